"""The property that privacy rests on: what one example gives does not change when the others do."""

import torch
from casemate_models.building import build
from casemate_models.losses import per_example_loss
from casemate_models.tracing import trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

STEPS = {
    "linear": lambda n: nn.Linear(n, n),
    "layer_norm": lambda n: nn.LayerNorm(n),
    "group_norm": lambda n: nn.GroupNorm(2, n),
    "tanh": lambda n: nn.Tanh(),
    "gelu": lambda n: nn.GELU(),
    "softmax": lambda n: nn.Softmax(-1),
}


class Random(nn.Module):
    """A stack of steps on vectors, each with or without a residual, then a convolution over them as an image."""

    def __init__(self, width: int, steps: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList([STEPS[name](width) for name, _ in steps])
        self.residual = [residual for _, residual in steps]
        self.conv = nn.Conv2d(2, 3, 2, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for step, residual in zip(self.steps, self.residual, strict=True):
            x = x + step(x) if residual else step(x)
        image = self.conv(x.view(x.shape[0], 2, -1, 2))
        return self.head(image.mean((2, 3)))


@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([4, 8, 12]),
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.booleans()), min_size=1, max_size=5),
    n=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_other_examples_change_nothing(width: int, steps: list[tuple[str, bool]], n: int, seed: int) -> None:
    torch.manual_seed(seed)
    built = build(*trace(Random(width, steps), (width,)))
    row = torch.randn(1, width)
    targets = torch.randint(0, 4, (n + 1,))
    targets[0] = 1

    def loss_of_row(others: Tensor) -> Tensor:
        return per_example_loss("cross_entropy", built(torch.cat([row, others])), targets)[0]

    alone = per_example_loss("cross_entropy", built(row), targets[:1])[0]
    torch.testing.assert_close(loss_of_row(torch.randn(n, width)), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_of_row(1e3 * torch.randn(n, width)), alone, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(loss_of_row(torch.full((n, width), float("nan"))))
