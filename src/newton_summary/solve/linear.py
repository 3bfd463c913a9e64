"""The linear algebra of the solvers: Cholesky factors, and scales that depend on no units.

scipy is imported where it is used, here and in the other solvers: importing it takes longer than all of the package.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

EPSILON = float(np.finfo(float).eps)


def cholesky(matrix: Array) -> Array | None:
    """The lower Cholesky factor, or ``None`` where the matrix is not positive definite.

    Its rounding errors follow the scales of the coordinates, so no scaling is needed first.
    """
    from scipy.linalg import lapack

    factor, info = lapack.dpotrf(matrix, lower=1, clean=1)
    return factor if info == 0 else None


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues in rising order and eigenvectors; NaN where the matrix has overflown."""
    if not np.isfinite(matrix).all():
        return np.full(len(matrix), np.nan), np.full(matrix.shape, np.nan)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def forward(factor: Array, right: Array) -> Array:
    """L⁻¹ b for a lower factor L."""
    return _triangular(factor, right, 0)


def backward(factor: Array, right: Array) -> Array:
    """L⁻ᵀ b for a lower factor L."""
    return _triangular(factor, right, 1)


def _triangular(factor: Array, right: Array, transposed: int) -> Array:
    """A triangular solve by BLAS, which LAPACK's dtrtrs would share among threads even where it takes a microsecond."""
    from scipy.linalg import blas

    if not len(factor):
        return right
    if right.ndim == 1:
        return blas.dtrsv(factor, right, lower=1, trans=transposed)
    return blas.dtrsm(1.0, factor, right, lower=1, trans_a=transposed)


def rounding(n: int) -> float:
    """How far rounding errors may move an eigenvalue of an n × n matrix whose entries are at most 1."""
    return 4 * max(n, 8) * EPSILON


def equilibrate(matrix: Array, rounds: int = 10) -> Array:
    """Scales w, shape (n,), such that the largest entry of every row of |M_st| w_s w_t is about 1.

    They start from 1/√|M_ss|, so they follow a change of the coordinates' units.  Rows of zeros get 1.
    """
    sizes = np.abs(matrix)
    largest = np.max(sizes, axis=1, initial=0.0)
    start = np.where(np.diag(sizes) > 0, np.diag(sizes), largest)
    scales = np.where(largest > 0, 1 / np.sqrt(np.where(largest > 0, start, 1.0)), 1.0)
    for _ in range(rounds):  # a row's own scale counts once or twice in its largest entry: the square root settles both
        rows = np.max(sizes * np.outer(scales, scales), axis=1, initial=0.0)
        scales = np.where(rows > 0, scales / np.sqrt(np.where(rows > 0, rows, 1.0)), scales)
    result: Array = scales
    return result
