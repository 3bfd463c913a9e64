"""Measuring: exact derivatives according to a partition, and no opinion on what to do with them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from newton_summary._checks import check_batches, check_count
from newton_summary.measure.attributes import generator_rewind, generators_behind
from newton_summary.measure.auto import AUTO, FORWARD, NESTED, AutoEngine
from newton_summary.measure.batches import SizeOf
from newton_summary.measure.direction import DirectionLike, resolve_direction
from newton_summary.measure.forward import ForwardEngine
from newton_summary.measure.loss import (
    Loss,
    LossFunction,
    check_dependence,
    gradients_of,
    preserved_randomness,
)
from newton_summary.measure.nested import NestedEngine, taylor
from newton_summary.measure.record import Refusal
from newton_summary.measure.rules import register_rule
from newton_summary.measure.slices import Pieces
from newton_summary.parallel.sharding import check_whole
from newton_summary.partition import Partition, resolve_partition
from newton_summary.summary import Summary

__all__ = [
    "AutoEngine",
    "Engine",
    "ForwardEngine",
    "Loss",
    "LossFunction",
    "NestedEngine",
    "Refusal",
    "preserved_randomness",
    "register_rule",
    "resolve_engine",
    "summarize",
    "taylor",
]


class Engine(Protocol):
    """What computes the summary of one batch (docs/engine.md)."""

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch along a direction, one tensor for each parameter of the partition."""
        ...


def resolve_engine(engine: str | Engine, memory: float | None = None) -> Engine:
    """An engine by its name: ``"forward"``, ``"nested"``, or ``"auto"``, the first of them that works.

    Args:
        engine: a name, or an engine.
        memory: the bytes that the forward engine may take.  Default: as the engine has it.

    Raises:
        ValueError: the name is unknown; or the engine has no budget of memory.
        TypeError: it is something else.
    """
    if isinstance(engine, str):
        engines: dict[str, Engine] = {"auto": AUTO, "forward": FORWARD, "nested": NESTED}
        if engine not in engines:
            raise ValueError(f"unknown engine {engine!r}: choose one of {', '.join(engines)}")
        engine = engines[engine]
    if not hasattr(engine, "measure"):
        raise TypeError(f"engine must be 'auto', 'forward', 'nested' or an Engine, got {type(engine).__name__}")
    if memory is None:
        return engine
    if not isinstance(engine, ForwardEngine | AutoEngine):
        name = type(engine).__name__
        raise ValueError(f"memory={memory:.0f} is for the engines 'auto' and 'forward', not for {name}")
    return engine.within(memory)


def summarize(
    loss_fn: LossFunction,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    partition: Partition | str | None = None,
    direction: DirectionLike = None,
    order: int = 3,
    third: Literal["diagonal", "full"] = "diagonal",
    engine: str | Engine = "auto",
    memory: float | None = None,
    slices: int = 1,
    batch_size: SizeOf = None,
    progress: bool = False,
) -> Summary:
    """Measures the derivatives of a loss according to a partition (docs/method.md, section 1).

    The loss is the mean over all samples: batches count by their size.  Nothing of the user's is changed: parameters,
    ``.grad``, buffers, train or eval mode, random states.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        model: any module; it stays in the mode that it is in.
        batches: an iterable of batches, such as a ``DataLoader`` or ``[batch]``.
        partition: S groups, or the name of a constructor: ``"by_module"``.  Default: one for each tensor.
        direction: u, in the parameters' own units: tensors in the partition's order, a dictionary by name, or a
            ``torch.optim.Optimizer``, or a list of several, whose next step it is (after ``backward()``), u = θ − θ':
            steps go against it, as against a gradient, and odd orders have the sign of going along.  Default: the
            gradient over the same batches, which are then gone through twice, in the same random state.
        order: the highest order of derivatives, from 1.  Above 3 every order is measured in full, by nested passes.
        third: the diagonal of the third order, or all S³ entries.
        engine: ``"auto"``, ``"forward"`` (which raises where it does not work) or ``"nested"``, or an :class:`Engine`.
        memory: the bytes that values, adjoints and tangents may take.  Where the tangents of all groups are more, some
            groups are swept at a time, with the same result.  Default: three quarters of what is free, for tangents.
        slices: into how many parts along the first dimension of its tensors each batch is cut, to bound memory.  The
            result is the same where the loss is a mean over samples, which batch normalisation in training mode breaks.
        batch_size: the number of samples in every batch, or a function that tells it.  Default: the first dimension of
            the tensors in a batch, where they agree on how batches compare.
        progress: whether to show a progress bar over the batches.

    Returns:
        A :class:`~newton_summary.Summary` in float64, on the model's device.

    Raises:
        ValueError: there are no batches, or they can be read only once where they are needed twice; the loss is not a
            scalar, not finite or does not depend on the parameters; the direction does not fit or is not finite; the
            partition is of another model; a parameter is sharded; the order is below 1; how many samples batches have
            is not clear; the mean over slices of a batch is not its loss.
        MemoryError: not even the two groups of one entry (three, for all of the third order) fit into the memory.
        Refusal: no engine can measure the loss; the reason is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> batch = torch.randn(10, 4), torch.randn(10, 1)
        >>> summary = summarize(lambda model, b: (model(b[0]) - b[1]).square().mean(), model, [batch])
        >>> summary.hessian.shape
        torch.Size([4, 4])
    """
    _check_request(order, third, batches, direction, slices)
    chosen = resolve_engine(engine, memory) if order <= 3 else NESTED
    partition = resolve_partition(partition, model)
    partition.check_is_of(model)
    check_whole(
        partition,
        "summarize()",
        "measure by Monitor(model, loss_fn, optimizer=…).measure(batches), which gathers what it needs, and read its "
        "summary",
    )
    loss, order = Loss(loss_fn, model), int(order)
    pieces = Pieces(loss, batches, int(slices), batch_size, progress)
    with torch.inference_mode(False), _rewinding(batches, partition.device):
        if direction is None:
            direction = _mean_gradient(loss, partition, pieces.each("gradient"))
        along = resolve_direction(direction, partition)
    with torch.inference_mode(False), _rewinding(batches, partition.device):
        parts = [
            replace(chosen.measure(loss, batch, partition, along, order, third), weight=float(size))
            for batch, size in pieces.each("summary")
        ]
        if not parts:
            raise ValueError("there are no batches to measure on")
        summary = Summary.mean(parts)
    _check_finite(summary.loss)
    _warn_of_infinite(summary)
    return summary


