"""Rules for LSTM, GRU and plain recurrent layers: the recurrence from linear parts, step by step.

The gradient of every step's gates comes back at once, so that a layer's weights have one use each, at ``t`` positions:
the input's from what went in, the recurrent ones' from the states before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from torch import Tensor

from .layers import linear_or_plain
from .uses import LinearUse, RowsUse, check_batch
from .watched import Watched, book_of, enter, on_gradient

State = tuple[Tensor, ...]
"""What a step hands to the next, each ``[n, hidden]``: the hidden state, and an LSTM's cell state."""

Cell = Callable[[Tensor, Tensor, State], State]
"""Of the input's and the hidden state's parts of a step's gates, each ``[n, gates]``, and the state before."""


def _lstm_cell(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    """Hochreiter and Schmidhuber 1997, with PyTorch's order of gates."""
    i, f, g, o = (of_input + of_hidden).chunk(4, dim=1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    """Cho et al. 2014, with PyTorch's order of gates and place of the reset gate."""
    (r, z, n), (hr, hz, hn) = of_input.chunk(3, dim=1), of_hidden.chunk(3, dim=1)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (new + torch.sigmoid(z + hz) * (state[0] - new),)


def _plain_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda of_input, of_hidden, state: (activation(of_input + of_hidden),)


@dataclass(frozen=True)
class _Weights:
    """Of one direction of one layer, as PyTorch names them; ``w_hr`` projects an LSTM's hidden state."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def _run(cell: Cell, x: Tensor, state: State, weights: _Weights) -> tuple[Tensor, State]:
    """One direction of one layer over ``x`` ``[n, t, p]``: hidden states ``[n, t, hidden]``, and the last state."""
    w_hh, b_hh, w_hr = weights.w_hh, weights.b_hh, weights.w_hr
    of_input = linear_or_plain(x, weights.w_ih, weights.b_ih)
    before, inner, after = [], [], []
    hidden = _taking_gradients(x, w_hh)
    projected = None if w_hr is None else (w_hr, *_taking_gradients(x, w_hr))
    for t, step in enumerate(of_input.unbind(1)):
        before.append(state[0])
        state = cell(step, F.linear(state[0], w_hh, b_hh) + hidden[1][t], state)
        if projected is not None:
            inner.append(state[0])
            state = (F.linear(state[0], projected[0]) + projected[2][t], *state[1:])
        after.append(state[0])
    _enter_all(hidden[0], before, w_hh, b_hh)
    if projected is not None:
        _enter_all(projected[1], inner, w_hr, None)
    return torch.stack(after, dim=1), state


def _taking_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Zeros ``[n, t, rows of weight]``, and each step's: what they are added to has their gradient."""
    zeros = x.new_zeros(*x.shape[:2], len(weight), requires_grad=True)
    return zeros, zeros.unbind(1)


def _enter_all(zeros: Tensor, states: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> None:
    seen = torch.stack([state.detach().float() for state in states], dim=1)

    def captured(gradient: Tensor) -> None:
        enter(weight, lambda: LinearUse(seen, gradient))
        enter(bias, lambda: RowsUse(gradient.sum(dim=1)))

    on_gradient(zeros, seen, captured)


def _layers(cell: Cell, kind: Literal["states", "state"]) -> Callable[..., tuple[Tensor, ...]]:
    """``torch.lstm`` (of ``states``) or ``torch.gru`` and its kin (of one ``state``), for sequences of one length."""

    def rule(
        input: Tensor,
        initial: Tensor | State,
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        if isinstance(initial, Tensor) != (kind == "state") or isinstance(weights, Tensor):
            raise ModelError("per-sample gradients are not available: packed sequences")
        if dropout and train and num_layers > 1:
            raise ModelError("per-sample gradients are not available: dropout between recurrent layers")
        states = [initial] if isinstance(initial, Tensor) else list(initial)
        if any(isinstance(tensor, Watched) for tensor in (input, *states)):
            raise ModelError("per-sample gradients are not available: a parameter as a recurrent layer's state")
        x = input if batch_first else input.transpose(0, 1)
        check_batch(x, book_of(*weights).count, 3)
        directions, last = 1 + bidirectional, []
        for layer in range(num_layers):
            found = []
            for direction in range(directions):
                number = layer * directions + direction
                mine = _weights_of(weights, number, num_layers * directions, has_biases)
                output, state = _run(cell, x.flip(1) if direction else x, tuple(s[number] for s in states), mine)
                found.append(output.flip(1) if direction else output)
                last.append(state)
            x = torch.cat(found, dim=2)
        output = x if batch_first else x.transpose(0, 1)
        return output, *(torch.stack(part) for part in zip(*last, strict=True))

    return rule


def _weights_of(weights: Sequence[Tensor], number: int, count: int, has_biases: bool) -> _Weights:
    """Those of one direction of one layer: two matrices, two shifts or none, a projection or none."""
    size = len(weights) // count
    w_ih, w_hh, *others = weights[number * size : (number + 1) * size]
    return _Weights(w_ih, w_hh, *others) if has_biases else _Weights(w_ih, w_hh, None, None, *others)


def _single(cell: Cell, kind: Literal["states", "state"]) -> Callable[..., Any]:
    """``torch.lstm_cell`` and its kin: one step."""

    def rule(
        input: Tensor,
        initial: Tensor | State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        before = (initial,) if isinstance(initial, Tensor) else tuple(initial)
        if any(isinstance(tensor, Watched) for tensor in (input, *before)):
            raise ModelError("per-sample gradients are not available: a parameter as a recurrent layer's state")
        check_batch(input, book_of(w_ih, w_hh, b_ih, b_hh).count, 2)
        _, state = _run(cell, input.unsqueeze(1), before, _Weights(w_ih, w_hh, b_ih, b_hh))
        return state[0] if kind == "state" else state

    return rule


_TANH, _RELU = _plain_cell(torch.tanh), _plain_cell(torch.relu)

RECURRENT: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    torch.lstm: _layers(_lstm_cell, "states"),
    torch.gru: _layers(_gru_cell, "state"),
    torch.rnn_tanh: _layers(_TANH, "state"),
    torch.rnn_relu: _layers(_RELU, "state"),
    torch.lstm_cell: _single(_lstm_cell, "states"),
    torch.gru_cell: _single(_gru_cell, "state"),
    torch.rnn_tanh_cell: _single(_TANH, "state"),
    torch.rnn_relu_cell: _single(_RELU, "state"),
}
