"""What a loss depends on, as a flat list of tensors, and what must be the same for one graph to stand for it."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from newton_summary.measure.graph import Refusal
from newton_summary.measure.loss import Loss, batch_size, with_known_mappings
from newton_summary.partition import Partition

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


class Inputs:
    """The tensors that a loss is a function of: parameters, frozen parameters, buffers, tensors of the batch.

    Args:
        loss: the loss and its model.
        batch: any nesting of tuples, lists and dictionaries of tensors and plain values.
        partition: its parameters come first, and require gradients.

    Raises:
        Refusal: the batch holds an object whose tensors cannot be found.
    """

    def __init__(self, loss: Loss, batch: Any, partition: Partition) -> None:
        self.loss, self.batch, self.partition = loss, batch, partition
        self.count = len(partition.parameters)
        trainable = set(partition.parameter_names)
        frozen = {name: p for name, p in loss.model.named_parameters() if name not in trainable}
        self.state = frozen | dict(loss.model.named_buffers())
        leaves, self.structure = pytree.tree_flatten(with_known_mappings(batch))
        self.leaves = leaves
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise Refusal(f"the batch holds a {type(leaf).__name__}, whose tensors cannot be found")

    @property
    def weight(self) -> float:
        """The number of samples."""
        return float(batch_size(self.batch))

    def tensors(self) -> list[Tensor]:
        """The inputs: fresh leaves for the parameters, copies of everything that a loss may overwrite."""
        parameters = [p.detach().requires_grad_() for p in self.partition.parameters]
        state = [tensor.detach().clone() for tensor in self.state.values()]
        data = [t.detach().requires_grad_(t.requires_grad) for t in self.leaves if isinstance(t, Tensor)]
        return parameters + state + data

    def function(self, *tensors: Tensor) -> Tensor:
        """The loss as a function of :meth:`tensors`."""
        names = [*self.partition.parameter_names, *self.state]
        rest = iter(tensors[len(names) :])
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        batch = pytree.tree_unflatten(leaves, self.structure)
        return self.loss(batch, dict(zip(names, tensors[: len(names)], strict=True)))

    def key(self) -> tuple[Any, ...]:
        """What a graph is traced for: shapes and types, the batch's structure and plain values, modes, autocast."""
        device = self.partition.device.type
        return (
            self.partition.parameter_names,
            tuple(_signature(p) for p in (*self.partition.parameters, *self.state.values())),
            tuple(_signature(leaf) for leaf in self.leaves),
            self.structure,
            tuple(module.training for module in self.loss.model.modules()),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_default_dtype()),
        )


def _signature(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf)
    return (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad)


class SameFunction:
    """Recognises a function without keeping it, or what it captured, alive.

    A function made anew by the same ``lambda`` counts as the same one when it captured the same objects.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._parts = [_weak(part) for part in _parts(function)]

    def __call__(self, function: Callable[..., Any]) -> bool:
        """Whether this is that function."""
        parts = _parts(function)
        return len(parts) == len(self._parts) and all(
            mine() is theirs for mine, theirs in zip(self._parts, parts, strict=True)
        )


def _parts(function: Any) -> Sequence[Any]:
    """The objects that make a function what it is."""
    if isinstance(function, types.MethodType):
        return [function.__self__, *_parts(function.__func__)]
    if not isinstance(function, types.FunctionType):
        return [function]
    captured = [_content(cell) for cell in function.__closure__ or ()]
    return [function.__code__, *captured, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _weak(part: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(part)
    except TypeError:  # plain values keep nothing else alive
        return (lambda: part) if isinstance(part, _PLAIN) else lambda: _UNKNOWN


_UNKNOWN = object()
