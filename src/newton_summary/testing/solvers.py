"""A solver against the conditions of its own model, on random problems in random units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from newton_summary.solve import Status, Step
from newton_summary.summary import Summary

Solver: TypeAlias = Callable[[Summary], Step]
Decrease: TypeAlias = Callable[[Summary, Tensor], Tensor]
Optimum: TypeAlias = Literal["global", "local", "stationary"]

_POINTS = 200
_LARGEST = 6


def quadratic_decrease(summary: Summary, sizes: Tensor) -> Tensor:
    """ḡᵀη − ½ ηᵀH̄η, differentiable in η (docs/method.md, section 2)."""
    return summary.gradient @ sizes - sizes @ summary.tensor(2) @ sizes / 2


def cubic_decrease(summary: Summary, sizes: Tensor, regularization: float = 1.0) -> Tensor:
    """ḡᵀη − ½ ηᵀH̄η − (λ_int / 6) ‖Dη‖³, differentiable in η (docs/method.md, section 2)."""
    third = summary.third_diagonal
    assert third is not None
    squares = third.abs() ** (2 / 3) * sizes**2
    return quadratic_decrease(summary, sizes) - regularization / 6 * squares.sum() ** 1.5


def check_solver(
    solver: Solver,
    decrease: Decrease = quadratic_decrease,
    *,
    optimum: Optimum = "global",
    nonnegative: bool = False,
    invariant: bool = True,
    problems: int = 24,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Holds a solver to its own model on random problems of 1 to 6 groups, half of them indefinite.

    - It returns a :class:`~newton_summary.solve.Step` in float64 on the host, the same one each time, and leaves the
      summary as it is.  It solves every problem whose H̄ is positive definite; others it may decline by a status.
    - The decrease that it predicts is that of its model, and the step is an optimum of it.
    - Groups in another order get their sizes in that order.
    - In other units of groups and loss it takes the same step.
    - Where ḡ or H̄ is not finite it raises nothing, and its status says so.

    Args:
        solver: takes a summary with H̄ and the diagonal of the third order.
        decrease: the decrease of the loss in the solver's model, differentiable by ``torch.func`` in the sizes.
        optimum: which one it finds.  ``"global"``: nothing is better anywhere; ``"local"``: nothing next to it is, and
            nothing anywhere where H̄ is positive definite; ``"stationary"``: the slope is 0.
        nonnegative: whether its rates are never negative.
        invariant: whether it takes the same step in other units; a ridge does not.
        problems: how many there are.
        tolerance: how accurate it has to be, relatively.
        seed: fixes the problems.

    Raises:
        AssertionError: one of these does not hold; it says which, and on what problem.

    Example:
        >>> from newton_summary import solve
        >>> check_solver(solve.newton, optimum="stationary")
        >>> check_solver(lambda summary: solve.cubic(summary, nonnegative=True), cubic_decrease,
        ...              optimum="local", nonnegative=True)
    """
    for problem in _problems(problems, seed, nonnegative):
        check = _Check(solver, decrease, problem, nonnegative, tolerance)
        step = check.solved()
        if step is None:
            continue
        check.predicts(step)
        check.is_stationary(step)
        if optimum != "stationary":
            check.is_lowest(step, everywhere=optimum == "global" or problem.definite)
        check.follows_the_order(step)
        if invariant:
            check.follows_the_units(step)
    _check_not_finite(solver)


@dataclass(frozen=True)
class _Problem:
    """A summary; the units of its groups, in which sizes are about 1; and other units, to change to."""

    summary: Summary
    units: Tensor
    factors: Tensor
    definite: bool
    generator: torch.Generator

    def __str__(self) -> str:
        s = self.summary
        assert s.third is not None
        return f"for ḡ = {s.gradient.tolist()}, H̄ = {s.tensor(2).tolist()}, D^(3) = {s.third.tolist()}"


