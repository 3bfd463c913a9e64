"""From repeated measurements to advice: how each group's learning rate should change, and how sure that is.

Pure functions of summaries along one direction, an optimizer's next step: a factor of 1 keeps a group's learning rate
as it is.  Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from newton_summary import solve
from newton_summary._checks import check_not_negative
from newton_summary._html import Cell, aligned, listed, table
from newton_summary.solve import Status
from newton_summary.summary import Summary
from newton_summary.watch.intervals import Array, best, intervals, quantile, slopes_of
from newton_summary.watch.words import UNMOVED, UNSURE, Factor, between, in_one, overall, tells, times, words_of

STRONG = 0.5
"""A correlation of this size between two groups is put into words."""

_MOST_PAIRS = 3
_CAPTION = "factors on the learning rates for one step, to compare groups by"
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
        stalled: that the loss has not fallen since the first measurement, in words; empty where it has, or where that
            is not known.  Then ``overall`` does not say that nothing is wrong.
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
    stalled: str = ""

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
        general = self._general()[:1]
        first, *others = general + off
        counted = f"{len(others)} group{'s' * (len(others) != 1)}" if general else f"{len(others)} more"
        return f"{first}; {counted} stand{'s' * (len(others) == 1)} out" if others else first

    def sentences(self) -> list[str]:
        """Everything that is worth saying: about all rates, the groups that differ most from the rest, the pairs.

        Groups of which nothing can be said for the same reason share a sentence.
        """
        ranked = self.ranked()
        told = [group.words for group in ranked if tells(group.words)]
        for reason, plural in ((UNSURE, UNSURE), UNMOVED):
            told += in_one([group.name for group in ranked if group.words.endswith(reason)], reason, plural)
        return self._general() + told + [pair.words for pair in self.pairs]

    def _general(self) -> list[str]:
        """What there is to say of no single group."""
        return [words for words in (self.overall, self.stalled) if words]

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

    @property
    def _counted(self) -> str:
        return f"{self.batches} batch{'es' if self.batches != 1 else ''}"

    def _repr_html_(self) -> str:
        """All sentences, and a table, for notebooks; groups that they do not single out are grey."""
        rows = [
            [Cell(text, grey=not tells(g.words)) for text in (g.name, times(g.alone), interval, joint)]
            for g in self.groups
            for interval, joint in [(between(g.low, g.high), times(g.joint))]
        ]
        caption = f"{_CAPTION.capitalize()}; from {self._counted}"
        header = ("group", "alone", f"{self.level:.0%} interval", "jointly")
        return listed(self.sentences()) + table(caption, header, rows)

    def __repr__(self) -> str:
        interval = f"{self.level:.0%} interval"
        rows = [("group", "alone", interval, "jointly")]
        rows += [(g.name, times(g.alone), between(g.low, g.high), times(g.joint)) for g in self.groups]
        said = [f"Advice from {self._counted}", *(f"  {sentence}" for sentence in self.sentences())]
        return "\n".join([*said, f"  {_CAPTION}:", *aligned(rows)])


def advise(
    summaries: Sequence[Summary], *, regularization: float = 1.0, level: float = 0.9, stalled: str = ""
) -> Advice:
    """Advice from summaries of several batches, all along one direction: the optimizer's next step.

    The factor of a group alone minimises its own cubic model −ḡ_s η + ½ H̄_ss η² + (λ_int / 6) |D_sss| |η|³ of the mean
    of the summaries; scaling a group's direction by c divides it by c.  The joint factors minimise the cubic model of
    all groups over η ≥ 0 (docs/method.md, section 2).

    Intervals invert a t-test: η is in the interval of group s unless the slope of the cubic model at η, which is linear
    in each batch's derivatives, differs from 0 over the batches (Fieller's method, with a cubic term).  So they need no
    approximation of a quotient, may reach 0 (descent is not sure) or infinity (curvature is not sure), and are
    right for few batches as far as the derivatives of a batch are normal, with a variance in inverse proportion to its
    weight, which is the number of its samples.  The batches must be independent of the direction and of each other.

    Factors are those of one step.  Words are about what holds for tens of them: they compare a group with the middle
    of all, and speak of all rates where even a direction that is nothing but noise leaves something to gain, or where
    the step as a whole surely raises the loss (:mod:`newton_summary.watch.words`).

    Args:
        summaries: of batches, with H̄, over the same groups; each counts by its weight.
        regularization: λ_int, the weight of the cubic term.
        level: the confidence of the intervals, between 0 and 1.
        stalled: that the loss has not fallen since the first measurement, in words, where it has not: the rates are
            then not said to be right.

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
    alone, low, high = _factors(parts, mean, regularization, level)
    step = solve.cubic(mean, regularization if mean.third is not None else 0.0, nonnegative=True)
    moved = ((mean.gradient != 0) | (hessian.diagonal() != 0)).numpy()
    falls = moved & (alone > 0)
    middle = _middle(alone[falls], low[falls], high[falls])
    bounded = 2 * int((np.isinf(alone) & ~np.isfinite(low))[falls].sum()) < int(falls.sum())
    groups = tuple(
        GroupAdvice(name, *numbers, words=words_of(name, *numbers[:3], middle, moves=moves, bounded=bounded))
        for name, numbers, moves in zip(
            mean.names,
            zip(alone.tolist(), low.tolist(), high.tolist(), step.sizes.tolist(), strict=True),
            moved.tolist(),
            strict=True,
        )
    )
    stands_out = any(tells(group.words) for group in groups)
    too_far, too_little = ([mean.names[i] for i in np.flatnonzero(moved & beyond)] for beyond in (high < 1, low > 1))
    return Advice(
        groups=groups,
        pairs=_strong_pairs(parts, mean, level),
        predicted_decrease=float(mean.gradient.sum() - hessian.sum() / 2),
        joint_decrease=step.predicted_decrease,
        status=step.status,
        batches=len(parts),
        level=level,
        middle=middle,
        overall=overall(
            Factor(_median(alone[falls]), _median(low[falls]), _median(high[falls], np.inf)),
            _common(parts, mean, level),
            stands_out,
            too_far,
            too_little,
            bool(stalled),
        ),
        stalled=stalled,
    )


