"""Summaries at the price of forward passes: tangents of all groups weighted by adjoints (docs/engine.md).

    H̄[i, j]        = Σ over operations of  v̄ · f''[ẋ_i, ẋ_j]
    D^(3)[i, i, i] = Σ over operations of  v̄ · (f'''[ẋ_i, ẋ_i, ẋ_i] + 3 f''[ẋ_i, ẍ_i])

where v̄ is the ordinary adjoint of an operation's result, and ẋ_i, ẍ_i are the derivatives of its arguments by the rate
of group i.  One backward pass gives all adjoints, one sweep over the graph all tangents.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure.composed import Composed
from newton_summary.measure.graph import Graph, Refusal, trace
from newton_summary.measure.inputs import Inputs, SameFunction
from newton_summary.measure.loss import Loss, check_dependence
from newton_summary.measure.sweep import Request, Tape, sweep
from newton_summary.partition import Partition
from newton_summary.summary import Summary

_VALUE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_DERIVATIVE_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
_COARSE = 3e-2  # for types of half precision
_KINKED = 2e-2  # for single precision with kinks: rounding moves a few values across, so that slopes jump


class ForwardEngine:
    """Exact derivatives of orders 1 to 3 by forward tangents.

    A graph of the loss is traced for each model, loss function and shape of the batch, and kept.  A new one is checked
    against the gradient and one Hessian-vector product of the loss itself, and every measurement against its value.

    Args:
        graphs: how many graphs are kept for each model.
    """

    def __init__(self, graphs: int = 8) -> None:
        self.graphs = graphs
        self._known: weakref.WeakKeyDictionary[nn.Module, list[_Known]] = weakref.WeakKeyDictionary()

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch, as the nested engine gives it.

        Raises:
            Refusal: the loss cannot be measured in this way: an operation, and the reason.
            ValueError: the loss does not depend on the parameters.
        """
        if order > 3:
            raise Refusal(f"order {order} is above 3")
        with loss.undisturbed() as rewind, torch.autocast(partition.device.type, enabled=False):
            inputs = Inputs(loss, batch, partition)
            known = self._find(inputs)
            request = Request(partition, direction, order, third)
            if known.graph is not None and known.checked:
                expected = _eager_value(inputs)  # first, while nothing else is held
                if known.graph.draws:
                    rewind()
                tape = _replayed(known.graph, inputs, request)
                if tape is not None and _close(tape.loss, expected, _value_tolerance(tape)):
                    summary = sweep(tape, request, inputs.weight)
                    if not known.checked_third:
                        _check_accelerations(tape, summary)
                        known.checked_third = summary.third is not None
                    return summary
            if known.refusal is not None:
                raise known.refusal
            return self._measure_anew(inputs, request, known, rewind)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, traces anew."""
        return ForwardEngine, (self.graphs,)

    def __len__(self) -> int:
        """How many graphs are kept."""
        return sum(entry.graph is not None for entries in self._known.values() for entry in entries)

    def kinds(self, loss: Loss) -> dict[str, str]:
        """The kind of rule that each operation of a model's latest graph took, by the operation's name."""
        graph = self._known[loss.model][0].graph
        assert graph is not None
        steps = zip(graph.instructions, graph.plan or (), strict=True)
        return {str(i.op).removeprefix("aten."): step.rule.kind for i, step in steps if step is not None}

    def _find(self, inputs: Inputs) -> _Known:
        """What is known of such inputs; the most recent comes first."""
        entries = self._known.setdefault(inputs.loss.model, [])
        key = inputs.key()
        for i, entry in enumerate(entries):
            if entry.key == key and entry.same(inputs.loss.loss_fn):
                entries.insert(0, entries.pop(i))
                return entry
        entries.insert(0, _Known(key, SameFunction(inputs.loss.loss_fn)))
        del entries[self.graphs :]
        return entries[0]

    def _measure_anew(self, inputs: Inputs, request: Request, known: _Known, rewind: Callable[[], None]) -> Summary:
        """Traces the loss in one way after the other, until its derivatives agree, from one random state."""
        rewind()
        expected = _Expected(inputs, request)
        reasons = []
        known.graph = None
        for above_autograd in (True, False):
            try:
                rewind()
                graph = trace(inputs.function, inputs.tensors(), above_autograd)
                rewind()
                tape = Tape(graph, inputs, with_gradient=True, keep=request.full)
                expected.check_gradient(tape)
                summary = sweep(tape, replace(request, order=max(request.order, 2)), inputs.weight)
                expected.check_hessian(summary, tape)
                _check_accelerations(tape, summary)
            except Refusal as reason:
                reasons.append(reason)
                continue
            known.graph, known.checked = graph, expected.is_finite
            known.checked_third = expected.is_finite and request.diagonal
            return summary if request.order > 1 else replace(summary, hessian=None)
        known.refusal = reasons[0] if "tracing" not in str(reasons[0]) else reasons[-1]
        raise known.refusal


@dataclass(slots=True)
class _Known:
    """A graph that was made, or why it could not be."""

    key: Any
    same: SameFunction
    graph: Graph | None = None
    checked: bool = False
    checked_third: bool = False
    refusal: Refusal | None = None


# Checks ---------------------------------------------------------------------------------------------------------------


def _eager_value(inputs: Inputs) -> Tensor:
    """The loss itself."""
    tensors = inputs.tensors()
    return inputs.function(*(t.detach() for t in tensors[: inputs.count]), *tensors[inputs.count :]).detach()


def _replayed(graph: Graph, inputs: Inputs, request: Request) -> Tape | None:
    """A known graph on new inputs, or nothing where a shape in it depends on what they are."""
    try:
        return Tape(graph, inputs, keep=request.full)
    except (RuntimeError, IndexError):
        return None


def _value_tolerance(tape: Tape) -> float:
    return _COARSE if tape.graph.coarse else _VALUE_TOLERANCE.get(tape.loss.dtype, _COARSE)


def _derivative_tolerance(tape: Tape) -> float:
    if tape.graph.coarse or tape.loss.dtype not in _DERIVATIVE_TOLERANCE:
        return _COARSE
    kinked = tape.graph.kinked and tape.loss.dtype == torch.float32
    return _KINKED if kinked else _DERIVATIVE_TOLERANCE[tape.loss.dtype]


def _close(value: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether they agree up to rounding; numbers that are not finite agree with each other."""
    x, y = value.detach().double(), expected.detach().double()
    if not bool(y.isfinite().all()):
        return not bool(x.isfinite().all())
    size = max(float(torch.linalg.vector_norm(y)), scale)
    return float(torch.linalg.vector_norm(x - y)) <= tolerance * size + 1e-30


