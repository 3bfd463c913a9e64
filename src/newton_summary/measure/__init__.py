"""Measuring: exact derivatives according to a partition, and no opinion on what to do with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from newton_summary.directions import next_step
from newton_summary.measure.loss import Loss, LossFunction, batch_size, check_dependence, preserved_randomness
from newton_summary.measure.nested import NestedEngine, taylor
from newton_summary.partition import Partition
from newton_summary.summary import Summary

__all__ = [
    "Engine",
    "Loss",
    "LossFunction",
    "NestedEngine",
    "preserved_randomness",
    "resolve_engine",
    "summarize",
    "taylor",
]

Direction: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor] | torch.optim.Optimizer | None


class Engine(Protocol):
    """What computes the summary of one batch."""

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch along a direction, one tensor for each parameter of the partition."""
        ...


def resolve_engine(engine: str | Engine) -> Engine:
    """An engine by its name.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(engine, str):
        return engine
    engines = {"auto": NestedEngine, "nested": NestedEngine}
    if engine not in engines:
        raise ValueError(f"unknown engine {engine!r}: choose one of {', '.join(engines)}")
    return engines[engine]()


def summarize(
    loss_fn: LossFunction,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    partition: Partition | None = None,
    direction: Direction = None,
    order: int = 3,
    third: Literal["diagonal", "full"] = "diagonal",
    engine: str | Engine = "auto",
    progress: bool = False,
) -> Summary:
    """Measures the derivatives of a loss according to a partition (docs/method.md, section 1).

    The loss is the mean over all samples: batches count by their size.  Nothing of the user's is changed: parameters,
    ``.grad``, buffers, train or eval mode, random states.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        model: any module; it stays in the mode that it is in.
        batches: an iterable of batches, such as a ``DataLoader`` or ``[batch]``.
        partition: S groups.  Default: one for each tensor.
        direction: u, in the parameters' own units: tensors in the partition's order, a dictionary by name, or a
            ``torch.optim.Optimizer`` whose next step it is (after ``backward()``).  Default: the gradient over the same
            batches, which then must allow for two passes.
        order: the highest order of derivatives, from 1.  Above 3 every order is measured in full, by nested passes.
        third: the diagonal of the third order, or all S³ entries.
        engine: ``"auto"`` or ``"nested"``, or an :class:`Engine`.
        progress: whether to show a progress bar over the batches.

    Returns:
        A :class:`~newton_summary.Summary` in float64, on the model's device.

    Raises:
        ValueError: there are no batches; the loss is not a scalar, not finite or does not depend on the parameters; the
            direction does not fit; the order is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> batch = torch.randn(10, 4), torch.randn(10, 1)
        >>> summary = summarize(lambda model, b: (model(b[0]) - b[1]).square().mean(), model, [batch])
        >>> summary.hessian.shape
        torch.Size([4, 4])
    """
    _check_request(order, third, batches)
    chosen = resolve_engine(engine) if order <= 3 else NestedEngine()
    partition = partition or Partition.canonical(model)
    _check_partition(partition, model)
    loss = Loss(loss_fn, model)
    with preserved_randomness({partition.device}):
        if direction is None:
            resolved = _mean_gradient(loss, partition, _counted(batches, progress, "gradient"))
        else:
            resolved = resolve_direction(direction, partition)
        parts = [
            chosen.measure(loss, batch, partition, resolved, order, third)
            for batch in _counted(batches, progress, "summary")
        ]
    if not parts:
        raise ValueError("there are no batches to measure on")
    summary = Summary.mean(parts)
    if not bool(summary.loss.isfinite()):
        raise ValueError(f"the loss is {summary.loss.item()}: look for it in the data, or lower the learning rate")
    return summary


def resolve_direction(direction: Direction, partition: Partition) -> list[Tensor]:
    """A direction in any of the forms that :func:`summarize` takes, as tensors in the partition's order.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or device, or not finite.
    """
    if isinstance(direction, torch.optim.Optimizer):
        return next_step(direction, partition.parameters)
    if isinstance(direction, Mapping):
        unknown = [name for name in direction if name not in partition.parameter_names]
        missing = [name for name in partition.parameter_names if name not in direction]
        if unknown or missing:
            what = f"has no parameter {unknown[0]!r}" if unknown else f"needs a direction for {missing[0]!r}"
            raise ValueError(f"direction: the partition {what}")
        direction = [direction[name] for name in partition.parameter_names]
    tensors = list(direction or ())
    if len(tensors) != len(partition.parameters):
        raise ValueError(f"direction has {len(tensors)} tensors, the partition {len(partition.parameters)} parameters")
    for name, parameter, tensor in zip(partition.parameter_names, partition.parameters, tensors, strict=True):
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"direction for {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
            )
        if tensor.device != parameter.device:
            raise ValueError(f"direction for {name!r} is on {tensor.device}, the parameter on {parameter.device}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"direction for {name!r}, of shape {tuple(tensor.shape)}, has entries that are not finite")
    return [
        tensor.detach().to(parameter.dtype) for tensor, parameter in zip(tensors, partition.parameters, strict=True)
    ]


def _mean_gradient(loss: Loss, partition: Partition, batches: Iterable[Any]) -> list[Tensor]:
    """The gradient of the mean loss over all samples."""
    total: list[Tensor] = [torch.zeros_like(p) for p in partition.parameters]
    weight = 0
    for batch in batches:
        with loss.undisturbed():
            aliases = [p.detach().requires_grad_() for p in partition.parameters]
            value = loss(batch, dict(zip(partition.parameter_names, aliases, strict=True)))
            check_dependence(value)
            gradients = torch.autograd.grad(value, aliases, allow_unused=True, materialize_grads=True)
        size = batch_size(batch)
        torch._foreach_add_(total, gradients, alpha=size)
        weight += size
    if not weight:
        raise ValueError("there are no batches to measure on")
    torch._foreach_div_(total, weight)
    return total


def _counted(batches: Iterable[Any], progress: bool, what: str) -> Iterator[Any]:
    yield from tqdm(batches, desc=what, disable=not progress, leave=False)


def _check_request(order: int, third: str, batches: Iterable[Any]) -> None:
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if third not in ("diagonal", "full"):
        raise ValueError(f"third must be 'diagonal' or 'full', got {third!r}")
    if isinstance(batches, Tensor | Mapping) or (
        isinstance(batches, tuple) and all(isinstance(item, Tensor) for item in batches)
    ):
        raise ValueError(f"batches must be an iterable of batches, got one {type(batches).__name__}: pass [batch]")


def _check_partition(partition: Partition, model: nn.Module) -> None:
    own = {id(p) for p in model.parameters()}
    for name, parameter in zip(partition.parameter_names, partition.parameters, strict=True):
        if id(parameter) not in own:
            raise ValueError(f"parameter {name!r} of the partition is not in this model: make the partition from it")
    _ = partition.device
