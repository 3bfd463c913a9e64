"""Complex numbers as pairs of real ones: only linear operations meet them as they are."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from newton_summary.measure.lowering.algebra import root
from newton_summary.measure.lowering.table import aten, in_one_type, lowers, same_type

Pair: TypeAlias = tuple[Tensor, Tensor | None]
"""The real and the imaginary part; no imaginary part where it is zero."""


def _pair(z: Any, beside: Any = None) -> Pair:
    """The parts of a tensor, or of a number as precise as the tensor that it stands beside."""
    if isinstance(beside, Tensor) and not isinstance(z, Tensor):
        kind = beside.dtype.to_complex()
        z = torch.as_tensor(z, dtype=kind if isinstance(z, complex) else kind.to_real(), device=beside.device)
    if not z.is_complex():
        return z, None
    parts = torch.view_as_real(z.resolve_conj())
    return parts.select(-1, 0), parts.select(-1, 1)


def _is_complex(*values: Any) -> bool:
    return any(v.is_complex() if isinstance(v, Tensor) else isinstance(v, complex) for v in values)


def _multiplied(x: Any, y: Any, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    (a, b), (c, d) = _pair(x, y), _pair(y, x)
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


@lowers(aten.polar.default)
def _polar(size: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(size * angle.cos(), size * angle.sin())


# Functions of one number, by those of its real part a and its imaginary part b ----------------------------------------


def _exp(a: Tensor, b: Tensor) -> Tensor:
    return _polar(a.exp(), b)  # type: ignore[no-any-return]


def _log(a: Tensor, b: Tensor) -> Tensor:
    return torch.complex(0.5 * (a.square() + b.square()).log(), torch.atan2(b, a))


def _sin(a: Tensor, b: Tensor) -> Tensor:
    return torch.complex(a.sin() * b.cosh(), a.cos() * b.sinh())


def _cos(a: Tensor, b: Tensor) -> Tensor:
    return torch.complex(a.cos() * b.cosh(), -a.sin() * b.sinh())


def _sinh(a: Tensor, b: Tensor) -> Tensor:
    return torch.complex(a.sinh() * b.cos(), a.cosh() * b.sin())


def _cosh(a: Tensor, b: Tensor) -> Tensor:
    return torch.complex(a.cosh() * b.cos(), a.sinh() * b.sin())


def _tanh(a: Tensor, b: Tensor) -> Tensor:
    """(t + iu) / (1 + itu), with t = tanh a and u = tan b."""
    t, u = a.tanh(), b.tan()
    scale = (1 + (t * u).square()).reciprocal()
    return torch.complex(t * (1 + u.square()) * scale, u * (1 - t.square()) * scale)


def power(z: Any, exponent: Any) -> Tensor:
    """z^w, by products where w is a small whole number, so that zero has derivatives, too; else exp(w log z)."""
    if isinstance(exponent, int | float) and exponent == int(exponent) and 0 < exponent <= 64:
        result = z
        for bit in bin(int(exponent))[3:]:
            result = result * result * z if bit == "1" else result * result
        return result  # type: ignore[no-any-return]
    logarithm = _of(z, _log) if isinstance(z, Tensor) else cmath.log(z)
    return (exponent * logarithm).exp()  # type: ignore[no-any-return]


def _of(z: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    a, b = _pair(z)
    return function(a, torch.zeros_like(a) if b is None else b)


def _by_parts(function: Callable[[Tensor, Tensor], Tensor], *ops: Any) -> None:
    """Enters a function of the real and the imaginary part for complex numbers alone."""
    lowers(*ops)(lambda z: _of(z, function) if _is_complex(z) else NotImplemented)


_by_parts(_exp, aten.exp.default)
_by_parts(_log, aten.log.default)
_by_parts(_sin, aten.sin.default)
_by_parts(_cos, aten.cos.default)
_by_parts(_sinh, aten.sinh.default)
_by_parts(_cosh, aten.cosh.default)
_by_parts(_tanh, aten.tanh.default)


@lowers(aten.expm1.default)
def _expm1(z: Tensor) -> Any:
    return z.exp() - 1 if _is_complex(z) else NotImplemented


@lowers(aten.sigmoid.default)
def _sigmoid(z: Tensor) -> Any:
    return ((-z).exp() + 1).reciprocal() if _is_complex(z) else NotImplemented


@lowers(aten.sqrt.default)
def _sqrt(z: Tensor) -> Any:
    return power(z, 0.5) if _is_complex(z) else NotImplemented


@lowers(aten.rsqrt.default)
def _rsqrt(z: Tensor) -> Any:
    return power(z, -0.5) if _is_complex(z) else NotImplemented


@lowers(aten.pow.Tensor_Scalar, aten.pow.Scalar)
def _pow(z: Any, exponent: Any) -> Any:
    return power(z, exponent) if _is_complex(z, exponent) else NotImplemented