class _Expected:
    """Value, gradient and one Hessian-vector product of a loss by nested differentiation."""

    def __init__(self, inputs: Inputs, request: Request) -> None:
        self.names = inputs.partition.parameter_names
        tensors = inputs.tensors()
        parameters = tensors[: inputs.count]
        with Composed():
            self.loss = inputs.function(*tensors)
        self.gradient: list[Tensor | None] = [None] * inputs.count
        if self.loss.requires_grad:
            self.gradient = list(torch.autograd.grad(self.loss, parameters, create_graph=True, allow_unused=True))
        check_dependence(self.gradient)
        self.rows = self._hessian_rows(parameters, request)
        self.is_finite = bool(self.loss.isfinite())

    def _hessian_rows(self, parameters: Sequence[Tensor], request: Request) -> Tensor | None:
        """H̄ times a vector of ones, or nothing where the loss is not twice differentiable by autograd."""
        moving = [(g, u) for g, u in zip(self.gradient, request.direction, strict=True) if g is not None]
        slope = sum((g * u).sum() for g, u in moving)
        if not isinstance(slope, Tensor) or not slope.requires_grad:
            return torch.zeros(len(request.partition), dtype=torch.float64, device=request.partition.device)
        try:
            product = torch.autograd.grad(slope, parameters, allow_unused=True)
        except RuntimeError:
            return None
        return request.partition.reduce(
            [None if h is None else h * u for h, u in zip(product, request.direction, strict=True)]
        )

    def check_gradient(self, tape: Tape) -> None:
        """Compares a graph's loss and its gradient, tensor by tensor."""
        if not _close(tape.loss, self.loss, _value_tolerance(tape)):
            raise Refusal(f"the traced graph gives a loss of {tape.loss.item()}, the model {self.loss.item()}")
        norm = max(float(torch.linalg.vector_norm(g.detach().to_dense())) for g in self.gradient if g is not None)
        for name, got, expected in zip(self.names, tape.gradient, self.gradient, strict=True):
            if got is None and expected is None:
                continue
            known = got if got is not None else expected
            assert known is not None
            g, e = (torch.zeros_like(known.to_dense()) if x is None else x.to_dense() for x in (got, expected))
            if not _close(g, e, _derivative_tolerance(tape), scale=1e-3 * norm):
                raise Refusal(
                    f"the traced graph has another gradient for {name!r} than the model, as custom autograd functions "
                    "and reentrant checkpoints have it"
                )

    def check_hessian(self, summary: Summary, tape: Tape) -> None:
        """Compares H̄ times ones."""
        if self.rows is None or not bool(self.rows.isfinite().all()):
            return
        assert summary.hessian is not None
        tolerance = _derivative_tolerance(tape)
        sizes = summary.hessian.abs().sum(1)
        # a saturated loss has next to no curvature: what is then measured is the rounding of a larger whole
        rounding = 100 * torch.finfo(tape.loss.dtype).eps * summary.gradient.square().max() / summary.loss.abs()
        allowed = tolerance * (sizes + 1e-3 * sizes.max()) + rounding.nan_to_num(nan=0.0) + 1e-30
        excess = (summary.hessian.sum(1) - self.rows).abs() - allowed
        if not bool((excess <= 0).all()):
            worst = int(excess.nan_to_num(nan=torch.inf).argmax())
            raise Refusal(
                f"the traced graph has another Hessian-vector product for group {summary.names[worst]!r} than the model"
            )


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
