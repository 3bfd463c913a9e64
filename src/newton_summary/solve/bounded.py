"""The cubic model within a box: projected Newton steps along exact curvature (``docs/method.md``, section 2).

The model may be nonconvex, and finding its global minimiser in a box is then hard in general.  What is found

* satisfies the first-order conditions of Karush, Kuhn and Tucker to rounding: the slope is 0 where a rate is free and
  points out of the box where it is not;
* has no direction of negative curvature among the rates strictly inside their bounds;
* is the global minimiser where H̄ is positive semidefinite;
* lies no higher than the unconstrained solution does after clipping, or after clipping and a line search.

Each step takes the coordinates whose slope does not hold them at a bound, and bends their Newton step along the walls
of the box (Bertsekas 1982); so it does with those strictly inside.  Where curvature is not positive it also tries the
lowest eigenvector, both ways.  All lengths from the very short to the very long are tried at once, and those at which a
wall is met.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from newton_summary.solve import secular
from newton_summary.solve.line_search import best_length
from newton_summary.solve.linear import Array, backward, cholesky, eigh, equilibrate, forward, rounding
from newton_summary.solve.model import ACCEPTED_ERROR, Model
from newton_summary.solve.step import Status, Step

Bounds = tuple[float | Tensor | ArrayLike, float | Tensor | ArrayLike]
"""The lower and the upper bound: a number for all groups or one for each, infinite where there is none."""

_LENGTHS = 4.0 ** np.arange(-24, 25)[:, None]
_ROUNDS = 1000
_POWERS = 100
_FLAT = 1e-12


@dataclass(frozen=True)
class Box:
    """Bounds of every coordinate, shape (n,) each."""

    lower: Array
    upper: Array

    @staticmethod
    def of(size: int, nonnegative: bool, bounds: Bounds | None) -> Box | None:
        """The box that a solver's arguments ask for; ``None`` where there are no bounds.

        Raises:
            ValueError: the bounds are no pair; one has another shape, is NaN, or leaves no room.
        """
        if not nonnegative and bounds is None:
            return None
        if bounds is not None and not (isinstance(bounds, Sized) and len(bounds) == 2):
            raise ValueError(f"bounds must be a pair, the lower ones and the upper ones, got {bounds!r}")
        low, high = (-np.inf, np.inf) if bounds is None else bounds
        lower, upper = _bound("lower", low, size), _bound("upper", high, size)
        if nonnegative:
            lower = np.maximum(lower, 0.0)
        wrong = ~((lower <= upper) & (lower < np.inf) & (upper > -np.inf))
        if wrong.any():
            s = int(np.argmax(wrong))
            raise ValueError(f"bounds leave no room for group {s}: lower {lower[s]:g}, upper {upper[s]:g}")
        return Box(lower, upper)

    def clip(self, x: Array) -> Array:
        """The nearest point of the box, or of every row."""
        return np.clip(x, self.lower, self.upper)

    def lengths(self, x: Array, direction: Array) -> Array:
        """How far it is from a point, along a direction, to the bounds that are ahead, shape (m, 1)."""
        moves = direction != 0
        found = (self.ahead(direction) - x)[moves] / direction[moves]
        return np.asarray(found[np.isfinite(found)][:, None])

    def snapped(self, x: Array, near: Array) -> Array:
        """A point of the box with coordinates that are this near a bound on it: rounding errors hold none back."""
        x = np.where(x - self.lower <= near, self.lower, x)
        return np.where(self.upper - x <= near, self.upper, x)

    def scaled(self, factors: Array) -> Box:
        """The box of x / factors."""
        largest = np.finfo(float).max  # a finite bound stays finite
        lower, upper = (
            np.where(np.isinf(b), b, np.clip(b / factors, -largest, largest)) for b in (self.lower, self.upper)
        )
        return Box(lower, upper)

    def restricted(self, mask: Array) -> Box:
        """The box of some of the coordinates."""
        return Box(self.lower[mask], self.upper[mask])

    def blocked(self, x: Array, direction: Array) -> Array:
        """The mask of the coordinates that the direction moves out of the box at once."""
        result: Array = ((x <= self.lower) & (direction < 0)) | ((x >= self.upper) & (direction > 0))
        return result

    def ahead(self, direction: Array) -> Array:
        """The bounds that a direction points to; the lower ones where it is 0."""
        return np.where(direction > 0, self.upper, self.lower)


def _bound(what: str, value: float | Tensor | ArrayLike, size: int) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(value, dtype=float)
    if array.shape not in ((), (size,)):
        raise ValueError(f"the {what} bound has shape {array.shape}; {size} groups need () or ({size},)")
    if np.isnan(array).any():
        raise ValueError(f"the {what} bound has entries that are NaN: use -inf or inf where there is none")
    result: Array = np.broadcast_to(array, (size,))
    return result


def solve(model: Model, box: Box | None) -> Step:
    """The step that minimises the model, within the box if there is one."""
    if not model.is_finite():
        return Step.failed(len(model), Status.NOT_FINITE)
    return model.step(*(secular.minimise(model) if box is None else minimise(model, box)))


def minimise(model: Model, box: Box) -> tuple[Array, Status]:
    """A minimiser in the box as the module describes it, shape (n,), and whether there is one.

    Coordinates on which nothing depends get the number in their bounds that is nearest to 0.
    """
    with np.errstate(all="ignore"):  # what overflows fails the check at the end
        target, status = secular.minimise(model)
        if status is Status.SOLVED and (box.clip(target) == target).all():
            return target, status
        origin = box.clip(np.zeros(len(model)))
        if status is not Status.SOLVED:
            target = origin
        seen = model.seen()
        part, room, target = model.restricted(seen), box.restricted(seen), target[seen]
        units = equilibrate(np.abs(part.hessian) + np.diag(secular.guess(part) * part.cubic**2))
        length = _length(part.scaled(units))
        balanced, units = part.scaled(units).per_length(length), units * length
        scaled = room.scaled(units)
        x, status = _minimise(balanced, scaled, target / units)
        inner = np.where(x >= scaled.upper, room.upper, x * units)
        origin[seen] = np.where(x <= scaled.lower, room.lower, inner)
        return origin, status


def _length(model: Model) -> float:
    """A length for steps that follows the unit of the loss, where curvature is about 1."""
    length = np.linalg.norm(model.gradient) or np.max(model.cubic, initial=0.0) ** -3.0
    return float(length) if 0 < length < np.inf else 1.0


def _minimise(model: Model, box: Box, target: Array) -> tuple[Array, Status]:
    """The minimiser, from a model whose curvature and slope are about 1, and its solution without the box."""
    if _recedes(model, box):
        return target, Status.UNBOUNDED
    convex = cholesky(model.hessian + rounding(len(model)) * np.eye(len(model))) is not None
    origin, clipped = box.clip(np.zeros(len(model))), box.clip(target)
    starts = [origin, clipped]
    if not origin.any():
        starts.append(best_length(model, clipped, 1.0) * clipped)
    starts.sort(key=model.decrease, reverse=True)
    ends = []
    for start in starts[:1] if convex else starts:
        x, status = _descend(model, box, start)
        if status is not Status.SOLVED:
            return x, status
        polished = secular.polish(model, x, (x > box.lower) & (x < box.upper))
        ends.append(polished if (box.clip(polished) == polished).all() else x)
    x = max(ends, key=model.decrease)
    return x, Status.SOLVED if _is_stationary(model, box, x) else Status.NOT_CONVERGED


def _descend(model: Model, box: Box, x: Array) -> tuple[Array, Status]:
    """Steps downhill until none is left."""
    for _ in range(_ROUNDS):
        free = ~box.blocked(x, -model.slope(x))
        paths = []
        for direction in _directions(model, box, x, free):
            if _falls_for_ever(model, box, x, direction):
                return x, Status.UNBOUNDED
            lengths = np.concatenate([_LENGTHS, box.lengths(x, direction)])
            paths.append(box.clip(x + lengths * direction))  # bent along the walls
        if not paths:
            break
        points = np.concatenate(paths)
        changes, sizes = model.change(x, points - x), np.abs(points - x)
        terms = sizes @ model.magnitude(x) + np.sum((sizes @ np.abs(model.hessian)) * sizes, axis=1) / 2
        surely = changes < -rounding(len(x)) * terms  # along a flat valley, a long step changes much by rounding
        surely &= sizes.max(axis=1) > rounding(len(x)) * np.abs(x).max()  # shorter ones creep on, round after round
        if not surely.any():
            break
        best = int(np.argmin(np.where(surely, changes, np.inf)))
        x = box.snapped(points[best], rounding(len(x)) * (np.abs(x) + sizes[best]))
    return x, Status.SOLVED


def _directions(model: Model, box: Box, x: Array, free: Array) -> list[Array]:
    """Directions in the free coordinates, and in those of them that are strictly inside.

    What is free at a wall may be pushed back into it by the others' steps: without the second kind, steps may zigzag.
    """
    inside = free & (x > box.lower) & (x < box.upper)
    masks = [free, inside] if (inside != free).any() else [free]
    return [direction for mask in masks if mask.any() for direction in _directions_in(model, x, mask)]


def _directions_in(model: Model, x: Array, mask: Array) -> list[Array]:
    """Newton's direction in some coordinates; where the curvature is not positive, several that may go downhill."""
    block, pull = model.curvature(x)[np.ix_(mask, mask)], -model.slope(x)[mask]
    factor = cholesky(block)
    terms = (np.abs(np.diag(model.hessian)) + model.radius(x) * model.cubic**2)[mask]
    is_regular = cholesky(block - rounding(len(block)) * np.diag(terms)) is not None  # else its inverse is noise
    if factor is not None and is_regular:
        return _widened(backward(factor, forward(factor, pull))[None], mask)
    values, vectors = eigh(block)
    smallest = rounding(len(values)) * max(float(np.max(np.abs(values))), 1.0)
    newton = vectors @ (vectors.T @ pull / np.maximum(np.abs(values), smallest))
    lowest = vectors[:, 0]
    return _widened(np.array([newton, lowest, -lowest]), mask)


