"""What is recorded of a loss: its operations in order, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Refusal(Exception):
    """Why a loss cannot be measured by this engine: an operation, and what is the matter with it."""


class Ref:
    """The place of a value among all values: one object for each number, so that comparing is cheap."""

    __slots__ = ("slot",)

    def __init__(self, slot: int) -> None:
        self.slot = slot

    def __repr__(self) -> str:
        return f"%{self.slot}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ref, (self.slot,)


_REFS: list[Ref] = []


def ref(slot: int) -> Ref:
    """The reference to a slot."""
    while len(_REFS) <= slot:
        _REFS.append(Ref(len(_REFS)))
    return _REFS[slot]


class Record(NamedTuple):
    """One operation: what was called, on what, where the result goes, and of which shape it was."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: int
    shape: Any

    @property
    def reads(self) -> list[int]:
        """The slots that its arguments refer to, each as often as they do."""
        return slots_in((self.args, tuple(v for _, v in self.kwargs)))


@dataclass(slots=True)
class Leaf:
    """A value that no recorded operation made: a parameter, or a constant."""

    slot: int
    tensor: Tensor
    parameter: int | None = None

    def signature(self) -> tuple[Any, ...]:
        """What operations on it are recorded for."""
        t = self.tensor
        strides = t.stride() if t.layout is torch.strided else t.layout
        return (self.slot, self.parameter, t.shape, strides, t.dtype, t.device)


@dataclass(slots=True)
class Recording:
    """A loss as it was computed once.

    Attributes:
        loss: its value, with the graph that autograd made.
        records: the operations, in order.
        leaves: what they start from.
        result: the slot of the loss, or nothing where it does not move.
        values: by slot, what was computed; for lowering.
    """

    loss: Tensor
    records: list[Record]
    leaves: list[Leaf]
    result: int | None
    values: dict[int, Any] = field(repr=False, default_factory=dict)

    def key(self) -> tuple[Any, ...]:
        """What two recordings have in common that one graph can stand for."""
        leaves = tuple(leaf.signature() for leaf in self.leaves)
        return (self.result, leaves, tuple(self.records))

    def operations(self) -> tuple[Any, ...]:
        """The operations alone, whatever the shapes."""
        return tuple(r.op for r in self.records)


def slots_in(argument: Any) -> list[int]:
    """The slots that an argument, or any nesting of them, refers to."""
    if type(argument) is Ref:
        return [argument.slot]
    if isinstance(argument, list | tuple):
        return [slot for a in argument for slot in slots_in(a)]
    return []
