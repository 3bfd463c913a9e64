"""The model of the loss change that every solver minimises, as plain float64 arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from newton_summary._checks import check_not_negative
from newton_summary.solve.linear import Array
from newton_summary.solve.step import Status, Step
from newton_summary.summary import Summary

ACCEPTED_ERROR = 1e-9
"""The largest backward error of a solution that counts as solved; most are near 1e-16."""


@dataclass(frozen=True)
class Model:
    """m(η) = −gᵀη + ½ ηᵀHη + ⅓ (‖Dη‖² + c²)^(3/2), up to a constant (``docs/method.md``, section 2).

    The weight λ_int / 6 of the cubic term is part of D.  Coordinates that are held fixed leave their share of the norm
    in c, which is otherwise 0.  With r = √(‖Dη‖² + c²), stationary points satisfy (H + r D²) η = g.

    Args:
        gradient: g, shape (n,).
        hessian: H, shape (n, n), symmetric.
        cubic: the diagonal of D, shape (n,), not negative.
        offset: c, not negative.
    """

    gradient: Array
    hessian: Array
    cubic: Array
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.gradient)

    @staticmethod
    def of(summary: Summary, regularization: float) -> Model:
        """The model of a summary, with one transfer from its device.

        Raises:
            ValueError: a derivative that is needed was not measured, or the regularization is not a number from 0 on.
        """
        check_not_negative("regularization", regularization)
        if summary.hessian is None:
            raise ValueError("a step needs the second order, which was not measured: summarize(..., order=2)")
        if regularization and summary.third is None:
            raise ValueError(
                "the cubic term needs the third order, which was not measured: summarize(..., order=3); "
                "regularization=0 goes without it"
            )
        host = summary.cpu()
        gradient, third = host.gradient.numpy(), host.third_diagonal
        hessian = np.zeros((0, 0)) if host.hessian is None else host.hessian.numpy()
        cubic = np.zeros(len(gradient))
        if regularization and third is not None:
            cubic = np.cbrt(np.abs(third.numpy())) * np.cbrt(regularization / 2)
        return Model(gradient, (hessian + hessian.T) / 2, cubic)

    def is_finite(self) -> bool:
        """Whether every number in it is finite."""
        return all(bool(np.isfinite(a).all()) for a in (self.gradient, self.hessian, self.cubic))

    # Values and derivatives -------------------------------------------------------------------------------------------

    def radius(self, x: Array) -> float:
        """The norm r that weighs the cubic term's curvature."""
        return float(np.hypot(np.linalg.norm(self.cubic * x), self.offset))

    def shifted(self, r: float) -> Array:
        """H + r D², shape (n, n)."""
        return self.hessian + np.diag(r * self.cubic**2)

    def slope(self, x: Array) -> Array:
        """The gradient of m, shape (n,)."""
        result: Array = self.hessian @ x + self.radius(x) * self.cubic**2 * x - self.gradient
        return result

    def curvature(self, x: Array) -> Array:
        """The Hessian of m, shape (n, n): H + r D² + D²x xᵀD² / r."""
        r = self.radius(x)
        if r == 0:
            return self.hessian
        normal = self.cubic * (self.cubic * x / r)
        return self.shifted(r) + r * np.outer(normal, normal)

    def change(self, x: Array, moves: Array) -> Array:
        """m(x + s) − m(x) for every row s of ``moves``, accurate to its own size also where m itself is much larger."""
        r = self.radius(x)
        along = moves @ (self.cubic**2 * x)
        squares = np.sum((self.cubic * moves) ** 2, axis=1)
        longer = np.hypot(np.linalg.norm(self.cubic * (x + moves), axis=1), self.offset) + r
        growth = np.divide(2 * along + squares, longer, out=np.zeros_like(along), where=longer > 0)  # of r
        quadratic = moves @ self.slope(x) + np.sum((moves @ self.hessian) * moves, axis=1) / 2
        result: Array = quadratic + r * squares / 2 + r * growth**2 / 2 + growth**3 / 3
        return result

    def decrease(self, x: Array) -> float:
        """m(0) − m(x)."""
        with np.errstate(all="ignore"):
            return 0.0 - float(self.change(np.zeros(len(self)), x[None])[0])

    def magnitude(self, x: Array) -> Array:
        """The sum of the sizes of the terms of each entry of the slope: what its rounding errors are relative to."""
        result: Array = (
            np.abs(self.hessian) @ np.abs(x) + self.radius(x) * self.cubic**2 * np.abs(x) + np.abs(self.gradient)
        )
        return result

    def error(self, x: Array) -> float:
        """The largest entry of the slope relative to its magnitude: the componentwise backward error.

        It is the same in all units of the groups and of the loss.
        """
        magnitude = self.magnitude(x)
        relative = np.divide(np.abs(self.slope(x)), magnitude, out=np.zeros(len(x)), where=magnitude != 0)
        return float(np.max(relative, initial=0.0))

    # Other forms of it ------------------------------------------------------------------------------------------------

    def scaled(self, factors: Array, loss: float = 1.0) -> Model:
        """The model, divided by ``loss``, as a function of x / factors."""
        return Model(
            self.gradient * factors / loss,
            self.hessian * factors * factors[:, None] / loss,
            self.cubic * factors / np.cbrt(loss),
            self.offset / float(np.cbrt(loss)),
        )

    def restricted(self, free: Array, x: Array) -> Model:
        """The model of the coordinates in the mask ``free``, the others being held at their values in ``x``."""
        held = np.where(free, 0.0, x)
        return Model(
            (self.gradient - self.hessian @ held)[free],
            self.hessian[np.ix_(free, free)],
            self.cubic[free],
            self.radius(held),
        )

    def seen(self) -> Array:
        """The mask of the coordinates on which the model depends."""
        result: Array = (self.gradient != 0) | (self.cubic != 0) | self.hessian.any(axis=1)
        return result

    def step(self, x: Array, status: Status) -> Step:
        """The solver's result for a solution x in this model."""
        decrease = self.decrease(x)
        if status is Status.SOLVED and not np.isfinite(decrease):  # it has overflown
            status = Status.NOT_CONVERGED
        if status is not Status.SOLVED:
            return Step.failed(len(self), status)
        return Step(torch.from_numpy(x.copy()), decrease)


def decrease(summary: Summary, sizes: Tensor, regularization: float = 1.0) -> float:
    """The decrease of the loss that the cubic model predicts for step sizes η, in units of the loss.

    It is ḡᵀη − ½ ηᵀH̄η − (λ_int / 6) ‖Dη‖³ with D = Diag(|D^(3)[s, s, s]|^(1/3)) (``docs/method.md``, section 2).

    Args:
        summary: with the second order, and the third unless ``regularization`` is 0.
        sizes: η, shape (S,).
        regularization: λ_int, not negative.

    Raises:
        ValueError: a derivative was not measured, the regularization is not a number from 0 on, or ``sizes`` has
            another shape.

    Example:
        >>> from newton_summary import Summary
        >>> decrease(Summary(loss=1.0, gradient=[2.0], hessian=[[1.0]], third=[0.0]), torch.tensor([1.0]))
        1.5
    """
    model = Model.of(summary, regularization)
    return model.decrease(sizes_of(model, sizes))


def sizes_of(model: Model, sizes: Tensor) -> Array:
    """Step sizes as an array.

    Raises:
        ValueError: they are not one number for each group.
    """
    if sizes.shape != (len(model),):
        raise ValueError(f"sizes has shape {tuple(sizes.shape)}; {len(model)} groups need ({len(model)},)")
    return sizes.detach().to("cpu", torch.float64).numpy()
