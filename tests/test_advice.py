"""Advice from repeated summaries: closed forms, equivariance, intervals and words."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from newton_summary import Summary
from newton_summary.solve import Status, cubic
from newton_summary.watch.advice import advise, alone, correlations
from newton_summary.watch.intervals import intervals
from newton_summary.watch.progress import Progress
from newton_summary.watch.words import LEAVE, LEAVE_SO_FAR


def one(gradient: float, curvature: float, third: float = 0.0, weight: float = 1.0, name: str = "g") -> Summary:
    return Summary(1.0, [gradient], [[curvature]], [third], [name], weight=weight)


def sampled(count: int, seed: int, size: int = 3, noise: float = 0.2) -> list[Summary]:
    """Summaries of batches around one indefinite truth."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(size, size))
    truth = (generator.normal(size=size), root @ root.T - 0.3 * np.eye(size), generator.normal(size=size))
    return [
        Summary(
            1.0,
            truth[0] + noise * generator.normal(size=size),
            truth[1] + noise * np.diag(generator.normal(size=size)),
            truth[2] + noise * generator.normal(size=size),
            [f"g{i}" for i in range(size)],
        )
        for _ in range(count)
    ]


def test_nothing_is_known_of_a_group_that_may_take_any_step() -> None:
    """Its mean slope and curvature let it go on for ever, and noise lets it stand."""
    advice = advise([one(1, -0.1), one(-0.5, 0.1), one(0.2, -0.2)])
    (group,) = advice.groups
    assert (group.alone, group.low, group.high) == (math.inf, 0, math.inf)
    assert math.isnan(advice.middle)
    assert advice.overall == LEAVE


# The factor -----------------------------------------------------------------------------------------------------------


@given(
    gradient=st.floats(-2, 2),
    curvature=st.floats(-3, 3),
    third=st.floats(-4, 4),
    regularization=st.floats(0.1, 5),
)
@settings(max_examples=200, deadline=None)
def test_alone_minimises_the_cubic_model_of_one_group(gradient, curvature, third, regularization) -> None:
    if abs(gradient) < 1e-3 or abs(third) < 1e-3:
        return

    def model(eta: float) -> float:
        return -gradient * eta + curvature * eta**2 / 2 + regularization / 6 * abs(third) * abs(eta) ** 3

    factor = alone(one(gradient, curvature, third), regularization).item()
    if gradient < 0:
        assert factor == 0
        return
    bound = 2 * (
        abs(curvature) * 2 / (regularization * abs(third)) + math.sqrt(gradient / (regularization * abs(third)))
    )
    grid = np.linspace(0, 2 * bound, 2001)
    start = grid[np.argmin([model(x) for x in grid])]
    found = optimize.minimize_scalar(model, bounds=(0, start + bound), method="bounded", options={"xatol": 1e-12})
    assert model(factor) <= found.fun + 1e-9 * (1 + abs(found.fun))
    slope = gradient - curvature * factor - regularization / 2 * abs(third) * factor**2
    assert abs(slope) <= 1e-12 * (gradient + abs(curvature) * factor + abs(third) * regularization * factor**2)


@pytest.mark.parametrize(
    ("gradient", "curvature", "third", "expected"),
    [
        (6.0, 2.0, 0.0, 3.0),
        (1.0, 0.0, 2.0, 1.0),
        (1.0, -1.0, 4.0, 1.0),
        (1.0, 0.0, 0.0, math.inf),
        (1.0, -1.0, 0.0, math.inf),
        (0.0, 1.0, 1.0, 0.0),
        (-1.0, 1.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, -1e8, 1e-8, 2e16),
    ],
)
def test_alone_in_closed_form(gradient, curvature, third, expected) -> None:
    assert alone(one(gradient, curvature, third)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1 / 30, 3.0, 1e5])
def test_scaling_a_group_divides_its_factor_and_interval(scale: float) -> None:
    parts = sampled(5, seed=3)
    before = advise(parts)
    after = advise([part.scale([1.0, scale, 1.0]) for part in parts])
    for a, b, factor in zip(before.groups, after.groups, (1.0, scale, 1.0), strict=True):
        for key in ("alone", "low", "high", "joint"):
            assert getattr(b, key) * factor == pytest.approx(getattr(a, key), rel=1e-9), (key, a.name)
        assert b.alone * factor == pytest.approx(a.alone, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e100, 1e200])
