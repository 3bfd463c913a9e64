"""Summaries at the price of forward passes: tangents of all groups weighted by adjoints (docs/engine.md).

    H̄[i, j]        = Σ over operations of  v̄ · f''[ẋ_i, ẋ_j]
    D^(3)[i, i, i] = Σ over operations of  v̄ · (f'''[ẋ_i, ẋ_i, ẋ_i] + 3 f''[ẋ_i, ẍ_i])

where v̄ is the ordinary adjoint of an operation's result, and ẋ_i, ẍ_i are the derivatives of its arguments by the rate
of group i.  One backward pass gives all adjoints, one sweep over the graph all tangents.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newton_summary._checks import check_memory
from newton_summary.measure.autograd import once_differentiable, own_derivatives
from newton_summary.measure.batches import batch_size
from newton_summary.measure.differences import rates
from newton_summary.measure.gradient import Gradient
from newton_summary.measure.graph import Graph, first_line, lower
from newton_summary.measure.loss import Loss, check_dependence, differentiable_recurrence
from newton_summary.measure.own_gradient import JUDGED, NoDerivative, check_own_gradient
from newton_summary.measure.record import Leaf, Recorder, Recording, Refusal
from newton_summary.measure.recorded_line import RecordedLine
from newton_summary.measure.sweep import Request, Tape, sweep
from newton_summary.partition import PIECE, Partition
from newton_summary.summary import Summary

_VALUE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_DERIVATIVE_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
_COARSE = 3e-2  # for types of half precision
_KINKED = 2e-2  # for single precision with kinks: rounding moves a few values across, so that slopes jump


_TORCHS = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError, AssertionError)
"""Errors of torch, or of a loss that does not stand being watched: an engine that does not watch may do better."""


class ForwardEngine:
    """Exact derivatives of orders 1 to 3 by forward tangents.

    At each measurement the loss is called once, and its operations are recorded as they run.  What they are made of is
    kept for each sequence of operations and shapes.  A new sequence of operations is checked against the gradient and
    one Hessian-vector product by autograd; every measurement against the loss, and against its gradient where the loss
    has derivatives of its own making (custom functions, hooks).

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
        with loss.undisturbed(differentiable=not on_host) as rewind, differentiable_recurrence(loss.model):
            recording, gradient = _recorded(loss, batch, request)
            entry = self._entry(known, recording)
            recording.values.clear()
            known_refusal = entry.refusal or entry.refused.get(_kind(request))
            if known_refusal is not None:
                raise known_refusal
            assert entry.graph is not None
            is_new = (recording.operations(), request.order) not in known.checked
            expected = None
            if is_new:
                rewind()
                expected = _Expected(loss, batch, request, own=gradient is not None)
                if gradient is not None:
                    expected.rows = _replayed_rows(entry.graph, recording.leaves, request)
            return self._swept(known, entry, recording, request, float(batch_size(batch)), gradient, expected)

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
                entry = _Entry(lower(recording))
            except Refusal as refusal:
                entry = _Entry(refusal=refusal)
            except _TORCHS as error:
                entry = _Entry(refusal=Refusal(f"lowering failed with {type(error).__name__}: {first_line(error)}"))
            while len(known.entries) >= self.graphs:
                known.entries.pop(next(iter(known.entries)))
        known.entries[key] = entry
        return entry

    def _swept(
        self,
        known: _Known,
        entry: _Entry,
        recording: Recording,
        request: Request,
        weight: float,
        gradient: Gradient | None,
        expected: _Expected | None,
    ) -> Summary:
        """The summary, with what is to be checked compared."""
        graph, is_new = entry.graph, expected is not None
        assert graph is not None
        try:
            with torch.autocast(request.partition.device.type, enabled=False):
                wanted = request.gradients if is_new or gradient is not None else None
                tape = Tape(graph, recording.leaves, wanted, keep=request.full)
                _check_value(tape, recording.loss)
                self._check_gradients(tape, recording, request, gradient, expected)
                asked = replace(request, order=max(request.order, 2)) if is_new else request
                summary = sweep(tape, asked, weight, self.memory)
        except Refusal as refusal:
            if gradient is None:
                entry.refused[_kind(request)] = refusal  # else it may be the data that decide
            raise
        if expected is not None:
            try:
                self._check_hessian(expected, summary, tape, recording.leaves, request)
                _check_accelerations(tape, summary)
            except Refusal as refusal:
                entry.refused[_kind(request)] = refusal
                raise
            if expected.is_finite:
                known.check((recording.operations(), request.order))
        return summary if request.order > 1 else replace(summary, hessian=None)

    @staticmethod
    def _check_gradients(
        tape: Tape,
        recording: Recording,
        request: Request,
        gradient: Gradient | None,
        expected: _Expected | None,
    ) -> None:
        """Holds the gradient of the recorded operations to that of the loss, and that to what it should be.

        One of the loss's own making may be another one by intention: it is left to the first comparison.
        """
        by_intention = gradient is not None
        if expected is not None and not by_intention:
            check_own_gradient(tape, recording.leaves, request, expected.gradient)
        for wanted in (gradient, expected.gradient if expected is not None else None):
            if wanted is not None:
                _check_gradient(tape, request.partition.parameter_names, wanted)
        if expected is not None and by_intention:
            check_own_gradient(tape, recording.leaves, request, expected.gradient)

    @staticmethod
    def _check_hessian(
        expected: _Expected, summary: Summary, tape: Tape, leaves: Sequence[Leaf], request: Request
    ) -> None:
        """Holds H̄ to autograd's Hessian-vector product; where they disagree, differences of the gradient decide.

        Raises:
            Refusal: they are not on the side of H̄: autograd may be right, or nobody.
        """
        worst = expected.unlike(summary, tape)
        if worst is None:
            return
        assert expected.rows is not None
        name = summary.names[worst]
        if tape.graph.coarsest in JUDGED:
            judge = RecordedLine(tape.graph, leaves, request).differences()
            if judge.worst(expected.rows) is not None:
                if judge.worst(_along(summary)) is None:
                    return
                raise NoDerivative(f"no way to second derivatives gives those of the gradient for group {name!r}")
        raise Refusal(f"the recorded operations have another Hessian-vector product for group {name!r} than autograd")