def _widened(rows: Array, mask: Array) -> list[Array]:
    """Directions in the coordinates of a mask as directions in all of them, without those that are 0."""
    full = np.zeros((len(rows), len(mask)))
    full[:, mask] = rows
    return [direction for direction in full if direction.any()]


def _falls_for_ever(model: Model, box: Box, x: Array, direction: Array) -> bool:
    """Whether the model does along the part of a direction without cubic term or bound, or along one entry of it."""
    ray = np.where((model.cubic == 0) & np.isinf(box.ahead(direction)), direction, 0.0)
    if not ray.any():
        return False
    rays = np.concatenate([ray[None], np.diag(ray)])
    curvature = np.sum((rays @ model.hessian) * rays, axis=1)
    level = rounding(len(x)) * np.sum((np.abs(rays) @ np.abs(model.hessian)) * np.abs(rays), axis=1)
    terms = np.abs(rays) @ model.magnitude(x)
    terms[0] = max(terms[0], np.linalg.norm(ray) * np.linalg.norm(model.magnitude(x)) * rounding(len(x)) / _FLAT)
    falls = rays @ model.slope(x) < -_FLAT * terms  # an eigenvector has rounding errors also in entries where it is 0
    return bool(((curvature <= level) & falls).any())


def _recedes(model: Model, box: Box) -> bool:
    """Whether a direction of negative curvature without a cubic term is found that never leaves the box.

    To decide it for certain is to decide whether a matrix is copositive, which is NP-hard.  This is the power iteration
    for the lowest eigenvector, projected on the directions that stay in the box, from many starts.
    """
    down, up = (np.where((model.cubic == 0) & np.isinf(bound), np.inf, 0.0) for bound in (box.lower, box.upper))
    open_ = (down > 0) | (up > 0)
    block = model.hessian[np.ix_(open_, open_)]
    if not open_.any() or cholesky(block) is not None:
        return False
    size = np.max(np.sum(np.abs(block), axis=1))
    rays = np.concatenate([np.eye(len(block)), -np.eye(len(block)), *(s * eigh(block)[1].T for s in (1, -1))])
    for _ in range(_POWERS):
        rays = np.clip(rays, -down[open_], up[open_])
        lengths = np.linalg.norm(rays, axis=1)
        rays = rays[lengths > 0] / lengths[lengths > 0, None]
        if (np.sum((rays @ block) * rays, axis=1) < -rounding(len(block)) * size).any():
            return True
        rays = rays @ (size * np.eye(len(block)) - block)
    return False


def _is_stationary(model: Model, box: Box, x: Array) -> bool:
    """Whether the first-order conditions hold, entry by entry or to rounding errors of all entries together."""
    slope = model.slope(x)
    small = (model.errors(x) <= ACCEPTED_ERROR) | (np.abs(slope) <= 100 * model.level(x))
    return bool((small | box.blocked(x, -slope)).all() and np.isfinite(x).all())