def _mean_gradient(loss: Loss, partition: Partition, pieces: Iterable[tuple[Any, int]]) -> list[Tensor]:
    """The gradient of the mean loss over all samples, from batches and their sizes.

    Half precision would stop to count after some hundred batches: the sum is in single precision at least.
    """
    kinds = [torch.promote_types(p.dtype, torch.float32) for p in partition.parameters]
    total = [
        torch.zeros_like(p, dtype=kind, requires_grad=False)
        for p, kind in zip(partition.parameters, kinds, strict=True)
    ]
    weight = 0
    for batch, size in pieces:
        with loss.undisturbed(), loss.evaluated(batch) as value:
            _check_finite(value)
            gradients = gradients_of(value, partition.parameters)
            check_dependence(gradients)
        for mean, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                mean.add_(gradient, alpha=size)
        weight += size
    if not weight:
        raise ValueError("there are no batches to measure on")
    torch._foreach_div_(total, weight)
    return [mean.to(p.dtype) for mean, p in zip(total, partition.parameters, strict=True)]


@contextlib.contextmanager
def _rewinding(batches: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Restores random states afterwards, those that batches are drawn with too: each pass sees the same batches."""
    rewind = generator_rewind(generators_behind(batches))
    try:
        with preserved_randomness({device}):
            yield
    finally:
        rewind()


def _check_finite(loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {loss.item()}: look for it in the data, or lower the learning rate")


def _warn_of_infinite(summary: Summary) -> None:
    """Says where a loss that is finite has no derivatives, or none beyond some order."""
    third = summary.third
    kinds = (
        ("derivatives", summary.gradient[:, None], ""),
        ("second derivatives", summary.hessian, ", though the gradient is"),
        ("third derivatives", None if third is None else third.reshape(len(summary), -1), ", though the second are"),
    )
    for kind, rows, but in kinds:
        finite = [] if rows is None else rows.isfinite().all(1).tolist()
        broken = [name for name, is_finite in zip(summary.names, finite, strict=False) if not is_finite]
        if broken:
            others = " and others" if len(broken) > 3 else ""
            warnings.warn(
                f"{kind} are not finite for {', '.join(map(repr, broken[:3]))}{others}{but}: some operation has none "
                "at this point, such as singular values that are equal or a root of zero",
                stacklevel=3,
            )
            return


def _check_request(order: int, third: str, batches: Iterable[Any], direction: DirectionLike, slices: int) -> None:
    check_count("order", order)
    if third not in ("diagonal", "full"):
        raise ValueError(f"third must be 'diagonal' or 'full', got {third!r}")
    check_batches("batches", batches)
    check_count("slices", slices)
    if direction is None and isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a one-shot {type(batches).__name__}, and is gone through twice, for the gradient and for the "
            "summary along it: pass a list or a DataLoader, or a direction"
        )
