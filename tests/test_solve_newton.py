"""Newton's step and the ridge, in the space of the rates."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newton_summary import Summary
from newton_summary.solve import Status, Step, decrease, newton, ridge


def summary_of(gradient, hessian) -> Summary:
    return Summary(loss=1.0, gradient=gradient, hessian=hessian)


def exact_solution(matrix, right) -> np.ndarray:
    """By Gauss and Jordan in fractions: no rounding at all."""
    rows = [[Fraction(float(x)) for x in row] + [Fraction(float(b))] for row, b in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(k for k in range(i, len(rows)) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        rows = [
            row if k == i else [x - row[i] * y for x, y in zip(row, rows[i], strict=True)] for k, row in enumerate(rows)
        ]
    return np.array([float(row[-1]) for row in rows])


def random_problem(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n))
    return rng.standard_normal(n), a + a.T


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("decades", [0, 8])
def test_the_step_solves_the_system_also_where_it_is_indefinite(n, decades):
    for seed in range(5):
        gradient, hessian = random_problem(seed, n)
        units = 10 ** np.random.default_rng(seed).uniform(-decades / 2, decades / 2, n)
        gradient, hessian = gradient * units, hessian * np.outer(units, units)
        step = newton(summary_of(gradient, hessian))
        assert step.status is Status.SOLVED
        assert step.sizes.numpy() == pytest.approx(exact_solution(hessian, gradient), rel=1e-11, abs=0)


def test_one_group_is_cauchys_step():
    assert newton(summary_of([3.0], [[4.0]])).sizes.tolist() == [0.75]
    assert newton(summary_of([3.0], [[-4.0]])).sizes.tolist() == [-0.75]


def test_the_stationary_point_of_an_indefinite_model_is_a_saddle():
    step = newton(summary_of([1.0, 2.0], [[1.0, 0.0], [0.0, -1.0]]))
    assert step.sizes.tolist() == pytest.approx([1.0, -2.0], rel=1e-12)
    assert step.predicted_decrease == -1.5


def test_a_diagonal_of_zeros():
    step = newton(summary_of([1.0, 2.0, 3.0], [[0.0, 1e8, 0.0], [1e8, 0.0, 1.0], [0.0, 1.0, 1e-8]]))
    expected = exact_solution([[0.0, 1e8, 0.0], [1e8, 0.0, 1.0], [0.0, 1.0, 1e-8]], [1.0, 2.0, 3.0])
    assert step.sizes.numpy() == pytest.approx(expected, rel=1e-12)


def test_groups_that_nothing_depends_on_get_no_rate():
    step = newton(summary_of([2.0, 0.0], [[4.0, 0.0], [0.0, 0.0]]))
    assert step.sizes.tolist() == [0.5, 0.0]
    assert newton(summary_of([0.0], [[0.0]])).sizes.tolist() == [0.0]


@pytest.mark.parametrize(
    ("gradient", "hessian"),
    [
        ([1.0], [[0.0]]),
        ([1.0, 0.0], [[0.0, 0.0], [0.0, 1.0]]),
        ([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]),
        ([1.0, 1.0], [[1e8, 1.0], [1.0, 1e-8]]),  # the same in other units
        ([1.0, 1.0, 1.0], [[1.0, 0.1, 0.2], [0.1, 0.01, 0.02], [0.2, 0.02, 0.04]]),  # singular but for rounding
    ],
)
def test_singular_matrices_say_so(gradient, hessian):
    step = newton(summary_of(gradient, hessian))
    assert step.status is Status.SINGULAR
    assert step.sizes.isnan().all()
    assert not step.ok


def test_only_the_symmetric_part_of_a_hessian_by_hand_counts():
    step = newton(summary_of([1.0, 1.0], [[2.0, 1.0], [0.0, 2.0]]))
    assert step.sizes.numpy() == pytest.approx([0.4, 0.4], rel=1e-12)


@pytest.mark.parametrize("solver", [newton, lambda s: ridge(s, 1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_summary_that_is_not_finite_is_not_solved(solver, value):
    assert solver(summary_of([value, 1.0], np.eye(2))).status is Status.NOT_FINITE
    assert solver(summary_of([1.0, 1.0], [[value, 0.0], [0.0, 1.0]])).status is Status.NOT_FINITE


def test_what_overflows_is_not_solved():
    assert newton(summary_of([1e200], [[1e-200]])).status is Status.NOT_CONVERGED  # the rate
    assert newton(summary_of([1e200], [[1e50]])).status is Status.NOT_CONVERGED  # the decrease


def test_the_predicted_decrease_is_the_models():
    gradient, hessian = random_problem(0, 4)
    summary = summary_of(gradient, hessian)
    step = newton(summary)
    assert step.predicted_decrease == pytest.approx(gradient @ step.sizes.numpy() / 2, rel=1e-12)
    assert step.predicted_decrease == decrease(summary, step.sizes, 0.0)


def test_steps_are_float64_on_the_host():
    step = newton(Summary(loss=1.0, gradient=torch.ones(2), hessian=torch.eye(2)))
    assert isinstance(step, Step)
    assert step.sizes.dtype is torch.float64
    assert step.sizes.device.type == "cpu"


# Ridge ----------------------------------------------------------------------------------------------------------------


def test_the_ridge_is_added_to_the_matrix():
    gradient, hessian = random_problem(1, 5)
    step = ridge(summary_of(gradient, hessian), 10.0)
    assert step.sizes.numpy() == pytest.approx(exact_solution(hessian + 10 * np.eye(5), gradient), rel=1e-12)
    assert step.predicted_decrease == pytest.approx(gradient @ step.sizes.numpy() / 2, rel=1e-12)  # with the ridge


def test_no_damping_is_newtons_step():
    summary = summary_of(*random_problem(2, 5))
    torch.testing.assert_close(ridge(summary, 0.0).sizes, newton(summary).sizes, rtol=1e-12, atol=0)


def test_the_ridge_makes_a_singular_matrix_regular():
    assert ridge(summary_of([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]), 1.0).sizes.numpy() == pytest.approx([1 / 3, 1 / 3])
    assert ridge(summary_of([1.0], [[-1.0]]), 1.0).status is Status.SINGULAR


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf])
def test_the_damping_is_a_number_from_0_on(damping):
    with pytest.raises(ValueError, match="damping must not be negative"):
        ridge(summary_of([1.0], [[1.0]]), damping)


@pytest.mark.parametrize("damping", [torch.ones(2), np.ones(2)])
def test_the_damping_is_one_number(damping):
    with pytest.raises(TypeError, match="damping must be a number, got"):
        ridge(summary_of([1.0, 1.0], np.eye(2)), damping)


@pytest.mark.parametrize("solver", [newton, lambda s: ridge(s, 1.0)])
def test_the_second_order_is_asked_for(solver):
    with pytest.raises(ValueError, match=r"second order, which was not measured: summarize\(\.\.\., order=2\)"):
        solver(Summary(loss=1.0, gradient=[1.0]))


# Units of the groups --------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 6),
    exponents=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6),
)
def test_newtons_step_follows_the_units_of_each_group(seed, n, exponents, signs):
    summary = summary_of(*random_problem(seed, n))
    factors = 10.0 ** np.array(exponents[:n]) * signs[:n]
    sizes, twin = newton(summary).sizes.numpy(), newton(summary.scale(factors)).sizes.numpy()
    assert twin * factors == pytest.approx(sizes, rel=1e-9, abs=1e-13 * np.abs(sizes).max())


def test_a_ridge_does_not_follow_them():
    summary, factors = summary_of(*random_problem(3, 4)), np.array([1.0, 2.0, 0.5, 3.0])
    sizes, twin = ridge(summary, 1.0).sizes.numpy(), ridge(summary.scale(factors), 1.0).sizes.numpy()
    assert np.abs(twin * factors - sizes).max() > 0.1 * np.abs(sizes).max()