def _problems(count: int, seed: int, nonnegative: bool) -> Iterator[_Problem]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(size: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

    for number in range(count):
        n, definite = 1 + number // 2 % _LARGEST, number % 2 == 0
        q, _ = torch.linalg.qr(normal(n, n))
        eigenvalues = uniform(n, 0.1, 2.0)
        if not definite:
            eigenvalues = eigenvalues * torch.where(torch.arange(n) == 0, -1.0, normal(n).sign())
        hessian = q @ torch.diag(eigenvalues) @ q.T
        summary = Summary(1.0, normal(n), (hessian + hessian.T) / 2, normal(n))  # type: ignore[arg-type]
        units, factors = 10 ** uniform(n, -1.0, 1.0), 10 ** uniform(n, -1.0, 1.0)
        if not nonnegative:
            factors = factors * normal(n).sign()
        yield _Problem(summary.scale(1 / units), units, factors, definite, generator)


@dataclass(frozen=True)
class _Check:
    """One problem's checks."""

    solver: Solver
    decrease: Decrease
    problem: _Problem
    nonnegative: bool
    tolerance: float

    def solved(self) -> Step | None:
        """The step; ``None`` where the solver may decline and does."""
        summary = self.problem.summary
        before = summary.to_dict()
        step, again = self.solver(summary), self.solver(summary)
        _check_step(step, len(summary))
        self._require(summary.to_dict() == before, "the solver changed the summary")
        same = step.status == again.status and torch.equal(step.sizes.nan_to_num(), again.sizes.nan_to_num())
        self._require(same, f"a second solve gave {again}, the first {step}")
        if not step.ok:
            self._require(not self.problem.definite, f"H̄ is positive definite, but the solve ended as {step.status}")
            return None
        return step

    def predicts(self, step: Step) -> None:
        expected = float(self.decrease(self.problem.summary, step.sizes))
        close = abs(step.predicted_decrease - expected) <= self.tolerance * self._terms(step.sizes)
        self._require(close, f"it predicts a decrease of {step.predicted_decrease}, its model one of {expected}")

    def is_stationary(self, step: Step) -> None:
        """The first-order conditions, each relative to the sizes of its own terms."""
        s, sizes = self.problem.summary, step.sizes
        slope = torch.func.grad(lambda x: self.decrease(s, x))(sizes)
        own = s.gradient - s.tensor(2) @ sizes
        terms = s.gradient.abs() + s.tensor(2).abs() @ sizes.abs() + (slope - own).abs()
        wrong = slope.abs() > self.tolerance * terms
        if self.nonnegative:
            self._require(bool((sizes >= 0).all()), f"rates are negative: {sizes.tolist()}")
            wrong &= (sizes > 0) | (slope > 0)
        self._require(not wrong.any(), f"the model's slope at {sizes.tolist()} is {slope.tolist()}")

    def is_lowest(self, step: Step, everywhere: bool) -> None:
        """No point is better among many next to the step, and, if so wanted, far from it."""
        noise = torch.randn(_POINTS, len(step.sizes), generator=self.problem.generator, dtype=torch.float64)
        points = [step.sizes + 1e-3 * noise * self.problem.units]
        if everywhere:
            points += [points[0] + scale * noise * self.problem.units for scale in (0.1, 1.0, 10.0)]
        tried = torch.cat(points).clamp(min=0) if self.nonnegative else torch.cat(points)
        values = torch.vmap(lambda x: self.decrease(self.problem.summary, x))(tried)
        best, found = float(self.decrease(self.problem.summary, step.sizes)), int(values.argmax())
        better = bool(values[found] > best + self.tolerance**1.5 * self._terms(step.sizes))
        what = f"{tried[found].tolist()} decreases the model by {float(values[found])}, the step by {best}"
        self._require(not better, what)

    def follows_the_order(self, step: Step) -> None:
        s = self.problem.summary
        assert s.third is not None
        order = torch.randperm(len(s), generator=self.problem.generator)
        gradient, hessian, third = s.gradient[order], s.tensor(2)[order][:, order], s.third[order]
        twin = self.solver(replace(s, gradient=gradient, hessian=hessian, third=third))
        self._same(step.sizes[order], twin.sizes, self.problem.units[order], "with the groups in another order")

    def follows_the_units(self, step: Step) -> None:
        summary, factors = self.problem.summary, self.problem.factors
        twin = self.solver(summary.scale(factors)).sizes * factors
        self._same(step.sizes, twin, self.problem.units, "with the groups in other units")
        twin = self.solver(summary * 1e3).sizes
        self._same(step.sizes, twin, self.problem.units, "with the loss in other units")

    def _terms(self, sizes: Tensor) -> float:
        """The sizes of the terms of the model, added up."""
        s = self.problem.summary
        value = s.gradient.abs() @ sizes.abs() + sizes.abs() @ s.tensor(2).abs() @ sizes.abs()
        return float(value + (self.decrease(s, sizes) - quadratic_decrease(s, sizes)).abs())

    def _same(self, expected: Tensor, got: Tensor, units: Tensor, when: str) -> None:
        difference = ((expected - got) / units).abs().max()
        same = bool(difference <= self.tolerance * (expected / units).abs().max())
        self._require(same, f"{when} the step is {got.tolist()}, not {expected.tolist()}")

    def _require(self, condition: object, message: str) -> None:
        if not condition:
            raise AssertionError(f"{message}, {self.problem}")


def _check_step(step: object, size: int) -> None:
    if not isinstance(step, Step):
        raise AssertionError(f"a solver returns a Step, this one {type(step).__name__}")
    sizes = step.sizes
    if sizes.shape != (size,) or sizes.dtype != torch.float64 or sizes.device.type != "cpu":
        raise AssertionError(
            f"sizes must be float64 of shape ({size},) on the host, got {sizes.dtype} of shape {tuple(sizes.shape)} "
            f"on {sizes.device}"
        )
    if not isinstance(step.status, Status):
        raise AssertionError(f"status must be a Status, got {step.status!r}")
    if step.ok and not bool(sizes.isfinite().all()):
        raise AssertionError(f"the status is SOLVED, but the sizes are {sizes.tolist()}")
    if not step.ok and not bool(sizes.isnan().all()):
        raise AssertionError(f"the status is {step.status}, but the sizes are {sizes.tolist()} and not NaN")


def _check_not_finite(solver: Solver) -> None:
    """Numbers that are not finite give a status, and never an error."""
    good = Summary(1.0, [1.0, 0.5], [[2.0, 0.1], [0.1, 1.0]], [0.5, -0.3])  # type: ignore[arg-type]
    for value in (torch.nan, torch.inf, -torch.inf):
        for what in ("gradient", "hessian"):
            tensor = getattr(good, what).clone()
            tensor.view(-1)[0] = value
            try:
                step = solver(replace(good, **{what: tensor}))
            except Exception as error:
                raise AssertionError(f"an entry {value} of the {what} raised {error!r}: return a status") from error
            _check_step(step, len(good))
            if step.ok:
                raise AssertionError(f"an entry {value} of the {what} was solved: return Status.NOT_FINITE")
