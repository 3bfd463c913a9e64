"""Shrinkage against loops over the groups, and the invariance of one of its targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solve_reference import KINDS, problem

from newton_summary import Summary
from newton_summary.solve import Status, cubic, newton, shrink, target_rates


def target_of(summary: Summary, target: str) -> list[float]:
    """The targets, one group after the other."""
    gradient, hessian = summary.gradient.tolist(), summary.hessian.tolist()
    n = range(len(gradient))
    if target == "shared":
        total = abs(sum(hessian[i][j] for i in n for j in n))
        return [max(sum(gradient), 0.0) / total if total else 0.0 for _ in n]
    alone = [max(gradient[i], 0.0) / abs(hessian[i][i]) if hessian[i][i] else 0.0 for i in n]
    slope = sum(gradient[i] * alone[i] for i in n)
    curvature = abs(sum(alone[i] * hessian[i][j] * alone[j] for i in n for j in n))
    return [slope / curvature * rate if curvature else 0.0 for rate in alone]


def weight_of(summary: Summary, rates: list[float], s: int) -> float:
    """How strongly one group is drawn to its target, at a strength of 1."""
    hessian, n = summary.hessian.tolist(), range(len(rates))
    if rates[s] == 0:
        return abs(hessian[s][s])
    return abs(sum(rates[i] * hessian[i][j] * rates[j] for i in n for j in n)) / (len(rates) * rates[s] ** 2)


@pytest.mark.parametrize("target", ["shared", "invariant"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_hessian_as_defined(kind, target):
    for seed in range(5):
        summary = problem(kind, seed).summary
        shrunk, rates = shrink(summary, 3.0, target), target_of(summary, target)
        assert target_rates(summary, target).tolist() == pytest.approx(rates, rel=1e-9)
        for s in range(len(summary)):
            pull = 3 * weight_of(summary, rates, s)
            expected = float(summary.gradient[s]) + pull * rates[s]
            assert shrunk.gradient[s].item() == pytest.approx(expected, rel=1e-9, abs=1e-11 * pull * rates[s])
            for t in range(len(summary)):
                expected = float(summary.hessian[s, t]) + (pull if s == t else 0.0)
                assert shrunk.hessian[s, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-11 * pull)


def test_the_rest_of_the_summary_is_kept():
    summary = Summary(2.0, [1.0], [[1.0]], [3.0], names=("body",), weight=7.0)
    shrunk = shrink(summary, 1.0)
    assert (shrunk.loss, shrunk.third.tolist(), shrunk.names, shrunk.weight) == (2.0, [3.0], ("body",), 7.0)


@pytest.mark.parametrize("target", ["shared", "invariant"])
def test_no_strength_changes_nothing(target):
    summary = problem("indefinite", 0).summary
    shrunk = shrink(summary, 0.0, target)
    assert torch.equal(shrunk.gradient, summary.gradient)
    assert torch.equal(shrunk.hessian, summary.hessian)


@pytest.mark.parametrize("target", ["shared", "invariant"])
def test_much_strength_ends_at_the_target(target):
    summary = Summary(1.0, [1.0, 2.0, -0.5], [[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.7]])
    step = newton(shrink(summary, 1e9, target))
    assert step.sizes.numpy() == pytest.approx(target_of(summary, target), rel=1e-8, abs=1e-8)


def test_targets_are_never_negative():
    summary = Summary(1.0, [-1.0, -2.0], np.eye(2))
    for target in ("shared", "invariant"):
        assert torch.equal(shrink(summary, 1.0, target).gradient, summary.gradient)


def test_negative_curvature_counts_by_its_size():
    summary = Summary(1.0, [1.0, 1.0], [[-1.0, 0.0], [0.0, -3.0]])
    assert shrink(summary, 1.0).gradient.tolist() == [1 + 2 * 0.5, 1 + 2 * 0.5]  # weights |−4| / 2
    assert shrink(summary, 1.0).hessian.tolist() == [[1.0, 0.0], [0.0, -1.0]]
    rate = (1 + 1 / 3) / (1 + 1 / 3)  # η = (1, 1/3): ηᵀH̄η = −(1 + 1/3)
    assert target_rates(summary, "invariant").tolist() == pytest.approx([rate, rate / 3], rel=1e-12)
    weights = [4 / 3 / 2, 4 / 3 / 2 * 9]
    expected = [1 + weights[0] * rate, 1 + weights[1] * rate / 3]
    assert shrink(summary, 1.0, "invariant").gradient.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_group_at_which_nothing_is_at_stake_has_the_target():
    """The second group's own gradient and curvature are tiny, and the overshoot of the first would stop it."""
    summary = Summary(1.0, [1.0, 1e-3], [[1.0, 2e-3], [2e-3, 1e-5]])
    assert newton(summary).sizes[1] < -1
    sizes = newton(shrink(summary, 0.1)).sizes
    assert sizes.tolist() == pytest.approx(target_rates(summary).tolist(), rel=0.03)


def test_no_curvature_makes_no_target():
    flat = Summary(1.0, [1.0, 1.0], [[0.0, 0.0], [0.0, 2.0]])
    assert shrink(flat, 1.0, "invariant").gradient.tolist() == [1.0, 1.0 + 1 * 0.5]  # ½ · ½² · 2 / ½²
    nowhere = Summary(1.0, [1.0, 1.0], [[1.0, -1.0], [-1.0, 1.0]])
    for target in ("shared", "invariant"):
        assert shrink(nowhere, 1.0, target).gradient.tolist() == [1.0, 1.0]
        assert shrink(nowhere, 1.0, target).is_finite()


def test_what_is_not_finite_stays_so_and_is_not_solved():
    for target in ("shared", "invariant"):
        assert cubic(shrink(Summary(1.0, [math.nan], [[1.0]], [1.0]), 1.0, target)).status is Status.NOT_FINITE


def test_bad_input():
    summary = Summary(1.0, [1.0], [[1.0]])
    with pytest.raises(ValueError, match="no target is called 'mean': the targets are 'shared', 'invariant'"):
        shrink(summary, 1.0, "mean")
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength must not be negative"):
            shrink(summary, strength)
    with pytest.raises(ValueError, match=r"second order, which was not measured: summarize\(\.\.\., order=2\)"):
        shrink(Summary(1.0, [1.0]), 1.0)


# Units of the groups --------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["indefinite", "definite", "some_flat"]),
    exponents=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
)
def test_rates_drawn_to_the_invariant_target_follow_the_units_of_each_group(seed, kind, exponents):
    p = problem(kind, seed)
    factors = 10.0 ** np.array(exponents[: len(p.gradient)])
    sizes, twin = (cubic(shrink(s, 2.0, "invariant")).sizes.numpy() for s in (p.summary, p.summary.scale(factors)))
    assert twin * factors == pytest.approx(sizes, rel=1e-8, abs=1e-13 * np.abs(sizes).max())


def test_rates_drawn_to_the_shared_target_do_not():
    summary = Summary(1.0, [1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]], [1.0, 1.0])
    factors = np.array([1.0, 3.0])
    sizes, twin = (cubic(shrink(s, 2.0, "shared")).sizes.numpy() for s in (summary, summary.scale(factors)))
    assert np.abs(twin * factors - sizes).max() > 0.05 * np.abs(sizes).max()
