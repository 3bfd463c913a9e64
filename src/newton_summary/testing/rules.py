"""A rule against derivatives of its operation along random curves, by nested backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.rules import Call, General, Jet, Place, Rule, Sums, has_rule, rule_for

_GROUPS = 4
_FIRST = ((0, 1, 2), (3, 1), (2,))  # the groups whose rates move the first, second … argument
_SECOND = ((1, 2), (1,), ())  # those of them that also accelerate it
_TOLERANCE = 1e-9


def check_rule(
    op: Any,
    *args: Any,
    moving: Sequence[Place] | None = None,
    rule: Rule | None = None,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    seed: int = 0,
) -> None:
    """Holds a rule to what its operation does along random curves of its arguments (docs/engine.md, the identity).

    The arguments move with four rates, at random velocities and accelerations: x(η) = x + Σ η_i ẋ_i + ½ Σ η_i² ẍ_i.
    Compared are the first and second derivative of the result by every rate, and what the rule adds to H̄, to the third
    order's diagonal and to all of the third order, through random adjoints.  If the operation gives several results,
    the first one counts.

    Args:
        op: the operation, such as ``torch.ops.mylib.myop.default``.
        args: its arguments; tensors in float64, away from kinks.
        moving: which of them move: positions, or pairs of a position and that in a list.  Default: every floating-point
            tensor.
        rule: the rule.  Default: the registered one.
        kwargs: keyword arguments of the operation, which do not move.
        reference: a function with the same values that torch differentiates rightly three times.  Default: ``op``.
        seed: fixes the curves and the adjoints.

    Raises:
        AssertionError: a derivative is wrong, or the rule does not take these arguments; it says which.
        TypeError: an argument that moves is not a float64 tensor.

    Example:
        >>> check_rule(torch.ops.aten.tanh.default, torch.linspace(-2.0, 2.0, 5, dtype=torch.float64))
    """
    curve = _Curve(op, args, dict(kwargs or {}), moving, reference or op, torch.Generator().manual_seed(seed))
    call = curve.call(third=False)
    if rule is None:
        if not has_rule(op):
            raise AssertionError(f"{op} has no rule of its own: register_rule({op}, rule) first, or pass rule=")
        rule = rule_for(call)
        if isinstance(rule, General):  # which stands in where the registered one does not take the arguments
            raise AssertionError(f"the rule of {op} does not take {sorted(map(str, call.jets))} as what moves")
    elif not rule.takes(set(call.jets)):
        raise AssertionError(f"the {rule.kind} rule does not take {sorted(map(str, call.jets))} of {op} as what moves")
    for third in (False, True):
        _check_push(rule, curve, third)
    if rule.is_curved(call):
        _check_full_third(rule, curve)
        _check_sources(rule, curve)


class _Curve:
    """Arguments that move with the rates, and the scalar ⟨w, f(x(η))⟩."""

    def __init__(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        moving: Sequence[Place] | None,
        reference: Callable[..., Any],
        generator: torch.Generator,
    ) -> None:
        self.op, self.args, self.kwargs, self.reference, self.generator = op, args, kwargs, reference, generator
        self.rows = {}
        for number, place in enumerate(_floating(args) if moving is None else moving):
            value = args[place] if isinstance(place, int) else args[place[0]][place[1]]
            if not isinstance(value, Tensor) or value.dtype != torch.float64:
                raise TypeError(f"{op}: argument {place} moves, so it must be a float64 tensor")
            first, second = _FIRST[number % len(_FIRST)], _SECOND[number % len(_SECOND)]
            self.rows[place] = (first, self.random(len(first), value), second, self.random(len(second), value))
        if not self.rows:
            raise TypeError(f"{op}: no argument is a float64 tensor, so nothing moves")
        self.out = op(*args, **kwargs)

    def random(self, count: int, like: Tensor) -> Tensor:
        return torch.randn(count, *like.shape, generator=self.generator, dtype=torch.float64).to(like.device)

    def weight(self) -> Tensor:
        """A random adjoint of the first result."""
        return self.random(1, self.result())[0]

    def result(self) -> Tensor:
        out = self.out if isinstance(self.out, Tensor) else self.out[0]
        assert isinstance(out, Tensor)
        return out

    def adjoint(self, weight: Tensor) -> Any:
        """An adjoint of the first result as rules are given it."""
        return weight if isinstance(self.out, Tensor) else [weight, *(None,) * (len(self.out) - 1)]

    def call(self, third: bool) -> Call:
        """The operation at work; accelerations are known where the third order is wanted."""
        jets = {
            place: Jet(second, first, torch.cat([bent, moved])) if third else Jet((), first, moved)
            for place, (first, moved, second, bent) in self.rows.items()
        }
        return Call(self.op, self.args, self.kwargs, self.out, dict(jets), third, frozenset(jets))

    def derivatives(self, weight: Tensor, accelerated: bool) -> list[Tensor]:
        """Of orders 1 to 3 by the rates at 0, in full."""
        eta = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(_GROUPS)]
        tensors = [torch.zeros((_GROUPS,) * order, dtype=torch.float64) for order in (1, 2, 3)]

        def descend(value: Tensor, index: tuple[int, ...]) -> None:
            if len(index) == 3 or not value.requires_grad:
                return
            slopes = torch.autograd.grad(value, eta, create_graph=True, allow_unused=True)
            for i, slope in enumerate(slopes):
                if slope is not None:
                    tensors[len(index)][(*index, i)] = slope.detach()
                    descend(slope, (*index, i))

        with torch.enable_grad():
            descend(self._scalar(eta, weight, accelerated), ())
        return tensors

    def _scalar(self, eta: list[Tensor], weight: Tensor, accelerated: bool) -> Tensor:
        args = [list(a) if isinstance(a, list | tuple) else a for a in self.args]
        for place, (first, moved, second, bent) in self.rows.items():
            value = args[place] if isinstance(place, int) else args[place[0]][place[1]]
            for group, row in zip(first, moved, strict=True):
                value = value + eta[group] * row
            for group, row in zip(second, bent, strict=True):
                value = value + 0.5 * eta[group] ** 2 * row * accelerated
            if isinstance(place, int):
                args[place] = value
            else:
                args[place[0]][place[1]] = value
        out = self.reference(*args, **self.kwargs)
        return ((out if isinstance(out, Tensor) else out[0]) * weight).sum()


def _check_push(rule: Rule, curve: _Curve, third: bool) -> None:
    """The tangents of the result, and what is added to H̄ and to the third order's diagonal."""
    what = f"the {rule.kind} rule of {curve.op}"
    call, weight, out = curve.call(third), curve.weight(), curve.result()
    sums = Sums(_GROUPS, out.device, third)
    with torch.no_grad():
        pushed = rule.push(call, curve.adjoint(weight) if rule.is_curved(call) else None, sums)
    jet = pushed if isinstance(pushed, Jet) else pushed[0]
    if jet.rows.shape[1:] != out.shape:
        raise AssertionError(f"{what}: tangents of shape {tuple(jet.rows.shape[1:])} for {tuple(out.shape)}")
    _assert_same(f"{what}: what it adds to H̄", sums.hessian, curve.derivatives(weight, accelerated=False)[1])
    if third:
        diagonal = torch.einsum("sss->s", curve.derivatives(weight, accelerated=True)[2])
        assert sums.diagonal is not None
        _assert_same(f"{what}: what it adds to the third order's diagonal", sums.diagonal, diagonal)
    for other in (weight, curve.weight()):
        slope, bend, _ = curve.derivatives(other, accelerated=True)
        _assert_same(f"{what}: the first derivative ẏ", _contract(jet.dot, jet.first, other), slope)
        if third:
            _assert_same(
                f"{what}: the second derivative ÿ", _contract(jet.ddot, jet.second, other), torch.diagonal(bend)
            )


