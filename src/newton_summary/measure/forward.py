"""Summaries at the price of forward passes: tangents of all groups weighted by adjoints (docs/engine.md).

    H̄[i, j]        = Σ over operations of  v̄ · f''[ẋ_i, ẋ_j]
    D^(3)[i, i, i] = Σ over operations of  v̄ · (f'''[ẋ_i, ẋ_i, ẋ_i] + 3 f''[ẋ_i, ẍ_i])

where v̄ is the ordinary adjoint of an operation's result, and ẋ_i, ẍ_i are the derivatives of its arguments by the rate
of group i.  One backward pass gives all adjoints, one sweep over the graph all tangents.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary._checks import check_memory
from newton_summary.measure.agreement import (
    Expected,
    check_accelerations,
    check_gradients,
    check_hessian,
    check_value,
    replayed_rows,
)
from newton_summary.measure.autograd import own_derivatives
from newton_summary.measure.batches import batch_size
from newton_summary.measure.differences import ratio
from newton_summary.measure.doubtful import reads_one_triangle, written_once, written_twice
from newton_summary.measure.gradient import Gradient
from newton_summary.measure.graph import Graph, first_line, lower
from newton_summary.measure.loss import Loss, check_dependence, differentiable_recurrence
from newton_summary.measure.own_gradient import NoDerivative, check_apart
from newton_summary.measure.record import Recording, Refusal
from newton_summary.measure.recorder import Recorder
from newton_summary.measure.request import Request
from newton_summary.measure.sweep import sweep
from newton_summary.measure.tape import Tape
from newton_summary.parallel import paging
from newton_summary.partition import Partition
from newton_summary.summary import Summary

_TORCHS = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError, AssertionError)
"""Errors of torch, or of a loss that does not stand being watched: an engine that does not watch may do better."""


class ForwardEngine:
    """Exact derivatives of orders 1 to 3 by forward tangents.

    At each measurement the loss is called once, and its operations are recorded as they run.  What they are made of is
    kept for each sequence of operations and shapes.  A new sequence of operations is checked against the gradient and
    one Hessian-vector product by autograd; every measurement against the loss, against its gradient where the loss
    has derivatives of its own making (custom functions, hooks), and against differences where it depends on the data
    whether autograd's gradient is that of the loss (entries written twice, matrices of which one triangle is read).

    Args:
        graphs: how many graphs are kept for each model.
        memory: the bytes that a measurement's values, adjoints and tangents may take, beside the model, the batch and
            the direction.  Where the tangents of all groups are more, some groups are swept at a time, which takes
            longer and changes nothing else (docs/engine.md).  Default: three quarters of what is free, for tangents.
    """

    def __init__(self, graphs: int = 8, memory: float | None = None) -> None:
        self.graphs = graphs
        self.memory = check_memory(memory)
        self._known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch, as the nested engine gives it.

        Raises:
            Refusal: the loss cannot be measured in this way: an operation, and the reason.
            ValueError: the loss does not depend on the parameters.
            MemoryError: the budget is too small for the groups that are needed at the same time.
        """
        if order > 3:
            raise Refusal(f"order {order} is above 3")
        try:
            return self._measure(loss, batch, Request(partition, direction, order, third))
        except _TORCHS as error:
            raise Refusal(f"{type(error).__name__}: {first_line(error)}") from error

    def _measure(self, loss: Loss, batch: Any, request: Request) -> Summary:
        partition = request.partition
        known = self._known.setdefault(loss.model, _Known())
        on_host = partition.device.type == "cpu"
        check_apart(partition)
        with loss.undisturbed(differentiable=not on_host) as rewind, differentiable_recurrence(loss.model):
            recording, gradient = _recorded(loss, batch, request)
            factor = _factor(recording, request)
            if factor != 1:
                request = replace(request, direction=[u * factor for u in request.direction])
            twice = written_twice(recording)
            entry = self._entry(known, recording)
            recording.values.clear()
            in_doubt = entry.is_in_doubt or twice is not None
            weight = float(batch_size(batch))
            try:
                with written_once(twice):
                    known_refusal = entry.refusal or entry.refused.get(_kind(request))
                    if known_refusal is not None:
                        raise known_refusal
                    assert entry.graph is not None
                    expected = None
                    if (recording.operations(), request.order) not in known.checked:
                        rewind()
                        expected = Expected(loss, batch, request, own=gradient is not None)
                        if gradient is not None:
                            expected.rows = replayed_rows(entry.graph, recording.leaves, request)
                    asked = _Asked(request, weight, gradient, expected, in_doubt)
                    return _divided(self._swept(known, entry, recording, asked), factor)
            except Refusal:
                if bool(recording.loss.isfinite()):
                    raise
                return request.undefined(recording.loss, weight)

    def within(self, memory: float | None) -> ForwardEngine:
        """The same engine, with the same graphs, and another budget."""
        other = ForwardEngine(self.graphs, memory)
        other._known = self._known
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, lowers anew."""
        return ForwardEngine, (self.graphs, self.memory)

    def __len__(self) -> int:
        """How many graphs are kept."""
        return sum(entry.graph is not None for known in self._known.values() for entry in known.entries.values())

    def kinds(self, loss: Loss) -> dict[str, str]:
        """The kind of rule that each operation of a model's latest graph took, by the operation's name."""
        graph = next(reversed(self._known[loss.model].entries.values())).graph
        assert graph is not None
        steps = zip(graph.instructions, graph.plan or (), strict=True)
        return {str(i.op).removeprefix("aten."): step.rule.kind for i, step in steps if step is not None}

    def _entry(self, known: _Known, recording: Recording) -> _Entry:
        """The graph of a recording, or why there is none; the most recent comes last."""
        key = recording.key()
        entry = known.entries.pop(key, None)
        if entry is None:
            try:
                graph = lower(recording)
                entry = _Entry(graph, is_in_doubt=reads_one_triangle(graph))
            except Refusal as refusal:
                entry = _Entry(refusal=refusal)
            except _TORCHS as error:
                entry = _Entry(refusal=Refusal(f"lowering failed with {type(error).__name__}: {first_line(error)}"))
            while len(known.entries) >= self.graphs:
                known.entries.pop(next(iter(known.entries)))
        known.entries[key] = entry
        return entry

    def _swept(self, known: _Known, entry: _Entry, recording: Recording, asked: _Asked) -> Summary:
        """The summary, with what is to be checked compared."""
        request, gradient, expected = asked.request, asked.gradient, asked.expected
        graph, is_new = entry.graph, expected is not None
        assert graph is not None
        try:
            with torch.autocast(request.partition.device.type, enabled=False):
                wanted = request.gradients if is_new or gradient is not None or asked.in_doubt else None
                tape = Tape(graph, recording.leaves, wanted, keep=request.full)
                check_value(tape, recording.loss)
                check_gradients(tape, recording, request, gradient, expected, asked.in_doubt)
                checkable = replace(request, order=max(request.order, 2)) if is_new else request
                summary = sweep(tape, checkable, asked.weight, self.memory)
            if expected is not None:
                check_hessian(expected, summary, tape, recording.leaves, request)
                check_accelerations(tape, summary)
        except NoDerivative:
            raise  # of these data
        except Refusal as refusal:
            if (gradient is None or expected is not None) and bool(recording.loss.isfinite()):
                entry.refused[_kind(request)] = refusal  # else it may be the data that decide
            raise
        if expected is not None and expected.is_finite:
            known.check((recording.operations(), request.order))
        return summary if request.order > 1 else replace(summary, hessian=None)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a recording.

    Attributes:
        request: what is measured.
        weight: of the batch.
        gradient: of the loss, where that may be of the user's own making.
        expected: what a new sequence of operations is held to.
        in_doubt: whether autograd's gradient may not be that of the loss, for these data.
    """

    request: Request
    weight: float
    gradient: Gradient | None
    expected: Expected | None
    in_doubt: bool


