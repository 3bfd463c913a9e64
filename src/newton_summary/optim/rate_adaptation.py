"""A scale on each group's learning rate, which follows what the average of the weights tells (docs/method.md, 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from newton_summary.optim.loss_level import LossLevel

_LARGEST = 1e150  # difference of losses, whose square is a number


@dataclass(frozen=True)
class Constants:
    """Those of the rule; docs/research.md has what each is worth.

    Args:
        gain: how fast rates change: while all comparisons agree, by the power ``gain`` of the factor by which the
            number of steps has grown, or by its inverse.
        settling: steps that are added to that number, so that a run does not begin with leaps.
        negligible: the share of the largest part below which a group's noise costs too little for shorter steps.
        window: the part of the run, as 1/window of its steps, that the average of the weights is over.
        part: of the way from the weights to their average, where the two are compared.
        recent: the share of a comparison in what differences are as a rule.
        outlier: how many times the usual difference between weights and average makes a divergence, where the loss is
            above that at the beginning, too.
        leap: the same elsewhere.
        cut: what rates are divided by after a divergence, or where the loss has risen.
    """

    gain: float = 2.0
    settling: int = 50
    negligible: float = 0.01
    window: float = 12.0
    part: float = 2 / 3
    recent: float = 0.3
    outlier: float = 3.0
    leap: float = 100.0
    cut: float = 4.0


class RateAdaptation:
    """Longer steps for groups whose weights are better than their average, shorter ones where the average is better.

    The average is over the last twelfth of the run.  It is behind by what the run gains in a thirteenth of its length,
    and it is ahead by the noise that steps of this length leave in the weights.  Where the second is more than the
    first, shorter steps would gain more than time does.

    The loss of the average, less that of the weights, is the sum over the groups of gradient times difference, on the
    way between the two: half way exactly so where the loss is quadratic, and at two thirds of it with two thirds of the
    noise.  Interactions between groups count half for either.

    At each *comparison* these parts are found on a fresh batch.  A constant in the loss does not enter them; what is
    used of each is its sign, so that a factor on the loss, and what a group matters for it, does not, either, and large
    differences of long ago do not outweigh those of today.  But steps become shorter only where that gains something:
    for a group whose noise costs less than a hundredth of the largest part, they do so by as much less.  Layers that
    are saturated, or wait on a plateau, have gradients of noise that costs nothing, and have to move to come back.

    Where steps are so long that the weights are thrown about between the walls of a valley, their average is no better
    than they are, and the comparison tells nothing.  The loss does: where its level has risen, all steps become a
    quarter as long.

    Args:
        groups: S, how many there are.
        constants: of the rule.

    Attributes:
        scales: on the rate of each group, S numbers.
        advantage: of the average: by how much the loss is lower there, as a moving average over the last comparisons.
        cuts: how often the weights diverged.
        rises: how often the loss rose.

    Source:
        docs/method.md, section 2.

    Example:
        >>> adaptation = RateAdaptation(groups=2)
        >>> for step in range(10, 100, 10):  # the average is worse for the first group, and better for the second
        ...     adaptation.compare([0.01, -0.02], steps=step, gap=10)
        >>> [round(scale, 2) for scale in adaptation.scales]
        [6.93, 0.14]
    """

    def __init__(self, groups: int = 1, constants: Constants | None = None) -> None:
        self.constants = Constants() if constants is None else constants
        self.scales = [1.0] * groups
        self.advantage = 0.0
        self.cuts = self.rises = 0
        self._level = LossLevel()
        self._square = 0.0  # of the differences, averaged as they are
        self._count = 0
        self._first: float | None = None  # the loss at the first weights

    def begin(self, loss: float) -> None:
        """Takes the loss at the first weights, which are their own average."""
        self._first = loss if math.isfinite(loss) else None

    def share(self, steps: int) -> float:
        """The share of the weights in their average, after so many steps."""
        return self.constants.window / (steps + self.constants.settling)

    def is_suspicious(self, loss: float, gain: float = 0.0) -> bool:
        """Whether weights are none that training leads to.

        Args:
            loss: on the way from them to their average, or at that.
            gain: by how much the loss is lower at the average, as a comparison tells.
        """
        if not math.isfinite(loss):
            return True
        return self._count > 0 and (self._is_above_first(loss) or gain > self._least(loss))

    def has_diverged(self, loss: float, average: float) -> bool:
        """Whether the weights should go back to their average, where they are suspicious.

        That is where the loss is lower at the average by far more than the two differ as a rule, and by ``outlier``
        times what that is above the loss at the beginning: else the batch may be what is wrong, and the average is
        nothing to go back to.
        """
        if not math.isfinite(average):
            return False
        gain = loss - average if math.isfinite(loss) else math.inf
        rise = 0.0 if self._first is None else average - self._first
        return gain > max(self._least(loss), self.constants.outlier * rise)

    def _is_above_first(self, loss: float) -> bool:
        return self._first is not None and loss > self._first

    def _least(self, loss: float) -> float:
        """The least difference that makes a divergence: above the first loss three usual ones, below it a hundred."""
        times = self.constants.outlier if self._is_above_first(loss) else self.constants.leap
        return times * math.sqrt(self._square)

    def roll_back(self) -> None:
        """Shorter steps, after a divergence."""
        self._shorten()
        self.cuts += 1

    def _shorten(self) -> None:
        self.scales = [scale / self.constants.cut for scale in self.scales]

    def compare(self, behind: Sequence[float], steps: int, gap: int, loss: float | None = None) -> None:
        """Takes a comparison.

        Args:
            behind: by how much the loss of the average is higher, as the parts of the groups: S numbers.
            steps: the number of steps taken.
            gap: those of them since the last comparison.
            loss: on the way to the average, if known.
        """
        total = sum(behind)
        if not abs(total) < _LARGEST:
            return
        self._count += 1
        share = max(self.constants.recent, 1 / self._count)
        self._square += share * (total**2 - self._square)
        self.advantage += share * (-total - self.advantage)
        change = self.constants.gain * gap / (steps + self.constants.settling)
        noticeable = self.constants.negligible * max(map(abs, behind)) or 1.0
        signs = [1.0 if part > 0 else max(part / noticeable, -1.0) for part in behind]
        self.scales = [scale * math.exp(change * sign) for scale, sign in zip(self.scales, signs, strict=True)]
        if loss is not None and math.isfinite(loss) and self._level.has_risen(loss, steps, gap):
            self._shorten()
            self.rises += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        own = {key: value for key, value in vars(self).items() if key not in ("constants", "_level")}
        return {**own, "level": self._level.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._level.load_state_dict(state.get("level", LossLevel().state_dict()))
        vars(self).update({key: value for key, value in state.items() if key != "level"})
