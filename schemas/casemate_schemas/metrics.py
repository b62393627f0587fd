"""Metrics of a final model under differential privacy: noisy sums over records, and what may be read off them.

A record adds the vector ``(1, s, l)``:

- ``s`` is 1 if the model's answer is right and -1 if not; classification only. The answer is the class with the largest
  output; for one logit, whether it is above 0;
- ``l`` in [-1, 1] is ``2·min(loss, bound)/bound - 1``, rounded to a multiple of 2^-20. A loss that is NaN counts as the
  bound, and its answer as wrong.

A subject adds the mean of its records' vectors. So no privacy unit moves the sum by more than :func:`sensitivity`, the root
of the number of its coordinates, and the noise is drawn for that.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Final

from pydantic import Field

from .codec import WireModel
from .pipeline import Loss

MARGIN: Final = 1 + 2.0**-16
"""What the noise is drawn for is larger than the sensitivity by this factor."""

_ERROR_BAR: Final = 1.96
"""Standard deviations on either side that hold 95 % of a normal distribution."""


def has_accuracy(loss: Loss) -> bool:
    """Whether answers are right or wrong, and the sums have a coordinate for it."""
    return loss != "mean_squared_error"


def sensitivity(loss: Loss) -> float:
    """How far one privacy unit can move the sums, in Euclidean norm."""
    return math.sqrt(3.0 if has_accuracy(loss) else 2.0)


def noise_std(loss: Loss, noise_multiplier: float) -> float:
    """The noise's standard deviation in each coordinate: a little more than the product, to cover rounding to a grid."""
    return noise_multiplier * sensitivity(loss) * MARGIN


class MetricSums(WireModel):
    """What was released: the noisy sums, the noise's standard deviation in each, and the bound on losses."""

    KIND: ClassVar[str] = "metric-sums"

    count: float
    right: float | None
    loss: float
    noise_std: Annotated[float, Field(gt=0)]
    loss_bound: Annotated[float, Field(gt=0)]

    @property
    def accuracy(self) -> Estimate | None:
        """The share of right answers, in [0, 1]; ``None`` for a regression, or where the noise drowns the count."""
        return None if self.right is None else self._mean(self.right, 1.0)

    @property
    def mean_loss(self) -> Estimate | None:
        """The mean loss, each clamped to the bound; ``None`` where the noise drowns the count."""
        return self._mean(self.loss, self.loss_bound)

    def summary(self) -> dict[str, str]:
        """In words, each value with its error bar."""
        drowned = "drowned by the noise"
        found = {} if self.right is None else {"training accuracy": str(self.accuracy or drowned)}
        return {**found, "mean training loss": str(self.mean_loss or drowned)}

    def _mean(self, total: float, scale: float) -> Estimate | None:
        """Of values in [0, ``scale``]. Error bar: the delta method for a quotient of two sums with independent noise."""
        if self.count < 4 * self.noise_std:
            return None
        ratio = min(max(total / self.count, -1.0), 1.0)
        deviation = self.noise_std * math.sqrt(1 + ratio * ratio) / self.count
        return Estimate(value=scale * (1 + ratio) / 2, error=scale / 2 * _ERROR_BAR * deviation)


class Estimate(WireModel):
    """A value, and the half width of its 95 % interval: what the noise makes of it, not the choice of records."""

    value: float
    error: Annotated[float, Field(ge=0)]

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"