@dataclass(slots=True)
class _Entry:
    """A graph that was made, or why it could not be, or not be swept for some request."""

    graph: Graph | None = None
    refusal: Refusal | None = None
    refused: dict[tuple[int, bool], Refusal] = field(default_factory=dict)


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


def _recorded(loss: Loss, batch: Any, request: Request) -> tuple[Recording, Gradient | None]:
    """One evaluation of the loss, and its gradient where that may be of the user's own making."""
    partition = request.partition
    recorder = Recorder(partition.parameters, partition.parameter_names)
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


# Checks ---------------------------------------------------------------------------------------------------------------


def _value_tolerance(tape: Tape) -> float:
    return _VALUE_TOLERANCE.get(tape.graph.coarsest, _COARSE)


def _derivative_tolerance(tape: Tape) -> float:
    """How far derivatives of the graph may be from autograd's, relatively.

    In half precision both are mostly rounding where a model is deep: n roundings, each anywhere within half a unit, add
    up as a random walk does, to √(n/3) halves of a unit.
    """
    coarsest = tape.graph.coarsest
    if coarsest not in _DERIVATIVE_TOLERANCE:
        walk = 0.5 * torch.finfo(coarsest).eps * math.sqrt(len(tape.graph.instructions) / 3)
        return max(_COARSE, walk)
    return _KINKED if tape.graph.kinked and coarsest == torch.float32 else _DERIVATIVE_TOLERANCE[coarsest]


