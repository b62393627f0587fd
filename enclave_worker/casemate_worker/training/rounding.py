"""What rounding takes off the clipping norm besides float32 sums (:mod:`.blocks`), under either mechanism.

Float64 sums over records err, differently with one record more; where a layer's products may cancel (``ghost`` at several
positions), by up to 2^16 times as much. So records are clipped to less than C by as much (:mod:`casemate_privacy.rounding`),
and released sums have sensitivity C with that rounding included. ``exact`` noise rounds sums to its grid before noise is
added, which is reserved for, too; ``hardened`` noise is rounded with them.
"""

from __future__ import annotations

from typing import Final

from casemate_privacy.rounding import exact_clipping_norm, hardened_clipping_norm, rounding_reserve
from casemate_schemas.job import Training

from .clipping import BookKeeping
from .uses import Strategy

_WORTHWHILE: Final = 2.0**-10
"""A larger share of the clipping norm is not given away for ghost norms."""


def clip_for_rounding(clipping: BookKeeping, plan: Training, coordinates: int, vectors: float) -> None:
    """Have ``clipping``, whose strategies are chosen, clip to what rounding leaves of the plan's clipping norm.

    ``coordinates`` are the model's, ``vectors`` the expected number of vectors in a batch. A layer whose ghost norms would
    take more than 2^-10 of C, because its products can cancel, has its gradients formed instead. All of this follows from
    model and plan, whatever strategies were measured to be fast.

    Raises :class:`ParameterError` as :func:`~casemate_privacy.rounding.exact_clipping_norm` and its like.
    """
    products = clipping.cancelling.items()
    kept = {name: count for name, count in products if rounding_reserve(0.0, 0, vectors, count) <= _WORTHWHILE}
    ghosts = {name for name, strategy in clipping.strategies.items() if strategy == "ghost"}
    formed: dict[str, Strategy] = dict.fromkeys(ghosts & (clipping.cancelling.keys() - kept.keys()), "per_sample")
    clipping.strategies = clipping.strategies | formed
    most = max(kept.values(), default=0)
    if plan.mechanism == "exact":
        sigma = max(sigma for _, sigma in plan.noise_phases)
        clipping.clipping_norm = exact_clipping_norm(plan.clipping_norm, sigma, coordinates, vectors, most)
    else:
        clipping.clipping_norm = hardened_clipping_norm(plan.clipping_norm, vectors, most)
