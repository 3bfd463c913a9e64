"""The table of operations that are written as simpler ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

CONSTANT = aten.detach_copy.default
"""Marks a value that counts as a constant: what the loss detached, or computed without gradients."""

Lowering = Callable[..., Any]

_OWN: dict[Any, Lowering] = {}
_AS_THEY_ARE: list[Any] = []


def lowering_of(op: Any) -> Lowering | None:
    """What an operation is decomposed by: ours, or torch's where no rule takes the operation as it is."""
    from newton_summary.measure.rules import has_rule

    own = _OWN.get(op)
    if own is not None or has_rule(op):
        return own
    return _torch_lowerings().get(op) or (op.decompose if op._can_decompose() else None)


@functools.cache
def _torch_lowerings() -> dict[Any, Lowering]:
    """Torch's, without those of composite operations: its whole table takes a tenth of a second to make."""
    from torch._decomp import _core_aten_decompositions_post_autograd, get_decompositions

    return _core_aten_decompositions_post_autograd() | get_decompositions([aten.grid_sampler_2d])


def lowers(*ops: Any) -> Callable[[Lowering], Lowering]:
    """Enters a function that stands for these operations; ``NotImplemented`` leaves one to its rule."""

    def put(function: Lowering) -> Lowering:
        _OWN.update({op: _guarded(op, function) for op in ops})
        return function

    return put


def _guarded(op: Any, function: Lowering) -> Lowering:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if op in _AS_THEY_ARE else function(*args, **kwargs)

    return guarded


def as_it_is(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls an operation from within the function that stands for it: on constants, or where it has a rule."""
    _AS_THEY_ARE.append(op)
    try:
        return op(*args, **kwargs)
    finally:
        _AS_THEY_ARE.pop()


def same_type(*values: Any) -> bool:
    """Whether all floating-point tensors among some values have one type: rules multiply tangents of one type."""
    return len({v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}) < 2


def in_one_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two values in the type that torch computes their product in."""
    dtype = torch.result_type(x, y)
    return x.to(dtype), y.to(dtype)