def _close(value: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether they agree up to rounding; numbers that are not finite agree with each other."""
    x, y = (_real(t.detach()).reshape(-1) for t in (value, expected))
    pairs = list(zip(x.split(PIECE), y.split(PIECE), strict=True)) if y.device.type == "cpu" else [(x, y)]
    norm = _norm(b for _, b in pairs)
    if not math.isfinite(norm):
        return not math.isfinite(_norm(a for a, _ in pairs))
    return _norm(a - b for a, b in pairs) <= tolerance * max(norm, scale) + 1e-30


def _norm(pieces: Iterable[Tensor]) -> float:
    """The Euclidean norm of all pieces together, in double precision; not finite where an entry is not."""
    wide = (piece.double() for piece in pieces)
    return float(torch.stack([torch.dot(piece, piece) for piece in wide]).sum().sqrt())


def _real(x: Tensor) -> Tensor:
    """A value, with complex numbers as pairs of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _check_value(tape: Tape, expected: Tensor) -> None:
    if not _close(tape.loss, expected, _value_tolerance(tape)):
        raise Refusal(f"the recorded operations give a loss of {tape.loss.item()}, the model {expected.item()}")


def _check_gradient(tape: Tape, names: Sequence[str], wanted: Gradient) -> None:
    """Compares a graph's gradient, tensor by tensor."""
    assert tape.gradient is not None
    norms = [float(torch.linalg.vector_norm(g.detach().to_dense())) for g in wanted.parts if g is not None]
    norm = max(norms, default=0.0)
    for name, got, expected in zip(names, tape.gradient.parts, wanted.parts, strict=True):
        if got is None and expected is None:
            continue
        known = got if got is not None else expected
        assert known is not None
        g, e = (torch.zeros_like(known.to_dense()) if x is None else x.to_dense() for x in (got, expected))
        if not _close(g, e, _derivative_tolerance(tape), scale=1e-3 * norm):
            raise Refusal(
                f"the recorded operations have another gradient for {name!r} than autograd, as custom autograd "
                "functions and hooks have it"
            )


class _Expected:
    """Gradient and one Hessian-vector product of a loss by nested differentiation.

    Args:
        loss: the loss and its model.
        batch: what it is measured on.
        request: what is measured.
        own: whether the loss has derivatives of its own making: the product is then left to be filled in.
    """

    def __init__(self, loss: Loss, batch: Any, request: Request, own: bool) -> None:
        parameters = request.partition.parameters
        with (
            sdpa_kernel(SDPBackend.MATH),
            loss.evaluated(batch, differentiable=True) as value,
        ):
            self.is_finite = bool(value.isfinite())
            gradients = request.gradients
            try:
                gradient = gradients.of(value, parameters, create_graph=True)
                unknown = own or once_differentiable(value)
                self.rows = None if unknown else gradients.hessian_rows(gradient, parameters)
            except RuntimeError:  # no second derivatives by autograd
                gradient, self.rows = gradients.of(value, parameters), None
            self.gradient = gradient.detached()

    def unlike(self, summary: Summary, tape: Tape) -> int | None:
        """The group whose second derivatives along the line are others."""
        if self.rows is None or not bool(self.rows.isfinite().all()):
            return None
        assert summary.hessian is not None
        tolerance = _derivative_tolerance(tape)
        sizes = summary.hessian.abs().sum(1)
        # a saturated loss has next to no curvature: what is then measured is the rounding of a larger whole
        rounding = 100 * torch.finfo(tape.graph.coarsest).eps * summary.gradient.square().max() / summary.loss.abs()
        allowed = tolerance * (sizes + 1e-3 * sizes.max()) + rounding.nan_to_num(nan=0.0) + 1e-30
        excess = (_along(summary) - self.rows).abs() - allowed
        return None if bool((excess <= 0).all()) else int(excess.nan_to_num(nan=torch.inf).argmax())


def _along(summary: Summary) -> Tensor:
    """H̄ times the groups' rates."""
    assert summary.hessian is not None
    return summary.hessian @ torch.tensor(rates(len(summary)), dtype=torch.float64, device=summary.hessian.device)


def _replayed_rows(graph: Graph, leaves: Sequence[Leaf], request: Request) -> Tensor | None:
    """H̄ times the groups' rates, of the recorded operations, by autograd; nothing where it has no such derivatives.

    Where the loss has derivatives of its own making, it is these operations that autograd is asked about, once their
    gradient is that of the loss: a backward pass by hand often hides from autograd what it depends on.
    """
    parameters = [p.detach() for p in request.partition.parameters]
    tensors = [leaves[leaf].tensor.detach() for _, leaf, _ in graph.inputs]
    for tensor, (_, _, number) in zip(tensors, graph.inputs, strict=True):
        if number is not None:
            parameters[number] = tensor.requires_grad_()
    try:
        value = graph.run(tensors)[graph.result]
        gradients = request.gradients
        return gradients.hessian_rows(gradients.of(value, parameters, create_graph=True), parameters)
    except RuntimeError:
        return None


def _check_accelerations(tape: Tape, summary: Summary) -> None:
    """Compares the loss's own second derivatives, which the third order is made of, with the diagonal of H̄."""
    if summary.third is None or tape.final is None or not tape.final.second:
        return
    assert summary.hessian is not None
    expected = summary.hessian.diagonal()[list(tape.final.second)]
    tolerance = _derivative_tolerance(tape)
    if bool(expected.isfinite().all()) and not bool(
        ((tape.final.ddot - expected).abs() <= tolerance * expected.abs().max() + 1e-30).all()
    ):
        general = sorted(
            {
                str(i.op)
                for i, s in zip(tape.graph.instructions, tape.steps, strict=True)
                if s and s.rule.kind == "general"
            }
        )
        raise Refusal(f"no reliable third derivatives of {', '.join(general) or 'some operation'}")
