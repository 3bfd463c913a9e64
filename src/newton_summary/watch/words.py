"""What there is to say of factors on learning rates, in words that hold for tens of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

Names: TypeAlias = Sequence[str]

NOTABLE = 1.5
"""A factor on all rates this far from what is certain is put into words."""

SHARED_NOISE = 19.0
"""How much shorter steps may have to be over tens of steps than for one alone.

A direction that averages gradients with β = 0.9 divides the variance of their noise by (1 + β)/(1 − β); the next step
is best for the little noise that is left, but consecutive directions share it.  Where a direction is all noise, the
best rate in the long run is that many times smaller; where it is all signal, it is the same."""

DISTINCT = math.sqrt(SHARED_NOISE)
"""A group whose factor is this far from the others', either way, is put into words.

If one may be all noise and another all signal, their factors may differ by 19 over tens of steps though both have the
right rate: what is within √19 of the middle of them tells nothing."""

_NONE_OFF = "leave the rates as they are: over tens of steps none is surely off"

LEAVE = f"{_NONE_OFF}, whatever suits one step alone"
"""What is said where nothing is wrong, and no interval tells a factor from 1."""

LEAVE_SO_FAR = "leave the rates as they are: from one batch none is surely off"
"""What is said where nothing is wrong, and there are no intervals."""

_RAISES = 0.5
"""A step raises a quadratic loss where the best factor on it is below a half."""

_TOO_LARGE = " are too large for the next step, "
_FROM_ONE = " (from one batch)"

UNMOVED = ("this step does not move it", "this step does not move them")
"""How sentences end about a group, and about several, that have no part in a step."""

UNSURE = "no descent along this step that can be told from noise"
"""How a sentence ends about a group whose descent may be noise."""


def tells(words: str) -> bool:
    """Whether words about groups say that something is off, beyond noise."""
    return bool(words) and not words.endswith((*UNMOVED, UNSURE))


def in_one(names: Sequence[str], singular: str, plural: str) -> list[str]:
    """One sentence about some groups, if there are any."""
    if len(names) < 2:
        return [f"`{name}`: {singular}" for name in names]
    first, second, *others = names
    listed = f"`{first}`, `{second}` and {len(others)} more" if others else f"`{first}` and `{second}`"
    return [f"{listed}: {plural}"]


def words_of(
    name: str, factor: float, low: float, high: float, middle: float, *, moves: bool, bounded: bool = True
) -> str:
    """How a group's factor compares with the middle of all, where its interval warrants it.

    Where nothing bounds the steps of the groups in the middle, no number says by how much others differ from them.
    """
    single = math.isnan(low)
    if not moves:
        return f"`{name}`: {UNMOVED[0]}"
    if factor == 0 and (single or high == 0):
        return f"`{name}`: no descent along this step{_FROM_ONE * single}"
    if factor == 0:
        return f"`{name}`: {UNSURE}"
    if math.isinf(factor) and (single or math.isinf(low)):
        return f"`{name}`: nothing in the model limits its step{_FROM_ONE * single}"
    factor, low, high = factor / middle, low / middle, high / middle
    if bounded and factor >= DISTINCT and (single or low > 1):
        amount = f"at least {_short(low)}×" if math.isinf(factor) else f"{_short(factor)}×{_range(low, high)}"
        return f"`{name}`: moves {amount} less than suits it, next to the other groups"
    if factor <= 1 / DISTINCT and (single or high < 1):
        if not bounded:
            return f"`{name}`: moves more than suits it, next to the other groups{_FROM_ONE * single}"
        amount = _times_shorter(factor, low, high)
        return f"`{name}`: moves {amount} more than suits it, next to the other groups"
    return ""


class Factor(NamedTuple):
    """A factor on learning rates, and the ends of its interval, which are NaN where a single batch was measured."""

    best: float
    low: float
    high: float


def overall(
    middle: Factor,
    common: Factor,
    stands_out: bool,
    too_far: Names = (),
    too_little: Names = (),
    stalled: bool = False,
) -> str:
    """What to do about all rates.

    That they are too small is said where it holds of the group in the middle and of all together: one group that limits
    the step may be far from the middle.  That they are too large is also said where only all together are, because
    groups interact, and the next step surely raises the loss: that is so where the best factor on it is below a half.

    Args:
        middle: the median factor, of groups alone, and the medians of the ends of their intervals.
        common: the factor on all rates alike.
        stands_out: whether there is something to say of single groups; then what is said of the middle is not of all.
        too_far: the groups whose intervals lie below 1, so that the next step alone would better be shorter.
        too_little: those whose intervals lie above 1.
        stalled: whether the loss does not fall, so that it is not said that nothing is wrong.
    """
    single = math.isnan(middle.low)
    whose = "the rates in the middle of the groups" if stands_out else "all rates"
    best, low, high = _nearer(middle.best, common.best), min(middle.low, common.low), max(middle.high, common.high)
    best = low if math.isinf(best) and not single else best  # what is sure, where nothing in the mean limits a step
    if best > NOTABLE * SHARED_NOISE and (single or low > SHARED_NOISE):
        if math.isinf(best):
            return f"{whose} are too small, nothing in the model limits them{_FROM_ONE * single}"
        amount = f"at least {_short(best / SHARED_NOISE)}× ({_short(best)}× for one step"
        return f"{whose} are too small, {amount}{', from one batch' * single})"
    if best < 1 / NOTABLE and (single or high < 1):
        return f"{whose}{_TOO_LARGE}{_times_shorter(best, low, high)}"
    if not stands_out and 0 < common.high < _RAISES:
        return f"{whose}{_TOO_LARGE}{_times_shorter(*common)}"
    return "" if stands_out or stalled else _leave(too_far, too_little, single and not math.isnan(middle.best))


def _nearer(factor: float, other: float) -> float:
    """The factor, or the other one where that is nearer to 1; 1 where they lie on both sides of it."""
    return max(factor, min(other, 1.0)) if factor < 1 else min(factor, max(other, 1.0))


def _leave(too_far: Names, too_little: Names, single: bool) -> str:
    """That nothing is wrong, and what tables beside it show nevertheless."""
    if single:
        return LEAVE_SO_FAR
    parts = [
        (f"`{names[0]}` moves" if len(names) == 1 else f"{len(names)} groups move") + f" too {how}"
        for names, how in ((too_far, "far"), (too_little, "little"))
        if names
    ]
    return f"{_NONE_OFF}, though for one step alone {' and '.join(parts)}" if parts else LEAVE


def were_too_large(words: str, step: int) -> str:
    """That all rates were too large before the step of this number, where words about all rates said so then."""
    whose, found, amount = words.partition(_TOO_LARGE)
    return f"before step {step:,} {whose} were too large, {amount}" if found else ""


def _times_shorter(factor: float, low: float, high: float) -> str:
    """How many times shorter steps should be, by a factor below 1 on them; where that is 0, its bound is told."""
    if not factor:
        return f"at least {_short(1 / high)}×"
    return f"{_short(1 / factor)}×{_range(_inverse(high), _inverse(low))}"


def _range(low: float, high: float) -> str:
    if math.isnan(low):
        return _FROM_ONE
    return f" (at least {_short(low)}×)" if math.isinf(high) else f" ({_short(low)}–{_short(high)}×)"


def _inverse(factor: float) -> float:
    return 1 / factor if factor else math.inf


def _short(value: float) -> str:
    """Two digits: 0.62, 6, 6.3, 63, 630."""
    if value == 0 or not math.isfinite(value):
        return {0.0: "0", math.inf: "∞"}.get(value, "?")
    digits = 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:g}" if 1e-3 <= rounded < 1e5 else f"{rounded:.1e}"


def times(value: float) -> str:
    """A factor as tables have it: 0.62×, 6.3×, 210×."""
    return "–" if math.isnan(value) else f"{_short(value)}×"


def between(low: float, high: float) -> str:
    """An interval of factors as tables have it; a dash where there is none."""
    return "–" if math.isnan(low) else f"{_short(low)}–{_short(high)}×"
