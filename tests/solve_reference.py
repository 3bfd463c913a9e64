"""Problems for the solvers, and references written another way: weak duality in 60 digits, and local searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import scipy.optimize

from newton_summary import Summary

DIGITS = 60


@dataclass(frozen=True)
class Problem:
    """ḡ, H̄, the diagonal of the third order, and λ_int."""

    gradient: np.ndarray
    hessian: np.ndarray
    third: np.ndarray
    regularization: float = 1.0

    @property
    def summary(self) -> Summary:
        return Summary(loss=1.0, gradient=self.gradient, hessian=self.hessian, third=self.third)


# Problems of all kinds ------------------------------------------------------------------------------------------------


def _symmetric(rng: np.random.Generator, eigenvalues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    matrix = q @ np.diag(eigenvalues) @ q.T
    return (matrix + matrix.T) / 2, q


def _in_units(k: np.ndarray, b: np.ndarray, d: np.ndarray, rng: np.random.Generator, **more: float) -> Problem:
    """The problem with K = D⁻¹H̄D⁻¹ and b = D⁻¹ḡ; λ_int ‖Dη‖³ has random signs in the third order."""
    return Problem(b * d, k * np.outer(d, d), d**3 * rng.choice([-1, 1], len(d)), **more)


def _spread(rng: np.random.Generator, n: int, decades: float) -> np.ndarray:
    return 10 ** rng.uniform(-decades / 2, decades / 2, n)


def indefinite(rng, n):
    k, _ = _symmetric(rng, rng.standard_normal(n))
    return _in_units(k, rng.standard_normal(n), _spread(rng, n, 1), rng, regularization=10 ** rng.uniform(-3, 3))


def definite(rng, n):
    k, _ = _symmetric(rng, 10 ** rng.uniform(-3, 1, n))
    return _in_units(k, rng.standard_normal(n), _spread(rng, n, 1), rng, regularization=10 ** rng.uniform(-3, 3))


def singular(rng, n):
    """H̄ positive semidefinite of lower rank: integers, so that it is so exactly."""
    a = rng.integers(-3, 4, (n, max(n // 2, 1)))
    return Problem(rng.standard_normal(n), (a @ a.T).astype(float), rng.uniform(0.1, 2, n))


def hard(rng, n):
    """ḡ has no part along the lowest curvature, and is small enough for that to matter."""
    values = np.sort(rng.uniform(-2, 2, n))
    values[0] = -1 - rng.random()
    k, q = _symmetric(rng, values)
    return _in_units(k, q[:, 1:] @ rng.standard_normal(n - 1) * 0.1, np.ones(n), rng)


def exactly_hard(rng, n):
    """The same on a diagonal, where nothing is rounded."""
    values = np.array([-4.0, *rng.integers(-3, 5, n - 1)])
    b = np.array([0.0, *rng.integers(-2, 3, n - 1) / 8.0])
    order = rng.permutation(n)
    return Problem(b[order], np.diag(values[order]), np.ones(n))


def orthogonal_but_regular(rng, n):
    """ḡ has no part along the lowest curvature, but is so large that the solution is regular."""
    values = np.array([-0.1, *rng.uniform(0.5, 2, n - 1)])
    k, q = _symmetric(rng, values)
    return _in_units(k, q[:, 1:] @ rng.standard_normal(n - 1) * 10, np.ones(n), rng)


def nearly_hard(rng, n):
    """A part along the lowest curvature that is 1e-3 to 1e-15 of the rest."""
    values = np.array([-1.0, *rng.uniform(-0.9, 2, n - 1)])
    k, q = _symmetric(rng, values)
    b = q[:, 1:] @ rng.standard_normal(n - 1) * 0.1 + q[:, 0] * 10 ** rng.uniform(-15, -3)
    return _in_units(k, b, _spread(rng, n, 2), rng)


def several_lowest(rng, n):
    """The lowest curvature has a space of dimension 2 or more."""
    values = np.array([-1.0, *np.where(rng.random(n - 1) < 0.6, -1.0, rng.uniform(0, 2, n - 1))])
    k, q = _symmetric(rng, values)
    force = rng.standard_normal(n) * (0.1 if rng.random() < 0.5 else (values > -1) * 0.1)
    return _in_units(k, q @ force, np.ones(n), rng)


def without_gradient(rng, n):
    k, _ = _symmetric(rng, rng.standard_normal(n))
    return _in_units(k, np.zeros(n), _spread(rng, n, 2), rng)


def wide(rng, n):
    """D spreads over 6 to 8 decades against H̄ and ḡ of ordinary size."""
    h, _ = _symmetric(rng, rng.standard_normal(n))
    return Problem(rng.standard_normal(n), h, _spread(rng, n, rng.uniform(6, 8)) ** 3)


def wide_definite(rng, n):
    h, _ = _symmetric(rng, 10 ** rng.uniform(-2, 1, n))
    return Problem(rng.standard_normal(n), h, _spread(rng, n, rng.uniform(6, 8)) ** 3)


def wide_hard(rng, n):
    """The hard case, to rounding, with D over 6 to 8 decades: ḡ is what a solution in the hard case needs."""
    h, _ = _symmetric(rng, rng.standard_normal(n))
    d = _spread(rng, n, rng.uniform(6, 8))
    lowest, vectors = np.linalg.eigh(h / np.outer(d, d))
    r = max(-lowest[0], 0.0)
    y = vectors[:, 1:] @ rng.standard_normal(n - 1)
    eta = y / d * 0.1 * r / max(np.linalg.norm(y), 1e-300)
    return Problem(h @ eta + r * d**2 * eta, h, d**3, regularization=2.0)


def graded(rng, n):
    """Negative curvature only where D is large, next to stiff groups where it is small: K is badly graded."""
    d = np.sort(_spread(rng, n, 7))
    h, _ = _symmetric(rng, rng.uniform(0.5, 2, n))
    h[-1, -1] -= rng.uniform(0, 3)
    return Problem(rng.standard_normal(n), h, d**3)


def other_units(rng, n):
    """An indefinite problem with every group in units of its own, over 8 decades."""
    p, a = indefinite(rng, n), _spread(rng, n, 8)
    return Problem(p.gradient * a, p.hessian * np.outer(a, a), p.third * a**3, p.regularization)


def some_flat(rng, n):
    """Some groups have no third derivative; H̄ is positive definite on those."""
    h, _ = _symmetric(rng, rng.standard_normal(n))
    flat = rng.random(n) < 0.5
    block = np.ix_(flat, flat)
    if flat.any():
        h[block], _ = _symmetric(rng, 10 ** rng.uniform(-2, 1, flat.sum()))
    return Problem(rng.standard_normal(n), h, np.where(flat, 0.0, _spread(rng, n, 4)))


def all_flat(rng, n):
    h, _ = _symmetric(rng, 10 ** rng.uniform(-4, 2, n))
    return Problem(rng.standard_normal(n), h, np.zeros(n))


KINDS: dict[str, Callable[[np.random.Generator, int], Problem]] = {
    f.__name__: f
    for f in (
        indefinite,
        definite,
        singular,
        hard,
        exactly_hard,
        orthogonal_but_regular,
        nearly_hard,
        several_lowest,
        without_gradient,
        wide,
        wide_definite,
        wide_hard,
        graded,
        other_units,
        some_flat,
        all_flat,
    )
}


def problem(kind: str, seed: int, largest: int = 5) -> Problem:
    rng = np.random.default_rng([list(KINDS).index(kind), seed])
    return KINDS[kind](rng, int(rng.integers(1, largest + 1)))


# References -----------------------------------------------------------------------------------------------------------


def objective(p: Problem, eta: np.ndarray) -> float:
    """−ḡᵀη + ½ ηᵀH̄η + λ_int/6 ‖Dη‖³, term by term in 60 digits."""
    with mpmath.workdps(DIGITS):
        x = [mpmath.mpf(float(v)) for v in eta]
        n = range(len(x))
        linear = mpmath.fsum(float(p.gradient[i]) * x[i] for i in n)
        quadratic = mpmath.fsum(x[i] * float(p.hessian[i, j]) * x[j] for i in n for j in n)
        norm = mpmath.sqrt(mpmath.fsum(_cube_root(p.third[i]) ** 2 * x[i] ** 2 for i in n))
        return float(-linear + quadratic / 2 + mpmath.mpf(p.regularization) / 6 * norm**3)


def residual(p: Problem, eta: np.ndarray) -> float:
    """The largest entry of (H̄ + λ_int/2 ‖Dη‖ D²) η − ḡ, each relative to the sum of the sizes of its own terms.

    That is the componentwise backward error: it does not depend on the units of the groups.
    """
    with mpmath.workdps(DIGITS):
        x = [mpmath.mpf(float(v)) for v in eta]
        n = range(len(x))
        d = [_cube_root(p.third[i]) for i in n]
        weight = mpmath.mpf(p.regularization) / 2 * mpmath.sqrt(mpmath.fsum((d[i] * x[i]) ** 2 for i in n))
        worst = mpmath.mpf(0)
        for i in n:
            terms = [float(p.hessian[i, j]) * x[j] for j in n] + [weight * d[i] ** 2 * x[i], -float(p.gradient[i])]
            size = mpmath.fsum(map(abs, terms))
            worst = max(worst, abs(mpmath.fsum(terms)) / size if size else mpmath.mpf(0))
        return float(worst)


def lowest_value(p: Problem) -> float:
    """The minimum of the objective, from below, in 60 digits.

    ‖y‖³ ≥ (3 r ‖y‖² − r³) / 2 for every r ≥ 0, so where H̄ + λ/2 r D² is positive definite, the number
    −½ ḡᵀ(H̄ + λ/2 r D²)⁻¹ḡ − λ/12 r³ lies below every value of the objective.  The largest of these bounds is found by
    bisection; groups without a third derivative are eliminated first.
    """
    with mpmath.workdps(DIGITS):
        flat, curved = [], []
        for i, value in enumerate(p.third):
            (curved if value else flat).append(i)
        h, g = mpmath.matrix(p.hessian.tolist()), mpmath.matrix(p.gradient.tolist())
        value, half = mpmath.mpf(0), mpmath.mpf(p.regularization) / 2
        if flat:
            block = mpmath.matrix([[h[i, j] for j in flat] for i in flat])
            right = mpmath.matrix([[g[i]] + [h[i, j] for j in curved] for i in flat])
            solved = block**-1 * right
            value = -mpmath.fsum(right[i, 0] * solved[i, 0] for i in range(len(flat))) / 2
            for a, i in enumerate(curved):
                g[i] -= mpmath.fsum(right[k, 1 + a] * solved[k, 0] for k in range(len(flat)))
                for b, j in enumerate(curved):
                    h[i, j] -= mpmath.fsum(right[k, 1 + a] * solved[k, 1 + b] for k in range(len(flat)))
        if not curved:
            return float(value)
        d = [_cube_root(p.third[i]) for i in curved]
        k = mpmath.matrix([[h[i, j] / (d[a] * d[b]) for b, j in enumerate(curved)] for a, i in enumerate(curved)])
        values, vectors = mpmath.eigsy(k)
        c = [mpmath.fsum(vectors[a, e] * g[i] / d[a] for a, i in enumerate(curved)) ** 2 for e in range(len(curved))]
        low = max(mpmath.mpf(0), -values[0] / half)
        high = low + 1
        while _dual_slope(values, c, half, high) > 0:
            high = 2 * high
        for _ in range(220):
            middle = (low + high) / 2
            low, high = (middle, high) if _dual_slope(values, c, half, middle) > 0 else (low, middle)
        dual = mpmath.fsum(c[e] / (values[e] + half * high) for e in range(len(c)) if c[e])
        value -= dual / 2 + half * high**3 / 6
        return float(value) if value < -1e-100 else 0.0  # the bisection ends a little above r = 0


def _dual_slope(values, squares, half, r):
    """The derivative of the bound, but for the factor λ/4: ‖y(r)‖² − r²."""
    return mpmath.fsum(s / (v + half * r) ** 2 for v, s in zip(values, squares, strict=True) if s) - r**2


def _cube_root(third: float) -> mpmath.mpf:
    return mpmath.cbrt(abs(mpmath.mpf(float(third))))


def best_of_many(p: Problem, seed: int, starts: int = 12) -> float:
    """The lowest value that local searches find from many points: knows no theory of the model at all."""
    rng = np.random.default_rng(seed)
    d = np.cbrt(np.abs(p.third))
    size = 1 / np.sqrt(np.abs(np.diag(p.hessian)) + p.regularization * d**2 + 1e-300)  # units of each group
    g, h, d = p.gradient * size, p.hessian * np.outer(size, size), d * size

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        r = np.linalg.norm(d * x)
        curved = h @ x
        return (
            -g @ x + x @ curved / 2 + p.regularization / 6 * r**3,
            -g + curved + p.regularization / 2 * r * d**2 * x,
        )

    found = [
        scipy.optimize.minimize(value, rng.standard_normal(len(g)) * 10 ** rng.uniform(-2, 2), jac=True, method="BFGS")
        for _ in range(starts)
    ]
    return min(objective(p, f.x * size) for f in found)
