"""Products of float32 numbers must be float32: bounds on sums and norms presume it (:mod:`.blocks`).

PyTorch has two generations of settings that let libraries shorten them to TF32 or bfloat16. On the CPU, where all of this
runs, the newer ones are those of oneDNN, for each kind of operation, and what these inherit from.
"""

from __future__ import annotations

from typing import Final

import torch
from casemate_schemas.errors import ParameterError

_OPERATIONS: Final = ("matmul", "conv", "rnn")


def check_float32_products() -> None:
    """:class:`ParameterError` where any setting lets PyTorch shorten float32 products on the CPU."""
    onednn = torch.backends.mkldnn
    kinds = (torch.backends, onednn, *(getattr(onednn, operation) for operation in _OPERATIONS))
    full = all(kind.fp32_precision in ("none", "ieee") for kind in kinds)
    try:
        full = full and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError as error:  # both generations were used, and disagree
        raise ParameterError("expected one setting of float32 precision: torch.set_float32_matmul_precision") from error
    if not full:
        raise ParameterError(
            "expected float32 products in float32: torch.set_float32_matmul_precision('highest') and 'none' or 'ieee' in "
            "torch.backends.fp32_precision and torch.backends.mkldnn's"
        )
