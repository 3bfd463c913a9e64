"""What holds recorded operations to the loss that they were recorded from: its value, its gradient, its curvature."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from newton_summary.measure.autograd import once_differentiable
from newton_summary.measure.differences import Differences, rates
from newton_summary.measure.doubtful import reads_one_triangle
from newton_summary.measure.gradient import Gradient
from newton_summary.measure.graph import Graph, Instruction
from newton_summary.measure.loss import Loss, gradients_of
from newton_summary.measure.own_gradient import JUDGED, NoDerivative, check_own_gradient
from newton_summary.measure.record import Leaf, Recording, Refusal
from newton_summary.measure.recorded_line import RecordedLine, differentiable
from newton_summary.measure.request import Request
from newton_summary.measure.tape import Tape
from newton_summary.partition import PIECE, Partition
from newton_summary.summary import Summary

aten = torch.ops.aten

_VALUE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_DERIVATIVE_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
_COARSE = 3e-2  # for types of half precision
_ROUNDINGS = 10.0  # times what rounding makes of a gradient: what may be rounding in another order of operations
_KINKED = 2e-2  # for single precision with kinks: rounding moves a few values across, so that slopes jump


def check_gradients(
    tape: Tape,
    recording: Recording,
    request: Request,
    gradient: Gradient | None,
    expected: Expected | None,
    in_doubt: bool,
) -> None:
    """Holds the gradient of the recorded operations to that of the loss, and that to what it should be.

    One of the loss's own making may be another one by intention: it is left to the first comparison.  Later ones are
    made where the data leave the gradient in doubt.
    """
    by_intention = gradient is not None
    if expected is None and in_doubt:
        known = gradient or tape.gradient
        assert known is not None
        check_own_gradient(tape, recording.leaves, request, known)
    if expected is not None and not by_intention:
        check_own_gradient(tape, recording.leaves, request, expected.gradient)
    for wanted in (gradient, expected.gradient if expected is not None else None):
        if wanted is not None:
            check_gradient(tape, recording.leaves, request.partition, wanted)
    if expected is not None and by_intention:
        check_own_gradient(tape, recording.leaves, request, expected.gradient)


def check_hessian(expected: Expected, summary: Summary, tape: Tape, leaves: Sequence[Leaf], request: Request) -> None:
    """Holds H̄ to autograd's Hessian-vector product; where it is another, or there is none, differences decide.

    Raises:
        Refusal: they are not on the side of H̄: autograd may be right, or nobody.
    """
    line = functools.cache(lambda: RecordedLine(tape.graph, leaves, request))
    is_judged = tape.graph.coarsest in JUDGED
    may_bend = is_judged and any(bool((line().here[slot] == 0).any()) for slot in _sizes(tape))
    if expected.rows is None or not bool(expected.rows.isfinite().all()) or may_bend:
        if is_judged and bool(summary.gradient.isfinite().all()):
            _check_by_differences(summary, line().differences(), may_bend)
        return
    worst = expected.unlike(summary, tape)
    if worst is None:
        return
    name = summary.names[worst]
    if is_judged:
        judge = line().differences()
        if judge.worst(expected.rows) is not None:
            if judge.worst(_along(summary)) is None:
                return
            raise NoDerivative(f"no way to second derivatives gives those of the gradient for group {name!r}")
    raise Refusal(f"the recorded operations have another Hessian-vector product for group {name!r} than autograd")


def _check_by_differences(summary: Summary, found: Differences, may_bend: bool) -> None:
    rows = _along(summary)
    worst = found.worst(rows)
    if may_bend and bool(rows.isfinite().all()) and not bool(found.rows.isfinite().all()):
        worst = int(rows.abs().argmin())  # a little away from zero there is no gradient
    if worst is not None:
        raise NoDerivative(
            f"no way to second derivatives gives those of the gradient for group {summary.names[worst]!r}, as behind "
            "a length or an absolute value that is exactly zero: take its square from squares (x.square().sum())"
        )


def _sizes(tape: Tape) -> list[int]:
    """The slots of what moves and is an absolute value or a root: where it is 0, what follows may bend, unseen.

    A root is taken apart from where it is zero, by a comparison (:func:`.algebra.root`).
    """
    made = {i.out for i, step in zip(tape.graph.instructions, tape.steps, strict=True) if step is not None}
    moving = made | {slot for slot, _, number in tape.graph.inputs if number is not None}
    compared = [i for i in tape.graph.instructions if i.op is aten.abs.default or _is_held_to_zero(i)]
    return [i.reads[0] for i in compared if i.reads[0] in moving]


def _is_held_to_zero(instruction: Instruction) -> bool:
    return instruction.op is aten.eq.Scalar and instruction.args[1] == 0


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
    x, y = _flat(value), _flat(expected)
    pairs = list(zip(x.split(PIECE), y.split(PIECE), strict=True)) if y.device.type == "cpu" else [(x, y)]
    norm = _norm(b for _, b in pairs)
    if not math.isfinite(norm):
        return not math.isfinite(_norm(a for a, _ in pairs))
    return _norm(a - b for a, b in pairs) <= tolerance * max(norm, scale) + 1e-30


def _norm(pieces: Iterable[Tensor]) -> float:
    """The Euclidean norm of all pieces together, in double precision; not finite where an entry is not."""
    wide = (piece.double() for piece in pieces)
    return float(torch.stack([torch.dot(piece, piece) for piece in wide]).sum().sqrt())


def _flat(x: Tensor) -> Tensor:
    """The entries of a value, complex numbers as pairs of real ones."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def check_value(tape: Tape, expected: Tensor) -> None:
    """Holds the loss of the recorded operations to the model's."""
    if not _close(tape.loss, expected, _value_tolerance(tape)):
        raise Refusal(f"the recorded operations give a loss of {tape.loss.item()}, the model {expected.item()}")


