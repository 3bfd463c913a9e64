"""The global minimiser of the cubic model over R^n, by one scalar equation (``docs/method.md``, section 2).

A point x is a global minimiser exactly if A(r) x = g with A(r) = H + r D² positive semidefinite and r the norm of x:
Moré & Sorensen 1983 for balls, Nesterov & Polyak 2006 and Cartis, Gould & Toint 2011 for the cubic term.  So r solves

    ψ(r) = r   with   ψ(r) = ‖D A(r)⁻¹ g‖,   which falls with r where A(r) is positive definite.

D may spread over many decades and have zeros, and at the solution A may be singular (the hard case).  Three steps take
care of that, none of which depends on the units of the groups:

1. Cholesky factors, graded as A is, bracket r.  The *base* b is the upper bound, where A is positive definite.
2. With A(b) = L Lᵀ and N = L⁻¹ D, an eigendecomposition of N Nᵀ makes ψ a sum.  Its largest eigenvalue e is the
   reciprocal of the distance from b to the singular matrix, so the unknown is the *gap* γ = 1 + (r − b) e in (0, 1],
   by its logarithm: it keeps all its digits where r loses them.
3. A few Newton steps on the model itself remove what the base's condition has cost.

The conditions at the top are then checked on the result, which makes it a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from newton_summary.solve.linear import EPSILON, Array, backward, cholesky, eigh, forward, rounding
from newton_summary.solve.model import ACCEPTED_ERROR, Model
from newton_summary.solve.step import Status

_RATIO = 2.0  # the bracket of r that is narrow enough for a base
_SMALLEST_GAP = 1e-20  # far below the rounding errors of A
_HARD_GAP = 1e-8  # above it, rounding errors do not decide on signs
_ACCEPTED_CURVATURE = 1e-11  # the largest negative curvature of A that counts as 0, relative to its terms
_TIE = 1e-14
_TINY = 1e-280
_LONGEST = 1e100
_ROUNDS = 400  # a bound on loops that end by themselves


def minimise(model: Model) -> tuple[Array, Status]:
    """The global minimiser of a model, shape (n,), and whether there is one.

    Coordinates on which nothing depends get 0.  Of two minimisers, in the hard case, the one with the larger Σ D_s x_s
    is taken.
    """
    seen = model.seen()
    x = np.zeros(len(model))
    with np.errstate(all="ignore"):  # what overflows fails the check at the end
        part = model.restricted(seen)
        status = _flat_status(part)
        if status is Status.SOLVED:
            polished = (polish(part, start, np.ones(len(part), dtype=bool)) for start in _solve(part))
            found = [y for y in polished if is_minimiser(part, y)]
            if found:
                x[seen] = _better(part, found[0], found[-1])
            else:
                status = Status.NOT_CONVERGED
    return x, status


def _better(model: Model, x: Array, y: Array) -> Array:
    """The point at which the model is lower; where that is only rounding errors, the one with the larger Σ D_s x_s."""
    rise = float(model.change(x, (y - x)[None])[0])
    if abs(rise) <= _TIE * model.decrease(x):
        return x if model.cubic @ x >= model.cubic @ y else y
    return x if rise > 0 else y


def is_minimiser(model: Model, x: Array) -> bool:
    """Whether the sufficient conditions for a global minimiser hold, to a little more than rounding errors."""
    if not (np.isfinite(x).all() and (model.errors(x) <= ACCEPTED_ERROR).all()):
        return False
    matrix = model.shifted(model.radius(x)) + _share(model, x, _ACCEPTED_CURVATURE)
    level = np.diag(~matrix.any(axis=1)).astype(float)  # rows of zeros do no harm
    return cholesky(matrix + level) is not None


def polish(model: Model, x: Array, free: Array, rounds: int = 6) -> Array:
    """Newton steps of the coordinates in a mask towards the stationary point next to x, while they bring it nearer.

    The Hessian of the model is used, which at a minimiser is positive definite also where A is singular; where several
    eigenvalues of A are 0, it takes a shift by rounding errors.
    """
    error = _largest_error(model, x, free)
    for _ in range(rounds):
        if not error > EPSILON:
            break
        slope, curvature = model.slope(x), model.curvature(x)
        for matrix in (curvature, curvature + _share(model, x, rounding(len(x)))):
            factor = cholesky(matrix[np.ix_(free, free)])
            if factor is None:
                continue
            new = x.copy()
            new[free] -= backward(factor, forward(factor, slope[free]))
            new_error = _largest_error(model, new, free)
            if new_error < error:
                x, error = new, new_error
                break
        else:
            break
    return x


def _largest_error(model: Model, x: Array, free: Array) -> float:
    return float(np.max(model.errors(x)[free], initial=0.0))


def _share(model: Model, x: Array, share: float) -> Array:
    """A diagonal matrix with a share of the sizes of the terms on the diagonal of H + r D²."""
    return np.diag(share * (np.abs(np.diag(model.hessian)) + model.radius(x) * model.cubic**2))


def _flat_status(model: Model) -> Status:
    """Whether the coordinates without a cubic term have a minimiser, given the others: H positive definite on them."""
    flat = model.cubic == 0
    if not flat.any():
        return Status.SOLVED
    block = model.hessian[np.ix_(flat, flat)]
    curvatures = np.diag(block)
    if (curvatures <= 0).any():  # also at 0: what nothing pulls at is not seen
        return Status.UNBOUNDED
    scales = 1 / np.sqrt(curvatures)
    values, vectors = eigh(block * scales * scales[:, None])
    tolerance = rounding(len(scales))
    if values[0] > tolerance:
        return Status.SOLVED
    if values[0] < -tolerance:
        return Status.UNBOUNDED
    null = vectors[:, values <= tolerance]
    pulls = scales[:, None] * np.column_stack([model.gradient[flat], model.hessian[np.ix_(flat, ~flat)]])
    sizes = np.linalg.norm(pulls, axis=0)  # an eigenvector has rounding errors also in the entries where it is 0
    return Status.SINGULAR if (np.abs(null.T @ pulls) <= tolerance * sizes).all() else Status.UNBOUNDED


def _solve(model: Model) -> list[Array]:
    """The minimiser before it is polished; in the hard case two candidates."""
    base = _base(model)
    factor = cholesky(model.shifted(base))
    if factor is None:  # overflow, or a bracket that rounding errors have spoilt
        return []
    whitened = forward(factor, model.gradient)
    candidates = _from_base(model, base, factor, whitened) if base > 0 else [whitened]
    return [backward(factor, candidate) for candidate in candidates]


def _base(model: Model) -> float:
    """An upper bound of the solution r at which A is positive definite, at most twice the solution or next to 0.

    Wherever A(r) is positive definite, the solution lies between r and ψ(r); where it is not, above r.
    """
    low, high, r, stride = 0.0, math.inf, 0.0, 2.0
    for _ in range(_ROUNDS):
        factor = cholesky(model.shifted(r))
        if factor is None:
            low = r
        else:
            size = model.radius(backward(factor, forward(factor, model.gradient)))
            low, high = max(low, min(r, size)), min(high, max(r, size))
        if high <= _RATIO * low or high < _TINY:
            break
        if math.isinf(high):
            r, stride = max(r * stride, guess(model)), min(stride**2, _LONGEST)
        elif low > 0:
            r = math.sqrt(low) * math.sqrt(high)
        elif r < high:
            r = high
        else:
            r, stride = high / stride, min(stride**2, _LONGEST)
    return high


def guess(model: Model) -> float:
    """A size for r, never 0: the largest of those that each coordinate would have by itself."""
    curved = model.cubic > 0
    cubic = model.cubic[curved]
    stiffness = np.diag(model.hessian)[curved] / cubic**2
    force = np.abs(model.gradient)[curved] / cubic
    alone = (np.sqrt(stiffness**2 + 4 * force) - stiffness) / 2
    return float(np.max(alone, initial=0.0)) or float(np.max(np.abs(stiffness), initial=0.0)) or 1.0


def _from_base(model: Model, base: float, factor: Array, whitened: Array) -> list[Array]:
    """Lᵀ x for the solution x, from L and L⁻¹ g at the base (step 2 above).

    In the hard case a multiple of the last eigenvector fills up the norm, with either sign: rounding errors decide on
    the sign of the force along it, so both are candidates.
    """
    transfer = forward(factor, np.diag(model.cubic))
    eigenvalues, vectors = eigh(transfer @ transfer.T)
    eigenvalues = eigenvalues.clip(0.0)
    largest = float(eigenvalues[-1])
    if not largest > 0:
        return [whitened]
    ratios = eigenvalues / largest
    force = vectors.T @ whitened

    def coefficients(gap: float) -> Array:
        result: Array = force / ((1 - ratios) + gap * ratios)
        return result

    def r(gap: float) -> float:
        return base - (1 - gap) / largest

    def excess(log_gap: float) -> float:  # log ψ(r) / r falls, and is nearly straight
        gap = math.exp(log_gap)
        size = max(_TINY, _norm(eigenvalues, coefficients(gap)))  # in this order also where it is NaN
        return math.log(size) - math.log(max(_TINY, r(gap)))

    gap = math.exp(_root(excess, math.log(_SMALLEST_GAP), 0.0))
    parts = coefficients(gap)
    if gap > _HARD_GAP:
        return [vectors @ parts]
    others = _norm(eigenvalues[:-1], parts[:-1])
    last = math.sqrt(max((r(gap) - others) * (r(gap) + others), 0.0) / largest)
    rest = vectors[:, :-1] @ parts[:-1]
    return [rest + sign * last * vectors[:, -1] for sign in (1, -1)]


def _norm(eigenvalues: Array, coefficients: Array) -> float:
    return math.sqrt(float(np.sum(eigenvalues * coefficients**2)))


def _root(falling: Callable[[float], float], left: float, right: float) -> float:
    """The root of a falling function; the nearer end where there is none."""
    from scipy.optimize import brentq

    ends = falling(left), falling(right)
    if not ends[0] > 0:
        return left
    if not ends[1] < 0:
        return right
    return float(brentq(falling, left, right, xtol=1e-14, rtol=4 * EPSILON))
