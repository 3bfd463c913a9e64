"""Newton's step with a ridge: the usual damping, for comparison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from newton_summary._checks import check_not_negative
from newton_summary.solve.bounded import Bounds, Box, solve
from newton_summary.solve.model import Model
from newton_summary.solve.newton import stationary
from newton_summary.solve.step import Step
from newton_summary.summary import Summary


def ridge(summary: Summary, damping: float, *, nonnegative: bool = False, bounds: Bounds | None = None) -> Step:
    """The stationary point of the quadratic model with a ridge: (H̄ + damping · I) η = ḡ.

    One number is added for all groups whatever their units, so a reparameterisation that rescales a group changes the
    training: this solver is not invariant, :func:`~newton_summary.solve.newton` and
    :func:`~newton_summary.solve.cubic` are.

    Args:
        summary: with the second order.
        damping: not negative, in units of the loss per squared rate: of the entries of H̄.
        nonnegative: whether rates must not be negative; then, as with bounds, the model with the ridge is minimised.
        bounds: lower and upper bounds of the rates, each a number or of shape (S,), infinite where there is none.

    Returns:
        Rates η, shape (S,), in units of the direction.  The predicted decrease is that of the model with the ridge.
        The status is ``SINGULAR`` where the matrix is singular to rounding, ``UNBOUNDED`` where the model falls for
        ever in the box, ``NOT_FINITE`` where a number is not finite.

    Raises:
        ValueError: the second order was not measured, the damping is not a number from 0 on, or the bounds do not fit.

    Source:
        docs/method.md, section 3.

    Example:
        >>> ridge(Summary(loss=1.0, gradient=[2.0, 1.0], hessian=[[2.0, 0.0], [0.0, 4.0]]), damping=1.0).sizes
        tensor([0.6667, 0.2000], dtype=torch.float64)
    """
    check_not_negative("damping", damping)
    model, box = Model.of(summary, 0.0), Box.of(len(summary), nonnegative, bounds)
    model = replace(model, hessian=model.hessian + float(damping) * np.eye(len(model)))
    return stationary(model) if box is None else solve(model, box)
