"""Complex numbers as pairs of real ones: only linear operations meet them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from newton_summary.measure.lowering.algebra import root
from newton_summary.measure.lowering.table import aten, in_one_type, lowers, same_type

Pair: TypeAlias = tuple[Tensor, Tensor | None]
"""The real and the imaginary part; no imaginary part where it is zero."""


def _pair(z: Any) -> Pair:
    z = torch.as_tensor(z)
    if not z.is_complex():
        return z, None
    parts = torch.view_as_real(z.resolve_conj())
    return parts.select(-1, 0), parts.select(-1, 1)


def _is_complex(*values: Any) -> bool:
    return any(v.is_complex() if isinstance(v, Tensor) else isinstance(v, complex) for v in values)


def _multiplied(x: Any, y: Any, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    (a, b), (c, d) = _pair(x), _pair(y)
    if b is None:
        assert d is not None
        return torch.complex(product(a, c), product(a, d))
    if d is None:
        return torch.complex(product(a, c), product(b, c))
    return torch.complex(product(a, c) - product(b, d), product(a, d) + product(b, c))


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def _mul(x: Any, y: Any) -> Any:
    if _is_complex(x, y):
        return _multiplied(x, y, torch.mul)
    return NotImplemented if same_type(x, y) else torch.mul(*in_one_type(x, y))


@lowers(aten.mm.default, aten.bmm.default)
def _mm(x: Tensor, y: Tensor) -> Any:
    return _multiplied(x, y, torch.matmul) if _is_complex(x, y) else NotImplemented


@lowers(aten.square.default)
def _square(x: Tensor) -> Any:
    return _multiplied(x, x, torch.mul) if _is_complex(x) else NotImplemented


@lowers(aten.reciprocal.default)
def _reciprocal(x: Tensor) -> Any:
    if not _is_complex(x):
        return NotImplemented
    a, b = _pair(x)
    assert b is not None
    scale = (a.square() + b.square()).reciprocal()
    return torch.complex(a * scale, -b * scale)


@lowers(aten.abs.default)
def _abs(x: Tensor) -> Any:
    if not _is_complex(x):
        return NotImplemented
    a, b = _pair(x)
    assert b is not None
    return root(a.square() + b.square())


@lowers(aten.angle.default)
def _angle(x: Tensor) -> Any:
    if not _is_complex(x):
        return NotImplemented
    a, b = _pair(x)
    assert b is not None
    return torch.atan2(b, a)


@lowers(aten.exp.default)
def _exp(x: Tensor) -> Any:
    if not _is_complex(x):
        return NotImplemented
    a, b = _pair(x)
    assert b is not None
    return aten.polar.default(a.exp(), b)


@lowers(aten.polar.default)
def _polar(size: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(size * angle.cos(), size * angle.sin())
