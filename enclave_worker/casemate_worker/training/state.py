"""What a later attempt needs to go on where this one stopped: its bytes, and where the tensors in them belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import safetensors.torch
import torch
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import MalformedError
from casemate_schemas.job import MAX_STEPS
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from .averaging import WeightAverage
from .flat import FlatParameters
from .uses import Strategy

_OVERHEAD_BYTES: Final = 1 << 20


class TrainingState(WireModel):
    """All that a later attempt needs to go on: the step (which is every generator's position) and the tensors.

    ``clipping`` is how each parameter's gradients were clipped: another way would round differently.
    """

    KIND: ClassVar[str] = "training-state"

    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    clipping: dict[str, Strategy]
    tensors: bytes


@dataclass(frozen=True)
class KeptTensors:
    """Everything that training moves: the model, what its optimiser keeps (``slots``), and the average of its weights.

    Names in a state are those of the model after ``model/``, ``optimizer/SLOT/`` and ``average/``.
    """

    model: nn.Module
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    slots: tuple[str, ...]
    average: WeightAverage | None

    def encode(self, step: int, clipping: dict[str, Strategy]) -> bytes:
        """A canonical :class:`TrainingState` of copies, after ``step`` steps. Confidential until released."""
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self._tensors(step).items()}
        return encode(TrainingState(step=step, clipping=clipping, tensors=safetensors.torch.save(tensors)))

    def decode(self, state: bytes) -> tuple[TrainingState, dict[str, Tensor]]:
        """The message and its tensors, which have the very names, shapes and types of :meth:`encode`'s after its step.

        Raises:
            MalformedError: not such a state.
        """
        largest = 6 * sum(t.nbytes for t in self.model.state_dict().values()) + _OVERHEAD_BYTES
        message = decode(TrainingState, state, max_bytes=largest)
        try:
            tensors = safetensors.torch.load(message.tensors)
        except (SafetensorError, ValueError, KeyError) as error:
            raise MalformedError("training state holds no tensors") from error
        if {name: (t.shape, t.dtype) for name, t in tensors.items()} != self._expected(message.step):
            raise MalformedError("training state is not of this plan and model")
        return message, tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Have these tensors, which :meth:`decode` gave, in place of those there are."""
        self.model.load_state_dict({name: tensors[f"model/{name}"] for name in self.model.state_dict()})
        if self.average is not None:
            self.average.tensors = {name: tensors[f"average/{name}"] for name in self.flat.shapes}
        slots: dict[str, Tensor] = {}
        if any(name.startswith("optimizer/") for name in tensors):
            for slot in self.slots:
                pieces = {name: tensors[f"optimizer/{slot}/{name}"] for name in self.flat.shapes}
                slots[slot] = next(iter(pieces.values())) if slot == "step" else self.flat.joined(pieces)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: slots} if slots else {}, "param_groups": groups})

    def _tensors(self, step: int) -> dict[str, Tensor]:
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for slot in self.slots if step else ():
            kept = self.optimizer.state[self.flat.vector][slot]
            pieces = dict.fromkeys(self.flat.shapes, kept) if slot == "step" else self.flat.pieces(kept)
            found |= {f"optimizer/{slot}/{name}": piece for name, piece in pieces.items()}
        averages = {} if self.average is None else self.average.tensors
        return found | {f"average/{name}": tensor for name, tensor in averages.items()}

    def _expected(self, step: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        expected = {f"model/{name}": (t.shape, t.dtype) for name, t in self.model.state_dict().items()}
        for name, whole in self.flat.shapes.items():
            for slot in self.slots if step else ():
                expected[f"optimizer/{slot}/{name}"] = (torch.Size() if slot == "step" else whole, torch.float32)
            if self.average is not None:
                expected[f"average/{name}"] = (whole, torch.float32)
        return expected
