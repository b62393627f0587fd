"""A parameter's stand-in, which lets no use pass unseen, and where uses are entered.

:class:`Watched` tensors share a parameter's values. A function that meets one is computed by its rule (``layers.py``,
``recurrent.py``, ``attention.py``, ``arithmetic.py``), or refused. There are three ways in which a rule accounts for a
parameter; all give the gradient of *one record's* loss, and all end in :meth:`Book.add`:

- :func:`on_gradient`: the layer is computed with the parameter as a constant; what came in and the gradient of what went
  out are a use;
- :func:`replicas`: each record gets a copy of its own, whose gradient is that record's;
- :func:`derive`: what is computed of parameters alone (a transpose, a slice, a product with a number) is watched in their
  place, and each record's gradient by it is carried back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from casemate_schemas.errors import ModelError
from torch import Tensor

from .terms import RankOne, Term, term_of
from .uses import RowsUse, Strategy, Use, check_batch


class Book:
    """The uses of all parameters by one batch of ``count`` records, by the parameter's position."""

    def __init__(self, count: int, strategy_of: Callable[[int, Use], Strategy]) -> None:
        """``strategy_of`` says what becomes of a use: only those of ``ghost`` parameters are kept as they are."""
        self.count = count
        self.strategy_of = strategy_of
        self._uses: dict[int, list[Use]] = {}
        self._strategies: dict[int, Strategy] = {}

    def add(self, index: int, use: Use) -> None:
        """Enter one use. Gradients that will be needed record by record are formed now, while all is in the cache."""
        strategy = self._strategies.setdefault(index, self.strategy_of(index, use))
        uses = self._uses.setdefault(index, [])
        if strategy == "ghost":
            uses.append(use)
            return
        formed = use.form(strategy)
        uses[:] = [uses[0].form(strategy).plus(formed) if uses else formed]

    def terms(self) -> dict[int, Term]:
        """What there is for each parameter that the batch used; one may stand for the parameter after its own, too."""
        found = {index: term_of(uses, self._strategies[index]) for index, uses in sorted(self._uses.items())}
        for index, term in sorted(found.items()):
            if isinstance(term, RankOne) and index + 1 in found and term.take_along(found[index + 1]):
                del found[index + 1]
        return found

    def uses(self) -> dict[int, list[Use]]:
        """The uses as entered."""
        return self._uses


class Watched(Tensor):
    """See the module's docstring."""

    rules: ClassVar[Mapping[Callable[..., Any], Callable[..., Any]]] = {}
    """Rules by function; those of :mod:`.watching`."""

    book: Book
    plain: Tensor
    """The same values for autograd: a leaf for a parameter."""
    sources: tuple[WatchedParameter, ...]
    """The parameters that it comes from."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = cls.rules.get(func)
        if rule is None:
            raise ModelError(f"per-sample gradients are not available: no rule for {getattr(func, '__name__', 'it')}")
        with torch._C.DisableTorchFunctionSubclass():
            return rule(*args, **(kwargs or {}))

    def enter(self, use: Use) -> None:
        """Form each record's gradient by this tensor and carry it back to the parameters."""
        rows = use.form("per_sample").joined()
        found = torch.autograd.grad(
            self.plain,
            [source.plain for source in self.sources],
            rows.reshape(-1, *self.plain.shape),
            is_grads_batched=True,
            retain_graph=True,
        )
        for source, gradient in zip(self.sources, found, strict=True):
            source.enter(RowsUse(gradient.reshape(len(rows), -1)))


class WatchedParameter(Watched):
    """Stands in for a parameter."""

    position: int
    address: int

    @classmethod
    def of(cls, parameter: Tensor, position: int) -> WatchedParameter:
        """For the parameter at ``position``."""
        found = Tensor._make_subclass(cls, parameter.detach())
        found.position, found.address = position, parameter.data_ptr()
        found.plain, found.sources = parameter.detach().requires_grad_(), (found,)
        return found

    def enter(self, use: Use) -> None:
        """Into the book."""
        self.book.add(self.position, use)