def _factors(parts: Sequence[Summary], mean: Summary, regularization: float, level: float) -> tuple[Array, ...]:
    """For every group the factor that is best when the others stand still, and both ends of its interval."""
    slopes = slopes_of(parts, mean, regularization)
    found = best(mean, regularization)
    return found, *intervals(slopes, np.array([part.weight for part in parts]), found, level)


def _common(parts: Sequence[Summary], mean: Summary, level: float) -> Factor:
    """The factor on all rates alike, in the quadratic model: third derivatives between groups are not known."""
    together = [_as_one(part) for part in parts]
    return Factor(*(float(end[0]) for end in _factors(together, _as_one(mean), 0.0, level)))


def _as_one(summary: Summary) -> Summary:
    """The summary of the whole step, as one group."""
    slope, curvature = summary.gradient.sum()[None], summary.tensor(2).sum()[None, None]
    return Summary(summary.loss, slope, curvature, None, ("all",), weight=summary.weight)


def alone(summary: Summary, regularization: float = 1.0) -> Tensor:
    """The factor of each group when all others stand still, shape (S,), float64 on the host.

    0 where the loss does not fall along the group's direction, infinity where nothing limits the step.
    """
    return torch.from_numpy(best(summary.cpu(), regularization))


def correlations(summary: Summary) -> Tensor:
    """Those of :meth:`~newton_summary.Summary.correlations`, shape (S, S)."""
    return summary.correlations()


def _strong_pairs(parts: Sequence[Summary], mean: Summary, level: float) -> tuple[Pair, ...]:
    """The strongest interactions whose sign is the same beyond chance."""
    matrix = correlations(mean)
    candidates = torch.triu(matrix.abs() >= STRONG, diagonal=1)
    if len(parts) > 1:
        weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        shares = (weights / weights.sum())[:, None, None]
        deviations = torch.stack([part.tensor(2) for part in parts]) - mean.tensor(2)
        error = ((shares * deviations.square()).sum(0) / (len(parts) - 1)).sqrt()
        candidates &= mean.tensor(2).abs() > quantile(level, len(parts)) * error
    found = [Pair(mean.names[i], mean.names[j], float(matrix[i, j])) for i, j in candidates.nonzero().tolist()]
    return tuple(sorted(found, key=lambda pair: -abs(pair.correlation))[:_MOST_PAIRS])


def _middle(factors: Array, low: Array, high: Array) -> float:
    """The median of factors, in decades; of their intervals' ends where they are 0 or infinite; NaN if none is left."""
    rows = zip(factors, low, high, strict=True)
    decades = [decade for row in rows if not math.isnan(decade := _clear_decades(*row))]
    return float(10 ** np.median(decades)) if decades else math.nan


def _median(values: Array, unclear: float = 0.0) -> float:
    """The median, in decades, of numbers that may be 0 or infinite; NaN if there are none.

    Where that leaves a choice, between a number and 0 or infinity, it is the one that is nearer to ``unclear``.
    """
    if not len(values):
        return math.nan
    below, above = (float(np.quantile(values, 0.5, method=side)) for side in ("lower", "higher"))
    if below > 0 and not math.isinf(above):
        return math.sqrt(below) * math.sqrt(above)
    return above if unclear else below


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