def test_advice_does_not_depend_on_the_units_of_the_loss(scale: float) -> None:
    parts = sampled(4, seed=3)
    before, after = advise(parts), advise([part * scale for part in parts])
    for a, b in zip(before.groups, after.groups, strict=True):
        for key in ("alone", "low", "high"):
            assert getattr(b, key) == pytest.approx(getattr(a, key), rel=1e-9), (key, a.name)


def test_joint_is_the_non_negative_solve_of_the_mean() -> None:
    parts = sampled(4, seed=1)
    advice = advise(parts, regularization=2.0)
    step = cubic(Summary.mean(parts), regularization=2.0, nonnegative=True)
    assert advice.status is Status.SOLVED
    assert [g.joint for g in advice.groups] == pytest.approx(step.sizes.tolist(), rel=1e-12)
    assert advice.joint_decrease == pytest.approx(step.predicted_decrease, rel=1e-12)


def test_batches_count_by_their_weight() -> None:
    heavy = advise([one(2.0, 1.0, weight=3.0), one(6.0, 1.0, weight=1.0)])
    assert heavy["g"].alone == pytest.approx(3.0)
    assert heavy.predicted_decrease == pytest.approx(3.0 - 0.5)


# Intervals ------------------------------------------------------------------------------------------------------------


def t_of_slope(parts: list[Summary], eta: float, sign: float, regularization: float = 1.0) -> float:
    """The t-statistic of the slope at η of one group, batch by batch."""
    slopes = [
        p.gradient.item() - p.hessian.item() * eta - regularization / 2 * sign * p.third.item() * eta**2 for p in parts
    ]
    return float(stats.ttest_1samp(slopes, 0.0).statistic)


@pytest.mark.parametrize("seed", range(12))
def test_the_ends_of_the_interval_are_where_a_t_test_just_rejects(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [
        one(1 + 0.2 * generator.normal(), 0.5 + 0.1 * generator.normal(), -0.3 + 0.1 * generator.normal())
        for _ in range(5)
    ]
    group = advise(parts, level=0.8)["g"]
    assert 0 < group.low < group.alone < group.high < math.inf
    quantile = stats.t.ppf(0.9, 4)
    assert t_of_slope(parts, group.low, -1.0) == pytest.approx(quantile, rel=1e-6)
    assert t_of_slope(parts, group.high, -1.0) == pytest.approx(-quantile, rel=1e-6)
    for eta in np.linspace(group.low, group.high, 7)[1:-1]:
        assert abs(t_of_slope(parts, eta, -1.0)) < quantile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "noise"),
    [((1.0, 0.5, 0.2), 0.3), ((1.0, 2.0, 0.0), 0.5), ((0.3, -0.5, 1.0), 0.1)],
)
def test_intervals_cover_the_truth(truth, noise) -> None:
    generator = np.random.default_rng(0)
    expected = alone(one(*truth)).item()
    covered = 0
    for _ in range(400):
        draws = np.asarray(truth) + noise * np.asarray([1, 0.7, 0.5]) * generator.normal(size=(4, 3))
        if truth[2] == 0:
            draws[:, 2] = 0
        group = advise([one(*row) for row in draws])["g"]
        covered += group.low <= expected <= group.high
    assert 0.85 <= covered / 400 <= 0.99


@pytest.mark.parametrize("sizes", [(1, 1, 1, 4), (32, 32, 32, 5), (1, 10), (8, 8, 64)])
def test_intervals_cover_the_truth_where_batches_have_different_sizes(sizes) -> None:
    """Slopes and curvatures are means over as many normal samples as a batch has; one group is one experiment."""
    generator, weights, experiments = np.random.default_rng(0), np.array(sizes, dtype=float), 4000
    scatter = 0.1 / np.sqrt(weights)[:, None, None] * generator.normal(size=(len(sizes), experiments, 3))
    slopes = np.array([1.0, -1.0, 0.0]) + scatter * np.array([1.0, 0.5, 0.0])
    mean = np.average(slopes, axis=0, weights=weights)
    low, high = intervals(slopes, weights, -mean[:, 0] / mean[:, 1], level=0.9)
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(0.9, abs=0.015)


def test_no_interval_from_one_batch_and_none_of_length_from_equal_ones() -> None:
    single = advise([one(3.0, 1.0)])["g"]
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert single.words == "", "a group by itself differs from no other"
    equal = advise([one(3.0, 1.0, 0.5)] * 3)["g"]
    assert equal.low == pytest.approx(equal.alone, rel=1e-12)
    assert equal.high == pytest.approx(equal.alone, rel=1e-12)