def _check_full_third(rule: Rule, curve: _Curve) -> None:
    """All of the third order, while the adjoints of the results move with every rate."""
    weight, groups = curve.weight(), tuple(range(_GROUPS))
    moving = curve.random(_GROUPS, curve.result())
    sums = Sums(_GROUPS, moving.device, full=True)
    with torch.no_grad():
        rule.add_third(curve.call(False), curve.adjoint(weight), curve.adjoint(moving), groups, sums)
    bends = torch.stack([curve.derivatives(row, accelerated=False)[1] for row in moving])
    expected = curve.derivatives(weight, accelerated=False)[2]
    expected = expected + bends + bends.permute(1, 0, 2) + bends.permute(1, 2, 0)
    _assert_same(f"the {rule.kind} rule of {curve.op}: all of the third order", sums.third, expected)


def _check_sources(rule: Rule, curve: _Curve) -> None:
    """How the adjoints of the arguments move: seen from the arguments' own motion it is H̄ again."""
    weight = curve.weight()
    with torch.no_grad():
        found = rule.sources(curve.call(False), curve.adjoint(weight))
    hessian = torch.zeros(_GROUPS, _GROUPS, dtype=torch.float64)
    for place, (groups, rows) in found.items():
        first, moved, _, _ = curve.rows[place]
        for (i, row), (j, dot) in product(zip(groups, rows, strict=True), zip(first, moved, strict=True)):
            hessian[i, j] += (row * dot).sum().cpu()
    what = f"the {rule.kind} rule of {curve.op}: how it moves the adjoints of its arguments (sources)"
    _assert_same(what, hessian, curve.derivatives(weight, accelerated=False)[1])


def _contract(rows: Tensor, groups: tuple[int, ...], weight: Tensor) -> Tensor:
    """⟨w, row⟩ for every group, 0 for those without a row."""
    result = torch.zeros(_GROUPS, dtype=torch.float64)
    for group, row in zip(groups, rows, strict=True):
        result[group] += (row * weight).sum().cpu()
    return result


def _floating(args: tuple[Any, ...]) -> list[Place]:
    """The places of the floating-point tensors."""
    places: list[Place] = []
    for i, argument in enumerate(args):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            places.append(i)
        elif isinstance(argument, list | tuple):
            places += [(i, j) for j, a in enumerate(argument) if isinstance(a, Tensor) and a.is_floating_point()]
    return places


def _assert_same(what: str, got: Tensor, expected: Tensor) -> None:
    got, expected = got.detach().cpu(), expected.detach().cpu()
    tolerance = _TOLERANCE * (1 + float(expected.abs().max()))
    if not bool(((got - expected).abs() <= tolerance).all()):
        raise AssertionError(f"{what} is wrong: got {got.tolist()}, expected {expected.tolist()}")
