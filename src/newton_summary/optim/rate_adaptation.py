"""One scale on all learning rates, which follows what the average of the weights tells (docs/method.md, section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_LARGEST = 1e150  # difference of losses, whose square is a number


@dataclass(frozen=True)
class Constants:
    """Those of the rule; docs/research.md has what each is worth.

    Args:
        gain: how fast rates change: while all comparisons agree, by the power ``gain`` of the factor by which the
            number of steps has grown, or by its inverse.
        settling: steps that are added to that number, so that a run does not begin with leaps.
        window: the part of the run, as 1/window of its steps, that the average of the weights is over.
        most: the share of the weights in their average, at most: with all of it, the two would be the same, and tell
            nothing, while comparisons are further apart than a fourth of the run.
        recent: the share of a comparison in what differences are as a rule.
        outlier: how many times the usual difference between weights and average makes a divergence, where the loss is
            above that at the beginning, too.
        cut: what rates are divided by after a divergence.
    """

    gain: float = 2.0
    settling: int = 50
    window: float = 4.0
    most: float = 0.5
    recent: float = 0.3
    outlier: float = 10.0
    cut: float = 2.0


class RateAdaptation:
    """Longer steps while the weights are better than their average, shorter ones while the average is better.

    The average is over the last quarter of the run.  It is behind by what the run gains in an eighth of its length, and
    it is ahead by the noise that steps of this length leave in the weights.  Where the second is more than the first,
    shorter steps would gain more than time does.

    At each *comparison* the loss of a fresh batch is evaluated at the weights and at their average.  Both see the same
    samples, so that a constant in the loss, and most of what differs between batches, cancels; and what is used of the
    difference is its sign, so that a factor on the loss does, too, and large differences of long ago do not outweigh
    those of today.

    Args:
        constants: of the rule.

    Attributes:
        scale: on all rates.
        advantage: of the average: by how much the loss is lower there, as a moving average over the last comparisons.
        cuts: how often the weights diverged.

    Source:
        docs/method.md, section 2.

    Example:
        >>> adaptation = RateAdaptation()
        >>> for step in range(10, 100, 10):  # the average is better: rates fall
        ...     adaptation.compare(weights=1.0, average=0.9, steps=step, gap=10)
        >>> round(adaptation.scale, 2)
        0.14
    """

    def __init__(self, constants: Constants | None = None) -> None:
        self.constants = Constants() if constants is None else constants
        self.scale = 1.0
        self.advantage = 0.0
        self.cuts = 0
        self._square = 0.0  # of the differences, averaged as they are
        self._count = 0
        self._first: float | None = None  # the loss that the first comparison has found at the weights

    def begin(self, weights: float) -> None:
        """Takes the loss at the first weights, which are their own average."""
        self._first = weights if math.isfinite(weights) else None

    def share(self, steps: int, gap: int) -> float:
        """The share of the weights in their average, after so many steps, ``gap`` of them since the last time."""
        window = self.constants.window
        return min(window * gap / (steps + window), self.constants.most)

    def may_have_diverged(self, weights: float, average: float) -> bool:
        """Whether the weights should go back to their average, if that is better, where the losses are these.

        That is where the loss is no number, or higher than at the beginning, higher at the weights than at their
        average, and by far more than it is as a rule.
        """
        if not math.isfinite(weights):
            return True
        if self._first is None or self._count == 0 or not math.isfinite(average):
            return False
        usual = self.constants.outlier * math.sqrt(self._square)
        return weights > self._first and weights - average > usual

    def roll_back(self) -> None:
        """Shorter steps, after a divergence."""
        self.scale /= self.constants.cut
        self.cuts += 1

    def compare(self, weights: float, average: float, steps: int, gap: int, holds: bool = False) -> None:
        """Takes the losses of one batch at the weights and at their average.

        Args:
            weights: the loss at the weights.
            average: the loss at their average.
            steps: the number of steps taken.
            gap: those of them since the last comparison.
            holds: whether the scale stays as it is.
        """
        behind = average - weights
        if not abs(behind) < _LARGEST:
            return
        if self._first is None:
            self._first = weights
        self._count += 1
        share = max(self.constants.recent, 1 / self._count)
        self._square += share * (behind**2 - self._square)
        self.advantage += share * (-behind - self.advantage)
        if behind != 0 and not holds:
            change = self.constants.gain * gap / (steps + self.constants.settling)
            self.scale *= math.exp(math.copysign(change, behind))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {key: value for key, value in vars(self).items() if key != "constants"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
