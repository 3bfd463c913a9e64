"""The pace of a training: one scale on all rates, which follows the loss along the steps from look to look."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_MEMORY = 100  # steps, of the averages
_LATEST = 0.15  # of a look in them, at most: rare looks must not each decide
_DOUBLING = 20  # steps, that the trial size needs to double or to halve
_LEAST, _MOST = 2 / 3, 1.4  # of the boldness: λ_1 between 1 and 2.1, for the default of 1.5
_GAIN = 0.004  # of the boldness for each step
_SLOWEST = 45  # steps, for which a comparison may count
_EIGHTH = 0.75  # of the fall between two averages over parts of the run: what an eighth of the run gains
_FALL = 0.3  # that the fall in an eighth of the run counts as, at most, in the logarithm of a loss
_SLIGHT = 0.02  # below which such a fall, or an advantage of the average, is noise
_LASTING = 400  # steps, in which slopes halve the scale at most, where the weights do not oscillate
_NOTHING = 1e-100  # what a loss of 0 counts as
_SMALL = 0.01  # of the usual loss: one that passes through 0 does no harm
_HALVINGS = 40
_STEEPEST = 1e150  # curvature, whose square is a number
_SHORTEST, _LONGEST = 1e-12, 1e3  # trial sizes: where the loss hardly changes, it must not lead them to 0 or infinity
_EXPLODED = 10.0  # times the loss that looks find as a rule
_WORSE = 3.0  # times the loss that the first look has found, and that at the average of the weights
_RETREAT = 4.0  # times shorter is the trial size after an explosion
_RULE = 0.1  # of a look, in the loss that looks find as a rule
_RECENT = 0.3  # of a comparison, in the advantage of the average


class Pace:
    """How long steps are, in multiples of the measured rates.

    A measurement tells how the rates of groups compare.  How long the step may be changes faster than measurements are
    affordable, and takes three evaluations of the loss to see.  At each *look*, the loss of a batch is evaluated at the
    weights and after one and two steps of a trial size, along the step that is about to be taken.

    1. The parabola through the three losses has a slope and a curvature.  They are divided by the loss, so that every
       batch counts the same whatever it holds, and averaged over about the last hundred steps.  The average curvature
       is half the mean and half the root mean square, in which a few steep batches weigh more; and one that has more
       than doubled counts at once: that of the averages is at least half of the last one.
    2. The scale is where the parabola of the averages has its minimum; 0 where it goes uphill.
    3. The trial size follows the scale, but neither doubles nor halves in less than 20 steps, nor in less than a look.
       The scale may be less than that at once, never more, and never beyond a thousand.  Where it has to serve for
       n > 20 steps, it is shortened to √(20/n) of it.
    4. While the loss changes by more than itself over one step of the trial size, that is halved.

    A look is greedy: where noise rules, it would shorten steps before their time.  The *boldness*, a factor on λ_1,
    corrects that.  It weighs two gains.  The loss at a moving average of the weights, which oscillates less, tells what
    shorter steps would gain at once; the fall of that loss in the last eighth of the run tells what steps as long as
    these gain in time.  Where the first is more, steps become shorter, else longer.  And where it is not, slopes that
    are small for one step need not be so for many: a growing curvature shortens the scale as ever, but a falling slope
    halves it in 400 steps at most.

    Between two looks a loss can explode.  Where one is no number, more than ten times what looks find as a rule, or
    three times what the first has found, and three times that of the average of the weights, these should go back to
    their average.

    Attributes:
        scale: what the measured rates are multiplied by; not negative.
        boldness: what λ_1 is multiplied by, between 2/3 and 1.4.
        advantage: of the average of the weights: the logarithm of how many times lower the loss is there, over the
            last few comparisons.
        halvings: how often the loss did not follow, and the trial size was halved.

    Source:
        docs/method.md, section 2; docs/research.md has what each part is worth.

    Example:
        >>> pace = Pace()
        >>> for _ in range(60):  # a valley, two steps of the measured size wide
        ...     here = pace.look(lambda size: 1.0 + (size - 2.0) ** 2, every=5)
        >>> round(pace.scale, 6)
        2.0
    """

    def __init__(self) -> None:
        self.scale = self.boldness = 1.0
        self.halvings = 0
        self.advantage = 0.0
        self._trial = 1.0
        self._slope = self._curvature = self._usual = self._minimum = 0.0
        self._mean = self._square = 0.0  # of the curvatures
        self._count = 0
        self._first: float | None = None  # the logarithm of the loss that the first look has found
        self._level = 0.0  # the same of what looks find as a rule
        self._steady = False  # whether comparisons were made, and the average is not better by more than the run gains
        self._steps = 0
        self._late: float | None = None  # the logarithm of the loss at the average, over the last eighth of the run
        self._longer = 0.0  # the same over the last three eighths

    def look(self, loss_after: Callable[[float], float], every: int) -> float:
        """Looks at the loss of a batch along the step, and follows it.

        Args:
            loss_after: the loss after a step of this multiple of the measured rates.
            every: the number of steps between looks.

        Returns:
            The loss at the weights.
        """
        here = loss_after(0.0)
        once = self._trusted(here, loss_after)
        if once is None:
            return here
        self._follow_the_run(here, every)
        twice = loss_after(2 * self._trial)
        if not math.isfinite(twice):  # the parabola of half the size, of which one point is known
            self._trial, twice = self._trial / 2, once
            once = loss_after(self._trial)
            self.halvings += 1
        least = 0.0
        if once not in (here, twice):  # else what is left of the loss is its rounding, which tells nothing
            flatter = self._average(here, once, twice, every)
            least = self._trial * flatter * 0.5 ** (every / _LASTING) if self._steady else 0.0
        growth = 2 ** min(every / _DOUBLING, 1.0)
        size = min(max(self._minimum, least), growth * self._trial, _LONGEST)
        self._trial = min(max(size, self._trial / growth, _SHORTEST), _LONGEST)
        self.scale = size * math.sqrt(min(_DOUBLING / every, 1.0))
        return here

    def compare(self, average: float, here: float, steps: int) -> None:
        """Follows the loss at the average of the weights, on the batch of a look; the last was so many steps ago."""
        if not (average > 0 and here > 0 and math.isfinite(average / here)):
            return
        ratio = min(max(math.log(average / here), -1.0), 1.0)
        self.advantage += _RECENT * (-ratio - self.advantage)
        fallen = 0.0 if self._late is None else min(max(_EIGHTH * (self._longer - self._late), 0.0), _FALL)
        self._steady = self.advantage < max(fallen, _SLIGHT)
        bolder = (fallen + ratio) / max(fallen, abs(self.advantage), _SLIGHT)
        self.boldness = min(max(self.boldness + _GAIN * min(steps, _SLOWEST) * bolder, _LEAST), _MOST)

    def may_have_exploded(self, here: float) -> bool:
        """Whether the loss of the last look is no number, or far above what looks find as a rule, or found first."""
        if self._first is None:
            return False
        return not here <= min(_EXPLODED * math.exp(self._level), _WORSE * math.exp(self._first))

    def retreats(self, average: float, here: float) -> bool:
        """Whether the weights should go back to their average, where the loss is this.

        If so, there is no step until the next look, and after it a shorter one.
        """
        if not math.isfinite(average) or here <= _WORSE * abs(average):
            return False
        self._trial = max(self._trial / _RETREAT, _SHORTEST)
        self.scale = 0.0
        return True

    def _follow_the_run(self, here: float, every: int) -> None:
        """Takes a loss at the weights, less the advantage of their average, into its averages over parts of the run."""
        if not 0 < here < math.inf:
            return
        self._steps += every
        level, eighth = math.log(here) - self.advantage, self._steps / 8
        if self._late is None:
            self._late = self._longer = level
        self._late += min(every / eighth, 1.0) * (level - self._late)
        self._longer += min(every / (3 * eighth), 1.0) * (level - self._longer)

    def _trusted(self, here: float, loss_after: Callable[[float], float]) -> float | None:
        """The loss after one step of a trial size at which it does not explode; ``None`` if there is no such size."""
        if not math.isfinite(here):
            return None
        for halvings in range(_HALVINGS):
            once = loss_after(self._trial / 2**halvings)
            if abs(once - here) <= max(abs(here), self._usual / 2):
                self._trial /= 2**halvings
                self.halvings += halvings
                return once
        return None

    def _average(self, here: float, once: float, twice: float, every: int) -> float:
        """Takes the parabola through three losses into the averages, and finds the minimum of their parabola.

        It gives the curvature before in units of that now, at most 1; 0 where either is not positive.
        """
        level = math.log(max(abs(here), _NOTHING))
        if self._first is None:
            self._first = self._level = level
        self._level += _RULE * (level - self._level)
        first, second = here - once, here - twice
        self._usual = max(abs(here), self._usual / 2, _NOTHING)
        unit = max(abs(here), _SMALL * self._usual)
        slope = (2 * first - second / 2) / (self._trial * unit)
        curvature = (2 * first - second) / (self._trial**2 * unit)
        self._count += 1
        before = self._curvature
        share = max(3 / (self._count + 2), min(every / _MEMORY, _LATEST))
        self._slope += share * (slope - self._slope)
        self._mean += share * (curvature - self._mean)
        self._square += share * (min(abs(curvature), _STEEPEST) ** 2 - self._square)
        self._curvature = (self._mean + math.sqrt(self._square)) / 2
        steepest = max(self._curvature, curvature / 2)
        self._minimum = 0.0 if self._slope <= 0 else math.inf if steepest <= 0 else self._slope / steepest
        return min(before / steepest, 1.0) if before > 0 and steepest > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)


def share_of_average(steps: int) -> float:
    """The share of the weights in their moving average, which takes them in after so many steps."""
    return min(0.03 * steps, 1.0)
