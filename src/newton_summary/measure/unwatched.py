"""Operations that give something else where a mode of torch's watches than where none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def as_unwatched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives where nothing watches.

    Torch's pseudoinverse conjugates a matrix by a mark that the product which follows does not see below a mode: of
    complex numbers it then gives something else, without a word.  No other operation that torch has samples of does so
    (tests/test_operations.py).
    """
    if func is aten.linalg_pinv.atol_rtol_tensor and args[0].is_complex() and not kwargs.get("hermitian"):
        return _pinv(args[0], kwargs.get("atol"), kwargs.get("rtol"))
    return func(*args, **kwargs)


def _pinv(x: Tensor, atol: Tensor | None, rtol: Tensor | None) -> Tensor:
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    least = torch.zeros((), dtype=sizes.dtype, device=x.device) if atol is None else atol
    if rtol is None:
        usual = torch.finfo(x.dtype).eps * max(x.shape[-2:])
        rtol = torch.where(least > 0, 0.0, usual).to(sizes.dtype)
    cut = torch.maximum(least.unsqueeze(-1), rtol.unsqueeze(-1) * sizes.amax(-1, keepdim=True))
    inverse = torch.where(sizes > cut, 1 / sizes, 0.0)
    product: Tensor = (right.mT.conj_physical() * inverse.unsqueeze(-2)) @ left.mT.conj_physical()
    return product
