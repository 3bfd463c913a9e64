"""The conformance suite passes what is right, and names what is wrong with what is not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from newton_summary import solve
from newton_summary.measure.rules import Bilinear, Elementwise, Linear, Softmax
from newton_summary.measure.rules.bilinear import MatrixProduct
from newton_summary.optim.directions import Adam, Momentum
from newton_summary.solve import Status, Step
from newton_summary.testing import check_direction, check_rule, check_solver, cubic_decrease, quadratic_decrease

aten = torch.ops.aten
X = torch.linspace(-1.5, 2.0, 12, dtype=torch.float64).view(3, 4)


def refuses(message):
    return pytest.raises(AssertionError, match=re.escape(message))


# Rules (tests/test_rules.py runs every rule of the package) -----------------------------------------------------------


def wrong_tanh(order):
    """The derivatives of tanh, one of them doubled."""

    def derivatives(call, highest):
        t = call.out
        slopes = [1 - t**2, -2 * t * (1 - t**2), (6 * t**2 - 2) * (1 - t**2)]
        slopes[order - 1] = 2 * slopes[order - 1] if order else slopes[order - 1]
        return tuple(slopes[:highest])

    return Elementwise(derivatives)


def test_a_right_rule_passes() -> None:
    check_rule(aten.tanh.default, X, rule=wrong_tanh(0))


@pytest.mark.parametrize(
    ("order", "message"), [(1, "the first derivative ẏ"), (2, "what it adds to H̄"), (3, "the third order's diagonal")]
)
def test_a_wrong_derivative_is_named(order, message) -> None:
    with pytest.raises(AssertionError, match=f"elementwise rule of aten.tanh.default: .*{message} is wrong: got .*exp"):
        check_rule(aten.tanh.default, X, rule=wrong_tanh(order))


def test_a_curve_that_calls_itself_linear_is_found() -> None:
    with refuses("the linear rule of aten.tanh.default: what it adds to H̄ is wrong"):
        check_rule(aten.tanh.default, X, rule=Linear(rows=lambda call, place, rows: rows * (1 - call.out**2)))


def test_a_rule_with_wrong_adjoints_or_third_order_is_found() -> None:
    class Forgetful(Softmax):
        def sources(self, call, adjoint):
            return {place: (groups, 2 * rows) for place, (groups, rows) in super().sources(call, adjoint).items()}

    class Lazy(Softmax):
        def add_third(self, call, adjoint, moving, groups, sums):
            super().add_third(call, None, moving, groups, sums)

    with refuses("how it moves the adjoints of its arguments (sources) is wrong"):
        check_rule(aten._softmax.default, X, -1, False, rule=Forgetful(log=False))
    with refuses("all of the third order is wrong"):
        check_rule(aten._softmax.default, X, -1, False, rule=Lazy(log=False))


def test_tangents_of_another_shape_are_found() -> None:
    class Idle(Linear):
        def push(self, call, adjoint, sums):
            return call.jets[0]

    with refuses("the linear rule of aten.t.default: tangents of shape (3, 4) for (4, 3)"):
        check_rule(aten.t.default, X, rule=Idle())


def test_a_rule_is_asked_for_what_it_takes() -> None:
    with refuses("the rule of aten.atan2.default does not take"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(check_rule.__globals__["rule_for"].__globals__["_RULES"], aten.atan2.default, Elementwise())
        check_rule(aten.atan2.default, X, X)
    with refuses("the multilinear rule does not take ['0', '1', '2'] of aten.addmm.default as what moves"):
        check_rule(aten.addmm.default, X[0, :2], X, X.T[:, :2], rule=Bilinear(MatrixProduct(), left=0, right=1))


def test_what_moves_is_in_float64() -> None:
    with pytest.raises(TypeError, match=r"aten.tanh.default: argument 0 moves, so it must be a float64 tensor"):
        check_rule(aten.tanh.default, X.float())
    with pytest.raises(TypeError, match="no argument is a float64 tensor, so nothing moves"):
        check_rule(aten.tanh.default, torch.tensor([1, 2]))


def test_lists_and_keyword_arguments() -> None:
    check_rule(aten.cat.default, [X, X], 1)
    check_rule(aten.gelu.default, X, kwargs={"approximate": "tanh"})


# Solvers --------------------------------------------------------------------------------------------------------------

SOLVERS = {
    "cubic": (solve.cubic, cubic_decrease, {}),
    "cubic, stronger": (
        lambda s: solve.cubic(s, 10.0),
        lambda s, x: cubic_decrease(s, x, regularization=10.0),
        {},
    ),
    "cubic, nonnegative": (
        lambda s: solve.cubic(s, nonnegative=True),
        cubic_decrease,
        {"optimum": "local", "nonnegative": True},
    ),
    "newton": (solve.newton, quadratic_decrease, {"optimum": "stationary"}),
    "newton, nonnegative": (
        lambda s: solve.newton(s, nonnegative=True),
        quadratic_decrease,
        {"optimum": "local", "nonnegative": True},
    ),
    "ridge": (
        lambda s: solve.ridge(s, 0.5),
        lambda s, x: quadratic_decrease(s, x) - 0.25 * x @ x,
        {"optimum": "stationary", "invariant": False},
    ),
}


@pytest.mark.parametrize(("solver", "decrease", "options"), SOLVERS.values(), ids=SOLVERS)
def test_the_solvers_of_the_package_pass(solver, decrease, options) -> None:
    check_solver(solver, decrease, **options)


def changed(**changes):
    """Newton's step but for some fields, which may depend on it."""

    def solver(summary):
        step = solve.newton(summary)
        return replace(step, **{key: f(step) if callable(f) else f for key, f in changes.items()}) if step.ok else step

    return solver


