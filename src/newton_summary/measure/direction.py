"""The direction u that a summary is along, in any of the forms in which it may be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from newton_summary.measure.next_step import next_step
from newton_summary.measure.together import OneOrSeveral, are_optimizers
from newton_summary.partition import Partition

DirectionLike: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor] | OneOrSeveral | None
"""What :func:`~newton_summary.summarize` takes for a direction."""


def resolve_direction(direction: DirectionLike, partition: Partition) -> list[Tensor]:
    """A direction in any of the forms that :func:`~newton_summary.summarize` takes, in the partition's order.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or device, complex where the parameter is not, not
            finite, or 0 in the parameter's type, though it is not.
        TypeError: it is something else.
    """
    if isinstance(direction, str):
        raise ValueError(f"direction must be tensors or an optimizer, got {direction!r}: names are for NewtonSummary")
    if are_optimizers(direction):
        direction = next_step(direction, partition.parameters)
    if isinstance(direction, Mapping):
        direction = _by_name(direction, partition.parameter_names)
    if not isinstance(direction, Iterable | None):
        kind = f"the class {direction.__name__}" if isinstance(direction, type) else type(direction).__name__
        raise TypeError(f"direction must be tensors or an optimizer, got {kind}")
    given = () if direction is None else direction
    tensors = [given] if isinstance(given, Tensor) else list(cast(Sequence[Tensor], given))
    if len(tensors) != len(partition.parameters):
        raise ValueError(f"direction has {len(tensors)} tensors, the partition {len(partition.parameters)} parameters")
    named = zip(partition.parameter_names, partition.parameters, tensors, strict=True)
    return [_like(name, parameter, tensor) for name, parameter, tensor in named]


def _by_name(direction: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """A direction by the names of parameters, in their order."""
    kinds = [type(key).__name__ for key in direction if not isinstance(key, str)]
    if kinds:
        raise ValueError(f"direction: its keys must be names of parameters, such as {names[0]!r}; one is a {kinds[0]}")
    unknown = [name for name in direction if name not in names]
    missing = [name for name in names if name not in direction]
    if unknown or missing:
        what = f"has no parameter {unknown[0]!r}" if unknown else f"needs a direction for {missing[0]!r}"
        raise ValueError(f"direction: the partition {what}")
    return [direction[name] for name in names]


def _like(name: str, parameter: Tensor, given: Any) -> Tensor:
    """The direction of a parameter, of its type, apart from whatever graph it has."""
    if not isinstance(given, Tensor):
        raise TypeError(f"direction for {name!r} must be a tensor, got {type(given).__name__}")
    if given.shape != parameter.shape:
        raise ValueError(
            f"direction for {name!r} has shape {tuple(given.shape)}, the parameter {tuple(parameter.shape)}"
        )
    if given.device != parameter.device:
        raise ValueError(f"direction for {name!r} is on {given.device}, the parameter on {parameter.device}")
    if given.is_complex() and not parameter.is_complex():
        raise ValueError(f"direction for {name!r} is complex, the parameter is not: pass real numbers")
    tensor = given.detach() if given.layout is torch.strided else given.detach().to_dense()
    cast_ = tensor.to(parameter.dtype)
    for value in (tensor,) if cast_ is tensor else (tensor, cast_):
        if not _is_finite(value):
            within = "" if value is tensor else f" in {str(value.dtype)[6:]}, the parameter's type"
            raise ValueError(
                f"direction for {name!r}, of shape {tuple(value.shape)}, has entries that are not finite{within}"
            )
    if cast_ is not tensor and bool(tensor.any()) and not bool(cast_.any()):
        raise ValueError(
            f"direction for {name!r} is all 0 in {str(cast_.dtype)[6:]}, the parameter's type, in which smaller "
            "numbers are none: make it longer, and the summary shorter again by its scale()"
        )
    return cast_.clone() if cast_.is_inference() else cast_  # autograd takes none made in inference mode


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are: their sum, which is quick, tells unless it overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
