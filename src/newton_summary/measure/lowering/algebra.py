"""Linear algebra.

A value that is defined by an equation is written as a few steps of an iteration that solves it, from a constant that
solves it already.  Each step makes derivatives of one more order right, so that three do for the third.  The constants
are factors that torch's own functions find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.squares import between, by_product, within
from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, lowers

_ORDERS = 3


def _refined(solution: Tensor, residual: Callable[[Tensor], Tensor]) -> Tensor:
    """Steps of an iteration, from a constant."""
    result: Tensor = CONSTANT(solution)
    for _ in range(_ORDERS):
        result = result + residual(result)
    return result


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


@lowers(aten._linalg_solve_ex.default)
def _solve(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X with A X = B, or X A = B: X ← X + A₀⁻¹ (B − A X)."""
    is_vector = left and (b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]))
    column = b.unsqueeze(-1) if is_vector else b
    lu, pivots, info = torch.linalg.lu_factor_ex(CONSTANT(a), check_errors=check_errors)

    def residual(x: Tensor) -> Tensor:
        error = column - (a @ x if left else x @ a)
        return torch.linalg.lu_solve(lu, pivots, error, left=left)  # type: ignore[no-any-return]

    x = _refined(torch.linalg.lu_solve(lu, pivots, CONSTANT(column), left=left), residual)
    return x.squeeze(-1) if is_vector else x, lu, pivots, info


@lowers(aten.linalg_solve_triangular.default)
def _solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    fixed = CONSTANT(a)
    matrix = a.triu(int(unitriangular)) if upper else a.tril(-int(unitriangular))
    matrix = matrix + _identity(a) if unitriangular else matrix

    def residual(x: Tensor) -> Tensor:
        return solved(b - (matrix @ x if left else x @ matrix))

    def solved(rest: Tensor) -> Tensor:
        return as_it_is(aten.linalg_solve_triangular.default, fixed, rest, **options)  # type: ignore[no-any-return]

    return _refined(solved(CONSTANT(b)), residual)


