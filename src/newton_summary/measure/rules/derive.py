"""Derivatives of any operation by ``torch.func``: what rules fall back on."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.rules.call import Call, Place
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


def apart(x: Tensor) -> Tensor:
    """The same with memory of its own for every entry, which torch's forward formulas write to, and for nothing else.

    A tangent of part of a tensor is made as large as the whole.
    """
    is_own = 0 not in x.stride() and x.untyped_storage().nbytes() == x.nbytes
    return x if is_own else x.clone(memory_format=torch.contiguous_format)


class Local:
    """An operation as a function of what moves, with the tangents of all groups that reach it.

    Attributes:
        places: the arguments that move.
        first: the groups that reach any of them.
        point: those arguments.
        dots: their first derivatives, a row for each group of ``first``.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.places: list[Place] = list(call.jets)
        self.first: Groups = tuple(dict.fromkeys(g for jet in call.jets.values() for g in jet.first))
        self.point = tuple(apart(call.argument(p).detach()) for p in self.places)
        self.dots = self._rows(second=False)

    def ddots(self) -> tuple[Tensor, ...]:
        """Their second derivatives, zero where there are none."""
        return self._rows(second=True)

    def _rows(self, second: bool) -> tuple[Tensor, ...]:
        jets = (self.call.jets[place] for place in self.places)
        return tuple(_aligned(jet, self.first, second, x) for jet, x in zip(jets, self.point, strict=True))

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]:
        """The differentiable results."""
        out = self.call.with_arguments(dict(zip(self.places, x, strict=True)))
        outs = (out,) if isinstance(out, Tensor) else out
        return tuple(o for o in outs if isinstance(o, Tensor) and o.is_floating_point())

    def weighted(self, weights: Any) -> Callable[..., Tensor]:
        """The sum of the results times weights: tensors of their shapes, or nothing."""
        outs = [self.call.out] if isinstance(self.call.out, Tensor) else self.call.out
        given = [weights] if isinstance(weights, Tensor) else weights
        used = [w for w, o in zip(given, outs, strict=True) if isinstance(o, Tensor) and o.is_floating_point()]

        def function(*x: Tensor) -> Tensor:
            products = [(v * w).sum() for v, w in zip(self(*x), used, strict=True) if w is not None]
            return functools.reduce(torch.add, products)  # type: ignore[no-any-return]

        return function

    def gradient(self, weights: Any) -> Callable[..., tuple[Tensor, ...]]:
        """The gradient of :meth:`weighted`."""
        return torch.func.grad(self.weighted(weights), argnums=tuple(range(len(self.point))))

    def bent(self, gradient: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The derivatives of a gradient along all tangents."""
        return torch.vmap(lambda *v: jvp(gradient, self.point, v)[1])(*self.dots)  # type: ignore[no-any-return]

    def gram(self, rows: Sequence[Tensor]) -> Tensor:
        """The products of rows with all tangents."""
        return functools.reduce(torch.add, (flat(r) @ flat(d).T for r, d in zip(rows, self.dots, strict=True)))

    def twisted(self, gradient: Callable[..., tuple[Tensor, ...]], number: int) -> tuple[Tensor, ...]:
        """The derivatives of :meth:`bent` along one more tangent."""
        along = tuple(d[number] for d in self.dots)

        def row(*v: Tensor) -> tuple[Tensor, ...]:
            return jvp(lambda *x: jvp(gradient, x, v)[1], self.point, along)[1]  # type: ignore[no-any-return]

        return torch.vmap(row)(*self.dots)


def _aligned(jet: Jet, groups: Groups, second: bool, like: Tensor) -> Tensor:
    """Rows for all of these groups, zero where the jet has none."""
    own, rows = (jet.second, jet.ddot) if second else (jet.first, jet.dot)
    if own == groups:
        return rows
    result = like.new_zeros((len(groups), *like.shape))
    for row, group in zip(rows, own, strict=True):
        result[groups.index(group)] = row
    return result
