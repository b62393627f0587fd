"""One training job in several processes: each takes a share of every step's batch, noise is added once.

All processes hold the same plan, records, seed and starting weights, and make the same draws. In a step with ``n`` sampled
records (their order is the batch's, which the seed decides), record ``j`` is the business of rank ``j mod world``, whose clipped
gradients it sums in float64; no record at all is as good a share as any. The sums of all ranks are then added up, in the order
of ranks, by every rank: so all have the same sum, bit for bit, add the same noise of the one keystream to it, and move their
weights alike. The mechanism is that of one process: the joint sum has sensitivity C, its noise is drawn once in value, and
accounting does not change. The rounding of float64 (and of blocks of float32, :mod:`.blocks`) is bounded whatever the order of
a sum, so those bounds hold as well.

**What travels** between processes are sums without noise, in clear, over sockets on the loopback interface. So all
processes must be in one enclave, in one network namespace that has no other interface. The worker's own training process may
open no socket at all and uses one process; see LIMITATIONS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, Protocol

import torch
import torch.distributed
from casemate_schemas.codec import encode
from casemate_schemas.errors import ParameterError, TrainingError
from casemate_schemas.job import Training
from torch import Tensor, nn

from .batches import OwnerData
from .uses import Strategy

_PIECE_ELEMENTS: Final = 1 << 20
"""So many coordinates of a sum are exchanged at a time: 8 MiB from each rank."""

Content = bytes | memoryview


class Group(Protocol):
    """The processes that share a job's batches."""

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch ``[n, ...]``: none where ``n`` is small."""

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts, float64 ``[d]``, the same bits in all of them."""

    def agree(self, contents: Iterable[Content]) -> None:
        """:class:`ParameterError` in all processes unless all have the same ``contents``, which none of them shows."""

    def leader_strategies(self, strategies: Mapping[str, Strategy]) -> dict[str, Strategy]:
        """Those of rank 0: where they are measured, processes differ."""


class Alone:
    """One process."""

    def share(self, rows: Tensor) -> Tensor:
        """See :meth:`Group.share`."""
        return rows

    def summed(self, part: Tensor) -> Tensor:
        """See :meth:`Group.summed`."""
        return part

    def agree(self, contents: Iterable[Content]) -> None:
        """See :meth:`Group.agree`."""

    def leader_strategies(self, strategies: Mapping[str, Strategy]) -> dict[str, Strategy]:
        """See :meth:`Group.leader_strategies`."""
        return dict(strategies)


class DataParallel:
    """The processes of PyTorch's default process group, with the ``gloo`` backend; see :func:`process_group`."""

    def __init__(self) -> None:
        """Of the group that is there."""
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def share(self, rows: Tensor) -> Tensor:
        """See :meth:`Group.share`."""
        return rows[self.rank :: self.world]

    def summed(self, part: Tensor) -> Tensor:
        """See :meth:`Group.summed`."""
        return torch.cat([_in_order(self._gathered(piece)) for piece in torch.split(part, _PIECE_ELEMENTS)])

    def agree(self, contents: Iterable[Content]) -> None:
        """See :meth:`Group.agree`. Processes exchange digests of what they have."""
        hashed = hashlib.sha256()
        for content in contents:
            hashed.update(hashlib.sha256(content).digest())
        digest = torch.frombuffer(bytearray(hashed.digest()), dtype=torch.uint8)
        if any(not torch.equal(digest, other) for other in self._gathered(digest)):
            raise ParameterError("expected the same plan, seed, records and weights in all processes of a group")

    def leader_strategies(self, strategies: Mapping[str, Strategy]) -> dict[str, Strategy]:
        """See :meth:`Group.leader_strategies`. All must have strategies for the same parameters."""
        kinds: Final[tuple[Strategy, ...]] = ("ghost", "per_sample", "grouped", "patches")
        chosen = torch.tensor([kinds.index(strategy) for strategy in strategies.values()], dtype=torch.uint8)
        leader = self._gathered(chosen)[0]
        return {name: kinds[number] for name, number in zip(strategies, leader.tolist(), strict=True)}

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's, in order."""
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        try:
            torch.distributed.all_gather(found, tensor.contiguous())
        except RuntimeError as error:
            raise TrainingError("another process of the group does not answer") from error
        return found


@contextmanager
def process_group(timeout_s: float) -> Iterator[DataParallel]:
    """Join the group that the environment names, as ``torchrun`` does it.

    ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` must be set, and ``GLOO_SOCKET_IFNAME`` to ``lo``. Whoever
    waits longer than ``timeout_s`` for another process gives up. Raises :class:`TrainingError` if the others do not come.
    """
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise TrainingError("the group of training processes did not form") from error
    try:
        yield DataParallel()
    finally:
        torch.distributed.destroy_process_group()


def inputs(
    plan: Training, expected_batch: float, seed: bytes, owners: Sequence[OwnerData], model: nn.Module
) -> Iterator[Content]:
    """What all processes must have alike: with other records, one could be used by two of them and count twice."""
    yield from (encode(plan), expected_batch.hex().encode(), seed)
    for data in owners:
        yield f"{data.owner} {data.sample_rate} {data.bound}".encode()
        for tensor in (data.features, data.targets, data.subjects):
            yield b"" if tensor is None else _memory(tensor)
    for name, tensor in model.state_dict().items():
        yield name.encode()
        yield _memory(tensor)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).numpy().data


def _in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
