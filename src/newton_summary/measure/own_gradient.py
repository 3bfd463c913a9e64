"""What autograd gives, held to differences of the recorded operations (docs/engine.md).

For some operations its gradient is not theirs: torch takes a matrix for symmetric or triangular that need not be so,
and an entry that is written twice for two.  All further derivatives, by whatever way, are those of another function.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.differences import rates
from newton_summary.measure.gradient import Gradient
from newton_summary.measure.graph import Instruction
from newton_summary.measure.lowering import CONSTANT
from newton_summary.measure.memory import geometry, overlaps
from newton_summary.measure.record import Leaf, Refusal
from newton_summary.measure.recorded_line import RecordedLine
from newton_summary.measure.request import Request
from newton_summary.measure.rules import KINKED
from newton_summary.measure.tape import Tape
from newton_summary.partition import Partition

JUDGED = (torch.float32, torch.float64)
"""Types that losses are computed in whose differences tell something."""


class NoDerivative(Refusal):
    """What autograd gives is no derivative of the loss, so that no engine can measure it."""


def check_own_gradient(tape: Tape, leaves: Sequence[Leaf], request: Request, gradient: Gradient) -> None:
    """Holds a gradient to differences of the loss that the recorded operations give, along a line.

    Nothing is said where differences cannot tell: at kinks, in half precision, and where the loss is flat.

    Args:
        tape: values of the recorded operations.
        leaves: of their recording.
        request: what is measured.
        gradient: by the parameters, as autograd has it.

    Raises:
        NoDerivative: it is another one.
    """
    if tape.graph.coarsest not in JUDGED:
        return
    slope, size = _slope_along(request, gradient)
    if RecordedLine(tape.graph, leaves, request, tape.values, size).slope([1]).may_be(slope, size):
        return
    line = RecordedLine(tape.graph, leaves, request)
    found = line.slope()
    if found.excludes(slope, size):
        recorded = tape.gradient
        assert recorded is not None
        is_theirs = found.excludes(*_slope_along(request, recorded))
        culprit = _culprit(line) if is_theirs else None
        if is_theirs and culprit is None and tape.graph.kinked:
            return  # several kinks at once: torch's convention at each, and no slope that is right
        culprit = culprit or _unlike(recorded.parts, request, gradient.parts)
        raise NoDerivative(
            f"autograd's gradient is not that of the loss: along the direction it gives {slope:.6g}, differences of "
            f"the loss give {found.value:.6g}, because of {culprit}.  A matrix "
            "is taken for symmetric or triangular that is not (build it so: A + A.T, A.tril()), an entry is written "
            "twice (write each once, or accumulate), gradients are scaled (scale_grad_by_freq=False), or a CTC loss "
            "has other numbers than logarithms of probabilities (log_softmax)"
        )


def check_apart(partition: Partition) -> None:
    """Checks that no two parameters lie in the same memory: one would move with the other, unseen by autograd.

    Raises:
        NoDerivative: two do.
    """
    owners: dict[int, list[int]] = {}
    for number, parameter in enumerate(partition.parameters):
        if parameter.layout is torch.strided:
            owners.setdefault(parameter.untyped_storage()._cdata, []).append(number)
    for shared in owners.values():
        views = [geometry(partition.parameters[n]) for n in shared]
        for i, j in itertools.combinations(range(len(shared)), 2):
            if overlaps(views[i], views[j]):
                one, other = (partition.parameter_names[shared[n]] for n in (i, j))
                raise NoDerivative(
                    f"parameters {one!r} and {other!r} are different tensors in the same memory: register one, and "
                    "make the other of it where it is used"
                )


def _slope_along(request: Request, gradient: Gradient) -> tuple[float, float]:
    """The slope along the line that a gradient gives, and the size of its terms."""
    partition = request.partition
    slopes = [
        rate * float(s) for rate, s in zip(rates(len(partition)), request.gradients.slopes(gradient), strict=True)
    ]
    return sum(slopes), sum(map(abs, slopes))


def _unlike(recorded: Sequence[Tensor | None], request: Request, gradient: Sequence[Tensor | None]) -> str:
    """The parameter whose gradient is furthest from that of the recorded operations."""

    def gap(number: int) -> float:
        one, other = gradient[number], recorded[number]
        known = [g.detach().to_dense() for g in (one, other) if g is not None]
        return float((known[0] - known[1] if len(known) > 1 else known[0]).abs().sum()) if known else 0.0

    worst = max(range(len(gradient)), key=gap)
    shape = tuple(request.partition.parameters[worst].shape)
    return f"what is computed with {request.partition.parameter_names[worst]!r}, of shape {shape}"


def _culprit(line: RecordedLine) -> str | None:
    """The first operation whose gradient is not that of what it computes, kinks apart, and the shape of its result."""
    there, back = (line.values(k) for k in (1, -1))
    generator = torch.Generator().manual_seed(0)
    moving = _moving(line)
    for instruction in line.graph.instructions:
        reads = [s for s in instruction.reads if s in moving]
        if not reads or instruction.out not in moving or instruction.op in KINKED:
            continue
        outs = [_real_parts(values[instruction.out]) for values in (line.here, there, back)]
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o) for o in outs[0]]
        given = sum(_dot(w, x - y) for w, x, y in zip(weights, *outs[1:], strict=True))
        pulled = zip(reads, _pulled(instruction, line.here, reads, weights), strict=True)
        parts = [_dot(g, there[s] - back[s]) for s, g in pulled if g is not None]
        rounding = sum(_dot(w.abs(), o.abs()) for w, o in zip(weights, outs[0], strict=True))
        if abs(sum(parts) - given) > 1e-2 * max(map(abs, (given, *parts))) + 1e3 * line.precision.eps * rounding:
            return f"{instruction.op}, of shape {tuple(outs[0][0].shape)}"
    return None


def _moving(line: RecordedLine) -> set[int]:
    """The slots of real numbers that move with the parameters."""
    moving = {slot for slot, _, number in line.graph.inputs if number is not None}
    for instruction in line.graph.instructions:
        if instruction.op is not CONSTANT and not moving.isdisjoint(instruction.reads):
            moving.add(instruction.out)
    return {s for s in moving if _real_parts(line.here[s])}


def _real_parts(value: Any) -> list[Tensor]:
    """The real numbers that an operation gives."""
    several = value if isinstance(value, list | tuple) else [value]
    return [v for v in several if isinstance(v, Tensor) and v.is_floating_point()]


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())


def _pulled(
    instruction: Instruction, values: Sequence[Any], reads: list[int], weights: list[Tensor]
) -> Sequence[Tensor | None]:
    """The gradient of an operation's results, with some weights, by what it reads."""
    inputs = list(values)
    for slot in reads:
        inputs[slot] = values[slot].detach().clone().requires_grad_()
    with torch.enable_grad():
        outs = _real_parts(instruction.op(*instruction.arguments(inputs), **instruction.keywords(inputs)))
    moving = [(o, w) for o, w in zip(outs, weights, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in moving], [inputs[s] for s in reads], [w for _, w in moving], allow_unused=True
    )