def test_the_interval_reaches_zero_and_infinity() -> None:
    unsure_descent = advise([one(1.0, 1.0), one(-0.8, 1.0), one(0.3, 1.0)])["g"]
    assert unsure_descent.low == 0
    unsure_curvature = advise([one(1.0, 1.0), one(1.1, -0.9), one(0.9, 0.2)])["g"]
    assert unsure_curvature.high == math.inf
    assert unsure_curvature.low > 0
    uphill = advise([one(-1.0, 1.0), one(-1.1, 1.0), one(-0.9, 1.0)])["g"]
    assert (uphill.alone, uphill.low, uphill.high) == (0, 0, 0)
    unlimited = advise([one(1.0, -1.0), one(1.1, -1.1), one(0.9, -0.9)])["g"]
    assert (unlimited.alone, unlimited.low, unlimited.high) == (math.inf,) * 3
    perhaps_unlimited = advise([one(1.0, 0.8), one(1.1, -1.1), one(0.9, -0.9)])["g"]
    assert perhaps_unlimited.alone == math.inf
    assert 0.3 < perhaps_unlimited.low < 3


# Words ----------------------------------------------------------------------------------------------------------------


def words(*parts: Summary) -> str:
    """What is said of a group beside two others whose factors are 1."""

    def beside(part: Summary) -> Summary:
        gradient, hessian = torch.ones(3).double(), torch.eye(3).double()
        third = torch.zeros(3).double() if part.third_diagonal is None else torch.full((3,), 0.0).double()
        gradient[0], hessian[0, 0] = part.gradient[0], part.tensor(2)[0, 0]
        return Summary(1.0, gradient, hessian, third, ["g", "h", "i"])

    return advise([beside(part) for part in parts])["g"].words


def overall(*factors: float, noise: float = 0.01) -> str:
    """What is said of all rates, from three batches, where the groups have these factors."""
    count = len(factors)
    hessian = torch.diag(1 / torch.tensor(factors, dtype=torch.float64))
    slopes = [[1.0 + e * (-1) ** s for s in range(count)] for e in (-noise, 0.0, noise)]
    return advise([Summary(1.0, g, hessian, [0.0] * count, [f"g{s}" for s in range(count)]) for g in slopes]).overall


def test_words_for_one_group() -> None:
    less, more = "less than suits it, next to the other groups", "more than suits it, next to the other groups"
    assert words(one(5.8, 1), one(6, 1), one(6.2, 1)) == f"`g`: moves 6× (5.7–6.3×) {less}"
    assert words(one(0.1, 1), one(0.11, 1), one(0.09, 1)) == f"`g`: moves 10× (8.6–12×) {more}"
    assert words(one(1.0, 1), one(1.1, 1), one(0.9, 1)) == ""
    assert words(one(4.0, 1), one(4.01, 1)) == "", "noise that is shared may explain a factor of 4"
    assert words(one(0.25, 1), one(0.251, 1)) == ""
    assert words(one(6.0, 1), one(-5.0, 1), one(8.0, 1)) == ""
    assert words(one(-1, 1), one(-1.1, 1), one(-0.9, 1)) == "`g`: no descent along this step"
    assert words(one(-1, 1), one(0.9, 1), one(-0.9, 1)) == "`g`: no descent along this step that can be told from noise"
    assert words(one(0, 0), one(0, 0)) == "`g`: this step does not move it"
    assert words(one(1, -1), one(1.1, -1)) == "`g`: nothing in the model limits its step"
    assert words(one(6.0, 1)) == f"`g`: moves 6× (from one batch) {less}"
    assert words(one(-1, 1)) == "`g`: no descent along this step (from one batch)"
    assert words(one(1, -1)) == "`g`: nothing in the model limits its step (from one batch)"
    assert words(one(6.0, 0.1), one(7.0, -0.05), one(6.5, 0.11)).endswith(f") {less}")


