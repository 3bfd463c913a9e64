"""The learning-rate multiplier: whether steps as long as line searches allow are worth their noise."""

from __future__ import annotations

import math
from typing import Any

_LEAST, _MOST = 2 / 3, 1.4  # λ_1 between 1 and 2.1, for the default of 1.5
_GAIN = 0.004  # for each step
_SLOWEST = 45  # steps, for which a comparison may count
_EIGHTH = 0.75  # of the fall between two averages over parts of the run: what an eighth of the run gains
_FALL = 0.3  # that the fall in an eighth of the run counts as, at most, in the logarithm of a loss
_SLIGHT = 0.02  # below which such a fall, or an advantage of the average, is noise
_RECENT = 0.3  # of a comparison, in the advantage of the average


class LearningRateMultiplier:
    """A factor on λ_1, which weighs two gains.

    A line search is greedy: where noise rules, it would shorten steps before their time.  The loss at a moving average
    of the weights, which oscillates less, tells what shorter steps would gain at once; the fall of that loss in the
    last eighth of the run tells what steps as long as these gain in time.  Where the first is more, steps become
    shorter, else longer.

    Attributes:
        value: what λ_1 is multiplied by, between 2/3 and 1.4.
        advantage: of the average of the weights: the logarithm of how many times lower the loss is there, over the
            last few comparisons.
        is_steady: whether comparisons were made, and the average is not better by more than the run gains.

    Source:
        docs/method.md, section 2; docs/research.md has what it is worth.

    Example:
        >>> multiplier = LearningRateMultiplier()
        >>> multiplier.follow(2.0, steps=5)
        >>> multiplier.compare(average=1.0, here=2.0, steps=15)  # half the loss, if steps were shorter
        >>> round(multiplier.value, 6)
        0.8
    """

    def __init__(self) -> None:
        self.value = 1.0
        self.advantage = 0.0
        self.is_steady = False
        self._steps = 0
        self._late: float | None = None  # the logarithm of the loss at the average, over the last eighth of the run
        self._longer = 0.0  # the same over the last three eighths

    def follow(self, here: float, steps: int) -> None:
        """Takes a loss at the weights, less the advantage of their average, into its averages over parts of the run.

        Args:
            here: the loss of a batch.
            steps: from the last one on.
        """
        if not 0 < here < math.inf:
            return
        self._steps += steps
        level, eighth = math.log(here) - self.advantage, self._steps / 8
        if self._late is None:
            self._late = self._longer = level
        self._late += min(steps / eighth, 1.0) * (level - self._late)
        self._longer += min(steps / (3 * eighth), 1.0) * (level - self._longer)

    def compare(self, average: float, here: float, steps: int) -> None:
        """Weighs the loss of a batch at the average of the weights; the last was so many steps ago."""
        if not (average > 0 and here > 0 and math.isfinite(average / here)):
            return
        ratio = min(max(math.log(average / here), -1.0), 1.0)
        self.advantage += _RECENT * (-ratio - self.advantage)
        fallen = 0.0 if self._late is None else min(max(_EIGHTH * (self._longer - self._late), 0.0), _FALL)
        self.is_steady = self.advantage < max(fallen, _SLIGHT)
        bolder = (fallen + ratio) / max(fallen, abs(self.advantage), _SLIGHT)
        self.value = min(max(self.value + _GAIN * min(steps, _SLOWEST) * bolder, _LEAST), _MOST)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
