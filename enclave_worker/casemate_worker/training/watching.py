"""One forward and one backward pass that leave behind how each parameter was used, without computing its gradient.

While :class:`Watch` lasts, a model's trainable parameters are stood in for by :class:`~.watched.Watched` tensors. Layers
call PyTorch's functions on them as ever; each function that has a rule is computed as usual, with a hook on its result,
and every other one is refused. So whatever a model is made of (``torch.nn`` modules, a rebuilt graph, plain functions, one
parameter in many places) each use is seen, or the model is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from casemate_schemas.errors import ModelError
from torch import nn

from .arithmetic import ARITHMETIC, HARMLESS
from .attention import ATTENTION
from .layers import LAYERS
from .recurrent import RECURRENT
from .watched import Book, Watched, WatchedParameter


class Watch:
    """Stands in for a model's parameters, wherever it keeps them, while a forward and a backward pass run."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """For these of ``model``'s parameters; a use is entered under the parameter's position among them."""
        positions = {id(p): index for index, p in enumerate(parameters)}
        holders = [module._parameters for module in model.modules()]
        self._slots = [
            (holder, name, positions[id(p)])
            for holder in holders
            for name, p in holder.items()
            if id(p) in positions and p is not None
        ]
        self._recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        self._parameters = parameters
        self._standing_in = [WatchedParameter.of(p, index) for index, p in enumerate(parameters)]

    @contextmanager
    def into(self, book: Book) -> Iterator[None]:
        """Enter each use into ``book``: forward and backward run inside. Afterwards nothing here holds it."""
        for index, (parameter, watched) in enumerate(zip(self._parameters, self._standing_in, strict=True)):
            if watched.address != parameter.data_ptr():
                self._standing_in[index] = WatchedParameter.of(parameter, index)
            self._standing_in[index].book = book
        if any(holder[name] is not self._parameters[index] for holder, name, index in self._slots):
            raise ModelError("the model's parameters were replaced after its clipping was set up")
        try:
            for holder, name, index in self._slots:
                holder[name] = cast(nn.Parameter, self._standing_in[index])
            yield
        finally:
            for holder, name, index in self._slots:
                holder[name] = self._parameters[index]
            for watched in self._standing_in:
                del watched.book
            for module in self._recurrent:  # which keep a list of their own
                module._init_flat_weights()


Watched.rules = {**HARMLESS, **LAYERS, **ATTENTION, **RECURRENT, **ARITHMETIC}