def test_all_rates_are_spoken_of_where_noise_cannot_be_the_reason() -> None:
    leave = "leave the rates as they are: over tens of steps none is surely off"
    assert overall(1.0, 1.2, 0.9, noise=0.5) == f"{leave}, whatever suits one step alone" == LEAVE
    # greedy by up to 19 along an averaged direction
    assert overall(15.0, 12.0, 18.0) == f"{leave}, though for one step alone 3 groups move too little"
    assert overall(190.0, 190.0, 300.0) == "all rates are too small, at least 10× (190× for one step)"
    assert overall(190.0, 100.0, 300.0, noise=50.0) == LEAVE, "nothing is sure"
    assert overall(0.1, 0.1, 0.1).startswith("all rates are too large for the next step, 10× (")
    assert overall(1.0, 1.1, 30.0) == "", "one that stands out is enough to say"
    assert advise([one(3.0, 1.0)]).overall == "leave the rates as they are: from one batch none is surely off"
    assert advise([one(0.2, 1.0)]).overall == "all rates are too large for the next step, 5× (from one batch)"
    assert advise([one(-1.0, 1.0)]).overall == ""


def test_the_sentence_that_nothing_is_off_agrees_with_the_intervals_beside_it() -> None:
    leave = "leave the rates as they are: over tens of steps none is surely off, though for one step alone"
    assert overall(0.5, 1.0, 1.0) == f"{leave} `g0` moves too far"
    assert overall(0.5, 1.0, 1.0, 2.0) == f"{leave} `g0` moves too far and `g3` moves too little"
    assert overall(0.5, 0.5, 1.0, 1.0, 2.0) == f"{leave} 2 groups move too far and `g4` moves too little"


def test_no_number_is_said_of_steps_that_nothing_limits() -> None:
    """Groups without a limit rank as if their factor were 1000, which is no finding."""
    small = "the rates in the middle of the groups are too small, "
    assert advise([one(1, -1)]).overall == f"{small}nothing in the model limits them (from one batch)"
    assert advise([one(1, -1), one(1.1, -1)]).overall == f"{small}nothing in the model limits them"
    limited = [Summary(1.0, [1.0, g, g], torch.diag(torch.tensor([1 / 40, 1 / 50, -1.0]))) for g in (1.0, 1.01)]
    assert advise(limited).overall.startswith(f"{small}at least 2.")
    assert advise(limited[:1]).overall == f"{small}at least 2.6× (50× for one step, from one batch)"
    one_is = [Summary(1.0, [g, g, 30 * g], torch.diag(torch.tensor([1.0, -1.0, 1.0]))) for g in (1.0, 1.01)]
    assert "`0`: moves 30× (29–31×) more" in advise(one_is).groups[0].words
    one_is = [Summary(s.loss, s.gradient, torch.diag(torch.tensor([1.0, -1.0, -1.0]))) for s in one_is]
    assert advise(one_is).groups[0].words == "`0`: moves more than suits it, next to the other groups"
    assert (
        advise(one_is[:1])
        .groups[0]
        .words.endswith("`: moves more than suits it, next to the other groups (from one batch)")
    )


def test_an_unsure_middle_has_no_end() -> None:
    """Where the intervals in the middle reach 0, so does what is said of it."""
    parts = [Summary(1.0, [0.1 + e, 0.1 - e, 1.0], torch.diag(torch.tensor([1.0, 1.0, 10.0]))) for e in (0.2, -0.2)]
    assert advise([*parts, *parts]).overall.endswith("too large for the next step, 10× (at least 2.7×)")


def test_what_is_said_of_the_middle_is_not_said_of_all_where_groups_differ() -> None:
    def headline(*factors: float) -> str:
        count = len(factors)
        hessian = torch.diag(1 / torch.tensor(factors, dtype=torch.float64))
        slopes = [[1.0 + e * (-1) ** s for s in range(count)] for e in (-0.001, 0.0, 0.001)]
        names = [f"g{s}" for s in range(count)]
        return advise([Summary(1.0, g, hessian, [0.0] * count, names) for g in slopes]).headline

    assert headline(190.0, 190.0, 190.0, 1900.0).startswith(
        "the rates in the middle of the groups are too small, at least 10× (190× for one step); 1 group stands out"
    )
    assert headline(190.0, 190.0, 190.0, 38.0).startswith(  # all together may move half as much
        "the rates in the middle of the groups are too small, at least 5× (95× for one step); 1 group stands out"
    )
    assert headline(40000.0, 40000.0, 40000.0, 0.6).startswith("`g3`: moves 67000× ("), "a larger rate for all is ruin"
    assert headline(0.1, 0.1, 0.1, 3.0).startswith("the rates in the middle of the groups are too large for the next")


