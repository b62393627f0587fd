"""An average of the weights along the way, which is what is released: post-processing of noised steps, so it costs nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """``a ← d·a + (1-d)·w`` after each step, from the initial weights, in float32, with ``d = min(decay, t/(t+9))``.

    ``t`` is the number of steps done, so a state needs nothing but the averages. Source: De, Berrada, Hayes, Smith, Balle,
    "Unlocking High-Accuracy Differentially Private Image Classification through Scale" (2022), section 3 and appendix.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """Of these parameters, by name, as they are now."""
        self._decay = decay
        self._parameters = parameters
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        """The averages, by name."""

    def update(self, steps_done: int) -> None:
        """Take in the weights after ``steps_done`` steps, at least one."""
        decay = min(self._decay, steps_done / (steps_done + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - decay)
