"""Before anything loads torch: what the worker's training processes have in their environment."""

from __future__ import annotations

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
