import pytest
import torch
from casemate_models.losses import ExampleLoss, check_loss, per_example_loss
from casemate_models.tracing import trace
from casemate_schemas.errors import ModelError, ParameterError
from casemate_schemas.pipeline import Loss, PipelineSpec
from torch import nn


def _pipeline(kind: str, n_classes: int | None = None) -> PipelineSpec:
    return PipelineSpec(features=("a",), target="t", target_kind=kind, n_classes=n_classes)


def test_losses_are_those_of_the_formulas() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    expected = -torch.log(torch.exp(logits[[0, 1], [1, 0]]) / torch.exp(logits).sum(1))
    torch.testing.assert_close(per_example_loss("cross_entropy", logits, torch.tensor([1, 0])), expected)

    logit, target = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0])
    expected = torch.log(1 + torch.exp(torch.tensor([-2.0, -1.0])))
    torch.testing.assert_close(per_example_loss("binary_cross_entropy", logit, target), expected)

    torch.testing.assert_close(
        per_example_loss("mean_squared_error", torch.tensor([[2.0], [5.0]]), torch.tensor([1.0, 3.0])),
        torch.tensor([1.0, 4.0]),
    )


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mean_squared_error"])
def test_shapes_that_torch_would_broadcast_are_refused(loss: Loss) -> None:
    for outputs, targets in [((3, 1), (3, 1)), ((3, 2), (3,)), ((1, 3), (3,)), ((3,), ()), ((3,), (1,))]:
        with pytest.raises(ModelError):
            per_example_loss(loss, torch.zeros(outputs), torch.zeros(targets))


def test_cross_entropy_takes_one_row_of_logits_an_example() -> None:
    for outputs, targets in [((3,), (3,)), ((2, 4), (3,)), ((3, 4, 2), (3,)), ((3, 4), (3, 1))]:
        with pytest.raises(ModelError):
            per_example_loss("cross_entropy", torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("hostile", [False, True])
def test_gradients_are_those_of_autograd_bit_for_bit(loss: Loss, hostile: bool) -> None:
    torch.manual_seed(4)
    outputs = 9 * torch.randn(40, 7 if loss == "cross_entropy" else 1)
    targets = torch.randint(0, 7, (40,)) if loss == "cross_entropy" else torch.rand(40)
    if hostile:
        outputs[3], outputs[4], outputs[5] = torch.inf, -torch.inf, torch.nan
        targets[6] = -100 if loss == "cross_entropy" else torch.inf  # -100 is no class: loss and gradient are zero
    leaf = outputs.clone().requires_grad_()
    expected = per_example_loss(loss, leaf, targets)
    expected.sum().backward()
    with torch.no_grad():
        losses, gradient = ExampleLoss(loss).with_gradient(outputs, targets)
    assert torch.equal(losses.view(torch.int32), expected.detach().view(torch.int32))
    assert leaf.grad is not None
    assert torch.equal(gradient.view(torch.int32), leaf.grad.view(torch.int32))
    assert not losses.requires_grad and not gradient.requires_grad
    for wrong in (outputs[:3], outputs.flatten()[:, None, None]):
        with pytest.raises(ModelError):
            ExampleLoss(loss).with_gradient(wrong, targets)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ParameterError):
        per_example_loss("hinge", torch.zeros(2), torch.zeros(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "n_outputs", "pipeline", "fits"),
    [
        ("cross_entropy", 3, _pipeline("class", 3), True),
        ("cross_entropy", 2, _pipeline("class", 3), False),
        ("cross_entropy", 4, _pipeline("class", 3), False),
        ("cross_entropy", 2, _pipeline("binary"), False),
        ("binary_cross_entropy", 1, _pipeline("binary"), True),
        ("binary_cross_entropy", 2, _pipeline("binary"), False),
        ("binary_cross_entropy", 1, _pipeline("class", 2), False),
        ("mean_squared_error", 1, _pipeline("value"), True),
        ("mean_squared_error", 2, _pipeline("value"), False),
        ("mean_squared_error", 1, _pipeline("binary"), False),
    ],
)
def test_loss_model_and_target_must_fit(loss: Loss, n_outputs: int, pipeline: PipelineSpec, fits: bool) -> None:
    spec, _ = trace(nn.Sequential(nn.Linear(5, n_outputs)), (5,))
    if fits:
        check_loss(spec, loss, pipeline)
    else:
        with pytest.raises(ModelError):
            check_loss(spec, loss, pipeline)