@given(st.floats(0.3, 30.0), st.floats(-0.45, 0.95), st.integers(2, 6), st.floats(1e-3, 0.3))
def test_all_rates_are_too_large_where_the_whole_step_surely_raises_the_loss(size, correlation, count, noise) -> None:
    hessian = torch.full((count, count), correlation / size, dtype=torch.float64).fill_diagonal_(1 / size)
    hessian = hessian if bool((torch.linalg.eigvalsh(hessian) > 0).all()) else torch.eye(count).double() / size
    parts = [Summary(1.0, [1.0 + e] * count, hessian, None, list("abcdef")[:count]) for e in (-noise, 0.0, noise)]
    told = advise(parts).overall
    changes = [float(hessian.sum() / 2 - part.gradient.sum()) for part in parts]  # of the loss, by the step as it is
    error = np.std(changes, ddof=1) / math.sqrt(3) * stats.t.ppf(0.95, 2)
    raises, lowers = np.mean(changes) > 1.001 * error, np.mean(changes) < -1.001 * error
    if raises:
        assert "all rates are too large for the next step" in told
    if lowers and size > 1:  # no group alone moves too far
        assert "too large" not in told


def test_of_a_step_that_does_not_descend_a_bound_is_told() -> None:
    hessian = torch.full((2, 2), 10.0).double().fill_diagonal_(11.0)
    parts = [Summary(1.0, [e, e], hessian, None, ["a", "b"]) for e in (-0.9, 0.1, 0.6)]
    assert re.fullmatch(r"all rates are too large for the next step, at least [\d.]+×", advise(parts).overall)


def test_where_the_loss_has_not_fallen_nothing_says_that_the_rates_are_right() -> None:
    parts = [one(1.0, 1.0), one(1.1, 1.0), one(0.9, 1.0)]
    advice = advise(parts, stalled="the loss is no lower")
    assert advise(parts).headline == LEAVE
    assert (advice.headline, advice.sentences()) == ("the loss is no lower", ["the loss is no lower"])
    assert advice.to_dict()["words"] == "the loss is no lower"
    assert repr(advice).splitlines()[1] == "  the loss is no lower"
    small = advise([one(190.0, 1.0), one(191.0, 1.0)], stalled="the loss is no lower")
    assert small.sentences() == ["all rates are too small, at least 10× (190× for one step)", "the loss is no lower"]
    beside = [Summary(1.0, [g, 1.0, 1.0], np.eye(3), [0.0] * 3, list("ghi")) for g in (30.0, 30.1)]
    assert advise(beside, stalled="the loss is no lower").headline == "the loss is no lower; 1 group stands out"


def told_of(*losses: float, overall: str = "", step: int = 0, every: int = 20) -> str:
    """What is said of a training whose measurements had these losses."""
    progress = Progress(20)
    for t, loss in enumerate(losses):
        progress.add(loss, t * every)
        progress.hear(overall if t == step else LEAVE, t * every)
    return progress.words()


def test_a_loss_that_has_not_fallen_is_told_from_one_that_has() -> None:
    assert told_of(2.4) == told_of(2.4, 2.5) == "", "too early to say"
    assert told_of(2.39, 2.4, 2.39) == "the loss is no lower than at the first measurement (2.39, now 2.4)"
    assert told_of(2.4, 2.6, 2.4, 2.5, every=0) == "", "no step was taken in between"
    assert told_of(*(2.4 - 0.1 * t for t in range(8))) == "", "steady progress is no scatter"
    assert told_of(2.4, 1.2, 0.6, 0.3, 0.15, 0.07, 0.04) == ""
    assert told_of(2.4, 9.0, 0.6, 0.5, 0.5, 0.5) == "", "a spike is no standstill"
    noise = np.random.default_rng(0).normal(size=20)
    assert told_of(2.4, *(2.3 + 0.3 * noise)).startswith("the loss is not surely lower than at the first measurement (")
    assert told_of(2.4, *(1.0 + 0.3 * noise)) == ""
    assert told_of(0.5, 0.4, 0.3, 0.2, 3.0, 4.0, 5.0) == (
        "the loss is no lower than at the first measurement (0.5, now 3)"
    )


