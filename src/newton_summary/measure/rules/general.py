"""Any operation that torch differentiates forward: tangents by ``vmap`` of ``jvp``, curvature by more of it."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.rules.base import Call, Place, Rule, Sums
from newton_summary.measure.rules.jets import Groups, Jet, flat


@functools.cache
def _load_formulas() -> None:
    """Loads torch's forward formulas, which warns of a deprecation inside torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def jvp(function: Callable[..., Any], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """The value of a function and its derivative along a direction."""
    _load_formulas()
    value, slope = torch.func.jvp(function, point, direction)  # type: ignore[misc]  # a third only with has_aux
    return value, slope


class General(Rule):
    """An operation of which nothing is known but that it can be differentiated."""

    kind = "general"

    @override
    def takes(self, places: set[Place]) -> bool:
        return True

    @override
    def is_curved(self, call: Call) -> bool:
        return True

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        places = list(call.jets)
        first = tuple(dict.fromkeys(g for jet in call.jets.values() for g in jet.first))
        point = tuple(call.argument(p) for p in places)
        dots = tuple(_aligned(call.jets[p], first, False, x) for p, x in zip(places, point, strict=True))
        ddots = tuple(_aligned(call.jets[p], first, True, x) for p, x in zip(places, point, strict=True))
        function = _function(call, places)
        if adjoint is not None:
            self._contract(call, function, adjoint, first, (point, dots, ddots), sums)
        if not call.third:
            return _jets(call, (), first, torch.vmap(lambda *v: jvp(function, point, v)[1])(*dots), None)
        one, two = torch.vmap(lambda v, w: _curve(function, point, v, w))(dots, ddots)
        return _jets(call, first, first, one, two)

    def _contract(
        self, call: Call, function: Callable[..., Any], adjoint: Any, first: Groups, jets: Any, sums: Sums
    ) -> None:
        point, dots, ddots = jets
        outs = [call.out] if isinstance(call.out, Tensor) else call.out
        weights = [adjoint] if isinstance(adjoint, Tensor) else adjoint
        adjoints = [a for a, o in zip(weights, outs, strict=True) if o.is_floating_point()]

        def weighted(*x: Tensor) -> Tensor:
            values = function(*x)
            return sum((v * a).sum() for v, a in zip(values, adjoints, strict=True) if a is not None)  # type: ignore

        gradient = torch.func.grad(weighted, argnums=tuple(range(len(point))))
        bent = torch.vmap(lambda *v: jvp(gradient, point, v)[1])(*dots)
        square = sum(flat(b) @ flat(d).T for b, d in zip(bent, dots, strict=True))
        sums.add_square(first, square)
        if call.third:
            sums.add_diagonal(first, torch.vmap(lambda v, w: _third(weighted, point, v, w))(dots, ddots))


def _function(call: Call, places: Sequence[Place]) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of what moves, to its differentiable results."""

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        out = call.with_arguments(dict(zip(places, x, strict=True)))
        outs = (out,) if isinstance(out, Tensor) else out
        return tuple(o for o in outs if isinstance(o, Tensor) and o.is_floating_point())

    return function


def _aligned(jet: Jet, groups: Groups, second: bool, like: Tensor) -> Tensor:
    """Rows for all of these groups, zero where the jet has none."""
    own, rows = (jet.second, jet.ddot) if second else (jet.first, jet.dot)
    if own == groups:
        return rows
    result = like.new_zeros((len(groups), *like.shape))
    for row, group in zip(rows, own, strict=True):
        result[groups.index(group)] = row
    return result


def _path(point: Sequence[Tensor], v: Sequence[Tensor], w: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda t: tuple(x + t * a + 0.5 * t * t * b for x, a, b in zip(point, v, w, strict=True))


def _derivative(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def _curve(function: Callable[..., Any], point: Any, v: Any, w: Any) -> tuple[Any, Any]:
    """The first and second derivative along a curve with this velocity and acceleration."""
    path = _path(point, v, w)
    first = _derivative(lambda t: function(*path(t)))
    zero = point[0].new_zeros(())
    return jvp(first, (zero,), (torch.ones_like(zero),))


def _third(scalar: Callable[..., Tensor], point: Any, v: Any, w: Any) -> Tensor:
    path = _path(point, v, w)
    along = _derivative(_derivative(_derivative(lambda t: scalar(*path(t)))))
    result: Tensor = along(point[0].new_zeros(()))
    return result


def _jets(call: Call, second: Groups, first: Groups, one: Any, two: Any) -> Any:
    rows = [r if two is None else torch.cat([two[k], r]) for k, r in enumerate(one)]
    if isinstance(call.out, Tensor):
        return Jet(second, first, rows[0])
    left = iter(rows)
    return tuple(
        Jet(second, first, next(left)) if isinstance(o, Tensor) and o.is_floating_point() else None for o in call.out
    )
