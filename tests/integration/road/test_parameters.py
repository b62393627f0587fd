"""A value that cannot be is refused where it is typed: no connection, no plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import casemate as cm
import pytest
from casemate_schemas.errors import ParameterError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("epsilon", [NAN, INF, 0.0, -1.0, 1e9])
def test_an_absurd_epsilon(epsilon: float) -> None:
    with pytest.raises(ParameterError, match="epsilon"):
        cm.Privacy(epsilon=epsilon, delta=1e-3)


@pytest.mark.parametrize("delta", [NAN, INF, 0.0, -1e-3, 0.6, 2.0])
def test_an_absurd_delta(delta: float) -> None:
    with pytest.raises(ParameterError, match="delta"):
        cm.Privacy(epsilon=1.0, delta=delta)


@pytest.mark.parametrize("norm", [NAN, INF, 0.0, -1.0])
def test_an_absurd_clipping_norm(norm: float) -> None:
    with pytest.raises(ParameterError, match="clipping_norm"):
        cm.Privacy(epsilon=1.0, delta=1e-3, clipping_norm=norm)


@pytest.mark.parametrize("lr", [NAN, INF, 0.0, -0.1, 1e9])
@pytest.mark.parametrize("optimizer", [cm.SGD, cm.Adam])
def test_an_absurd_lr(optimizer: Callable[..., Any], lr: float) -> None:
    with pytest.raises(ParameterError, match="lr"):
        optimizer(lr=lr)