def test_a_training_that_stands_still_is_told_what_was_wrong_at_first() -> None:
    large = "all rates are too large for the next step, 3.3× (2–4×)"
    still = "the loss is no lower than at the first measurement (2.4, now 2.4)"
    assert told_of(2.4, 2.4, 2.4, overall=large) == f"{still}; before step 1 all rates were too large, 3.3× (2–4×)"
    assert told_of(2.4, 2.4, 2.4, overall=large, step=1).endswith(
        "; before step 21 all rates were too large, 3.3× (2–4×)"
    )
    assert told_of(*[2.4] * 30, overall=large, step=25) == still, "that was not at first"
    assert told_of(2.4, 0.1, 0.1, overall=large) == ""


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_rarely_taken_for_progress(seed: int) -> None:
    generator = np.random.default_rng(seed)
    healthy = sum(not told_of(*generator.normal(size=21)) for _ in range(100))
    assert healthy <= 10


def test_the_headline_is_what_is_wrong_or_that_nothing_is() -> None:
    def headline(*factors: float, names: str = "abcdef", noise: float = 0.001) -> str:
        count = len(factors)
        slopes = [[1.0 + e * (-1) ** s for s in range(count)] for e in (-noise, 0.0, noise)]
        hessian = torch.diag(1 / torch.tensor(factors, dtype=torch.float64))
        advice = advise([Summary(1.0, g, hessian, [0.0] * count, list(names[:count])) for g in slopes])
        assert advice.headline.startswith(advice.sentences()[0])
        return advice.headline

    assert headline(1.0, 1.1, 0.9, noise=0.2) == LEAVE
    assert headline(1.0, 1.0, 30.0) == "`c`: moves 30× (30–30×) less than suits it, next to the other groups"
    assert headline(1.0, 1.0, 1.0, 20.0, 0.02).startswith("`e`: moves 50× (")
    assert headline(1.0, 1.0, 1.0, 20.0, 0.02).endswith("next to the other groups; 1 more stands out")
    middle = "the rates in the middle of the groups are too large for the next step, 10× ("
    assert headline(0.1, 0.1, 0.1, 3.0, 0.001).startswith(middle)
    assert headline(0.1, 0.1, 0.1, 3.0, 0.001).endswith("); 2 groups stand out")


def test_what_cannot_be_told_from_noise_is_no_headline() -> None:
    def two(*slopes: float) -> Summary:
        return Summary(1.0, slopes, np.eye(2), [0.0, 0.0], ["a", "b"])

    calm = advise([two(1.0, 1.0), two(1.1, -1.2), two(0.9, -0.5)])
    assert calm["b"].words == "`b`: no descent along this step that can be told from noise"
    assert calm.headline == calm.overall == calm.sentences()[0] == LEAVE
    nowhere = advise([two(1.0, 1.0), two(-2.0, -1.2), two(-0.9, -0.5)])
    assert nowhere.headline == nowhere.overall == LEAVE
    up = advise([two(-1.0, 1.0), two(-1.1, 1.2), two(-0.9, 1.1)])
    assert up.headline == "`a`: no descent along this step"
    still = advise([Summary(1.0, [0.0, 1.0], [[0.0, 0.0], [0.0, 1.0]], [0.0, 0.0], ["a", "b"])])
    assert still.headline == LEAVE_SO_FAR


def test_groups_of_which_nothing_can_be_said_share_a_sentence() -> None:
    def told(*slopes: float) -> list[str]:
        names = [f"g{i}" for i in range(len(slopes))]
        curvature = np.diag([float(slope != 0) for slope in slopes])
        flips = [[slope if slope > 0 else -sign * slope for slope in slopes] for sign in (1, -1, -0.1)]
        return advise([Summary(1.0, g, curvature, [0.0] * len(names), names) for g in flips]).sentences()

    unsure = "no descent along this step that can be told from noise"
    assert told(1.0, 0.0) == [LEAVE, "`g1`: this step does not move it"]
    assert told(1.0, 0.0, 0.0) == [LEAVE, "`g1` and `g2`: this step does not move them"]
    assert told(1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0) == [
        LEAVE, f"`g2` and `g4`: {unsure}", "`g1`, `g3` and 2 more: this step does not move them"
    ]  # fmt: skip


def test_what_all_rates_share_singles_out_no_group() -> None:
    """Words about single groups are the same whatever the learning rate is."""
    parts = sampled(4, seed=2)
    for factor in (1e-3, 1.0, 1e3):
        scaled = [Summary(p.loss, factor * p.gradient, factor**2 * p.tensor(2), None, p.names) for p in parts]
        told = [group.words for group in advise(scaled).groups]
        assert told == [
            g.words for g in advise([Summary(p.loss, p.gradient, p.tensor(2), None, p.names) for p in parts]).groups
        ]


