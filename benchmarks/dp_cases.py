"""The four networks that DP-SGD steps are timed on, and the plain step that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 0.05
CLIPPING_NORM = 1.0
NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True)
class Case:
    """One network with a batch in memory; ``target`` is the worst good ratio of our step to the plain one."""

    name: str
    build: Callable[[], nn.Module]
    record_shape: tuple[int, ...]
    classes: int
    batch: int
    threads: int
    target: float

    def model(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        return self.build()

    def records(self) -> tuple[Tensor, Tensor]:
        """Features float32 ``[batch, ...]`` (whole numbers below 1,000 for the transformer), targets int64."""
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(self.batch, *self.record_shape, generator=generator)
        if self.name == "transformer":
            features = torch.randint(0, 1000, features.shape, generator=generator).float()
        return features, torch.randint(0, self.classes, (self.batch,), generator=generator)


def plain_step(case: Case) -> Callable[[], None]:
    """Non-private SGD."""
    model, (x, y) = case.model(), case.records()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


class _WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, inner), nn.GroupNorm(16, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y + (x if self.shortcut is None else self.shortcut(h))


def _wide_resnet() -> nn.Module:
    """WRN-16-4: 2.7 million parameters, two blocks at each of three sizes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    inner = 16
    for outer, stride in ((64, 1), (128, 2), (256, 2)):
        layers += [_WideBlock(inner, outer, stride), _WideBlock(outer, outer, 1)]
        inner = outer
    return nn.Sequential(
        *layers, nn.GroupNorm(16, 256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)
    )


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Transformer(nn.Module):
    """4 layers of width 256, 8 heads, 1,000 words, 128 tokens: 3.5 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(1000, 256), nn.Embedding(128, 256)
        self.blocks = nn.Sequential(*[_TransformerBlock(256, 8) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand(x.shape).contiguous()
        return self.head(self.norm(self.blocks(self.words(x.long()) + self.places(places))).mean(1))


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, (50,), 2, 256, 1, 1.9),
        Case("lenet", _lenet, (1, 28, 28), 10, 256, 1, 1.2),
        Case("wrn", _wide_resnet, (3, 32, 32), 10, 64, 1, 1.5),
        Case("transformer", _Transformer, (128,), 2, 32, 1, 1.5),
    )
}
