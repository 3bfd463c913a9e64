"""From repeated measurements to advice: how each group's learning rate should change, and how sure that is.

Pure functions of summaries along one direction, an optimizer's next step: a factor of 1 keeps a group's learning rate
as it is.  Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from newton_summary import solve
from newton_summary._checks import check_not_negative
from newton_summary._html import Cell, aligned, table
from newton_summary.solve import Status
from newton_summary.summary import Summary

Array: TypeAlias = NDArray[Any]

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

STRONG = 0.5
"""A correlation of this size between two groups is put into words."""

LEAVE = "leave the rates as they are: none is off by more than one step can tell"
"""What is said where nothing is wrong."""

UNMOVED = ("this step does not move it", "this step does not move them")
"""How sentences end about a group, and about several, that have no part in a step."""

_UNSURE = "no descent along this step that can be told from noise"

_REACH = 1e6  # an interval is searched this far on both sides of its scale; beyond lie 0 and infinity
_GRID = 400
_HALVINGS = 55
_MOST_PAIRS = 5
_NO_DESCENT = 1e-3  # where a group ranks that does not descend at all


@dataclass(frozen=True)
class GroupAdvice:
    """What one group is told.

    Args:
        name: of the group.
        alone: the factor on its learning rate that is best when all other groups stand still.  0: no descent; inf:
            nothing in the model limits it.
        low: the lower end of the interval of ``alone``; NaN where a single batch was measured.
        high: the upper end.
        joint: its factor where all groups change together, their interactions counted.  NaN where that has no solution.
        words: how it compares with the other groups, in words; empty where there is nothing to say.
    """

    name: str
    alone: float
    low: float
    high: float
    joint: float
    words: str


@dataclass(frozen=True)
class Pair:
    """Two groups that interact strongly: H̄_ij / √|H̄_ii H̄_jj| is their correlation."""

    first: str
    second: str
    correlation: float

    @property
    def words(self) -> str:
        """What that means for their rates."""
        if self.correlation > 0:
            return f"`{self.first}` and `{self.second}` pull against each other ({self.correlation:+.2f})"
        return f"`{self.first}` and `{self.second}` help each other ({self.correlation:+.2f})"


@dataclass(frozen=True)
class Advice:
    """Advice for every group of a partition.

    Args:
        groups: one entry for each group.
        pairs: the strongest interactions, the strongest first.
        predicted_decrease: of the loss, in the quadratic model, by the step as it is (all factors 1).
        joint_decrease: of the loss, in the cubic model, by the step with all joint factors.
        status: how the joint solve ended.
        batches: how many batches were measured.
        level: the confidence of the intervals.
        middle: the median factor of the groups along which the loss falls: what all rates share.  NaN where there is
            none.
        overall: what to do about all rates, in words; empty where only single groups stand out.
    """

    groups: tuple[GroupAdvice, ...]
    pairs: tuple[Pair, ...]
    predicted_decrease: float
    joint_decrease: float
    status: Status
    batches: int
    level: float
    middle: float
    overall: str

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> GroupAdvice:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group is called {name!r}: the groups are {', '.join(g.name for g in self.groups)}")

    def ranked(self) -> list[GroupAdvice]:
        """The groups, those whose factors are furthest from the median of all factors first.

        What all groups share, such as a learning rate that is too small everywhere, singles out none of them.
        """
        decades = np.array([_clear_decades(group.alone, group.low, group.high) for group in self.groups])
        distances = np.abs(decades - np.nanmedian(decades)) if not np.isnan(decades).all() else decades
        order = sorted(range(len(self)), key=lambda i: -np.nan_to_num(distances[i], nan=-1.0))
        return [self.groups[i] for i in order]

    @property
    def headline(self) -> str:
        """The one sentence to read first: what is wrong most, and how much else is; or that nothing is."""
        off = [group.words for group in self.ranked() if tells(group.words)]
        first, *others = [self.overall] * bool(self.overall) + off
        counted = f"{len(others)} group{'s' * (len(others) != 1)}" if self.overall else f"{len(others)} more"
        return f"{first}; {counted} stand{'s' * (len(others) == 1)} out" if others else first

    def sentences(self) -> list[str]:
        """Everything that is worth saying: about all rates, the groups that differ most from the rest, the pairs.

        Groups of which nothing can be said for the same reason share a sentence.
        """
        ranked = self.ranked()
        told = [group.words for group in ranked if tells(group.words)]
        for reason, plural in ((_UNSURE, _UNSURE), UNMOVED):
            told += _in_one([group.name for group in ranked if group.words.endswith(reason)], reason, plural)
        return [self.overall] * bool(self.overall) + told + [pair.words for pair in self.pairs]

    def to_dict(self) -> dict[str, float | str | None]:
        """Flat, with plain values, as what logs dictionaries takes it: ``None`` stands for infinite or unknown.

        Keys are ``alone/NAME``, ``low/NAME``, ``high/NAME`` and ``joint/NAME`` for every group, the two predicted
        decreases, ``middle``, ``batches``, ``level``, ``status``, and ``words``, all sentences in one.
        """
        flat: dict[str, float | str | None] = {
            f"{key}/{group.name}": _finite(getattr(group, key))
            for key in ("alone", "low", "high", "joint")
            for group in self.groups
        }
        flat |= {
            key: _finite(getattr(self, key)) for key in ("predicted_decrease", "joint_decrease", "middle", "level")
        }
        return flat | {"batches": self.batches, "status": self.status.name, "words": "; ".join(self.sentences())}

    def _repr_html_(self) -> str:
        """A table for notebooks, with all sentences; groups that they do not single out are grey."""
        rows = [
            [Cell(text, grey=not tells(g.words)) for text in (g.name, times(g.alone), interval, joint)]
            for g in self.groups
            for interval, joint in [(_interval(g.low, g.high), times(g.joint))]
        ]
        caption = f"Factors on the learning rates, for one step; from {self.batches} batches"
        header = ("group", "alone", f"{self.level:.0%} interval", "jointly")
        return table(caption, header, rows, self.sentences())

    def __repr__(self) -> str:
        interval = f"{self.level:.0%} interval"
        rows = [("group", "alone", interval, "jointly")]
        rows += [(g.name, times(g.alone), _interval(g.low, g.high), times(g.joint)) for g in self.groups]
        lines = [f"Advice from {self.batches} batch{'es' if self.batches != 1 else ''}: factors on the learning rates"]
        return "\n".join([*lines, *aligned(rows), *(f"  {sentence}" for sentence in self.sentences())])


def advise(summaries: Sequence[Summary], *, regularization: float = 1.0, level: float = 0.9) -> Advice:
    """Advice from summaries of several batches, all along one direction: the optimizer's next step.

    The factor of a group alone minimises its own cubic model −ḡ_s η + ½ H̄_ss η² + (λ_int / 6) |D_sss| |η|³ of the mean
    of the summaries; scaling a group's direction by c divides it by c.  The joint factors minimise the cubic model of
    all groups over η ≥ 0 (docs/method.md, section 2).

    Intervals invert a t-test: η is in the interval of group s unless the slope of the cubic model at η, which is linear
    in each batch's derivatives, differs from 0 over the batches (Fieller's method, with a cubic term).  So they need no
    approximation of a quotient, may reach 0 (descent is not sure) or infinity (curvature is not sure), and are
    right for few batches as far as the derivatives of a batch are normal.  The batches must be independent of the
    direction and of each other.

    Factors are those of one step.  Words are about what holds for tens of them: they compare a group with the middle
    of all, and speak of all rates where even a direction that is nothing but noise leaves something to gain
    (:data:`SHARED_NOISE`, :data:`DISTINCT`).

    Args:
        summaries: of batches, with H̄, over the same groups; each counts by its weight.
        regularization: λ_int, the weight of the cubic term.
        level: the confidence of the intervals, between 0 and 1.

    Raises:
        ValueError: there are no summaries, H̄ was not measured, an entry is not finite, or the level is out of range.

    Example:
        >>> curvature = 0.1 * torch.eye(3)
        >>> slopes = [[0.6 + e, 0.1 + e, 0.1 - e] for e in (-0.01, 0.0, 0.01)]
        >>> advise([Summary(1.0, g, curvature, [0.0] * 3, ["head", "body", "stem"]) for g in slopes]).sentences()
        ['`head`: moves 6× (5.8–6.2×) less than suits it, next to the other groups']
    """
    check_not_negative("regularization", regularization)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    parts = [summary.cpu() for summary in summaries]
    mean = Summary.mean(parts)
    hessian = mean.tensor(2)
    if not all(part.is_finite() for part in parts):
        raise ValueError("a summary has entries that are not finite: leave it out")
    slopes = _slopes(parts, mean, regularization)
    alone = _best(mean, regularization)
    low, high = _intervals(slopes, np.array([part.weight for part in parts]), alone, level)
    step = solve.cubic(mean, regularization if mean.third is not None else 0.0, nonnegative=True)
    moved = ((mean.gradient != 0) | (hessian.diagonal() != 0)).numpy()
    falls = moved & (alone > 0)
    middle = _middle(alone[falls], low[falls], high[falls])
    groups = tuple(
        GroupAdvice(name, *numbers, words=_words(name, *numbers[:3], middle, moves=moves))
        for name, numbers, moves in zip(
            mean.names,
            zip(alone.tolist(), low.tolist(), high.tolist(), step.sizes.tolist(), strict=True),
            moved.tolist(),
            strict=True,
        )
    )
    stands_out = any(tells(group.words) for group in groups)
    return Advice(
        groups=groups,
        pairs=_strong_pairs(parts, mean, level),
        predicted_decrease=float(mean.gradient.sum() - hessian.sum() / 2),
        joint_decrease=step.predicted_decrease,
        status=step.status,
        batches=len(parts),
        level=level,
        middle=middle,
        overall=_overall(middle, _middle(low[falls]), _middle(high[falls]), stands_out),
    )


def alone(summary: Summary, regularization: float = 1.0) -> Tensor:
    """The factor of each group when all others stand still, shape (S,), float64 on the host.

    0 where the loss does not fall along the group's direction, infinity where nothing limits the step.
    """
    return torch.from_numpy(_best(summary.cpu(), regularization))


def correlations(summary: Summary) -> Tensor:
    """Those of :meth:`~newton_summary.Summary.correlations`, shape (S, S)."""
    return summary.correlations()


# The factor of one group ----------------------------------------------------------------------------------------------


def _best(summary: Summary, regularization: float) -> Array:
    """The minimiser over η ≥ 0 of each group's cubic model, shape (S,), by a quadratic formula free of cancellation."""
    gradient, curvature, cubic = _own_terms(summary, regularization)
    root = np.sqrt(curvature**2 + 4 * cubic * np.maximum(gradient, 0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # where nothing limits a step, infinity
        bent = 2 * gradient / (curvature + root)
        straight = (root - curvature) / (2 * cubic)  # where curvature is negative
    best = np.where(curvature >= 0, bent, straight)
    return np.where(gradient > 0, best, 0.0)


def _own_terms(summary: Summary, regularization: float) -> tuple[Array, Array, Array]:
    """ḡ_s, H̄_ss and (λ_int / 2) |D_sss|: the slope of group s at η is ḡ_s − H̄_ss η − (λ_int / 2) |D_sss| η²."""
    third = summary.third_diagonal
    gradient, curvature = summary.gradient.numpy(), summary.tensor(2).diagonal().numpy()
    cubic = np.zeros_like(gradient) if third is None else regularization / 2 * third.abs().numpy()
    return gradient, curvature, cubic


def _slopes(parts: Sequence[Summary], mean: Summary, regularization: float) -> Array:
    """For each batch and group the coefficients of its slope, a polynomial in η: shape (batches, S, 3).

    The sign of the third derivative is that of the mean, so that the mean of the slopes is the slope of the mean.
    """
    rows = []
    sign = 1.0 if mean.third_diagonal is None else torch.where(mean.third_diagonal < 0, -1.0, 1.0)
    for part in parts:
        third = torch.zeros_like(part.gradient) if part.third_diagonal is None else part.third_diagonal
        rows.append(torch.stack([part.gradient, -part.tensor(2).diagonal(), -regularization / 2 * sign * third], 1))
    return torch.stack(rows).numpy()


def _intervals(slopes: Array, weights: Array, centre: Array, level: float) -> tuple[Array, Array]:
    """Both ends of each group's interval, shape (S,); NaN from a single batch.

    They are the nearest points on both sides of the centre, the root of the mean slope, from which on the slope is
    surely positive (below) or surely negative (above); where there is none, 0 and infinity.
    """
    count = len(slopes)
    if count < 2:
        return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    shares = (weights / weights.sum())[:, None, None]
    mean = (shares * slopes).sum(0)
    deviations = shares * (slopes - mean)
    covariance = count / (count - 1) * np.einsum("bsi,bsj->sij", deviations, deviations)
    spread = covariance * _quantile(level, count) ** 2
    test, scale = _Test.of(mean, spread), _scale(mean, spread)
    known = (scale > 0) & np.isfinite(scale)
    grid = np.where(known, scale, 1.0)[:, None] * np.geomspace(1 / _REACH, _REACH, _GRID)
    grid = np.concatenate([np.zeros((len(grid), 1)), grid, np.full((len(grid), 1), np.inf)], 1)
    with np.errstate(invalid="ignore", over="ignore"):  # at infinity nothing is sure
        high = test.end(grid, centre, -1.0)
        low = test.end(grid[:, ::-1], centre, 1.0)
    low = np.where(centre == 0, 0.0, low)
    return np.where(known, low, centre), np.where(known, high, centre)


@dataclass(frozen=True)
class _Test:
    """A t-test of the sign of the slope at η, for all groups at once: both it and its variance are polynomials in η.

    Args:
        mean: the coefficients of the slope, each of shape (S, 1), the constant first.
        variance: those of its variance times the square of the t-quantile.
    """

    mean: Sequence[Array]
    variance: Sequence[Array]

    @staticmethod
    def of(mean: Array, spread: Array) -> _Test:
        """From the slope's coefficients, shape (S, 3), and their covariance times that square, shape (S, 3, 3)."""
        sums = [sum(spread[:, i, k - i] for i in range(3) if 0 <= k - i < 3) for k in range(5)]
        return _Test([c[:, None] for c in mean.T], [np.asarray(c)[:, None] for c in sums])

    def is_sure(self, eta: Array, sign: float) -> Array:
        """Whether the slope at η, shape (S, n), is surely of this sign."""
        slope = sign * _polynomial(self.mean, eta)
        result: Array = slope > np.sqrt(np.maximum(_polynomial(self.variance, eta), 0.0))
        return result

    def end(self, grid: Array, centre: Array, sign: float) -> Array:
        """The first point beyond the centre where the slope is surely of this sign, shape (S,).

        Args:
            grid: points to look at, shape (S, n), in the order in which to look; the last is where the axis ends.
            centre: where the interval begins, shape (S,).
            sign: −1 on the way up, +1 on the way down.
        """
        beyond = (grid >= centre[:, None]) if sign < 0 else (grid <= centre[:, None])
        found = self.is_sure(grid, sign) & beyond
        rows, first = np.arange(len(grid)), found.argmax(1)
        outside = grid[rows, first]
        before = np.maximum(first - 1, 0)
        inside = np.where(beyond[rows, before], grid[rows, before], centre)
        unlimited = np.isinf(inside)
        for _ in range(_HALVINGS):
            middle = np.where(unlimited, outside, (outside + inside) / 2)
            sure = self.is_sure(middle[:, None], sign)[:, 0]
            outside, inside = np.where(sure, middle, outside), np.where(sure, inside, middle)
        return np.where(found.any(1), np.where(unlimited, np.inf, inside), grid[:, -1])


def _polynomial(coefficients: Sequence[Array], x: Array) -> Array:
    """Σ_k c_k x^k at points of shape (S, n)."""
    *lower, value = coefficients
    for coefficient in reversed(lower):
        value = value * x + coefficient
    return value


def _quantile(level: float, count: int) -> float:
    """How many standard errors a mean of this many batches may be from the truth at this level (Student's t)."""
    from scipy import special  # here, because it takes long to import

    return float(special.stdtrit(count - 1, (1 + level) / 2))


def _scale(mean: Array, spread: Array) -> Array:
    """A step size for each group that moves with its units: where its slope is used up by curvature, sizes for both."""
    slope, curvature, cubic = (np.abs(mean) + np.sqrt(np.einsum("sii->si", spread))).T
    bottom = curvature + np.sqrt(curvature**2 + 4 * cubic * slope)
    result: Array = np.divide(2 * slope, bottom, out=np.full_like(slope, np.inf), where=bottom > 0)
    return result


# Words ----------------------------------------------------------------------------------------------------------------


def tells(words: str) -> bool:
    """Whether words about groups say that something is off, beyond noise."""
    return bool(words) and not words.endswith((*UNMOVED, _UNSURE))


def _in_one(names: Sequence[str], singular: str, plural: str) -> list[str]:
    """One sentence about some groups, if there are any."""
    if len(names) < 2:
        return [f"`{name}`: {singular}" for name in names]
    first, second, *others = names
    listed = f"`{first}`, `{second}` and {len(others)} more" if others else f"`{first}` and `{second}`"
    return [f"{listed}: {plural}"]


def _words(name: str, factor: float, low: float, high: float, middle: float, *, moves: bool) -> str:
    """How a group's factor compares with the middle of all, where its interval warrants it."""
    single = math.isnan(low)
    if not moves:
        return f"`{name}`: {UNMOVED[0]}"
    if factor == 0 and (single or high == 0):
        return f"`{name}`: no descent along this step"
    if factor == 0:
        return f"`{name}`: {_UNSURE}"
    if math.isinf(factor) and (single or math.isinf(low)):
        return f"`{name}`: nothing in the model limits its step"
    factor, low, high = factor / middle, low / middle, high / middle
    if factor >= DISTINCT and (single or low > 1):
        amount = f"at least {_short(low)}×" if math.isinf(factor) else f"{_short(factor)}×{_range(low, high)}"
        return f"`{name}`: moves {amount} less than suits it, next to the other groups"
    if factor <= 1 / DISTINCT and (single or high < 1):
        amount = f"{_short(1 / factor)}×{_range(_inverse(high), _inverse(low))}"
        return f"`{name}`: moves {amount} more than suits it, next to the other groups"
    return ""


def _overall(middle: float, low: float, high: float, stands_out: bool) -> str:
    """What to do about all rates.

    Args:
        middle: the median factor.
        low: the median of the lower ends of the intervals; NaN where a single batch was measured.
        high: that of the upper ends.
        stands_out: whether there is something to say of single groups.
    """
    single = math.isnan(low)
    if math.isnan(middle):
        return "" if stands_out else LEAVE
    if middle > NOTABLE * SHARED_NOISE and (single or low > SHARED_NOISE):
        return f"all rates are too small, at least {_short(middle / SHARED_NOISE)}× ({_short(middle)}× for one step)"
    if middle < 1 / NOTABLE and (single or high < 1):
        return (
            f"all rates are too large for the next step, {_short(1 / middle)}×{_range(_inverse(high), _inverse(low))}"
        )
    return "" if stands_out else LEAVE


def _range(low: float, high: float) -> str:
    if math.isnan(low):
        return ""
    return f" (at least {_short(low)}×)" if math.isinf(high) else f" ({_short(low)}–{_short(high)}×)"


def _strong_pairs(parts: Sequence[Summary], mean: Summary, level: float) -> tuple[Pair, ...]:
    """The strongest interactions whose sign is the same beyond chance."""
    matrix = correlations(mean)
    candidates = torch.triu(matrix.abs() >= STRONG, diagonal=1)
    if len(parts) > 1:
        weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        shares = (weights / weights.sum())[:, None, None]
        deviations = shares * (torch.stack([part.tensor(2) for part in parts]) - mean.tensor(2))
        error = (deviations.square().sum(0) * len(parts) / (len(parts) - 1)).sqrt()
        candidates &= mean.tensor(2).abs() > _quantile(level, len(parts)) * error
    found = [Pair(mean.names[i], mean.names[j], float(matrix[i, j])) for i, j in candidates.nonzero().tolist()]
    return tuple(sorted(found, key=lambda pair: -abs(pair.correlation))[:_MOST_PAIRS])


def _middle(factors: Array, low: Array | None = None, high: Array | None = None) -> float:
    """The median of factors, in decades; of their intervals' ends where they are 0 or infinite; NaN if none is left."""
    unknown = np.full_like(factors, np.nan)
    rows = zip(factors, unknown if low is None else low, unknown if high is None else high, strict=True)
    decades = [decade for row in rows if not math.isnan(decade := _clear_decades(*row))]
    return float(10 ** np.median(decades)) if decades else math.nan


def _clear_decades(factor: float, low: float, high: float) -> float:
    """log10 of a group's factor; where that is 0 or infinite, of an end of its interval; NaN where that is either, too.

    So a group without descent that could be told from noise has no rank.
    """
    if factor == 0:
        factor = _NO_DESCENT if high == 0 or math.isnan(high) else high if high < 1 else math.inf
    elif math.isinf(factor):
        factor = 1 / _NO_DESCENT if math.isinf(low) or math.isnan(low) else low
    return math.log10(factor) if 0 < factor < math.inf else math.nan


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


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


def _interval(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{_short(low)}–{_short(high)}×"
