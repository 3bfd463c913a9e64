"""The cubic solver: global minimisers of problems of all kinds, every special case by name, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solve_reference import KINDS, Problem, best_of_many, lowest_value, objective, problem, residual

from newton_summary import Summary
from newton_summary.solve import Status, cubic, decrease, newton
from newton_summary.solve.model import Model
from newton_summary.solve.secular import is_minimiser

SEEDS = 63  # problems of each of the 16 kinds: 1,008


def summary_of(gradient, hessian, third=None) -> Summary:
    return Summary(loss=1.0, gradient=gradient, hessian=hessian, third=third)


def check_global(p: Problem) -> None:
    """The objective is within 1e-8 of a bound that no point beats, and the optimality condition holds to 1e-8."""
    step = cubic(p.summary, p.regularization)
    assert step.status is Status.SOLVED
    eta, lowest = step.sizes.numpy(), lowest_value(p)
    assert abs(objective(p, eta) - lowest) <= 1e-8 * abs(lowest)
    assert residual(p, eta) <= 1e-8
    assert step.predicted_decrease == pytest.approx(-lowest, rel=1e-8, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_global_minimiser(kind):
    for seed in range(SEEDS):
        check_global(problem(kind, seed))


@pytest.mark.parametrize("kind", ["indefinite", "definite", "hard", "exactly_hard", "several_lowest", "some_flat"])
def test_no_local_search_finds_a_lower_value(kind):
    for seed in range(2):
        p = problem(kind, 1000 + seed, largest=4)
        best = best_of_many(p, seed)
        found = objective(p, cubic(p.summary, p.regularization).sizes.numpy())
        assert found <= best + 1e-8 * abs(best)
        assert lowest_value(p) == pytest.approx(best, rel=1e-6)  # the searches do get there, so they are a test


@pytest.mark.parametrize("kind", KINDS)
def test_large_problems_meet_the_optimality_condition(kind):
    p = problem(kind, 5, largest=50)
    step = cubic(p.summary, p.regularization)
    assert step.ok
    assert residual(p, step.sizes.numpy()) <= 1e-12


# Special cases by name ------------------------------------------------------------------------------------------------


def test_one_group_is_the_root_of_a_quadratic():
    step = cubic(summary_of([3.0], [[-2.0]], [5.0]), 4.0)  # −3 − 2η + 2·5 η² = 0
    assert step.sizes.item() == pytest.approx((2 + math.sqrt(4 + 120)) / 20, rel=1e-12)


def test_hard_case_fills_the_norm_with_the_lowest_eigenvector():
    # K = diag(−2, 1), λ = 2: r = 2 and y = (±√(4 − (0.3/3)²), 0.3/3)
    step = cubic(summary_of([0.0, 0.3], [[-2.0, 0.0], [0.0, 1.0]], [1.0, 1.0]), 2.0)
    assert step.sizes.numpy() == pytest.approx([math.sqrt(4 - 0.01), 0.1], rel=1e-12)


def test_hard_case_with_unequal_third_derivatives():
    # the same in units of (1/4, 3): D = (4, 1/3)
    step = cubic(summary_of([0.0, 0.1], [[-32.0, 0.0], [0.0, 1 / 9]], [64.0, 1 / 27]), 2.0)
    assert step.sizes.numpy() == pytest.approx([math.sqrt(4 - 0.01) / 4, 0.3], rel=1e-12)


def test_orthogonality_alone_is_not_the_hard_case():
    step = cubic(summary_of([0.0, 10.0], [[-0.1, 0.0], [0.0, 1.0]], [1.0, 1.0]), 2.0)
    assert step.sizes.numpy() == pytest.approx([0.0, (-1 + math.sqrt(41)) / 2], rel=1e-12)  # y² + y = 10


def test_no_gradient_stays_where_curvature_is_positive():
    step = cubic(summary_of([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0]))
    assert step.ok
    assert step.sizes.tolist() == [0.0, 0.0]
    assert step.predicted_decrease == 0.0


def test_no_gradient_leaves_a_saddle():
    step = cubic(summary_of([0.0], [[-3.0]], [1.0]))
    assert step.sizes.item() == pytest.approx(6.0, rel=1e-12)
    assert step.predicted_decrease == pytest.approx(18.0, rel=1e-12)  # ½·3·36 − 216/6


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_model_that_falls_in_all_directions_alike(n):
    step = cubic(summary_of(np.zeros(n), -np.eye(n), np.ones(n)), 2.0)
    assert step.sizes.norm().item() == pytest.approx(1.0, rel=1e-12)


def test_of_two_equal_minimisers_the_more_positive_is_taken():
    for sign in (-1, 1):
        step = cubic(summary_of([0.0, 0.0], [[1.0, 2.0 * sign], [2.0 * sign, 1.1]], [1.0, 2.0]))
        assert step.sizes @ torch.tensor([1.0, 2.0 ** (1 / 3)], dtype=torch.float64) > 0


@pytest.mark.parametrize("force", [1e-3, 1e-6, 1e-9, 1e-12])
def test_of_two_nearly_equal_minimisers_the_lower_is_taken(force):
    for sign in (-1, 1):
        step = cubic(summary_of([sign * force, 0.1], [[-1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]), 2.0)
        assert step.sizes[0] * sign > 0.9


def test_stationary_points_that_are_not_minimisers_get_no_certificate():
    """−0.2 η − η² / 2 + |η|³ / 3 has its minimum above 0, and below 0 a maximum and a local minimum."""
    model = Model.of(summary_of([0.2], [[-1.0]], [1.0]), 2.0)
    roots = {
        "global": (1 + math.sqrt(1.8)) / 2,
        "maximum": -(1 - math.sqrt(0.2)) / 2,
        "local": -(1 + math.sqrt(0.2)) / 2,
    }
    for root in roots.values():
        assert abs(model.slope(np.array([root]))[0]) < 1e-13
    assert {name: is_minimiser(model, np.array([root])) for name, root in roots.items()} == {
        "global": True,
        "maximum": False,
        "local": False,
    }
    assert not is_minimiser(model, np.array([roots["global"] + 1e-6]))


def test_no_curvature_at_all():
    step = cubic(summary_of([3.0, 4.0], np.zeros((2, 2)), [1.0, 1.0]), 2.0)
    assert step.sizes.numpy() == pytest.approx([3 / math.sqrt(5), 4 / math.sqrt(5)], rel=1e-12)  # ‖η‖ η = ḡ


def test_nothing_but_an_interaction():
    step = cubic(summary_of([0.0, 0.0], [[0.0, 1.0], [1.0, 0.0]], [1.0, 1.0]), 2.0)  # K = −1 along (1, −1): r = 1
    assert step.sizes.abs().numpy() == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-12)
    assert step.predicted_decrease == pytest.approx(1 / 6, rel=1e-12)


def test_zero_third_derivatives_of_some_groups():
    # group 0 has no cubic term: η_0 = (ḡ_0 − h η_1) / 2, which leaves (H̄_11 − h²/2) η_1 + η_1² = ḡ_1 − h ḡ_0 / 2
    step = cubic(summary_of([1.0, 3.0], [[2.0, 1.0], [1.0, 0.0]], [0.0, 1.0]), 2.0)
    last = (0.5 + math.sqrt(0.25 + 4 * 2.5)) / 2
    assert step.sizes.numpy() == pytest.approx([(1 - last) / 2, last], rel=1e-12)


def test_zero_third_derivatives_of_all_groups_is_newtons_step():
    hessian = np.array([[2.0, 1.0], [1.0, 3.0]])
    step = cubic(summary_of([1.0, -3.0], hessian, [0.0, 0.0]))
    assert step.sizes.numpy() == pytest.approx(np.linalg.solve(hessian, [1.0, -3.0]), rel=1e-12)


def test_no_regularization_needs_no_third_order_and_is_newtons_step():
    plain = summary_of([1.0, -3.0], [[2.0, 1.0], [1.0, 3.0]])
    with_third = Summary(1.0, plain.gradient, plain.hessian, [5.0, 1.0])
    assert torch.allclose(cubic(plain, 0.0).sizes, cubic(with_third, 0.0).sizes, rtol=1e-12, atol=0)
    assert torch.allclose(cubic(plain, 0.0).sizes, newton(plain).sizes, rtol=1e-12)


def test_groups_that_nothing_depends_on_get_no_rate():
    hessian = [[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    step = cubic(summary_of([1.0, 0.0, 1.0], hessian, [0.0, 0.0, 1.0]))
    without = cubic(summary_of([1.0, 1.0], [[2.0, 1.0], [1.0, -1.0]], [0.0, 1.0]))
    first, last = without.sizes.tolist()
    assert step.sizes.tolist() == [pytest.approx(first, rel=1e-12), 0.0, pytest.approx(last, rel=1e-12)]
    assert cubic(summary_of([0.0], [[0.0]], [0.0])).sizes.tolist() == [0.0]
    assert cubic(summary_of([0.0], [[0.0]], [1.0])).sizes.tolist() == [
        0.0
    ]  # but for the cubic term, which is lowest there


@pytest.mark.parametrize(
    ("gradient", "hessian", "third"),
    [
        ([1.0], [[-1.0]], [0.0]),
        ([0.0], [[-1.0]], [0.0]),
        ([1.0], [[0.0]], [0.0]),  # no curvature against a gradient
        ([0.0, 0.0], [[0.0, 1.0], [1.0, 5.0]], [0.0, 1.0]),  # no curvature of its own, coupled to another group
        ([1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0]),  # positive diagonal, indefinite
        ([1.0, -1.0], [[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0]),  # semidefinite, with the gradient along its null space
        ([1.0, 1.0, 0.0], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 9.0]], [0.0, 0.0, 1.0]),  # coupled along it
    ],
)
def test_unbounded_models_say_so_and_make_up_no_number(gradient, hessian, third):
    step = cubic(summary_of(gradient, hessian, third))
    assert step.status is Status.UNBOUNDED
    assert step.sizes.isnan().all()
    assert math.isnan(step.predicted_decrease)


def test_a_flat_valley_is_singular():
    assert cubic(summary_of([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0])).status is Status.SINGULAR


def test_a_flat_valley_is_singular_also_where_no_gradient_is_near_it():
    """It is along the third and the fifth group; rounding puts a little of the others into it."""
    rows = [[4, -1, -2, -1, 2], [-1, 4, 2, 1, -2], [-2, 2, 3, 1, -3], [-1, 1, 1, 4, -1], [2, -2, -3, -1, 3]]
    assert cubic(summary_of([1, -1, 0, 0, 0], rows, [0.0] * 5)).status is Status.SINGULAR


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "hessian", "third"])
def test_a_summary_that_is_not_finite_is_not_solved(where, value):
    parts = {"gradient": np.ones(2), "hessian": np.eye(2), "third": np.ones(2)}
    parts[where].flat[0] = value
    step = cubic(summary_of(**parts))
    assert step.status is Status.NOT_FINITE
    assert step.sizes.isnan().all()


def test_a_third_order_in_full_counts_by_its_diagonal():
    full = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    diagonal = torch.stack([full[s, s, s] for s in range(3)])
    hessian = -np.eye(3)
    steps = [cubic(summary_of([1.0, 2.0, 3.0], hessian, third)) for third in (full, diagonal, -diagonal)]
    assert torch.allclose(steps[0].sizes, steps[1].sizes, rtol=1e-12, atol=0)
    assert torch.allclose(steps[0].sizes, steps[2].sizes, rtol=1e-12, atol=0)  # its sign does not matter


def test_the_regularization_multiplies_the_cubic_term():
    p = problem("indefinite", 3)
    steps = [cubic(summary_of(p.gradient, p.hessian, a * p.third), b) for a, b in ((1.0, 8.0), (8.0, 1.0), (1.0, 1.0))]
    assert torch.allclose(steps[0].sizes, steps[1].sizes, rtol=1e-12)
    assert not torch.allclose(steps[0].sizes, steps[2].sizes, rtol=1e-2)


def test_steps_are_float64_on_the_host_and_summaries_are_not_changed():
    summary = problem("some_flat", 1).summary
    before = {k: v.clone() for k, v in summary._tensors().items()}
    step = cubic(summary)
    assert step.sizes.dtype is torch.float64
    assert step.sizes.device.type == "cpu"
    assert all(torch.equal(v, before[k]) for k, v in summary._tensors().items())


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_asked_for():
    with pytest.raises(ValueError, match=r"third order, which was not measured: summarize\(\.\.\., order=3\)"):
        cubic(summary_of([1.0], [[1.0]]))
    with pytest.raises(ValueError, match=r"second order, which was not measured: summarize\(\.\.\., order=2\)"):
        cubic(Summary(loss=1.0, gradient=[1.0]))


@pytest.mark.parametrize("regularization", [-1.0, math.nan, math.inf])
def test_the_regularization_is_a_number_from_0_on(regularization):
    with pytest.raises(ValueError, match="regularization must not be negative"):
        cubic(summary_of([1.0], [[1.0]], [1.0]), regularization)


# Properties -----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["indefinite", "definite", "wide", "some_flat", "graded", "orthogonal_but_regular"]),
    exponents=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5),
)
def test_rates_follow_the_units_of_each_group(seed, kind, exponents, signs):
    p = problem(kind, seed)
    n = len(p.gradient)
    factors = 10.0 ** np.array(exponents[:n])
    if kind in (
        "indefinite",
        "definite",
        "some_flat",
    ):  # else two minimisers may tie, and the sign of the rates decides
        factors *= signs[:n]
    step, twin = (cubic(s, p.regularization) for s in (p.summary, p.summary.scale(factors)))
    assert step.ok
    assert twin.ok
    sizes = step.sizes.numpy()
    assert twin.sizes.numpy() * factors == pytest.approx(sizes, rel=1e-9, abs=1e-14 * np.abs(sizes).max())
    assert twin.predicted_decrease == pytest.approx(step.predicted_decrease, rel=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KINDS)), loss=st.floats(1e-6, 1e6))
def test_rates_do_not_depend_on_the_units_of_the_loss(seed, kind, loss):
    p = problem(kind, seed)
    first, second = cubic(p.summary, p.regularization), cubic(p.summary * loss, p.regularization)
    assert second.predicted_decrease == pytest.approx(loss * first.predicted_decrease, rel=1e-10)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KINDS)))
def test_the_predicted_decrease_is_the_models_and_not_negative(seed, kind):
    p = problem(kind, seed)
    step = cubic(p.summary, p.regularization)
    assert step.predicted_decrease >= 0
    assert decrease(p.summary, step.sizes, p.regularization) == step.predicted_decrease
