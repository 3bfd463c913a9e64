"""Directions by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from newton_summary.measure.together import OneOrSeveral, are_optimizers
from newton_summary.optim.directions.adam import Adam, NAdam
from newton_summary.optim.directions.base import Direction
from newton_summary.optim.directions.gradient import Gradient
from newton_summary.optim.directions.momentum import Momentum
from newton_summary.optim.directions.soap import SOAP
from newton_summary.optim.directions.step_of import StepOf


def resolve(direction: str | OneOrSeveral | Direction) -> Direction:
    """A direction by its name, such as ``"adam"``, or around an optimizer or several.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is something else.
    """
    if are_optimizers(direction):
        return StepOf(direction)
    if not isinstance(direction, str):
        if isinstance(direction, type) or not hasattr(direction, "update") or not hasattr(direction, "defaults"):
            members = direction if isinstance(direction, list | tuple) else [direction]
            got = f"{type(direction).__name__} of {_kinds(members)}" if members is direction else _kinds(members)
            raise TypeError(
                f"direction must be a name, a torch.optim.Optimizer, a list of them, or a Direction, got {got}"
            )
        return cast(Direction, direction)
    named: dict[str, type[Direction]] = {
        "gradient": Gradient,
        "momentum": Momentum,
        "adam": Adam,
        "nadam": NAdam,
        "soap": SOAP,
    }
    if direction not in named:
        raise ValueError(
            f"unknown direction {direction!r}: choose one of {', '.join(named)}, or pass a torch.optim.Optimizer, "
            "or a list of them"
        )
    return named[direction]()


def _kinds(members: Sequence[object]) -> str:
    """What they are, in words; classes are told from what is made of them."""
    kinds = (f"the class {m.__name__}" if isinstance(m, type) else type(m).__name__ for m in members)
    return ", ".join(kinds) or "nothing"
