"""Whether optimizers have taken the steps that were measured: gradients may have been changed in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from newton_summary.parallel.sharding import local
from newton_summary.partition import products

_ANOTHER = 3.0
"""A step that is this many times longer or shorter than the one measured is another one."""

_ROUNDING = 10.0  # units of the last place of the weights, below which nothing is said

_Pairs: TypeAlias = list[tuple[Tensor, Tensor]]


class StepTaken:
    """Where the weights stand along the steps that were measured, by optimizer, until these have been taken.

    Weights of half precision are left out: steps may vanish in their rounding.

    Args:
        optimizers: take the steps.
        parameters: of the model.
        steps: u for each of them, θ − θ' as it was measured.

    Example:
        >>> weight, u = torch.ones(2, requires_grad=True), torch.tensor([1.0, 0.0])
        >>> taken = StepTaken([torch.optim.SGD([weight])], [weight], [u])
        >>> weight.data -= u / 100
        >>> round(taken.others()[0][1], 2)
        0.01
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> None:
        held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
        pairs = [(p, u) for p, u in zip(parameters, steps, strict=True) if _tells(p)]
        self._pairs: list[_Pairs] = [[(p, u) for p, u in pairs if id(p) in own] for own in held]
        self._before = [_along(own) for own in self._pairs]

    def others(self) -> list[tuple[int, float]]:
        """The numbers of the optimizers that took another step, and how much longer it was.

        One that took no step is none of them, nor is one whose steps are so short that their squares are no numbers.
        """
        found = []
        for number, (pairs, (before, spread)) in enumerate(zip(self._pairs, self._before, strict=True)):
            measured = sum(float(_products(u, u).sum(dtype=torch.float64)) for _, u in pairs)
            taken = before - _along(pairs)[0]
            is_clear = measured > 0 and taken != 0 and abs(taken - measured) > spread
            if is_clear and not 1 / _ANOTHER < taken / measured < _ANOTHER:
                found.append((number, taken / measured))
        return found


def compared(ratio: float) -> str:
    """How long a step was, in words that another step follows.

    Example:
        >>> [compared(ratio) for ratio in (0.1, 5.0, -0.1)]
        ['10 times shorter than', '5 times as long as', 'against']
    """
    if ratio < 0:
        return "against"
    return f"{1 / ratio:.3g} times shorter than" if ratio < 1 else f"{ratio:.3g} times as long as"


def _tells(parameter: Tensor) -> bool:
    """Whether the rounding of a parameter is finer than the steps that it takes."""
    return parameter.layout is torch.strided and torch.finfo(parameter.dtype).bits >= 32


def _along(pairs: _Pairs) -> tuple[float, float]:
    """The sum of θ · u, and what rounding may make of it."""
    total, spread = 0.0, 0.0
    for parameter, u in pairs:
        products = _products(parameter, u)
        total += float(products.sum(dtype=torch.float64))
        spread += float(products.square().sum(dtype=torch.float64)) * torch.finfo(parameter.dtype).eps ** 2
    return total, _ROUNDING * math.sqrt(spread)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Those of the entries that this process has."""
    return products(local(a.detach()), local(b.detach()))
