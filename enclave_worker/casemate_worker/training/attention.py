"""The rule for ``nn.MultiheadAttention``: its function from linear parts, so that each projection's use is seen.

Vaswani et al. 2017, §3.2, with the arguments and outputs of PyTorch's ``multi_head_attention_forward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from torch import Tensor

from .layers import linear_or_plain
from .watched import Watched, derive, replicas


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if static_k is not None or static_v is not None or (training and dropout_p) or query.dim() != 3:
        raise ModelError("per-sample gradients are not available: attention with dropout, static keys or no batch")
    if any(isinstance(x, Watched) for x in (query, key, value, key_padding_mask, attn_mask)):
        raise ModelError("per-sample gradients are not available: a parameter as attention's input (add it to zeros)")
    if is_causal and attn_mask is None:
        raise ModelError("per-sample gradients are not available: causal attention without its mask")
    weights: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    q, k, v = _projections(query, key, value, in_proj_weight, in_proj_bias, weights)
    n, extra = len(q), 0
    if bias_k is not None and bias_v is not None:
        k, v, extra = torch.cat([k, _rows(bias_k, n)], 1), torch.cat([v, _rows(bias_v, n)], 1), 1
    if add_zero_attn:
        k, v, extra = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), extra + 1
    q, k, v = (x.reshape(n, x.shape[1], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, (n, num_heads), extra, q.dtype)
    scores = None
    if need_weights:
        products = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        scores = (products if mask is None else products + mask).softmax(dim=3)
    found = F.scaled_dot_product_attention(q, k, v, mask) if scores is None else scores @ v
    output = linear_or_plain(found.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
    return output, scores.mean(dim=1) if scores is not None and average_attn_weights else scores


def _projections(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    weights: Sequence[Tensor | None],
) -> list[Tensor]:
    """Queries, keys and values ``[n, length, width]``; at once where they are of the same and weights are packed."""
    inputs = [x.transpose(0, 1) for x in (query, key, value)]
    if packed is not None and query is key is value:
        return list(linear_or_plain(inputs[0], packed, bias).chunk(3, dim=2))
    each = _thirds(packed) if packed is not None else weights
    shifts = _thirds(bias) if bias is not None else (None, None, None)
    return [linear_or_plain(x, w, b) for x, w, b in zip(inputs, each, shifts, strict=True) if w is not None]


def _thirds(tensor: Tensor) -> Sequence[Tensor]:
    return derive(torch.chunk, tensor, 3) if isinstance(tensor, Watched) else tensor.chunk(3)


def _rows(bias: Tensor, count: int) -> Tensor:
    """``[1, 1, width]`` as one more position of each of ``count`` records."""
    return replicas(bias, 3) if isinstance(bias, Watched) else bias.expand(count, -1, -1)


def _mask(
    positions: Tensor | None, padding: Tensor | None, sizes: tuple[int, int], extra: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to scores ``[n, heads, queries, keys]``; positions that were appended are open to all."""
    if positions is not None:
        positions = positions.reshape(*sizes, *positions.shape[1:]) if positions.dim() == 3 else positions[None, None]
    masks = [_additive(mask, dtype) for mask in (positions, padding[:, None, None] if padding is not None else None)]
    present = [F.pad(mask, (0, extra)) for mask in masks if mask is not None]
    return sum(present[1:], present[0]) if present else None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Where a mask says yes or no, yes is minus infinity."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


ATTENTION: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {F.multi_head_attention_forward: _attention}