class Derived(Watched):
    """Computed of parameters alone. ``rows_alike``: axis 0 repeats one row."""

    rows_alike: bool


def tensors_in(values: object) -> Iterator[Tensor]:
    """All tensors among arguments, however nested."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def mapped(values: Any, change: Callable[[Watched], Tensor]) -> Any:
    """Arguments with each watched tensor changed, however nested."""
    if isinstance(values, Watched):
        return change(values)
    if isinstance(values, Mapping):
        return {name: mapped(value, change) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([mapped(value, change) for value in values])
    return values


def book_of(*parameters: Tensor | None) -> Book:
    """The book of the first watched one."""
    return next(p.book for p in parameters if isinstance(p, Watched))


def enter(parameter: Tensor | None, use: Callable[[], Use]) -> None:
    """Enter ``use``, made only if ``parameter`` is watched."""
    if isinstance(parameter, Watched):
        parameter.enter(use())


def on_gradient(output: Tensor, seen: Tensor, enter: Callable[[Tensor], None]) -> Tensor:
    """``output``, part of the graph, whose gradient, in float32, goes to ``enter``; ``seen`` must by then be what it is now.

    Afterwards neither is held any more, so that a backward pass gives back memory as it goes, as autograd's own nodes do.
    """
    if not output.requires_grad:
        output.requires_grad_()
    held, version = [(seen, enter)], seen._version

    def hook(gradient: Tensor) -> None:
        seen, enter = held.pop()
        if seen._version != version:
            raise ModelError("per-sample gradients are not available: a layer's input was changed in place")
        enter(gradient.float())

    output.register_hook(hook)  # type: ignore[no-untyped-call]
    return output


def derive(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` of watched tensors and numbers alone, watched itself; a tuple of such where it gives one."""
    watched = [t for t in tensors_in((args, kwargs)) if isinstance(t, Watched)]
    if len(watched) < len(list(tensors_in((args, kwargs)))):
        raise ModelError("per-sample gradients are not available: a parameter and a tensor meet without a rule")
    found = function(*mapped(args, lambda w: w.plain), **mapped(kwargs, lambda w: w.plain))
    return _wrapped(found, watched[0].book, tuple({id(s): s for w in watched for s in w.sources}.values()))


def _wrapped(found: Any, book: Book, sources: tuple[WatchedParameter, ...]) -> Any:
    if isinstance(found, list | tuple):
        return tuple(_wrapped(one, book, sources) for one in found)
    if not found.requires_grad:
        raise ModelError("per-sample gradients are not available: a parameter is used as a constant")
    derived = Tensor._make_subclass(Derived, found.detach())
    derived.book, derived.plain, derived.sources, derived.rows_alike = book, found, sources, False
    return derived


def replicas(watched: Watched, rank: int) -> Tensor:
    """One copy for each record, ``[n, ...]`` of ``rank`` axes, that broadcasts against a batch as ``watched`` does."""
    n, alike = watched.book.count, isinstance(watched, Derived) and watched.rows_alike
    if watched.dim() == rank > 0 and (watched.shape[0] == 1 or (watched.shape[0] == n and alike)):
        watched = derive(Tensor.__getitem__, watched, 0)
    if watched.dim() >= rank:
        raise ModelError("per-sample gradients are not available: a parameter's use does not follow the batch")
    shape = watched.shape
    copies = watched.plain.detach().reshape(1, *[1] * (rank - 1 - len(shape)), *shape).expand(n, *[-1] * (rank - 1))
    return on_gradient(copies, copies, lambda g: watched.enter(RowsUse(g.reshape(n, -1))))


def in_batch(tensor: Tensor) -> Tensor:
    """What has the batch as axis 0: where it is a parameter expanded along the batch, each record's own copy."""
    if not isinstance(tensor, Watched):
        return tensor
    check_batch(tensor, tensor.book.count, 1)
    return replicas(tensor, tensor.dim())
