"""What a solver returns: step sizes, what the model predicts of them, and how the solve ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


class Status(enum.Enum):
    """How a solve ended.  The value says what happened and what to try."""

    SOLVED = "solved"
    NOT_FINITE = "the summary has entries that are not finite: measure again, on another batch or in float64"
    OUTLIER = "the loss of this measurement is a thousand times the last one's, which is believed if it is so again"
    SINGULAR = "the matrix is singular: add a ridge or a cubic term"
    UNBOUNDED = (
        "the model is unbounded below: add a cubic term or a ridge where curvature is not positive, or set bounds"
    )
    NOT_CONVERGED = "the iteration ended before its tolerance was met: rescale the direction or set bounds"


@dataclass(frozen=True, eq=False)
class Step:
    """Step sizes for the S groups of a summary: the parameters move by −u_p η_s (docs/method.md, section 2).

    Args:
        sizes: η, shape (S,), float64 on the host.  NaN where the solve failed.
        predicted_decrease: the loss at θ less the value of the solver's own model after the step, in units of the loss.
        status: how the solve ended.
    """

    sizes: Tensor
    predicted_decrease: float
    status: Status = Status.SOLVED

    @property
    def ok(self) -> bool:
        """Whether there is a step to take."""
        return self.status is Status.SOLVED

    @staticmethod
    def failed(size: int, status: Status) -> Step:
        """A step that is no step: S entries of NaN, and the reason."""
        return Step(torch.full((size,), torch.nan, dtype=torch.float64), float("nan"), status)
