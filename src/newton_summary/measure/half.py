"""Types of half precision: squares, and what is nearly zero, may not fit, so that torch computes sums in single."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """A value in the type that torch computes sums of it in: half precision in single."""
    return x.float() if x.dtype in HALF else x