def check_gradient(tape: Tape, leaves: Sequence[Leaf], partition: Partition, wanted: Gradient) -> None:
    """Compares a graph's gradient, tensor by tensor."""
    assert tape.gradient is not None
    pairs = [_dense(*pair) for pair in zip(tape.gradient.parts, wanted.parts, strict=True)]
    norm = max((float(torch.linalg.vector_norm(expected)) for _, expected in pairs), default=0.0)
    tolerance = _derivative_tolerance(tape)
    unlike = [n for n, pair in enumerate(pairs) if not _close(*pair, tolerance, scale=1e-3 * norm)]
    if not unlike:
        return
    rounding = _rounding(tape, leaves, partition)
    for number in unlike:
        got, expected = pairs[number]
        if not _norm([_flat(got - expected)]) <= _ROUNDINGS * rounding[number]:
            name = f"{partition.parameter_names[number]!r}, of shape {tuple(expected.shape)},"
            if reads_one_triangle(tape.graph):
                raise NoDerivative(
                    f"autograd's gradient for {name} is not that of the loss: a matrix is taken for symmetric or "
                    "triangular that is not built so (A + A.T, A.tril())"
                )
            raise Refusal(
                f"the recorded operations have another gradient for {name} than autograd, as custom autograd functions "
                "and hooks have it"
            )


def _dense(got: Tensor | None, expected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two gradients of a parameter as dense tensors, zeros for none."""
    known = [g.detach().to_dense() for g in (got, expected) if g is not None]
    nothing = torch.zeros_like(known[0]) if known else torch.zeros(())
    return (nothing if got is None else known[0]), (nothing if expected is None else known[-1])


def _rounding(tape: Tape, leaves: Sequence[Leaf], partition: Partition) -> list[float]:
    """How far rounding moves the gradient by each parameter: as far as a change of all in the last place does.

    What remains of a gradient that cancels, as that of a bias before a normalisation, is nothing else.
    """
    generator = torch.Generator().manual_seed(0)
    here, there = [], []
    for _, leaf, number in tape.graph.inputs:
        tensor = leaves[leaf].tensor.detach()
        here.append(tensor)
        there.append(tensor if number is None else _in_last_place(tensor, generator))
    gradients = [gradients_of(*differentiable(tape.graph, inputs, partition, tape.values)) for inputs in (here, there)]
    return [_norm([_flat(x - y)]) for x, y in map(_dense, *gradients)]


def _in_last_place(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor with every entry one unit in the last place larger or smaller, at random."""
    up = torch.rand(tensor.shape, generator=generator, device="cpu") < 0.5
    eps = torch.finfo(tensor.dtype).eps
    return torch.where(up.to(tensor.device), tensor * (1 + eps), tensor * (1 - eps))


class Expected:
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
        assert summary.hessian is not None
        assert self.rows is not None
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


def replayed_rows(graph: Graph, leaves: Sequence[Leaf], request: Request) -> Tensor | None:
    """H̄ times the groups' rates, of the recorded operations, by autograd; nothing where it has no such derivatives.

    Where the loss has derivatives of its own making, it is these operations that autograd is asked about, once their
    gradient is that of the loss: a backward pass by hand often hides from autograd what it depends on.
    """
    inputs = [leaves[leaf].tensor for _, leaf, _ in graph.inputs]
    try:
        value, parameters = differentiable(graph, inputs, request.partition)
        gradients = request.gradients
        return gradients.hessian_rows(gradients.of(value, parameters, create_graph=True), parameters)
    except RuntimeError:
        return None


def check_accelerations(tape: Tape, summary: Summary) -> None:
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
