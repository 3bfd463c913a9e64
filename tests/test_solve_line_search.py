"""The line search against a fine grid and in closed form, and the value of the model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solve_reference import KINDS, Problem, objective, problem

from newton_summary import Summary
from newton_summary.solve import Status, Step, cubic, decrease, line_search, newton


def one_group(gradient: float, hessian: float, third: float = 0.0) -> Summary:
    return Summary(loss=1.0, gradient=[gradient], hessian=[[hessian]], third=[third])


def sizes(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KINDS)), limit=st.sampled_from([0.01, 1.0, 100.0]))
def test_no_point_of_a_fine_grid_is_lower(seed, kind, limit):
    p = problem(kind, seed)
    rng = np.random.default_rng(seed)
    eta = rng.standard_normal(len(p.gradient)) / np.sqrt(np.abs(np.diag(p.hessian)) + np.cbrt(p.third) ** 2)
    eta *= 1.0 if p.gradient @ eta >= 0 else -1.0
    step = line_search(p.summary, torch.as_tensor(eta), p.regularization, limit)
    assert step.ok
    norm = np.linalg.norm(np.cbrt(np.abs(p.third)) * eta)
    along = Problem(np.array([p.gradient @ eta]), np.array([[eta @ p.hessian @ eta]]), [norm**3], p.regularization)
    lowest = min(objective(along, np.array([t])) for t in np.linspace(0, limit, 101))
    size = abs(p.gradient @ eta) + abs(eta @ p.hessian @ eta) * limit
    assert -step.predicted_decrease <= lowest + 1e-13 * limit * size
    assert step.predicted_decrease >= 0
    t = step.sizes.numpy() / eta
    assert t == pytest.approx(np.full(len(eta), t[0]), rel=1e-12)
    assert 0 <= t[0] <= limit * (1 + 1e-12)


@pytest.mark.parametrize(
    ("gradient", "hessian", "third", "expected"),
    [
        (2.0, 4.0, 0.0, 0.5),  # a parabola
        (2.0, 1.0, 0.0, 1.0),  # its lowest point lies beyond the limit
        (2.0, 0.0, 0.0, 1.0),  # downhill for ever
        (2.0, -1.0, 0.0, 1.0),
        (2.0, 1.0, 12.0, 0.5),  # 2 = t + 6 t²
        (2.0, -1.0, 20.0, 0.5),  # 2 = −t + 10 t²
        (2.0, 0.0, 16.0, 0.5),  # 2 = 8 t²
        (0.0, -1.0, 4.0, 0.5),  # a saddle: 0 = −t + 2 t²
        (0.0, -1.0, 0.0, 1.0),
        (0.0, 1.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        (-2.0, 1.0, 1.0, 0.0),  # uphill
        (-2.0, -50.0, 0.0, 0.0),  # uphill at first
    ],
)
def test_closed_forms(gradient, hessian, third, expected):
    step = line_search(one_group(gradient, hessian, third), sizes(1.0))
    assert step.sizes.item() == pytest.approx(expected, rel=1e-12)
    assert step.predicted_decrease == decrease(one_group(gradient, hessian, third), step.sizes)


def test_a_small_curvature_costs_no_digits():
    step = line_search(one_group(1.0, 1.0, 2e-20), sizes(1.0))  # 1 = t + 1e-20 t²
    assert step.sizes.item() == 1.0
    step = line_search(one_group(1e-20, 1.0, 2.0), sizes(1.0))
    assert step.sizes.item() == pytest.approx(1e-20, rel=1e-12)


def test_a_solvers_own_step_is_best_as_it_is():
    p = problem("indefinite", 7)
    step = cubic(p.summary, p.regularization)
    assert line_search(p.summary, step, p.regularization).sizes.numpy() == pytest.approx(step.sizes.numpy(), rel=1e-12)
    assert line_search(p.summary, step, p.regularization, limit=9.0).sizes.numpy() == pytest.approx(
        step.sizes.numpy(), rel=1e-9
    )


def test_a_clipped_step_that_goes_uphill_is_shortened_until_it_goes_down():
    summary = Summary(loss=1.0, gradient=[1.0, 0.5], hessian=[[1.0, 0.99], [0.99, 1.0]])
    clipped = newton(summary).sizes.clamp(min=0)
    assert decrease(summary, clipped, 0.0) < -290
    step = line_search(summary, clipped, 0.0)
    assert step.sizes.numpy() == pytest.approx([1.0, 0.0], rel=1e-12)
    assert step.predicted_decrease == pytest.approx(0.5, rel=1e-12)


def test_the_limit():
    summary = one_group(2.0, 1.0)
    assert line_search(summary, sizes(1.0), limit=math.inf).sizes.item() == 2.0
    assert line_search(summary, sizes(1.0), limit=0.0).sizes.item() == 0.0
    unbounded = line_search(one_group(2.0, -1.0), sizes(1.0), limit=math.inf)
    assert unbounded.status is Status.UNBOUNDED
    assert unbounded.sizes.isnan().all()
    for limit in (-1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be a number from 0 on"):
            line_search(summary, sizes(1.0), limit=limit)


def test_a_failed_step_is_given_back():
    failed = Step.failed(1, Status.UNBOUNDED)
    assert line_search(one_group(1.0, 1.0), failed) is failed


def test_what_is_not_finite_is_not_searched():
    assert line_search(one_group(math.nan, 1.0), sizes(1.0)).status is Status.NOT_FINITE
    assert line_search(one_group(1.0, 1.0), sizes(math.inf)).status is Status.NOT_FINITE


def test_sizes_and_numbers_of_other_kinds():
    for kind in (list, np.array, torch.tensor):
        assert line_search(one_group(1.0, 1.0), kind([2.0])).sizes.tolist() == [1.0]
        assert decrease(one_group(1.0, 1.0), kind([1.0])) == decrease(one_group(1.0, 1.0), sizes(1.0))
    assert decrease(one_group(1.0, 1.0), [0.1]) == decrease(one_group(1.0, 1.0), sizes(0.1))  # all of its digits
    assert line_search(one_group(1.0, 1.0), [1e-100], limit=math.inf).sizes.item() == pytest.approx(1.0)
    one = torch.tensor(1.0)
    assert line_search(one_group(1.0, 1.0), sizes(2.0), one, one).sizes.tolist() == [1.0]


def test_bad_input():
    with pytest.raises(ValueError, match=r"sizes has shape \(2,\); 1 groups need \(1,\)"):
        line_search(one_group(1.0, 1.0), sizes(1.0, 1.0))
    with pytest.raises(ValueError, match="regularization must not be negative"):
        line_search(one_group(1.0, 1.0), sizes(1.0), -1.0)
    without = Summary(loss=1.0, gradient=[1.0], hessian=[[1.0]])
    with pytest.raises(ValueError, match="third order, which was not measured"):
        line_search(without, sizes(1.0))
    assert line_search(without, sizes(1.0), 0.0).sizes.item() == 1.0


# The value of the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_decrease_term_by_term(kind):
    for seed in range(5):
        p = problem(kind, seed)
        eta = np.random.default_rng(seed).standard_normal(len(p.gradient))
        terms = abs(p.gradient) @ abs(eta) + abs(eta) @ abs(p.hessian) @ abs(eta)
        terms += p.regularization * np.linalg.norm(np.cbrt(p.third) * eta) ** 3
        found = decrease(p.summary, torch.as_tensor(eta), p.regularization)
        assert found == pytest.approx(-objective(p, eta), rel=1e-12, abs=1e-14 * terms)


def test_the_decrease_of_sizes_of_another_number_of_groups():
    with pytest.raises(ValueError, match=r"sizes has shape \(2,\); 1 groups need \(1,\)"):
        decrease(one_group(1.0, 1.0), sizes(1.0, 1.0))