class Alternating:
    """Takes half the step every second time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, summary):
        self.calls += 1
        step = solve.newton(summary)
        return replace(step, sizes=step.sizes / (1 + self.calls % 2))


def spoils(summary):
    step = solve.newton(summary)
    summary.hessian.mul_(2)
    return step


def raises(summary):
    if not summary.is_finite():
        raise ValueError("not finite")
    return solve.newton(summary)


def clamps(summary):
    step = solve.newton(summary)
    sizes = step.sizes.clamp(min=0)
    return replace(step, sizes=sizes, predicted_decrease=float(quadratic_decrease(summary, sizes)))


def favours_the_first(summary):
    """The best step of the first group alone, the others standing still: stationary for one group only."""
    sizes = torch.zeros(len(summary), dtype=torch.float64)
    sizes[0] = summary.gradient[0] / summary.hessian[0, 0]
    return Step(sizes, float(quadratic_decrease(summary, sizes)))


def ones(summary):
    return Step(torch.ones(len(summary), dtype=torch.float64), 0.0)


def declines(summary):
    return Step.failed(len(summary), Status.SINGULAR)


def trusting(summary):
    step = solve.newton(summary)
    return step if step.ok else Step(torch.zeros(len(summary), dtype=torch.float64), 0.0)


WRONG_SOLVERS = {
    "a solver returns a Step, this one Tensor": (lambda s: s.gradient, {}),
    "sizes must be float64 of shape (1,) on the host, got torch.float32": (
        changed(sizes=lambda s: s.sizes.float()),
        {},
    ),
    "status must be a Status, got 'fine'": (changed(status="fine"), {}),
    "the status is SOLVED, but the sizes are [nan]": (changed(sizes=lambda s: s.sizes * torch.nan), {}),
    "and not NaN": (changed(status=Status.SINGULAR), {}),
    "the solver changed the summary": (spoils, {}),
    "a second solve gave": (Alternating(), {}),
    "H̄ is positive definite, but the solve ended as Status.SINGULAR": (declines, {}),
    "it predicts a decrease of": (changed(predicted_decrease=lambda s: 2 * s.predicted_decrease), {}),
    "the model's slope at": (favours_the_first, {}),
    "decreases the model by": (solve.newton, {"optimum": "global"}),
    "rates are negative": (solve.newton, {"nonnegative": True}),
    "the model's slope at [0.0": (clamps, {"nonnegative": True}),
    "raised ValueError('not finite'): return a status": (raises, {}),
    "was solved: return Status.NOT_FINITE": (trusting, {}),
}


@pytest.mark.parametrize(("message", "wrong"), WRONG_SOLVERS.items(), ids=WRONG_SOLVERS)
def test_what_is_wrong_with_a_solver_is_named(message, wrong) -> None:
    solver, options = wrong
    with refuses(message):
        check_solver(solver, **{"optimum": "stationary"} | options)


def test_a_ridge_depends_on_the_units_of_the_groups() -> None:
    solver, decrease, options = SOLVERS["ridge"]
    with refuses("with the groups in other units the step is"):
        check_solver(solver, decrease, **options | {"invariant": True})


def test_a_solver_that_knows_the_units_of_the_loss_is_found() -> None:
    def decrease(summary, sizes):
        return quadratic_decrease(summary, sizes) - 0.5 * summary.hessian.diagonal().abs() ** 1.5 @ sizes**2

    def solver(summary):
        matrix = summary.hessian + torch.diag(summary.hessian.diagonal().abs() ** 1.5)
        if not matrix.isfinite().all() or torch.linalg.eigvalsh(matrix)[0] <= 0:
            return Step.failed(len(summary), Status.UNBOUNDED)
        sizes = torch.linalg.solve(matrix, summary.gradient)
        return Step(sizes, float(decrease(summary, sizes)))

    with refuses("in other units the step is"):
        check_solver(solver, decrease)
    check_solver(changed(), optimum="stationary")


def test_a_solver_that_knows_the_places_of_groups_is_found() -> None:
    def tilted(summary):
        return 2.0 + torch.arange(len(summary)) / 10

    def decrease(summary, sizes):
        return quadratic_decrease(summary, sizes) - 0.5 * tilted(summary) * summary.hessian.diagonal().abs() @ sizes**2

    def solver(summary):
        matrix = summary.hessian + torch.diag(tilted(summary) * summary.hessian.diagonal().abs())
        sizes = torch.linalg.solve(matrix, summary.gradient)
        return Step(sizes, float(decrease(summary, sizes)))

    with refuses("with the groups in another order the step is"):
        check_solver(solver, decrease, optimum="stationary")


# Directions (tests/test_directions.py runs every direction of the package) --------------------------------------------


class Wrong(Momentum):
    """Momentum with one method replaced."""

    def __init__(self, update=None, **members):
        super().__init__(0.5)
        self._changed = update
        for name, value in members.items():
            setattr(self, name, value)

    def update(self, groups, state):
        u = super().update(groups, state)
        return u if self._changed is None else self._changed(u, groups)


def in_place(u, groups):
    for p in u:
        p.mul_(0.9)
    return u


def clips_gradients(u, groups):
    for p in u:
        p.grad.clamp_(-0.1, 0.1)
    return u


def by_group(u, groups):
    norms = {
        p: torch.stack([u[q].norm() for q in g["params"] if q in u]).norm()
        for g in groups
        for p in g["params"]
        if p in u
    }
    return {p: v / norms[p] for p, v in u.items()}


class RemembersElsewhere(Momentum):
    """Its memory is not in the state."""

    def __init__(self):
        super().__init__(0.5)
        self.calls = 0

    def update(self, groups, state):
        self.calls += 1
        return {p: v * self.calls for p, v in super().update(groups, state).items()}


WRONG_DIRECTIONS = {
    "defaults must be a dictionary, got None": lambda ps: Wrong(defaults=None),
    "update gave a direction for what is no parameter": lambda ps: Wrong(lambda u, g: {**u, torch.ones(2): 1.0}),
    "update changed a parameter of shape (3, 2)": lambda ps: Wrong(in_place),
    "update changed the gradient of a parameter of shape (3, 2)": lambda ps: Wrong(clips_gradients),
    "parameter of shape () without a gradient got a direction": lambda ps: Wrong(
        lambda u, g: {p: u.get(p, torch.zeros_like(p)) for h in g for p in h["params"]}
    ),
    "parameter of shape (3, 2) with a gradient got no direction": lambda ps: Wrong(lambda u, g: {}),
    "is torch.float32 of shape (6,)": lambda ps: Wrong(lambda u, g: {p: v.flatten() for p, v in u.items()}),
    "requires gradients: detach it": lambda ps: Wrong(
        lambda u, g: {p: v.clone().requires_grad_() for p, v in u.items()}
    ),
    "is not finite, though the gradients are": lambda ps: Wrong(lambda u, g: {p: v / 0 for p, v in u.items()}),
    "is the parameter itself: give a copy": lambda ps: Wrong(lambda u, g: {p: p.detach() for p in u}),
    "the unit of a parameter of shape (3, 2) is 0.0: it must be positive": lambda ps: Wrong(unit=lambda p: 0.0),
    "the direction depends on how parameters are grouped": lambda ps: Wrong(by_group),
    "a successor with the state of step 3 gives other directions": lambda ps: RemembersElsewhere(),
}


@pytest.mark.parametrize(("message", "make"), WRONG_DIRECTIONS.items(), ids=WRONG_DIRECTIONS)
def test_what_is_wrong_with_a_direction_is_named(message, make) -> None:
    with refuses(message):
        check_direction(make)


def test_a_member_that_is_missing_is_named() -> None:
    class Half:
        defaults: dict = {}  # noqa: RUF012

        def update(self, groups, state):
            return {}

    with refuses("Half has no unit"):
        check_direction(lambda parameters: Half())


def test_a_state_that_loses_digits_on_its_way_is_found() -> None:
    """torch casts a floating-point state to its parameter's type when an optimizer loads it."""

    class Precise(Momentum):
        def update(self, groups, state):
            for p in (p for g in groups for p in g["params"] if p.grad is not None):
                past = state[p].get("sum", torch.zeros_like(p, dtype=torch.float64))
                state[p]["sum"] = 0.9 * past + p.grad.double() / 3
            return {p: state[p]["sum"].to(p.dtype) for g in groups for p in g["params"] if p.grad is not None}

    with refuses("a training that was resumed from a checkpoint ends elsewhere"):
        check_direction(lambda parameters: Precise(0.5))


def test_directions_of_the_users_own_pass() -> None:
    check_direction(lambda parameters: Adam((0.8, 0.9), 1e-6))
    check_direction(lambda parameters: torch.optim.RAdam(parameters))
