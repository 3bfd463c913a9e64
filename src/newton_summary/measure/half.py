"""Types of half precision: squares, and what is nearly zero, may not fit, so that torch computes sums in single."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

SINGLE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""What stands for types of half precision in single."""


def wide(x: Tensor) -> Tensor:
    """A value in the type that torch computes sums of it in: half precision in single."""
    kind = SINGLE.get(x.dtype)
    return x if kind is None else x.to(kind)
