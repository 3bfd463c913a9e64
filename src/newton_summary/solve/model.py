"""The model of the loss change that every solver minimises, as plain float64 arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from newton_summary._checks import check_not_negative
from newton_summary.solve.linear import EPSILON, Array
from newton_summary.solve.step import Status, Step
from newton_summary.summary import Summary

ACCEPTED_ERROR = 1e-9
"""The largest backward error of a solution that counts as solved; most are near 1e-16."""


@dataclass(frozen=True)
class Model:
    """m(η) = −gᵀη + ½ ηᵀHη + ⅓ ‖Dη‖³ (``docs/method.md``, section 2).

    The weight λ_int / 6 of the cubic term is part of D.  With r = ‖Dη‖, stationary points satisfy (H + r D²) η = g.

    Args:
        gradient: g, shape (n,).
        hessian: H, shape (n, n), symmetric.
        cubic: the diagonal of D, shape (n,), not negative.
    """

    gradient: Array
    hessian: Array
    cubic: Array

    def __len__(self) -> int:
        return len(self.gradient)

    @staticmethod
    def of(summary: Summary, regularization: float) -> Model:
        """The model of a summary, with one transfer from its device.

        Raises:
            ValueError: a derivative that is needed was not measured, or the regularization is not a number from 0 on.
        """
        check_not_negative("regularization", regularization)
        regularization = float(regularization)
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
        return float(np.linalg.norm(self.cubic * x))

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
        longer = np.linalg.norm(self.cubic * (x + moves), axis=1) + r
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
        size = np.abs(x)
        result: Array = (
            np.abs(self.hessian) @ size + self.radius(x) * self.cubic**2 * size + np.abs(self.gradient) + self.level(x)
        )
        return result

    def level(self, x: Array) -> Array:
        """The slopes, shape (n,), that change the model by no more than the square of a rounding error."""
        size, stiffness = np.abs(x), self.radius(x) * self.cubic**2
        curvature = np.abs(np.diag(self.hessian)) + stiffness
        value = size @ (np.abs(self.hessian) @ size + stiffness * size + np.abs(self.gradient))
        result: Array = EPSILON * np.sqrt(curvature * value)
        return result

    def errors(self, x: Array) -> Array:
        """Each entry of the slope relative to its magnitude, without sign: the componentwise backward errors.

        They are the same in all units of the groups and of the loss.
        """
        magnitude = self.magnitude(x)
        return np.divide(np.abs(self.slope(x)), magnitude, out=np.zeros(len(x)), where=magnitude != 0)

    # Other forms of it ------------------------------------------------------------------------------------------------

    def scaled(self, factors: Array) -> Model:
        """The model as a function of x / factors."""
        return Model(self.gradient * factors, self.hessian * factors * factors[:, None], self.cubic * factors)

    def per_length(self, length: float) -> Model:
        """The model as a function of x / length, divided by the square of it: curvatures stay what they are."""
        return Model(self.gradient / length, self.hessian, self.cubic * np.cbrt(length))

    def restricted(self, free: Array) -> Model:
        """The model of the coordinates in a mask, the others being 0."""
        return Model(self.gradient[free], self.hessian[np.ix_(free, free)], self.cubic[free])

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


def decrease(summary: Summary, sizes: Tensor | ArrayLike, regularization: float = 1.0) -> float:
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


def sizes_of(model: Model, sizes: Tensor | ArrayLike) -> Array:
    """Step sizes as an array.

    Raises:
        ValueError: they are not one number for each group.
    """
    sizes = torch.as_tensor(sizes, dtype=torch.float64, device="cpu")  # of a list by itself torch would make float32
    if sizes.shape != (len(model),):
        raise ValueError(f"sizes has shape {tuple(sizes.shape)}; {len(model)} groups need ({len(model)},)")
    return sizes.detach().numpy()
