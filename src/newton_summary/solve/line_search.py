"""How far to go along a given step, in the cubic model."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from newton_summary.solve.linear import Array
from newton_summary.solve.model import Model, sizes_of
from newton_summary.solve.step import Status, Step
from newton_summary.summary import Summary


def line_search(
    summary: Summary, step: Step | Tensor | ArrayLike, regularization: float = 1.0, limit: float = 1.0
) -> Step:
    """The best multiple t η of a step, 0 ≤ t ≤ limit, in the cubic model of the summary.

    It minimises −t ḡᵀη + t²/2 ηᵀH̄η + t³ λ_int/6 ‖Dη‖³ exactly.  Where the model rises from the start (ḡᵀη < 0), or
    nowhere falls, t is 0: the result never goes uphill.

    Args:
        summary: with the second order, and the third unless ``regularization`` is 0.  It need not be the one that the
            step was solved for.
        step: a solver's step, or its sizes η, shape (S,), clipped or limited in any way.  A failed step is given back.
        regularization: λ_int, not negative.
        limit: the largest t, not negative; it may be infinite.

    Returns:
        The scaled step, with the decrease that the model of ``summary`` predicts, in units of the loss.  Its status is
        ``UNBOUNDED`` where the limit is infinite and the model falls for ever, ``NOT_FINITE`` where a number in the
        summary or the sizes is not finite.

    Raises:
        ValueError: a derivative was not measured, the sizes have another shape, or the regularization or the limit is
            not a number from 0 on.

    Source:
        docs/method.md, section 2.

    Example:
        >>> import torch
        >>> summary = Summary(loss=1.0, gradient=[1.0, 0.5], hessian=[[1.0, 0.99], [0.99, 1.0]], third=[0.0, 0.0])
        >>> line_search(summary, torch.tensor([25.4, 0.0])).sizes  # a Newton step, clipped: 1 is the best length
        tensor([1., 0.], dtype=torch.float64)
    """
    if not limit >= 0:
        raise ValueError(f"limit must be a number from 0 on, got {limit}")
    limit = float(limit)
    model = Model.of(summary, regularization)
    if isinstance(step, Step) and not step.ok:
        return step
    x = sizes_of(model, step.sizes if isinstance(step, Step) else step)
    if not (model.is_finite() and np.isfinite(x).all()):
        return Step.failed(len(model), Status.NOT_FINITE)
    t = best_length(model, x, limit)
    if math.isinf(t):
        return Step.failed(len(model), Status.UNBOUNDED)
    return model.step(t * x, Status.SOLVED)


def best_length(model: Model, x: Array, limit: float) -> float:
    """The t in [0, limit] at which the model is lowest along t x; 0 where it rises at first."""
    slope, curvature = float(model.gradient @ x), float(x @ model.hessian @ x)
    r = model.radius(x)
    cubic = r * r * r  # as ** would raise where it overflows
    if slope < 0 or (slope == 0 and curvature >= 0):
        return 0.0
    # The derivative −slope + curvature t + cubic t² is convex and not positive at 0, so it has one root, or none.
    root = math.hypot(curvature, 2 * math.sqrt(slope) * math.sqrt(cubic))
    if curvature > 0:
        return min(2 * slope / (curvature + root), limit)
    return min((root - curvature) / (2 * cubic), limit) if cubic > 0 else limit
