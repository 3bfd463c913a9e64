"""Several operations on every entry of one value, as one curve with derivatives of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.half import wide
from newton_summary.measure.rules.call import Call
from newton_summary.measure.rules.elementwise import TABLE, Elementwise, Slope

aten = torch.ops.aten

Expansion: TypeAlias = list[Any]
"""A value and its derivatives by the chain's argument, entry by entry: tensors or numbers; ``None`` where zero."""

_DIVIDED = {aten.div.Scalar, aten.div.Tensor}
_SCALED = {aten.mul.Scalar, *_DIVIDED}
_SHIFTED = {aten.add.Scalar, aten.sub.Scalar}
_SUMMED = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_MODERATE = 1e2  # factors are within this of 1: by a larger one units change, and powers of it would be no numbers
_STRAIGHT = {*_SCALED, *_SHIFTED, *_SUMMED, aten.neg.default}


@dataclass(frozen=True, slots=True)
class Earlier:
    """The result of an earlier link; 0 is the chain's argument."""

    number: int


@dataclass(frozen=True, slots=True)
class Link:
    """One operation of a chain; its arguments are earlier results, and numbers."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arguments(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with what they refer to in its place."""
        return tuple(results[a.number] if isinstance(a, Earlier) else a for a in self.args)


class Chain(Elementwise):
    """Operations on every entry of one value, from there to their last result.

    Tangents of all groups are pushed once, where they would be through every operation, and what is much smaller, the
    value, is expanded: each link has its own derivatives, which are put together by the rules of Leibniz and of Faà di
    Bruno.

    Args:
        links: in an order in which they can run.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        super().__init__(self._expanded)
        self.links = links

    def __call__(self, x: Tensor) -> Any:
        """The last result; differentiable."""
        return self._results(x)[-1]

    def _results(self, x: Tensor) -> list[Any]:
        """The argument, and the result of each link."""
        results: list[Any] = [x]
        for link in self.links:
            results.append(link.op(*link.arguments(results), **link.kwargs))
        return results

    @override
    def __repr__(self) -> str:
        return " → ".join(str(link.op).removeprefix("aten.") for link in self.links)

    @override
    def _point(self, call: Call) -> tuple[Tensor, Tensor]:
        """As they are: results in between are rounded, in half precision, and slopes are those at what was rounded."""
        return call.args[0], call.out

    def _expanded(self, call: Call, order: int) -> tuple[Slope, ...]:
        """The derivatives of the last result by the chain's argument; of half precision in single."""
        x, *values = map(wide, self._results(call.args[0]))
        expansions: list[Expansion] = [[x, 1.0, *[None] * (order - 1)]]
        for link, value in zip(self.links, values, strict=True):
            expansions.append([value, *_derivatives(link, link.arguments(expansions), value, order)])
        return tuple(s if s is None or isinstance(s, Tensor) else x.new_full((), s) for s in expansions[-1][1:])


def can_link(op: Any, args: Sequence[Any], is_value: Sequence[bool], kwargs: dict[str, Any]) -> bool:
    """Whether an operation can be a link of a chain.

    Kinks, and curves that are steep at zero, keep a place of their own: what is known of them is told by operation.  So
    do changes of units, wherever they stand: tangents in other units and powers of the factor would not fit together.

    Args:
        op: the operation.
        args: its arguments.
        is_value: which of them are values that move; all others must be numbers.
        kwargs: its keyword arguments.
    """
    if not all(v or _is_number(a) for a, v in zip(args, is_value, strict=True)) or not all(
        _is_number(v) for v in kwargs.values()
    ):
        return False
    if not all(_is_moderate(f) for f in _factors(op, args, kwargs)):
        return False
    if op in _SUMMED or op is aten.mul.Tensor:
        return True
    if not is_value or not is_value[0] or any(is_value[1:]):
        return False
    rule = TABLE.get(op)
    if rule is None:
        return op in _STRAIGHT
    is_steep = rule.is_steep(Call(op, tuple(args), kwargs, None, {}))
    return not (rule.piecewise_linear or is_steep or op is aten.elu.default)


def is_straight(op: Any, values: int) -> bool:
    """Whether a link has no curvature.

    Args:
        op: the operation.
        values: how many of its arguments are values that move.
    """
    return op in _STRAIGHT or (op is aten.mul.Tensor and values == 1)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float | str)  # GELU has its name for an approximation


def _factors(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The numbers that a value is multiplied with."""
    if op in _SCALED or op is aten.mul.Tensor:
        return [a for a in args if isinstance(a, int | float)]
    return [kwargs["alpha"]] if op in _SUMMED and "alpha" in kwargs else []


def _is_moderate(factor: float) -> bool:
    return 1 / _MODERATE <= abs(factor) <= _MODERATE


def _derivatives(link: Link, args: Sequence[Any], value: Tensor, order: int) -> Sequence[Any]:
    """The derivatives of a link's result, which is known."""
    one, *others = args
    if link.op is aten.mul.Tensor:
        return _product(_expansion(one, order), _expansion(others[0], order))
    if link.op in _SUMMED:
        factor = _SUMMED[link.op] * link.kwargs.get("alpha", 1)
        pairs = zip(*(_expansion(a, order)[1:] for a in args), strict=True)
        return [_sum(x, _times(y, factor)) for x, y in pairs]
    if link.op in _SCALED:
        factor = 1 / others[0] if link.op in _DIVIDED else others[0]
        return [_times(x, factor) for x in one[1:]]
    if link.op is aten.neg.default:
        return [_times(x, -1) for x in one[1:]]
    if link.op in _SHIFTED:
        return list(one[1:])
    outer = TABLE[link.op].derivatives(Call(link.op, (one[0], *others), link.kwargs, value, {}), order)
    return _composed(outer, one[1:])


def _expansion(argument: Any, order: int) -> Expansion:
    return argument if isinstance(argument, list) else [argument, *[None] * order]


def _product(one: Expansion, other: Expansion) -> list[Any]:
    """Leibniz: (fg)⁽ᵏ⁾ = Σ C(k, j) f⁽ʲ⁾ g⁽ᵏ⁻ʲ⁾, for k > 0."""
    result = []
    for k in range(1, len(one)):
        total = None
        for j in range(k + 1):
            total = _sum(total, _times(_times(one[j], other[k - j]), math.comb(k, j)))
        result.append(total)
    return result


def _composed(outer: Sequence[Slope], inner: Expansion) -> Expansion:
    """Faà di Bruno: the derivatives of h(f) by those of h at f, and of f.

    Those of h come first in each product: where they are 0, a power of f' would be too large a number for nothing.
    """
    h1, h2, h3 = (*outer, None, None)[:3]
    f1, f2, f3 = (*inner, None, None)[:3]
    turned = _times(h2, f1)
    twice = _times(_times(h3, f1), f1)
    derivatives = [
        _times(h1, f1),
        _sum(_times(turned, f1), _times(h1, f2)),
        _sum(_sum(_times(twice, f1), _times(_times(turned, f2), 3)), _times(h1, f3)),
    ]
    return derivatives[: len(inner)]


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def _times(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return None
    if not isinstance(one, Tensor) and one == 1:
        return other
    return one if not isinstance(other, Tensor) and other == 1 else one * other
