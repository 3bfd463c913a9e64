"""Newton's step in the space of the groups' rates."""

from __future__ import annotations

import numpy as np

from newton_summary.solve.bounded import Bounds, Box, solve
from newton_summary.solve.linear import Array, equilibrate, rounding
from newton_summary.solve.model import ACCEPTED_ERROR, Model
from newton_summary.solve.step import Status, Step
from newton_summary.summary import Summary


def newton(summary: Summary, *, nonnegative: bool = False, bounds: Bounds | None = None) -> Step:
    """The stationary point of the quadratic model, η = H̄⁻¹ ḡ.

    Where H̄ is indefinite that is a saddle, as in Newton's own method, and the predicted decrease may be negative;
    :func:`~newton_summary.solve.cubic` minimises.  With bounds it is the minimiser of the quadratic model in the box
    that counts (:mod:`~newton_summary.solve.bounded` says which one where H̄ is indefinite).

    Args:
        summary: with the second order.
        nonnegative: whether rates must not be negative.
        bounds: lower and upper bounds of the rates, each a number or of shape (S,), infinite where there is none.

    Returns:
        Rates η, shape (S,), in units of the direction; they do not depend on the units of the groups.  A group whose
        row of H̄ and entry of ḡ are all 0 gets 0.  The status is ``SINGULAR`` where H̄ is singular to rounding,
        ``UNBOUNDED`` where the model falls for ever in the box, ``NOT_FINITE`` where a number is not finite.

    Raises:
        ValueError: the second order was not measured, or the bounds do not fit.

    Source:
        docs/method.md, section 2.

    Example:
        >>> newton(Summary(loss=1.0, gradient=[2.0, 1.0], hessian=[[2.0, 0.0], [0.0, 4.0]])).sizes
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    model, box = Model.of(summary, 0.0), Box.of(len(summary), nonnegative, bounds)
    return stationary(model) if box is None else solve(model, box)


def stationary(model: Model) -> Step:
    """The stationary point of a quadratic model."""
    if not model.is_finite():
        return Step.failed(len(model), Status.NOT_FINITE)
    seen = model.seen()
    x = np.zeros(len(model))
    with np.errstate(all="ignore"):  # what overflows fails the check at the end
        part = model.restricted(seen)
        solution = _solve(part.hessian, part.gradient)
        if solution is None:
            return Step.failed(len(model), Status.SINGULAR)
        x[seen] = solution
        accurate = np.isfinite(x).all() and (model.errors(x) <= ACCEPTED_ERROR).all()
    return model.step(x, Status.SOLVED if accurate else Status.NOT_CONVERGED)


def _solve(matrix: Array, right: Array) -> Array | None:
    """The solution of a symmetric system, refined once; ``None`` where the matrix is singular to rounding."""
    from scipy.linalg import lapack

    if not len(matrix):
        return right
    scales = equilibrate(matrix)
    balanced = matrix * np.outer(scales, scales)
    factors, pivots, info = lapack.dgetrf(balanced)
    if info > 0:
        return None
    condition, _ = lapack.dgecon(factors, np.linalg.norm(balanced, 1))
    if condition <= rounding(len(matrix)):
        return None

    def inverse(b: Array) -> Array:
        solution: Array = scales * lapack.dgetrs(factors, pivots, scales * b)[0]
        return solution

    x = inverse(right)
    return x + inverse(right - matrix @ x)