def test_pairs_are_named_where_their_interaction_is_strong_and_sure() -> None:
    def pair(c: float, weight: float = 1.0) -> Summary:
        return Summary(1.0, [1.0, 1.0], [[2.0, c], [c, 0.5]], [0.0, 0.0], ["conv1", "fc1"], weight=weight)

    assert [p.words for p in advise([pair(0.9), pair(0.94)]).pairs] == [
        "`conv1` and `fc1` pull against each other (+0.92)"
    ]
    assert [p.words for p in advise([pair(-0.8)]).pairs] == ["`conv1` and `fc1` help each other (-0.80)"]
    assert advise([pair(0.3), pair(0.31)]).pairs == ()
    assert advise([pair(0.9), pair(-0.2), pair(1.2)]).pairs == ()
    assert advise([pair(0.3), pair(0.9, weight=10.0)]).pairs == (), "the lighter one is far off"


def test_ranking_puts_what_differs_from_the_rest_first() -> None:
    def batch(*gradient: float) -> Summary:
        return Summary(1.0, gradient, np.eye(4), [0.0] * 4, ["a", "b", "c", "d"])

    def ranking(*parts: Summary) -> list[str]:
        return [g.name for g in advise(parts).ranked()]

    assert ranking(batch(20.0, 22.0, 1.0, 90.0))[:2] == ["c", "d"]
    assert ranking(batch(1.0, 1.2, -1.0, 30.0))[:2] == ["c", "d"]
    noisy = batch(1.0, 1.2, 5.0, 30.0), batch(1.0, 1.3, -6.0, 31.0)  # c: no descent that can be told from noise
    assert [ranking(*noisy)[0], ranking(*noisy)[-1]] == ["d", "c"]
    downhill = batch(1.0, 1.2, -1.0, 30.0), batch(1.0, 1.3, -1.001, 31.0)
    assert ranking(*downhill)[0] == "c"


def test_the_table_is_readable() -> None:
    text = repr(advise(sampled(4, seed=5)))
    lines = text.splitlines()
    assert lines[0] == "Advice from 4 batches"
    assert lines[1:-5] == [f"  {sentence}" for sentence in advise(sampled(4, seed=5)).sentences()]
    assert lines[-5] == "  factors on the learning rates for one step, to compare groups by:"
    assert lines[-4].split() == ["group", "alone", "90%", "interval", "jointly"]
    assert [line.split()[0] for line in lines[-3:]] == ["g0", "g1", "g2"]


def test_a_flat_dictionary_for_loggers() -> None:
    parts = [Summary(1.0, [6.0 + e, 1.0], np.diag([1.0, -1.0]), [0.0, 0.0], ["a", "b"]) for e in (-0.1, 0.0, 0.1)]
    advice = advise(parts)
    flat = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert (flat["alone/a"], flat["alone/b"], flat["batches"]) == (pytest.approx(6.0), None, 3)
    assert (flat["low/a"], flat["high/a"]) == pytest.approx((advice["a"].low, advice["a"].high))
    assert flat["low/a"] < 6.0 < flat["high/a"]
    assert flat["words"] == "; ".join(advice.sentences())
    assert flat["status"] == advice.status.name
    assert all(value is None or isinstance(value, str | float | int) for value in flat.values())
    assert len(flat) == 4 * 2 + 7


def test_correlations() -> None:
    summary = Summary(1.0, [1.0] * 3, [[4.0, -1.0, 0.0], [-1.0, -1.0, 2.0], [0.0, 2.0, 0.0]])
    expected = torch.tensor([[1.0, -0.5, 0.0], [-0.5, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(correlations(summary), expected)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="no summaries"):
        advise([])
    with pytest.raises(ValueError, match="not finite"):
        advise([one(math.nan, 1.0)])
    with pytest.raises(ValueError, match="level"):
        advise([one(1.0, 1.0)], level=90)
    with pytest.raises(ValueError, match="order 2 was not measured"):
        advise([Summary(1.0, [1.0])])
    with pytest.raises(KeyError, match="no group is called 'x': the groups are g"):
        advise([one(1.0, 1.0)])["x"]


def test_a_curvature_next_to_zero_limits_nothing():
    """The quotient overflows, which is infinity and no warning."""
    assert alone(Summary(1.0, [1.0], [[2e-313]], [0.0])).tolist() == [math.inf]
