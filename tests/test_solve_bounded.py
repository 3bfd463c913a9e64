"""Solvers within bounds: first- and second-order conditions, convex and small problems against enumeration of faces."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls
from solve_reference import KINDS, Problem, objective, problem

from newton_summary import Summary
from newton_summary.solve import Status, bounded, cubic, decrease, line_search, newton, ridge

INF = math.inf
CONVEX = ("definite", "singular", "wide_definite", "all_flat")


def summary_of(gradient, hessian, third=None) -> Summary:
    return Summary(loss=1.0, gradient=gradient, hessian=hessian, third=third)


def slope_of(p: Problem, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the objective, and the sum of the sizes of its terms, but for 1e-6 of those of all groups."""
    d = np.cbrt(np.abs(p.third))
    stiffness = p.regularization / 2 * np.linalg.norm(d * eta) * d**2
    size = np.abs(p.gradient) + np.abs(p.hessian) @ np.abs(eta) + stiffness * np.abs(eta)
    all_groups = np.sqrt((np.abs(np.diag(p.hessian)) + stiffness) * (np.abs(eta) @ size))
    return p.hessian @ eta + stiffness * eta - p.gradient, size + 1e-6 * all_groups


def check_stationary(p: Problem, eta: np.ndarray, lower: np.ndarray, upper: np.ndarray, tolerance: float = 1e-9):
    """Within the bounds; the slope is 0 where they leave room, and points out of the box where they do not."""
    assert (lower <= eta).all()
    assert (eta <= upper).all()
    slope, size = slope_of(p, eta)
    slope = np.where(np.abs(slope) <= tolerance * size, 0.0, slope)
    assert (slope[eta > lower] <= 0).all()
    assert (slope[eta < upper] >= 0).all()