@dataclass(slots=True)
class _Entry:
    """A graph that was made, or why it could not be, or not be swept for some request."""

    graph: Graph | None = None
    refusal: Refusal | None = None
    refused: dict[tuple[int, bool], Refusal] = field(default_factory=dict)
    is_in_doubt: bool = False


def _kind(request: Request) -> tuple[int, bool]:
    return request.order, request.full


@dataclass
class _Known:
    """What is known of a model: graphs by what was recorded, and the operations and orders that were checked."""

    entries: dict[Any, _Entry] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)

    def check(self, what: Any) -> None:
        """Notes that something was checked; begins anew where that is no longer a few."""
        if len(self.checked) >= _CHECKED:
            self.checked.clear()
        self.checked.add(what)


_CHECKED = 256


def _factor(recording: Recording, request: Request) -> float:
    """What the direction is multiplied with: a power of two, so that in float16 tangents are about as large as values.

    Those of a step of training would be no numbers, squared.
    """
    kinds = {value.dtype for value in recording.values.values() if isinstance(value, Tensor)}
    if torch.float16 not in kinds or paging.is_active():
        return 1.0
    return 2.0 ** round(math.log2(ratio(request.partition.parameters, request.direction)))


def _divided(summary: Summary, factor: float) -> Summary:
    """The summary along a direction, from that along a multiple of it."""
    if factor == 1:
        return summary
    return replace(
        summary,
        gradient=summary.gradient / factor,
        hessian=None if summary.hessian is None else summary.hessian / factor**2,
        third=None if summary.third is None else summary.third / factor**3,
    )


def _recorded(loss: Loss, batch: Any, request: Request) -> tuple[Recording, Gradient | None]:
    """One evaluation of the loss, and its gradient where that may be of the user's own making."""
    partition = request.partition
    recorder = Recorder(partition.parameters)
    with loss.evaluated(batch, recorder) as value:
        with torch.no_grad():
            recording = recorder.finish(value)
        if recording.result is None:
            check_dependence([None])
        gradient = None
        if recorder.is_hooked() or own_derivatives(value):
            gradient = request.gradients.of(value, partition.parameters)
    recording.loss = value.detach()
    return recording, gradient
