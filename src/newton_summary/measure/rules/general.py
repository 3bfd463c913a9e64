"""Any operation that torch differentiates forward: tangents by ``vmap`` of ``jvp``, curvature by more of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.rules.base import Rule, Sums
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.derive import Local, jvp
from newton_summary.measure.rules.jets import Groups, Jet


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
        local = Local(call)
        ddots = local.ddots() if call.third else ()
        if adjoint is not None:
            sums.add_square(local.first, local.gram(local.bent(local.gradient(adjoint))))
            if call.third:
                scalar = local.weighted(adjoint)
                cubes = torch.vmap(lambda v, w: _third(scalar, local.point, v, w))(local.dots, ddots)
                sums.add_diagonal(local.first, cubes)
        if not call.third:
            rows = torch.vmap(lambda *v: jvp(local, local.point, v)[1])(*local.dots)
            return _jets(call, (), local.first, rows, None)
        one, two = torch.vmap(lambda v, w: _curve(local, local.point, v, w))(local.dots, ddots)
        return _jets(call, local.first, local.first, one, two)


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
