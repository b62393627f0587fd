"""Does a kernel give a record's row other bits where it stands elsewhere, or in a batch of another size? Asked before any record.

A submitter's weights could hide a kernel's rounding from this question and show it to real records. So it is asked of each
function by itself: while the model runs, whatever a function gives is compared and then *replaced* by pseudo-random rows, each
record's own, which the next function takes in. Weights are pseudo-random as well. So nothing that a model computes has any
influence on what its functions are asked, but for their shapes and constants. Once more it is asked with the very weights and
nothing replaced.

Batches of several sizes, with records at other places among others, must give every record the bits that it has in the first
batch: each function's, forward and backward, and what clipping makes of them (gradients formed, norms). What cannot be
compared is refused. This tests kernels, at sizes that occur; it is no proof for all sizes (docs/decisions/0024).

Of the first batch fingerprints are kept (:func:`_fingerprints`), so the question takes little more memory than a step does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from casemate_schemas.errors import ModelError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from casemate_worker.key_schedule import KEY_BYTES

from .keystream import Keystream
from .memory import give_back
from .rows import most_rows, row_step
from .watched import tensors_in

Run = Callable[[Tensor, Tensor, Any, Callable[[Tensor], None]], None]
"""Features, targets, a context for all that depends on a model, and what takes whatever there is of each record, ``[n, ...]``."""

_LABEL: Final = "kernels"
_LARGE_ROWS: Final = 1024
_LARGE_ELEMENTS: Final = 1 << 22
_PIECE_WORDS: Final = 1 << 17
_STRIDE: Final = 101
_OFFSETS: Final = 1 << 16

_REFUSED: Final = (
    "on this machine a record's numbers depend on its place in the batch: set MKL_CBWR=AVX2,STRICT before torch is loaded, "
    "or use other layer sizes"
)

_SECRET: Final = os.urandom(KEY_BYTES)

_passed: set[object] = set()


def check_kernels(model: nn.Module, run: Run, features: Tensor, targets: Tensor, physical: int, key: object) -> None:
    """Compare what ``run`` makes of records in several batches; see the module's docstring.

    ``features`` ``[0, ...]`` and ``targets`` ``[0, ...]`` say what records look like, ``physical`` how many a batch has at most.
    Asked again in this process for the same functions, sizes and ``key``, with replaced numbers it is asked no more.
    Raises :class:`ModelError` where bits differ, or cannot be compared. The model is left as it was.
    """
    question = _Question(run, features, targets)
    elements = question.elements
    most = min(most_rows(physical), _LARGE_ROWS)
    if most * elements > _LARGE_ELEMENTS:
        most = min(most, 3 * row_step())
    asked = (question.signature, most, torch.get_num_threads(), key)
    try:
        if asked not in _passed:
            with _random_weights(model):
                question.ask(most, replace=True)
            _passed.add(asked)
        question.ask(row_step(), replace=False)
    finally:
        _pool.cache_clear()
        _keys.cache_clear()


class _Question:
    """One model's, as it runs on records of one shape."""

    def __init__(self, run: Run, features: Tensor, targets: Tensor) -> None:
        """Run it on two records and on three, to see which axis of what each function gives is the batch."""
        self._run, self._features, self._targets = run, features, targets
        two, three = _Shapes(), _Shapes()
        for shapes, count in ((two, 2), (three, 3)):
            run(*self._records(torch.arange(count)), shapes, lambda _rows: None)
        if two.names != three.names:
            raise ModelError("the model calls other functions in a batch of another size")
        pairs = zip(two.found, three.found, strict=True)
        self._axes = [[_batch_axis(a, b) for a, b in zip(x, y, strict=True)] for x, y in pairs]
        self._names = two.names
        self.signature = tuple(two.signature)
        """The functions called, with the shapes and constants that they took."""
        self.elements = sum(shape.numel() for shapes in two.found for shape in shapes) // 2
        """How many numbers all functions give for a record, about."""

    def ask(self, most: int, *, replace: bool) -> None:
        """Compare batches of up to ``most`` records with the first, of ``most``; in the last, half of them stand twice."""
        first: list[NDArray[np.uint64]] = []
        self._compare(torch.arange(most), first, replace)
        for number, count in enumerate((row_step(), 2 * row_step(), most), start=1):
            if count < most or number == 3:
                self._compare(_shuffled(most, number)[:count], first, replace)
        self._compare(_shuffled(most, 4)[: most // 2].repeat(2), first, replace)

    def _compare(self, records: Tensor, first: list[NDArray[np.uint64]], replace: bool) -> None:
        """``first`` is what there was of all records, or empty, to be filled."""
        seen = _Seen(records, first)
        inside = _Replacing(seen, self._names, self._axes) if replace else nullcontext()
        self._run(*self._records(records), inside, lambda rows: seen.take(rows.reshape(len(records), -1)))
        seen.end()
        give_back()

    def _records(self, records: Tensor) -> tuple[Tensor, Tensor]:
        shape = self._features.shape[1:]
        features = _table(0, int(records.max()) + 1, shape.numel())[records].reshape(-1, *shape)
        return features.to(self._features.dtype), self._targets.new_ones(len(records), *self._targets.shape[1:])


class _Seen:
    """What there was of each record, one after another; compared bit by bit with what there was of it first."""

    def __init__(self, records: Tensor, first: list[NDArray[np.uint64]]) -> None:
        self._records, self._first, self._is_first, self._count = records, first, not first, 0

    def take(self, rows: Tensor) -> None:
        """``[n, ...]``, of the records in their order; or ``[n·t, ...]``, of which either may come first."""
        found = _fingerprints(rows)
        if self._is_first:
            self._first.append(found)
        elif self._count >= len(self._first) or not self._is_same(found, self._first[self._count]):
            raise ModelError(_REFUSED)
        self._count += 1

    def _is_same(self, found: NDArray[np.uint64], first: NDArray[np.uint64]) -> bool:
        each, records = len(found) // len(self._records), self._records.numpy()
        if np.array_equal(found, first.reshape(-1, each)[records].ravel()):
            return True
        return each > 1 and np.array_equal(found, first.reshape(each, -1)[:, records].ravel())

    def end(self) -> None:
        """There was nothing more."""
        if self._count != len(self._first):
            raise ModelError(_REFUSED)


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which functions are called, on what, and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.found: list[list[torch.Size]] = []
        self.signature: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # weights that are watched come along
            out = func(*args, **(kwargs or {}))
            self.names.append(str(func))
            self.found.append([t.shape for t in tensors_in(out)])
            self.signature.append((str(func), _described(args), _described(kwargs or {})))
        return out


class _Replacing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compares what each function gives, and puts each record's own pseudo-random numbers in its place."""

    def __init__(self, seen: _Seen, names: Sequence[str], axes: Sequence[Sequence[int | None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen, self._names, self._axes, self._call = seen, names, axes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # weights that are watched come along
            out = func(*args, **(kwargs or {}))
        call, self._call = self._call, self._call + 1
        if call >= len(self._names) or self._names[call] != str(func):
            raise ModelError("the model calls other functions in a batch of another size")
        if "empty" in str(func):  # memory as it was found
            return out
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        for number, (tensor, axis) in enumerate(zip(tensors_in(out), self._axes[call], strict=True)):
            if axis is not None and not is_view:
                self._replace(tensor.movedim(axis, 0), 1009 * call + number + 1)
        return out

    def _replace(self, rows: Tensor, salt: int) -> None:
        records = self._seen._records
        self._seen.take(rows)
        if rows.is_floating_point() and len(rows) == len(records):
            table = _table(salt, int(records.max()) + 1, rows.numel() // len(records))
            rows.copy_(table[records].reshape(rows.shape))


def _fingerprints(rows: Tensor) -> NDArray[np.uint64]:
    """One number for the bits of each row (``[m, ...]``): two rows that differ have the same one with probability 2^-33 at most.

    It is ``Σ_j k_j·w_j`` modulo 2^64 over the row's 32-bit words. Two rows' words differ at some ``j`` by an odd number times
    ``2^s``, ``s <= 31``; then ``2^s`` of the 2^64 values of ``k_j`` make the sums equal. Each process draws keys of its own, so
    whoever made the rows does not know them.
    """
    if rows.element_size() < 4:
        rows = rows.to(torch.int32) if not rows.is_floating_point() else rows.view(torch.int16).to(torch.int32)
    words = rows[:1].numel() * rows.element_size() // 4
    keys = _keys(1 << words.bit_length())[:words]
    found = [
        np.einsum("ij,j->i", few.reshape(len(few), few[:1].numel()).numpy().view(np.uint32), keys)
        for few in torch.split(rows.detach(), max(1, _PIECE_WORDS // max(1, words)))
    ]
    return np.concatenate(found)


@lru_cache(maxsize=2)
def _keys(count: int) -> NDArray[np.uint64]:
    return Keystream(_SECRET, _LABEL).words(0, count)


def _batch_axis(two: torch.Size, three: torch.Size) -> int | None:
    """Where sizes follow the number of records; None where none does."""
    if two == three:
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(differing) != 1 or 3 * two[differing[0]] != 2 * three[differing[0]]:
        raise ModelError(_REFUSED)
    return differing[0]


def _described(values: Any) -> object:
    """Arguments by shape and value, fit for a key."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), str(values.dtype)
    if isinstance(values, dict):
        return tuple((name, _described(value)) for name, value in sorted(values.items()))
    if isinstance(values, list | tuple):
        return tuple(_described(value) for value in values)
    return repr(values)


def _shuffled(count: int, salt: int) -> Tensor:
    keys = Keystream(bytes(32), _LABEL).words(salt, count)
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _table(salt: int, records: int, elements: int) -> Tensor:
    """Pseudo-random numbers in [-1, 1), ``[records, elements]``: windows of one long row, to be read only."""
    pool = _pool(1 << (_OFFSETS + _STRIDE * records + elements).bit_length())
    return pool.as_strided((records, elements), (_STRIDE, 1), 7919 * salt % _OFFSETS)


@lru_cache(maxsize=2)
def _pool(size: int) -> Tensor:
    words = Keystream(bytes(32), _LABEL).words(0, size)
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0))


@contextmanager
def _random_weights(model: nn.Module) -> Iterator[None]:
    """Pseudo-random numbers in place of all parameters and buffers that are floats, for as long as it lasts."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [t.clone() for t in tensors]
    try:
        for salt, tensor in enumerate(tensors):
            tensor.copy_(_table(salt, 1, tensor.numel()).view(tensor.shape))
        yield
    finally:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
