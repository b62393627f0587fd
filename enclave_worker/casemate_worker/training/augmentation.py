"""Several views of each record in a step: what is clipped is the gradient of the mean of their losses.

A record's sensitivity is what it was, since the mean of its views' gradients is clipped as one vector; so accounting does
not change. Views are further uses of the same parameters by the same record, which is what :mod:`.watching` enters them as.

Byte for byte: in step ``t``, view ``k >= 1`` of the record at place ``i`` of the batch (owners by id, each one's records
ascending) is made from word ``w = words[i·(K-1) + k-1]`` of the ``augmentation`` keystream at ``t``. With ``s`` the shift,
``dy = (w >> 1) mod 2^31 mod (2s+1) - s``, ``dx = (w >> 32) mod (2s+1) - s``, and it is mirrored if flips are asked for and
``w`` is odd: pixel ``(y, x)`` of the view is pixel ``(y + dy, x + dx)`` of the record, mirrored, each coordinate clamped to
the image. View 0 is the record.

Source: De, Berrada, Hayes, Smith, Balle, "Unlocking High-Accuracy Differentially Private Image Classification through
Scale" (2022), section 3: averaging before clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from casemate_schemas.job import Augmentation
from torch import Tensor, nn

from .keystream import AUGMENTATION, Keystream

Loss = Callable[[Tensor, Tensor], Tensor]


class Augmenter:
    """Makes the views of a step's records."""

    def __init__(self, seed: bytes, plan: Augmentation, features: Tensor) -> None:
        """For records shaped like ``features``. :class:`ModelError` unless they are images larger than the shift."""
        plan.check_input(features.shape[1:])
        self._plan = plan
        self._keystream = Keystream(seed, AUGMENTATION)

    def records_in(self, max_physical_batch: int) -> int:
        """How many records have no more than that many views together; at least one."""
        return max(1, max_physical_batch // self._plan.multiplicity)

    def batches(self, features: Tensor, targets: Tensor, step: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The step's records, ``size`` at a time, as views ``[n, K, ...]`` with their targets: all at once are many.

        At least one batch, which is empty where there is no record.
        """
        each = self._plan.multiplicity - 1
        words = self._keystream.words(step, len(features) * each).reshape(-1, each)
        for start in range(0, max(1, len(features)), size):
            rows = slice(start, start + size)
            yield self._views(features[rows], words[rows]), targets[rows]

    def _views(self, records: Tensor, words: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
        n, channels, height, width = records.shape
        span = np.uint64(2 * self._plan.shift + 1)
        moves = ((words >> np.uint64(1)) % np.uint64(1 << 31) % span, (words >> np.uint64(32)) % span)
        dy, dx = (torch.from_numpy(move.astype(np.int64)) - self._plan.shift for move in moves)
        y = (torch.arange(height) + dy[..., None]).clamp(0, height - 1)  # [n, K-1, height]
        x = (torch.arange(width) + dx[..., None]).clamp(0, width - 1)
        if self._plan.flip:
            mirrored = torch.from_numpy((words & np.uint64(1)).astype(np.bool_))[..., None]
            x = torch.where(mirrored, width - 1 - x, x)
        places = (y[..., :, None] * width + x[..., None, :]).flatten(1)[:, None].expand(n, channels, -1)
        moved = records.flatten(2).gather(2, places).view(n, channels, words.shape[1], height, width).transpose(1, 2)
        return torch.cat([records[:, None], moved], dim=1)


class Views(nn.Module):
    """``model`` on each of ``[n, K, ...]`` views, as ``[n, K, ...]`` outputs; its parameters are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        """Around ``model``, which stays as it is."""
        super().__init__()
        self.model = model

    def forward(self, views: Tensor) -> Tensor:
        """One call of the model for each view."""
        return torch.stack([self.model(view) for view in views.unbind(1)], dim=1)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that the model has for them."""
        return self.model.named_parameters(*args, **kwargs)


def mean_over_views(loss: Loss) -> Loss:
    """``loss`` of outputs ``[n, K, ...]`` and targets ``[n]``: each record's mean, ``[n]``."""

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        views = outputs.shape[1]
        return loss(outputs.flatten(0, 1), targets.repeat_interleave(views)).view(-1, views).mean(dim=1)

    return mean