def curvature_inside(p: Problem, eta: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """The lowest curvature among the rates strictly inside, in units in which that of each term is at most 1."""
    inside = (eta > lower) & (eta < upper)
    if not inside.any():
        return 0.0
    d = np.cbrt(np.abs(p.third))
    r = np.linalg.norm(d * eta)
    terms = [p.hessian]
    if r > 0:
        normal = d**2 * eta
        terms += [p.regularization / 2 * r * np.diag(d**2), p.regularization / 2 * np.outer(normal, normal) / r]
    scale = 1 / np.sqrt(sum(np.abs(np.diag(t)) for t in terms))
    matrix = sum(terms) * np.outer(scale, scale)
    return np.linalg.eigvalsh(matrix[np.ix_(inside, inside)])[0]


def random_box(p: Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the size of the unconstrained solution; some are infinite, and some leave no room."""
    rng = np.random.default_rng(seed)
    step = cubic(p.summary, p.regularization)
    size = np.abs(step.sizes.numpy()) if step.ok else np.ones(len(p.gradient))
    lower, upper = (np.where(rng.random(len(size)) < 0.2, INF, rng.uniform(-0.5, 1.5, len(size)) * size) for _ in "lu")
    lower, upper = -lower, np.maximum(upper, -lower)
    return lower, upper


def by_enumeration(gradient: np.ndarray, hessian: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """The lowest value of the quadratic model in a bounded box: that of the stationary points of all its faces."""
    n, best = len(gradient), INF
    for face in itertools.product((lower, upper, None), repeat=n):
        free = np.array([side is None for side in face])
        eta = np.array([0.0 if side is None else side[i] for i, side in enumerate(face)])
        if free.any():
            block = hessian[np.ix_(free, free)]
            if np.linalg.cond(block) > 1e12:
                continue
            eta[free] = np.linalg.solve(block, (gradient - hessian @ eta)[free])
        if (eta >= lower - 1e-12).all() and (eta <= upper + 1e-12).all():
            best = min(best, -gradient @ eta + eta @ hessian @ eta / 2)
    return best


# Any problem ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["nonnegative", "box"])
def test_solutions_meet_the_conditions_and_are_no_worse_than_clipped_ones(kind, shape):
    for seed in range(15):
        p = problem(kind, seed, largest=12)
        n = len(p.gradient)
        lower, upper = (np.zeros(n), np.full(n, INF)) if shape == "nonnegative" else random_box(p, seed)
        how = {"nonnegative": True} if shape == "nonnegative" else {"bounds": (lower, upper)}
        step, free = cubic(p.summary, p.regularization, **how), cubic(p.summary, p.regularization)
        assert step.ok
        check_stationary(p, step.sizes.numpy(), lower, upper)
        assert curvature_inside(p, step.sizes.numpy(), lower, upper) >= -1e-9
        clipped = free.sizes.clamp(torch.as_tensor(lower), torch.as_tensor(upper))
        found = objective(p, step.sizes.numpy())
        assert found <= objective(p, clipped.numpy()) + 1e-12 * abs(found)
        if (lower <= 0).all() and (upper >= 0).all():
            shortened = line_search(p.summary, clipped, p.regularization)
            assert step.predicted_decrease >= shortened.predicted_decrease * (1 - 1e-12)
            assert step.predicted_decrease >= 0


@pytest.mark.parametrize("kind", CONVEX)
def test_convex_problems_are_solved_to_their_global_minimum(kind):
    """No point y of the box lies lower than the tangent plane at η, which is lowest at a corner."""
    for seed in range(15):
        p = problem(kind, seed, largest=8)
        lower, upper = random_box(p, seed)
        step = cubic(p.summary, p.regularization, bounds=(lower, upper))
        assert step.ok
        eta = step.sizes.numpy()
        slope, size = slope_of(p, eta)
        corner = np.where(slope > 0, lower, upper)
        unlimited = np.isinf(corner)
        assert (np.abs(slope) <= 1e-9 * size)[unlimited].all()
        lower_at_most = slope @ (eta - np.where(unlimited, eta, corner))
        assert lower_at_most <= 1e-8 * abs(objective(p, eta))


def test_nonnegative_least_squares_as_scipy_has_it():
    rng = np.random.default_rng(0)
    for n in (1, 3, 20, 50):
        a, b = rng.standard_normal((n + 5, n)), rng.standard_normal(n + 5)
        units = 10 ** rng.uniform(-4, 4, n)
        summary = summary_of(a.T @ b * units, (a.T @ a) * np.outer(units, units))
        step = newton(summary, nonnegative=True)
        assert step.sizes.numpy() * units == pytest.approx(nnls(a, b)[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("definite", [True, False])
def test_quadratic_models_in_a_box_against_all_faces(definite):
    """The global minimum where the model is convex; elsewhere it is found in nearly all of these problems."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(60):
        n = int(rng.integers(1, 5))
        a = rng.standard_normal((n, n))
        hessian = a @ a.T + 1e-3 * np.eye(n) if definite else a + a.T
        gradient, lower = 2 * rng.standard_normal(n), -rng.random(n)
        upper = lower + rng.uniform(0, 2, n)
        step = newton(summary_of(gradient, hessian), bounds=(lower, upper))
        assert step.ok
        found, lowest = -step.predicted_decrease, by_enumeration(gradient, hessian, lower, upper)
        assert found >= lowest - 1e-9
        missed += found > lowest + 1e-8 * abs(lowest)
    assert missed == 0 if definite else missed <= 6


def test_large_problems_in_units_over_eight_decades():
    rng = np.random.default_rng(2)
    a, units = rng.standard_normal((50, 50)), 10 ** rng.uniform(-4, 4, 50)
    for hessian in (a @ a.T / 50, a + a.T):
        p = Problem(rng.standard_normal(50) * units, hessian * np.outer(units, units), units**3)
        step = cubic(p.summary, nonnegative=True)
        assert step.ok
        check_stationary(p, step.sizes.numpy(), np.zeros(50), np.full(50, INF))


# Special cases by name ------------------------------------------------------------------------------------------------


def test_clipping_raises_the_model_where_a_nonnegative_solve_lowers_it():
    """H̄ = ((1, .99), (.99, 1)), ḡ = (1, .5): the solution (25.4, −24.6), clipped, raises the model by 297."""
    summary = summary_of([1.0, 0.5], [[1.0, 0.99], [0.99, 1.0]])
    free = newton(summary)
    assert free.sizes.numpy() == pytest.approx([25.4, -24.6], rel=1e-2)
    assert decrease(summary, free.sizes.clamp(min=0), 0.0) == pytest.approx(-297, rel=1e-2)
    step = newton(summary, nonnegative=True)
    assert step.sizes.tolist() == [pytest.approx(1.0, rel=1e-12), 0.0]
    assert step.predicted_decrease == pytest.approx(0.5, rel=1e-12)


def test_a_solution_inside_the_bounds_is_the_unconstrained_one():
    p = problem("indefinite", 4)
    free = cubic(p.summary, p.regularization)
    wide = cubic(p.summary, p.regularization, bounds=(-1e9, 1e9))
    torch.testing.assert_close(wide.sizes, free.sizes, rtol=1e-12, atol=0)
    open_ = cubic(p.summary, p.regularization, bounds=(-INF, INF))
    torch.testing.assert_close(open_.sizes, free.sizes, rtol=1e-12, atol=0)


def test_bounds_are_numbers_arrays_or_tensors():
    summary = summary_of([3.0, -3.0], np.eye(2))
    for bounds in (
        (-1, 2),
        (-1.0, [2.0, 2.0]),
        (np.array([-1.0, -1.0]), np.float64(2)),
        (torch.tensor([-1.0, -1.0]), torch.tensor(2.0)),
        (torch.tensor([-1.0, -1.0], dtype=torch.bfloat16), torch.tensor(2.0, requires_grad=True)),
    ):
        assert newton(summary, bounds=bounds).sizes.tolist() == [2.0, -1.0]


def test_nonnegative_and_bounds_hold_together():
    step = newton(summary_of([3.0, -3.0], np.eye(2)), nonnegative=True, bounds=(-1, 2))
    assert step.sizes.tolist() == [pytest.approx(2.0, rel=1e-12), 0.0]


def test_bounds_that_fix_a_rate():
    summary = summary_of([1.0, 1.0, 1.0], [[2.0, 1.0, 0.0], [1.0, -5.0, 0.0], [0.0, 0.0, 1.0]])
    step = newton(summary, bounds=([-INF, 0.25, 0.1], [INF, 0.25, 0.1]))
    assert step.sizes.tolist() == [pytest.approx(0.375, rel=1e-12), 0.25, 0.1]


def test_groups_that_nothing_depends_on_get_the_allowed_rate_next_to_0():
    summary = summary_of([1.0, 0.0], [[2.0, 0.0], [0.0, 0.0]], [1.0, 0.0])
    assert cubic(summary, nonnegative=True).sizes[1] == 0.0
    assert cubic(summary, bounds=(-1, 0.1)).sizes[1] == 0.0
    assert cubic(summary, bounds=(0.1, 0.2)).sizes[1] == 0.1


def test_no_gradient_leaves_a_saddle_into_the_box():
    step = cubic(summary_of([0.0], [[-3.0]], [1.0]), nonnegative=True)
    assert step.sizes.item() == pytest.approx(6.0, rel=1e-12)
    step = cubic(summary_of([0.0], [[-3.0]], [1.0]), bounds=(-INF, 0))
    assert step.sizes.item() == pytest.approx(-6.0, rel=1e-12)
    step = newton(summary_of([0.0, 0.0], -np.eye(2)), bounds=(-1, 1))
    assert step.sizes.abs().tolist() == [1.0, 1.0]


def test_a_local_minimum_next_to_the_start_is_not_all():
    """The best of the points to start from ends at (0, 0.56), where the model is 0.59 lower than at the origin."""
    step = cubic(summary_of([0.0, 2.0], [[-2.0, 1.0], [1.0, 3.0]], [1.0, 1.0]), 2.0, nonnegative=True)
    assert step.sizes.numpy() == pytest.approx([2.0, 0.0], rel=1e-12)
    assert step.predicted_decrease == pytest.approx(4 / 3, rel=1e-12)


def test_a_saddle_inside_is_left_also_where_the_lowest_curvature_of_all_points_out_of_the_box():
    """Curvature is lowest along (0, 0, 1, −1), out of the box either way; along (1, −1, 0, 0) it is negative, too."""
    hessian = np.zeros((4, 4))
    hessian[:2, :2], hessian[2:, 2:] = [[1.0, 1.1], [1.1, 1.0]], [[1.0, 2.0], [2.0, 1.0]]
    step = newton(summary_of(np.zeros(4), hessian), bounds=([-1, -1, 0, 0], 1))
    assert step.sizes.abs().numpy() == pytest.approx([1.0, 1.0, 0.0, 0.0])
    assert step.predicted_decrease == pytest.approx(0.1)


def test_a_ridge_is_minimised_in_the_box():
    summary = summary_of([1.0, 0.5], [[0.0, 0.99], [0.99, 0.0]])
    assert ridge(summary, 1.0, nonnegative=True).sizes.tolist() == [pytest.approx(1.0, rel=1e-12), 0.0]
    assert ridge(summary, 1.0, nonnegative=True).predicted_decrease == 0.5


@pytest.mark.parametrize(
    ("gradient", "hessian", "third", "far"),
    [
        ([1.0], [[0.0]], [0.0], [1e9]),  # no curvature, downhill
        ([0.0], [[-1.0]], [0.0], [1e9]),
        ([-1.0], [[-1.0]], [0.0], [1e9]),  # uphill at first: 0 is a local minimum of a model that is unbounded
        ([1.0, 1.0], [[1.0, -1.0], [-1.0, 1.0]], [0.0, 0.0], [1e9, 1e9]),  # flat along (1, 1), downhill
        ([-1.0, -1.0], [[1.0, -2.0], [-2.0, 1.0]], [0.0, 0.0], [1e9, 1e9]),  # negative along (1, 1), uphill at first
        ([-1.0, -1.0], [[1.0, -200.0], [-200.0, 1e4]], [0.0, 0.0], [1e9, 1e7]),  # the same in other units
        ([1.0, 0.0], [[0.0, -1.0], [-1.0, 0.0]], [1.0, 0.0], [1.0, 1e9]),  # downhill once another group has moved
        ([1.0, 0.0, 1.0], [[0.0, 2.0, 2.0], [2.0, -1.0, 3.0], [2.0, 3.0, 1.0]], [0.0, 1.0, 0.0], [1e9, 0.0, 0.0]),
        ([-1.0, -1.0, -1.0], 1.6 * np.eye(3) - 0.6 * np.ones((3, 3)), [0.0, 0.0, 0.0], [1e9, 1e9, 1e9]),
    ],
)
def test_models_that_are_unbounded_in_the_box_say_so(gradient, hessian, third, far):
    summary = summary_of(gradient, hessian, third)
    assert decrease(summary, torch.tensor(far, dtype=torch.float64)) > 1e8  # they are
    step = cubic(summary, nonnegative=True)
    assert step.status is Status.UNBOUNDED
    assert step.sizes.isnan().all()
    assert cubic(summary, bounds=(0, 1e3)).ok
    mirrored = summary.scale([-1.0] * len(gradient))
    assert cubic(mirrored, bounds=(-INF, 0)).status is Status.UNBOUNDED


@pytest.mark.parametrize(
    ("gradient", "hessian", "expected"),
    [
        ([-1.0], [[0.0]], [0.0]),  # no curvature, uphill
        ([1.0, -1.0], [[1.0, 2.0], [2.0, 1.0]], [1.0, 0.0]),  # negative along (1, −1) only
        ([1.0, -2.0], [[1.0, -1.0], [-1.0, 1.0]], [1.0, 0.0]),  # flat along (1, 1), uphill
    ],
)
def test_models_that_are_bounded_only_in_the_box_are_solved(gradient, hessian, expected):
    summary = summary_of(gradient, hessian, np.zeros(len(gradient)))
    assert cubic(summary).status is not Status.SOLVED
    step = cubic(summary, nonnegative=True)
    assert step.ok
    assert step.sizes.numpy() == pytest.approx(expected, abs=1e-12)


def test_a_flat_valley_in_the_box_has_a_solution():
    step = newton(summary_of([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]), nonnegative=True)
    assert step.ok
    assert step.sizes.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert step.predicted_decrease == pytest.approx(0.5, rel=1e-12)


def in_a_valley(factor, target, lower, upper, units=1.0):
    """|Fᵀη − t|² / 2 with fewer equations than groups, in units of the groups: the solution, and scipy's decrease."""
    a, t = np.asarray(factor, dtype=float), np.asarray(target, dtype=float)
    lower, upper, units = (np.broadcast_to(np.asarray(x, dtype=float), len(a)) for x in (lower, upper, units))
    summary = summary_of(a @ t * units, (a @ a.T) * np.outer(units, units))
    step = newton(summary, bounds=(lower / units, upper / units))
    return step, t @ t / 2 - lsq_linear(a.T, t, (lower, upper), method="bvls", tol=1e-13).cost


def test_flat_valleys_in_boxes_that_are_open_as_scipy_has_them():
    """Along them the model is flat, but for rounding, which grows with the square of the step."""
    rng = np.random.default_rng(0)
    for case in range(100):
        n = int(rng.integers(2, 7))
        shape = n, int(rng.integers(1, n))
        is_whole = case % 2 == 0
        factor, z = (rng.integers(-2, 3, s) if is_whole else rng.standard_normal(s) for s in (shape, n))
        lower, upper = np.where(rng.random(n) < 0.5, -INF, 0.0), np.where(rng.random(n) < 0.5, INF, 1.0)
        if np.isinf([lower, upper]).all():  # no box at all
            continue
        step, expected = in_a_valley(factor, factor.T @ z, lower, upper, 10.0 ** rng.integers(-4, 5, n))
        assert step.ok
        assert step.predicted_decrease == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("factor", "target", "lower", "upper", "units"),
    [
        (  # a rate that rounding keeps an ulp from its bound
            [[-2, 0, -2, -2], [-1, 0, 2, -2], [-2, 0, -2, 2], [-1, 2, 0, 2], [-2, 2, 0, 1]],
            [-2, 2, 0, 5],
            [0, -INF, 0, -INF, -INF],
            [1, INF, INF, 1, 1],
            1.0,
        ),
        (  # a long way along the valley to a bound
            np.array(
                [
                    [-0.05857576732477869, -1.1970422036654802, -0.07157147214141614],
                    [0.9597948730506174, 1.6136058797790789, 1.0443164272782892],
                ]
            ).T,
            [-3.59039787, 5.13799511],
            [0, 0, -INF],
            [INF, 1, INF],
            1.0,
        ),
        (  # an eigenvector with rounding errors where it is 0
            [[-1, 2, -1], [-2, 2, -2], [2, 2, 0], [-1, -1, 0], [1, -2, 1]],
            [-2, 2, -2],
            0,
            INF,
            [1e-2, 1e4, 10, 1, 1],
        ),
    ],
)
def test_flat_valleys_that_led_astray(factor, target, lower, upper, units):
    step, expected = in_a_valley(factor, target, lower, upper, units)
    assert step.ok
    assert step.predicted_decrease == pytest.approx(expected, rel=1e-9)


def test_a_step_that_lands_where_the_curvature_is_0_is_not_the_last():
    """The third rate gets to −2, where −2 + |η| is 0 but for rounding, and Newton's step is endless."""
    summary = summary_of([-1.0, 0.0, -1.0], np.diag([-1.0, 1.0, -2.0]), [0.0, 0.0, 1.0])
    step = cubic(summary, bounds=([0.0, 0.0, -INF], [1.0, INF, 1.0]))
    assert step.ok
    assert step.sizes.numpy() == pytest.approx([0.0, 0.0, -2 - math.sqrt(6)], rel=1e-12)


def test_curvatures_over_twelve_decades_are_solved_as_scipy_has_them():
    """Newton's steps from a wall bend back into it at once: alone, a thousand of them got nowhere in one case of 15."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        factor = rng.standard_normal((8, 8)) * 10 ** rng.uniform(-6, 0, 8)
        target = factor.T @ rng.standard_normal(8)
        step = newton(summary_of(factor @ target, factor @ factor.T), nonnegative=True)
        assert step.ok
        expected = target @ target / 2 - nnls(factor.T, target)[1] ** 2 / 2
        assert step.predicted_decrease == pytest.approx(expected, rel=1e-9)


def test_solves_end_when_steps_are_rounding_errors(monkeypatch):
    """Ever shorter steps were surely downhill, and changed nothing, for a thousand rounds in one solve of twenty."""
    rounds, find = [], bounded._directions
    monkeypatch.setattr(bounded, "_directions", lambda *args: rounds.append(args) or find(*args))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a, third = rng.standard_normal((40, 40)), rng.standard_normal(40)
        third[::3] = 0
        summary = summary_of(rng.standard_normal(40), (a + a.T) / math.sqrt(40) + 3 * np.eye(40), third)
        for how in ({"nonnegative": True}, {"bounds": (-0.5, 0.7)}):
            rounds.clear()
            assert cubic(summary, **how).ok
            assert len(rounds) < 60
    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 500))
    parts = [(rng.standard_normal(500) + 0.5, rng.standard_normal(500)) for _ in range(5)]
    gradient, third = np.mean(parts, axis=0)
    rounds.clear()
    assert cubic(summary_of(gradient, a @ a.T / 500 + 0.01 * np.eye(500), third), nonnegative=True).ok
    assert len(rounds) < 60


@pytest.mark.parametrize("factor", [1 / 1024, 1024.0])
def test_the_unit_of_the_loss_decides_on_no_minimum(factor):
    """Of several local ones: lengths along eigenvectors follow the unit, too."""
    rng = np.random.default_rng(0)
    for case in range(150):
        a, third = rng.standard_normal((4, 4)), rng.standard_normal(4)
        gradient = rng.standard_normal(4) * (case % 5 > 0)
        summary = summary_of(gradient, a + a.T, third)
        step, twin = (cubic(s, nonnegative=True) for s in (summary, summary * factor))
        assert twin.sizes.numpy() == pytest.approx(step.sizes.numpy(), rel=1e-9)
        assert twin.predicted_decrease == pytest.approx(step.predicted_decrease * factor, rel=1e-9)


@pytest.mark.parametrize("decades", [5, 50, 150, 300])
def test_numbers_of_all_sizes_are_solved_or_fail_with_a_status(decades):
    rng = np.random.default_rng(decades)
    statuses = []
    for _ in range(30):
        n = int(rng.integers(1, 6))

        def numbers(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape) * 10 ** rng.uniform(-decades, decades, shape) * (rng.random(shape) < 0.8)

        summary = summary_of(numbers(n), numbers(n, n), numbers(n))
        boxed = cubic(summary, bounds=(-1, 2))
        steps = [cubic(summary), newton(summary), ridge(summary, 1.0), boxed, cubic(summary, nonnegative=True)]
        for step in steps:
            assert step.ok == bool(step.sizes.isfinite().all())
            assert step.ok == math.isfinite(step.predicted_decrease)
        assert boxed.status is not Status.UNBOUNDED
        statuses += [step.status for step in steps]
    if decades == 5:
        assert Status.NOT_CONVERGED not in statuses


@pytest.mark.parametrize("solver", [newton, lambda s, **how: ridge(s, 1.0, **how), cubic])
def test_a_summary_that_is_not_finite_is_not_solved(solver):
    step = solver(summary_of([1.0, math.nan], np.eye(2), np.ones(2)), nonnegative=True)
    assert step.status is Status.NOT_FINITE


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.0, [1.0, 2.0, 3.0]), r"the upper bound has shape \(3,\); 2 groups need \(\) or \(2,\)"),
        ((math.nan, 1.0), "the lower bound has entries that are NaN"),
        (([0.0, 2.0], 1.0), "no room for group 1: lower 2, upper 1"),
        ((INF, INF), "no room for group 0"),
        (1.0, "bounds must be a pair, the lower ones and the upper ones, got 1.0"),
        ((0.0, 1.0, 2.0), "bounds must be a pair"),
        ((-INF, -INF), "no room for group 0"),
    ],
)
def test_bounds_that_do_not_fit(bounds, message):
    with pytest.raises(ValueError, match=message):
        newton(summary_of([1.0, 1.0], np.eye(2)), bounds=bounds)


def test_nonnegative_against_negative_bounds():
    with pytest.raises(ValueError, match="no room for group 0: lower 0, upper -1"):
        newton(summary_of([1.0], [[1.0]]), nonnegative=True, bounds=(-2, -1))


# Properties -----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["definite", "wide_definite", "indefinite", "some_flat"]),
    exponents=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5),
    loss=st.sampled_from([1.0, 1e-60, 1e60]),
)
def test_rates_follow_the_units_of_each_group_and_not_those_of_the_loss(seed, kind, exponents, signs, loss):
    p = problem(kind, seed)
    lower, upper = random_box(p, seed)
    n = len(lower)
    factors = 10.0 ** np.array(exponents[:n]) * signs[:n]
    bounds = np.sort([lower / factors, upper / factors], axis=0)
    step = cubic(p.summary, p.regularization, bounds=(lower, upper))
    twin = cubic(p.summary.scale(factors) * loss, p.regularization, bounds=tuple(bounds))
    assert step.ok
    sizes = step.sizes.numpy()
    assert twin.sizes.numpy() * factors == pytest.approx(sizes, rel=1e-9, abs=1e-13 * np.abs(sizes).max())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(CONVEX))
def test_tighter_bounds_never_predict_more(seed, kind):
    p = problem(kind, seed)
    lower, upper = random_box(p, seed)
    wide = cubic(p.summary, p.regularization, bounds=(lower - 1, upper + 1))
    narrow = cubic(p.summary, p.regularization, bounds=(lower, upper))
    assert wide.predicted_decrease >= narrow.predicted_decrease - 1e-10 * abs(wide.predicted_decrease)