@lowers(aten.linalg_inv_ex.default)
def _inverse(a: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    inverse, info = as_it_is(aten.linalg_inv_ex.default, CONSTANT(a), check_errors=check_errors)
    identity = _identity(a)
    return _refined(inverse, lambda x: inverse @ (identity - a @ x)), info


@lowers(aten._linalg_slogdet.default)
def _slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sign and logarithm of a determinant."""
    sign, logarithm, lu, pivots = as_it_is(aten._linalg_slogdet.default, CONSTANT(a))
    return sign, logarithm + _log_ratio(a), lu, pivots


@lowers(aten._linalg_det.default)
def _determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, lu, pivots = as_it_is(aten._linalg_det.default, CONSTANT(a))
    return value * _log_ratio(a).exp(), lu, pivots


def _log_ratio(a: Tensor) -> Tensor:
    """Log det(A₀⁻¹ A) = tr E − tr E²/2 + tr E³/3 − …, with E = A₀⁻¹ (A − A₀), which is zero."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(CONSTANT(a))
    e = torch.linalg.lu_solve(lu, pivots, a - CONSTANT(a))
    square = e @ e
    trace = e.diagonal(0, -2, -1).sum(-1) - 0.5 * square.diagonal(0, -2, -1).sum(-1)
    return trace + (square * e.mT).sum((-2, -1)) / 3  # type: ignore[no-any-return]


@lowers(aten.linalg_cholesky_ex.default)
def _cholesky(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """L₀ (I + Δ), with L₀⁻¹ A L₀⁻ᵀ − I = Δ + Δᵀ + Δ Δᵀ and Δ lower triangular."""
    symmetric = (a.triu() + a.triu(1).mT) if upper else (a.tril() + a.tril(-1).mT)
    fixed, info = as_it_is(aten.linalg_cholesky_ex.default, CONSTANT(symmetric), check_errors=check_errors)

    def divided(b: Tensor) -> Tensor:
        return as_it_is(aten.linalg_solve_triangular.default, fixed, b, upper=False)  # type: ignore[no-any-return]

    excess = divided(divided(symmetric).mT) - _identity(a)
    delta = torch.zeros_like(fixed)
    for _ in range(_ORDERS):
        rest = excess - delta @ delta.mT
        delta = rest.tril() - 0.5 * rest.tril().triu()
    result = fixed + fixed @ delta
    return result.mT if upper else result, info


@lowers(aten.cholesky_inverse.default)
def _cholesky_inverse(a: Tensor, upper: bool = False) -> Tensor:
    """The inverse of L Lᵀ, or of Uᵀ U: X ← X + X₀ (I − L Lᵀ X)."""
    inverse = as_it_is(aten.cholesky_inverse.default, CONSTANT(a), upper)
    factor = a.triu().mT if upper else a.tril()
    identity = _identity(a)
    return _refined(inverse, lambda x: inverse @ (identity - factor @ (factor.mT @ x)))


@lowers(aten.linalg_householder_product.default)
def _householder_product(a: Tensor, tau: Tensor) -> Tensor:
    """The first columns of Π (I − τ_i v_i v_iᵀ), where v_i is what column i has below its diagonal, and a one above."""
    result = torch.eye(*a.shape[-2:], dtype=a.dtype, device=a.device).expand(a.shape)
    vectors = a.tril(-1) + torch.eye(*a.shape[-2:], dtype=a.dtype, device=a.device)
    for i in reversed(range(tau.shape[-1])):
        v = vectors[..., i : i + 1]
        result = result - tau[..., i, None, None] * v @ (v.mT @ result)
    return result


@lowers(aten._sparse_addmm.default)
def _sparse_addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A sparse constant times a dense matrix, entry by entry of the sparse one."""
    if a.layout is not torch.sparse_coo or b.layout is not torch.strided:
        return NotImplemented
    (rows, columns), entries = a._indices(), a._values()
    terms = b.index_select(0, columns) * (alpha * entries).unsqueeze(1)
    product = torch.zeros(a.shape[0], b.shape[1], dtype=b.dtype, device=b.device).index_add(0, rows, terms)
    return product if beta == 0 else beta * bias + product


@lowers(aten._trilinear.default)
def _trilinear(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Any:
    """``bilinear``'s x · W_o · y, (samples, outputs), by one product with all of W."""
    if (expand1, expand2, expand3, sumdim) != ([1, 3], [0], [1, 2], [2, 3]):
        return NotImplemented
    outputs, width, other = y.shape
    moved = (x @ y.transpose(0, 1).reshape(width, outputs * other)).view(-1, outputs, other)
    return (moved * z.unsqueeze(1)).sum(-1)


# Norms and distances --------------------------------------------------------------------------------------------------


def root(total: Tensor) -> Tensor:
    """A square root whose derivatives at zero are zero, as those of torch's norms are."""
    zero = total == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).sqrt())


def _norm(x: Tensor, p: float, dims: list[int], keepdim: bool) -> Any:
    if p == 2:
        return root(x.square().sum(dims, keepdim=keepdim))
    if p == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    if p == torch.inf:
        return x.abs().amax(dims, keepdim=keepdim)
    if p == -torch.inf:
        return x.abs().amin(dims, keepdim=keepdim)
    if p == 0:
        return CONSTANT(x.ne(0).to(x.dtype)).sum(dims, keepdim=keepdim)
    size = x.abs()
    zero = size == 0
    total = torch.where(zero, 0.0, torch.where(zero, 1.0, size).pow(p)).sum(dims, keepdim=keepdim)
    zero = total == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).pow(1 / p))


@lowers(aten.linalg_vector_norm.default)
def _vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    x = x.abs() if x.is_complex() else x
    value = x if dtype is None else x.to(dtype)
    return _norm(value, ord, list(dim) if dim else list(range(x.dim())), keepdim)


@lowers(aten._cdist_forward.default)
def _cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None = None) -> Any:
    return _norm(between(x, y), p, [-1], False)


@lowers(aten._euclidean_dist.default)
def _euclidean_dist(x: Tensor, y: Tensor) -> Any:
    """By one product, as torch computes it between many points: differences of all pairs were (points)² × width.

    Between equal points rounding leaves a distance that is none: it is torch's value, and does not move.
    """
    squares, sizes = by_product(x, y)
    apart = CONSTANT(squares > 4 * torch.finfo(x.dtype).eps * sizes)
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), CONSTANT(squares.clamp_min(0).sqrt()))


@lowers(aten._pdist_forward.default)
def _pdist(x: Tensor, p: float = 2) -> Any:
    return _norm(within(x), p, [-1], False)
