"""The line search: how long a step may be, one factor on all rates, followed from search to search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from newton_summary.optim.multiplier import LearningRateMultiplier

_MEMORY = 100  # steps, of the averages
_LATEST = 0.15  # of a search in them, at most: rare ones must not each decide
_DOUBLING = 20  # steps, that the trial size needs to double or to halve
_LASTING = 400  # steps, in which slopes halve the step size at most, where the weights do not oscillate
_NOTHING = 1e-100  # what a loss of 0 counts as
_SMALL = 0.01  # of the usual loss: one that passes through 0 does no harm
_HALVINGS = 40
_STEEPEST = 1e150  # curvature, whose square is a number
_SHORTEST, _LONGEST = 1e-12, 1e3  # trial sizes: where the loss hardly changes, it must not lead them to 0 or infinity
_DIVERGED = 10.0  # times the loss that searches find as a rule
_WORSE = 3.0  # times the loss that the first search has found, and that at the average of the weights
_ROLLBACK = 4.0  # times shorter is the trial size after a divergence
_RULE = 0.1  # of a search, in the loss that they find as a rule


class LineSearch:
    """How long steps are, in multiples of the measured rates.

    A measurement tells how the rates of groups compare.  How long the step may be changes faster than measurements are
    affordable, and takes three evaluations of the loss to see.  At each search, the loss of a batch is evaluated at the
    weights and after one and two steps of a trial size, along the step that is about to be taken.

    1. The parabola through the three losses has a slope and a curvature.  They are divided by the loss, so that every
       batch counts the same whatever it holds, and averaged over about the last hundred steps.  The average curvature
       is half the mean and half the root mean square, in which a few steep batches weigh more; and one that has more
       than doubled counts at once: that of the averages is at least half of the last one.
    2. The step size is where the parabola of the averages has its minimum; 0 where it goes uphill.
    3. The trial size follows the step size, but neither doubles nor halves in less than 20 steps, nor from one search
       to the next.  The step size may be less than that at once, never more, and never beyond a thousand.  Where it
       has to serve for n > 20 steps, it is shortened to √(20/n) of it.
    4. While the loss changes by more than itself over one step of the trial size, that is halved.

    A search is greedy.  Where its multiplier finds that longer steps gain more in time than shorter ones would at once,
    slopes that are small for one step need not be so for many: a growing curvature shortens the step as ever, but a
    falling slope halves it in 400 steps at most.

    Between two searches a loss can diverge.  Where one is no number, more than ten times what they find as a rule, or
    three times what the first has found, and three times that of the average of the weights, these should go back to
    their average.

    Attributes:
        step_size: what the measured rates are multiplied by; not negative.
        multiplier: what λ_1 is multiplied by.
        halvings: how often the loss did not follow, and the trial size was halved.

    Source:
        docs/method.md, section 2; docs/research.md has what each part is worth.

    Example:
        >>> search = LineSearch()
        >>> for _ in range(60):  # a valley, two steps of the measured size wide
        ...     here = search.search(lambda size: 1.0 + (size - 2.0) ** 2, every=5)
        >>> round(search.step_size, 6)
        2.0
    """

    def __init__(self) -> None:
        self.step_size = 1.0
        self.multiplier = LearningRateMultiplier()
        self.halvings = 0
        self._trial = 1.0
        self._slope = self._curvature = self._usual = self._minimum = 0.0
        self._mean = self._square = 0.0  # of the curvatures
        self._count = 0
        self._first: float | None = None  # the logarithm of the loss that the first search has found
        self._level = 0.0  # the same of what searches find as a rule

    def search(self, loss_after: Callable[[float], float], every: int) -> float:
        """Evaluates the loss of a batch along the step, and follows it.

        Args:
            loss_after: the loss after a step of this multiple of the measured rates.
            every: the number of steps between searches.

        Returns:
            The loss at the weights.
        """
        here = loss_after(0.0)
        once = self._trusted(here, loss_after)
        if once is None:
            return here
        self.multiplier.follow(here, every)
        twice = loss_after(2 * self._trial)
        if not math.isfinite(twice):  # the parabola of half the size, of which one point is known
            self._trial, twice = self._trial / 2, once
            once = loss_after(self._trial)
            self.halvings += 1
        least = 0.0
        if once not in (here, twice):  # else what is left of the loss is its rounding, which tells nothing
            flatter = self._average(here, once, twice, every)
            least = self._trial * flatter * 0.5 ** (every / _LASTING) if self.multiplier.is_steady else 0.0
        growth = 2 ** min(every / _DOUBLING, 1.0)
        size = min(max(self._minimum, least), growth * self._trial, _LONGEST)
        self._trial = min(max(size, self._trial / growth, _SHORTEST), _LONGEST)
        self.step_size = size * math.sqrt(min(_DOUBLING / every, 1.0))
        return here

    def may_have_diverged(self, here: float) -> bool:
        """Whether the loss of the last search is no number, or far above what they find as a rule, or found first."""
        if self._first is None:
            return False
        return not here <= min(_DIVERGED * math.exp(self._level), _WORSE * math.exp(self._first))

    def has_diverged(self, here: float, average: float) -> bool:
        """Whether a loss that may have diverged is far above that at the average of the weights, too."""
        return math.isfinite(average) and not here <= _WORSE * abs(average)

    def roll_back(self) -> None:
        """Lets no step be taken until the next search, and after it a shorter one."""
        self._trial = max(self._trial / _ROLLBACK, _SHORTEST)
        self.step_size = 0.0

    def _trusted(self, here: float, loss_after: Callable[[float], float]) -> float | None:
        """The loss after one step of a trial size at which it does not diverge; ``None`` if there is no such size."""
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
        return {**vars(self), "multiplier": self.multiplier.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        own = dict(state)
        self.multiplier.load_state_dict(own.pop("multiplier"))
        vars(self).update(own)
