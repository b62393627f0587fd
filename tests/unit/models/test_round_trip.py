"""A user's module, traced, sent and built back: the same function, the same names, the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from casemate_models.building import Interpreter, build, read_weights, weights_of
from casemate_models.losses import per_example_loss
from casemate_models.tracing import trace
from casemate_schemas.codec import decode, encode
from casemate_schemas.model import ModelSpec
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(30, 16)
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.norm(self.hidden(x))))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.GroupNorm(3, 6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 5, stride=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 2 * 2, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self._conv_1 = nn.Conv2d(channels, channels, 3, padding="same", groups=2)
        self.norm = nn.GroupNorm(2, channels, affine=False)
        self.conv_2 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.conv_2(F.relu(self.norm(self._conv_1(x)))), 0.1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
        joined = torch.cat([self.head["a"](x), self.head["b"](x)], dim=1)
        return (1 - joined * 2) / 3


class Everything(nn.Module):
    """Each function and module of the allow-list that the others leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.acts = nn.Sequential(
            *(nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.ELU(0.5), nn.LeakyReLU(0.2)),
            *(nn.Softplus(2.0, 5.0), nn.Identity(), nn.Tanh()),
        )
        self.pools = nn.Sequential(nn.AdaptiveAvgPool2d((2, None)), nn.AvgPool2d(2, 1, 1, count_include_pad=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.acts(self.first(x))
        y = F.max_pool2d(x.reshape(x.shape[0], 1, 3, 4), 2, stride=1, padding=1)
        y = F.avg_pool2d(F.elu(y), (1, 2))
        y = self.pools(y) - F.softplus(self.pools(y))
        z = torch.softmax(-x, dim=-1) + x.log_softmax(1) * F.silu(x).sub(0.5)
        z = F.gelu(z, approximate="tanh").flatten(1) + torch.sigmoid(2 + z)
        z = z.unsqueeze(1).squeeze(1).view(-1, 12)
        means = torch.cat([torch.flatten(y, 1).mean(dim=-1, keepdim=True), z.sum(axis=1, keepdim=True)], -1)
        return torch.unsqueeze(means.mul(3.0), 2).mean((1, 2)) / 7


CASES = [
    (Mlp, (30,)),
    (LeNet, (1, 28, 28)),
    (Residual, (4, 6, 6)),
    (Everything, (12,)),
]


@pytest.mark.parametrize(("cls", "shape"), CASES)
def test_a_traced_module_is_the_same_function_after_the_wire(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    module = cls()
    spec, weights = trace(module, shape)

    received = decode(ModelSpec, encode(spec))
    built = build(received, weights)

    x = torch.randn(5, *shape)
    torch.testing.assert_close(built(x), module(x), rtol=0, atol=1e-6)
    assert built.output_shape == tuple(module(x).shape[1:])
    assert built.input_shape == shape
    assert built(x[:0]).shape == (0, *built.output_shape)


@pytest.mark.parametrize(("cls", "shape"), CASES)
def test_trained_weights_load_into_the_users_module(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    module = cls()
    spec, weights = trace(module, shape)
    built = build(spec, weights)
    assert list(built.state_dict()) == list(module.state_dict())

    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.25)
    module.load_state_dict(read_weights(spec, weights_of(built)))

    x = torch.randn(5, *shape)
    torch.testing.assert_close(built(x), module(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cls", "shape"), CASES)
def test_hooks_on_layers_give_the_gradients_of_one_example_at_a_time(
    cls: type[nn.Module], shape: tuple[int, ...]
) -> None:
    spec, weights = trace(cls(), shape)
    built, x = build(spec, weights), torch.randn(4, *shape)

    sampled = GradSampleModule(build(spec, weights), loss_reduction="sum")
    sampled(x.clone().requires_grad_()).square().sum().backward()

    for i in range(4):
        built.zero_grad()
        built(x[i : i + 1]).square().sum().backward()
        for name, parameter in built.named_parameters():
            got = sampled.get_parameter(f"_module.{name}").grad_sample[i]
            assert parameter.grad is not None
            torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_tracing_leaves_the_users_module_as_it_was_and_is_deterministic() -> None:
    module = LeNet()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attributes = set(vars(module))

    first, second = trace(module, (1, 28, 28)), trace(module, (1, 28, 28))

    assert first == second
    assert set(vars(module)) == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_built_module_owns_its_parameters_and_draws_no_random_numbers() -> None:
    spec, weights = trace(Mlp(), (30,))
    state = torch.get_rng_state()

    one, two = build(spec, weights), build(spec, weights)

    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        one.get_parameter("hidden.weight").zero_()
    assert two.get_parameter("hidden.weight").abs().sum() > 0
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_leaf for p in one.parameters())


def test_weights_have_one_byte_string_whatever_the_order_of_the_parameters() -> None:
    class Swapped(nn.Module):
        def __init__(self, mlp: Mlp) -> None:
            super().__init__()
            self.output, self.norm, self.hidden = mlp.output, mlp.norm, mlp.hidden

    mlp = Mlp()
    assert list(Swapped(mlp).state_dict()) != list(mlp.state_dict())
    assert weights_of(Swapped(mlp)) == weights_of(mlp)


def test_a_plain_sequential_can_be_sent() -> None:
    module = nn.Sequential(nn.Linear(3, 1))
    spec, weights = trace(module, (3,))
    assert [node.name for node in spec.nodes] == ["input#0", "0", "output#2"]
    x = torch.randn(2, 3)
    torch.testing.assert_close(build(spec, weights)(x), module(x))


def test_an_interpreter_compiles_no_source() -> None:
    spec, weights = trace(Mlp(), (30,))
    built = build(spec, weights)
    assert type(built) is Interpreter
    assert not any(isinstance(module, torch.fx.GraphModule) for module in built.modules())


def test_a_loss_trains_the_built_module() -> None:
    spec, weights = trace(Mlp(), (30,))
    built, x, y = build(spec, weights), torch.randn(64, 30), torch.randint(0, 2, (64,))
    optimiser = torch.optim.SGD(built.parameters(), lr=0.5)
    first = per_example_loss("cross_entropy", built(x), y).mean()
    for _ in range(50):
        optimiser.zero_grad()
        per_example_loss("cross_entropy", built(x), y).mean().backward()
        optimiser.step()
    assert per_example_loss("cross_entropy", built(x), y).mean() < 0.2 * first
