"""The minimiser of the quadratic model with an anisotropic cubic term."""

from __future__ import annotations

from newton_summary.solve.bounded import Bounds, Box, solve
from newton_summary.solve.model import Model
from newton_summary.solve.step import Step
from newton_summary.summary import Summary


def cubic(
    summary: Summary, regularization: float = 1.0, *, nonnegative: bool = False, bounds: Bounds | None = None
) -> Step:
    """The global minimiser of −ḡᵀη + ½ ηᵀH̄η + (λ_int / 6) ‖Dη‖³, with D = Diag(|D^(3)[s, s, s]|^(1/3)).

    It solves (H̄ + (λ_int / 2) ‖Dη‖ D²) η = ḡ with that matrix positive semidefinite.  H̄ may be indefinite, D may have
    zeros and spread over many decades; the result is checked against these conditions, which are sufficient.  In the
    hard case two minimisers are equally good: the one with the larger Σ D_s η_s is taken.  With bounds a minimiser in
    the box is found, the global one where H̄ is positive semidefinite (:mod:`~newton_summary.solve.bounded`).

    Args:
        summary: with the second order, and the third (its diagonal is enough) unless ``regularization`` is 0.
        regularization: λ_int, not negative; 0 means no cubic term.
        nonnegative: whether rates must not be negative.
        bounds: lower and upper bounds of the rates, each a number or of shape (S,), infinite where there is none.

    Returns:
        Rates η, shape (S,), in units of the direction; they do not depend on the units of the groups.  A group whose
        entries of ḡ, H̄ and D are all 0 gets 0.  The status is ``UNBOUNDED`` where the model falls for ever: H̄ is not
        positive definite on the groups without a third derivative.  It is ``SINGULAR`` where it is flat there to
        rounding, ``NOT_FINITE`` where a number is not finite, ``NOT_CONVERGED`` where the conditions are not met.

    Raises:
        ValueError: a derivative was not measured, the regularization is not a number from 0 on, or the bounds do not
            fit.

    Source:
        docs/method.md, section 2.

    Example:
        >>> summary = Summary(loss=1.0, gradient=[1.0], hessian=[[-3.0]], third=[8.0])  # D = 2, so −3 + 4 η = 1 / η
        >>> cubic(summary).sizes.round(decimals=6)
        tensor([1.], dtype=torch.float64)
    """
    return solve(Model.of(summary, regularization), Box.of(len(summary), nonnegative, bounds))
