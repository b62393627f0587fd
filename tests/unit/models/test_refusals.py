"""What the tracer refuses, by which error, with which name, at which line of the user's code."""

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from casemate_models.tracing import trace
from casemate_schemas.errors import BatchDependenceError, CasemateError, ModelError, UnsupportedOperationError
from torch import Tensor, nn


class Net(nn.Module):
    """One layer, and then whatever the test asks."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self._then = forward

    def forward(self, x: Tensor) -> Any:
        return self._then(self, self.layer(x))


MIXES_EXAMPLES: dict[str, Callable[[Any, Any], Any]] = {
    "getitem": lambda m, x: x + x[0],
    "getitem ": lambda m, x: x[-1:, :],
    "mean": lambda m, x: x - x.mean(0),
    "mean ": lambda m, x: torch.mean(x, dim=(-1, -2)),
    "mean  ": lambda m, x: x.mean(),
    "sum": lambda m, x: x.sum(),
    "sum ": lambda m, x: torch.sum(x, -2),
    "softmax": lambda m, x: torch.softmax(x, 0),
    "softmax ": lambda m, x: F.softmax(x, dim=-2),
    "log_softmax": lambda m, x: x.log_softmax(dim=0),
    "view": lambda m, x: x.view(-1, 2),
    "view ": lambda m, x: x.view(2, -1),
    "view  ": lambda m, x: x.view(x.shape[0], 2),
    "view   ": lambda m, x: x.view(4, x.shape[0]),
    "reshape": lambda m, x: torch.reshape(x, (-1,)),
    "flatten": lambda m, x: torch.flatten(x),
    "cat": lambda m, x: torch.cat([x, x]),
    "squeeze": lambda m, x: x.squeeze(),
    "unsqueeze": lambda m, x: x.unsqueeze(0),
    "truediv": lambda m, x: x / x.shape[0],
    "mul": lambda m, x: x * x.size(0),
    "floordiv": lambda m, x: x.reshape(x.size(0) // 2, 8),
    "len": lambda m, x: x / len(x),
    "iter": lambda m, x: torch.cat(list(x)),
    "batch_norm": lambda m, x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXES_EXAMPLES)
def test_examples_that_meet_are_refused_with_their_line(name: str) -> None:
    forward = MIXES_EXAMPLES[name]
    line = f"{__file__}:{forward.__code__.co_firstlineno}"
    with pytest.raises(BatchDependenceError, match=f"^'{name.strip()}' at {re.escape(line)}: "):
        trace(Net(forward), (4,))


NOT_ON_THE_LIST: dict[str, Callable[[Any, Any], Any]] = {
    "matmul": lambda m, x: x @ x,
    "flip": lambda m, x: x.flip(0),
    "roll": lambda m, x: torch.roll(x, 1),
    "cumsum": lambda m, x: torch.cumsum(x, 0),
    "sort": lambda m, x: x.sort(dim=0),
    "rand_like": lambda m, x: x + torch.rand_like(x),
    "dropout": lambda m, x: F.dropout(x),
    "linear": lambda m, x: F.linear(x, torch.ones(4, 4)),
    "gt": lambda m, x: x if x > 0 else -x,
    "bool": lambda m, x: x if x else -x,
    "add_": lambda m, x: x.add_(1),
    "relu": lambda m, x: F.relu(x, inplace=True),
    "relu_": lambda m, x: torch.relu_(x),
    "iadd": lambda m, x: operator.iadd(x, x),
    "imul": lambda m, x: operator.imul(x, 2),
    "setitem": lambda m, x: operator.setitem(x, 0, 1.0),
    "item": lambda m, x: x * x.item(),
    "numpy": lambda m, x: x.numpy(),
    "detach": lambda m, x: x.detach(),
    "getitem": lambda m, x: x[:, 0],
    "add": lambda m, x: x + torch.ones(4),
    "sub": lambda m, x: torch.sub(x, x, alpha=2),
    "truediv": lambda m, x: x / x,
    "max_pool2d": lambda m, x: F.max_pool2d(x, 2, ceil_mode=True),
    "softmax": lambda m, x: F.softmax(x, 1, dtype=torch.float64),
}


@pytest.mark.parametrize("name", NOT_ON_THE_LIST)
def test_what_is_off_the_list_is_refused_with_its_line(name: str) -> None:
    forward = NOT_ON_THE_LIST[name]
    line = f"{__file__}:{forward.__code__.co_firstlineno}"
    with pytest.raises(UnsupportedOperationError, match=f"^'{name}' at {re.escape(line)}: "):
        trace(Net(forward), (4,))


@pytest.mark.parametrize(
    ("module", "error", "why"),
    [
        (nn.BatchNorm1d(4), BatchDependenceError, "normalises each example by the others"),
        (nn.Dropout(0.5), UnsupportedOperationError, "random operations"),
        (nn.ReLU(inplace=True), UnsupportedOperationError, "inplace=False"),
        (nn.Bilinear(4, 4, 4), UnsupportedOperationError, "allow-list"),
        (nn.Softmax(dim=0), BatchDependenceError, "axis 0 is the batch"),
        (nn.Flatten(0), BatchDependenceError, "axis 0 is the batch"),
        (nn.LayerNorm((3, 4)), BatchDependenceError, "reaches over the batch axis"),
        (nn.GroupNorm(4, 4), BatchDependenceError, "more than one element a group"),
        (nn.LayerNorm(4, bias=False), UnsupportedOperationError, "both weight and bias"),
        (nn.Conv2d(4, 4, 1), ModelError, "expected images"),
        (nn.MaxPool2d(1), ModelError, "expected images"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), UnsupportedOperationError, "allow-list"),
    ],
)
def test_a_module_is_refused_with_its_path_and_line(module: nn.Module, error: type[CasemateError], why: str) -> None:
    forward = lambda m, x: m.part(x)  # noqa: E731
    line = f"{__file__}:{forward.__code__.co_firstlineno}"
    name = re.escape(f"'{type(module).__name__}' (module 'part.0') at {line}: ")
    with pytest.raises(error, match=f"^{name}.*{why}") as caught:
        trace(Net(forward, part=nn.Sequential(module)), (4,))
    assert type(caught.value) is error


def test_an_augmented_assignment_is_refused_where_python_would_have_made_a_copy() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            kept = h
            h += 1
            return h * kept

    with pytest.raises(UnsupportedOperationError, match=r"'iadd' at .*: it works in place"):
        trace(Aliased(), (4,))


def test_a_parameter_or_buffer_of_the_users_own_is_refused() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("seen", torch.zeros(4))

    with pytest.raises(UnsupportedOperationError, match=r"^parameter 'scale' at .*test_refusals.py:\d+: "):
        trace(Net(lambda m, x: x * m.owner.scale, owner=Owner()), (4,))
    with pytest.raises(BatchDependenceError, match=r"^buffer 'seen' at .*test_refusals.py:\d+: "):
        trace(Net(lambda m, x: x + m.owner.seen.add_(x), owner=Owner()), (4,))
    with pytest.raises(ModelError, match=r"'owner\.scale' is in the module's state_dict, but forward does not use it"):
        trace(Net(lambda m, x: x, owner=Owner()), (4,))


def test_shared_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="called once only"):
        trace(Net(lambda m, x: m.layer(x)), (4,))

    tied = Net(lambda m, x: m.other(x), other=nn.Linear(4, 4))
    tied.get_submodule("other").weight = tied.layer.weight
    with pytest.raises(ModelError, match=r"'layer\.weight' and 'other\.weight' are tied"):
        trace(tied, (4,))

    viewed = Net(lambda m, x: m.other(x), other=nn.Linear(4, 4))
    viewed.get_parameter("other.weight").data = viewed.layer.weight.data
    with pytest.raises(ModelError, match=r"'layer\.weight' and 'other\.weight' are tied"):
        trace(viewed, (4,))


def _frozen() -> nn.Module:
    net = Net(lambda m, x: x)
    net.layer.bias.requires_grad_(False)
    return net


def _infinite() -> nn.Module:
    net = Net(lambda m, x: x)
    with torch.no_grad():
        net.layer.weight[0, 0] = float("inf")
    return net


def _hooked() -> nn.Module:
    net = Net(lambda m, x: x)
    net.layer.register_forward_hook(lambda module, args, output: output * 2)
    return net


def _patched() -> nn.Module:
    net = Net(lambda m, x: x)
    net.layer.forward = lambda x: x
    return net


def _resized() -> nn.Module:
    net = Net(lambda m, x: x)
    net.layer.weight = nn.Parameter(torch.zeros(4, 1))
    return net


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (_frozen(), "'layer.bias' is frozen"),
        (_infinite(), "'layer.weight' is not finite"),
        (_hooked(), "module 'layer' has hooks"),
        (_patched(), "a patched forward"),
        (_resized(), "expected 'layer.weight'"),
        (Net(lambda m, x: x).double(), "call .float"),
        (Net(lambda m, x: x).to("meta"), "no values yet"),
        (Net(lambda m, x: x, lost=nn.Linear(4, 4)), "'lost.bias' is in the module's state_dict"),
        (Net(lambda m, x: m.lost(x) and x, lost=nn.Linear(4, 4)), "'bool'"),
        (Net(lambda m, x: (m.lost(x), x)[1], lost=nn.Linear(4, 4)), "'lost' is never used"),
        (Net(lambda m, x: nn.ReLU()(x)), "assign the module to an attribute"),
        (Net(lambda m, x: [x, x]), "must return one tensor"),
        (Net(lambda m, x: {"out": x}), "must return one tensor"),
        (Net(lambda m, x: x.shape[0]), "must return one tensor"),
        (Net(lambda m, x: 1 / 0), r"cannot be traced at .*test_refusals.py:\d+: division by zero"),
        (Net(lambda m, x: float(x)), r"cannot be traced at .*test_refusals.py:\d+: "),
        (
            Net(lambda m, x: x + x.T),
            r"'add' at .*test_refusals.py:\d+: attribute 'T' of a tensor is not on the allow-list",
        ),
        (Net(lambda m, x: x.T), "must return one tensor"),
        (Net(lambda m, x: x * 1e9), "value"),
        (Net(lambda m, x: x / 0), "divisor"),
        (Net(lambda m, x: x.mean(3)), "expected an axis from"),
        (Net(lambda m, x: x + x.mean(1, keepdim=True)), "two values of one shape"),
        (Net(lambda m, x: x, über=nn.Linear(4, 4)), "'über.bias' is in"),
        (Net(lambda m, x: m.get_submodule("a b")(x), **{"a b": nn.Linear(4, 4)}), "String should match pattern"),
        (Net(lambda m, x: m.get_submodule("input_shape")(x), input_shape=nn.Linear(4, 4)), "cannot be named"),
        (TwoInputs(), "must take one tensor"),
        (Constant(), "must return one tensor"),
        (nn.Sequential(nn.ReLU()), "1 or more parameters"),
        (nn.Linear(4, 4), r"wrap it as nn.Sequential"),
        (nn.Sequential(nn.Linear(5, 4)), "expected 5 features"),
    ],
)
def test_a_module_that_cannot_be_sent_as_it_is(module: nn.Module, why: str) -> None:
    with pytest.raises(CasemateError, match=why):
        trace(module, (4,))


@pytest.mark.parametrize("shape", [(), (0,), (-1,), (1 << 30,), (4,) * 9])
def test_an_input_shape_out_of_bounds_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CasemateError):
        trace(nn.Sequential(nn.Linear(4, 4)), shape)


def test_a_model_with_too_many_operations_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3000):
            x = x + 1
        return x

    with pytest.raises(ModelError, match="at most 2000 operations"):
        trace(Net(forward), (4,))
