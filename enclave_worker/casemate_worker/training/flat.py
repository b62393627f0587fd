"""A model's trainable parameters end to end in one vector: what moves them is a few operations, however many they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FlatParameters:
    """Lays ``parameters`` end to end, each flattened row-major; from then on they are views of :attr:`vector`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Of float32 parameters, by name, whose values and identities stay what they are."""
        self.shapes = {name: p.shape for name, p in parameters.items()}
        """Of the parameters, in their order, by name."""
        self.vector = nn.Parameter(self.joined({name: p.detach() for name, p in parameters.items()}))
        """All of them, for an optimiser to move."""
        for parameter, piece in zip(parameters.values(), self.pieces(self.vector.detach()).values(), strict=True):
            parameter.data = piece

    def pieces(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector like :attr:`vector`, by the names and with the shapes of the parameters."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def joined(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """A new vector of such pieces, by the parameters' names."""
        return torch.cat([pieces[name].flatten() for name in self.shapes])
