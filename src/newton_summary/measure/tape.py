"""A graph at one point: its values, its adjoints, and what each of its operations does to tangents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.budget import held
from newton_summary.measure.gradient import Gradient, GradientAlong
from newton_summary.measure.graph import Graph, Instruction, first_line
from newton_summary.measure.lowering import CONSTANT
from newton_summary.measure.positions import find_sections
from newton_summary.measure.record import Leaf, Ref, Refusal
from newton_summary.measure.rules import KINKED, Call, Jet, Place, Rule, rule_for


@dataclass(slots=True)
class Step:
    """What an operation of a graph does to tangents."""

    rule: Rule
    places: tuple[tuple[Place, int], ...]
    curved: bool
    bent: frozenset[Place] = frozenset()


_UNKNOWN = Jet((), (), torch.empty(0))


class Tape:
    """A graph's values and adjoints at one point.

    Args:
        graph: the loss.
        leaves: those of the recording that it is run for.
        gradients: finds the gradient by the parameters, where that is wanted, too.
        keep: whether another backward pass will follow.

    Attributes:
        gradient: by the parameters, where it was wanted.
    """

    def __init__(
        self, graph: Graph, leaves: Sequence[Leaf], gradients: GradientAlong | None = None, keep: bool = False
    ) -> None:
        self.graph = graph
        self.final: Jet | None = None
        tensors = [leaves[leaf].tensor.detach() for _, leaf, _ in graph.inputs]
        moving = {p: t.requires_grad_() for t, (_, _, p) in zip(tensors, graph.inputs, strict=True) if p is not None}
        self.values = graph.run(tensors, _BATCHABLE if keep else None)
        self.loss: Tensor = self.values[graph.result]
        self.steps = _plan(graph, self.values)
        self.adjoints: dict[int, Any] = {}
        self.gradient: Gradient | None = None
        if gradients is None:
            self._differentiate({}, keep)
        else:
            self.gradient = gradients.taken(self.loss, lambda: self._differentiate(moving, keep), moving)

    def _differentiate(self, leaves: dict[int, Tensor], keep: bool) -> dict[int, Tensor | None]:
        """Finds adjoints of the results of all curved operations; gives the gradient by some leaves."""
        slots = [s.out for s, step in zip(self.graph.instructions, self.steps, strict=True) if step and step.curved]
        wanted: list[Tensor] = []
        for slot in slots:
            value = self.values[slot]
            wanted += [v for v in results_of(value) if moves(v)]
        found: list[Tensor | None] = [None] * (len(wanted) + len(leaves))
        if self.loss.requires_grad and found:
            by = [*wanted, *leaves.values()]
            found = list(torch.autograd.grad(self.loss, by, allow_unused=True, retain_graph=keep))
        rest = iter(found)
        for slot in slots:
            value = self.values[slot]
            several = [next(rest) if moves(v) else None for v in results_of(value)]
            if any(a is not None for a in several):
                self.adjoints[slot] = several[0] if isinstance(value, Tensor) else several
        return dict(zip(leaves, rest, strict=True))

    def held(self) -> int:
        """The bytes of values and adjoints that operations made."""
        given = {slot for slot, _, _ in self.graph.inputs} | {slot for slot, _ in self.graph.constants}
        made = [value for slot, value in enumerate(self.values) if slot not in given]
        inputs = {v.untyped_storage()._cdata for v in (self.values[slot] for slot in given)}
        own = [v for v in made if not (isinstance(v, Tensor) and v.untyped_storage()._cdata in inputs)]
        return held([*own, *self.adjoints.values()])


def moves(value: Any) -> bool:
    """Whether a value changes with the parameters."""
    return isinstance(value, Tensor) and value.requires_grad


def _plan(graph: Graph, values: Sequence[Any]) -> list[Step | None]:
    """The rule of each operation that moves with the parameters; made once for each graph."""
    if graph.plan is None:
        types = {v.dtype.to_real() for v in values if moves(v)}
        graph.coarsest = max(types, key=lambda t: torch.finfo(t).eps, default=torch.float64)
        reached = {graph.result}
        for instruction in reversed(graph.instructions):
            if instruction.out in reached and instruction.op is not CONSTANT:
                reached.update(instruction.reads)
        strided = [v for v in values if isinstance(v, Tensor) and v.layout is torch.strided]
        graph.widest = max((v.nbytes for v in strided), default=0)
        graph.kinked = any(i.op in KINKED and i.out in reached for i in graph.instructions)
        bent: set[int] = set()
        plan: list[Step | None] = []
        for instruction in graph.instructions:
            step = _step(instruction, values, bent) if instruction.out in reached else None
            if step is not None and (step.curved or step.bent):
                bent.add(instruction.out)
            plan.append(step)
        graph.plan = plan
        graph.sections = find_sections(graph.instructions, plan, values)
    return graph.plan


def _step(instruction: Instruction, values: Sequence[Any], bent: set[int]) -> Step | None:
    out = values[instruction.out]
    if any(_any_moves(v) for v in instruction.keywords(values).values()):
        raise Refusal(f"{instruction.op} takes a moving tensor by a keyword only")
    if instruction.op is CONSTANT or not any(moves(v) for v in results_of(out)):
        return None
    places = tuple((place, slot) for place, slot in _places(instruction) if _any_moves(values[slot]))
    moving = dict.fromkeys((place for place, _ in places), _UNKNOWN)
    call = Call(instruction.op, instruction.arguments(values), instruction.keywords(values), out, moving)
    rule = rule_for(call)
    if rule.kind != "linear" and any(isinstance(values[s], Tensor) and values[s].is_complex() for _, s in places):
        raise Refusal(f"{instruction.op} takes complex numbers: write it with their real and imaginary parts")
    if rule.kind == "general" and any(isinstance(v, Tensor) and v.is_complex() for v in results_of(out)):
        raise Refusal(f"{instruction.op} gives complex numbers: compute it without them")
    return Step(rule, places, rule.is_curved(call), frozenset(place for place, slot in places if slot in bent))


def _any_moves(value: Any) -> bool:
    return any(moves(v) for v in value) if isinstance(value, list | tuple) else moves(value)


def _places(instruction: Instruction) -> list[tuple[Place, int]]:
    places: list[tuple[Place, int]] = []
    for i, argument in enumerate(instruction.args):
        if isinstance(argument, Ref):
            places.append((i, argument.slot))
        elif isinstance(argument, list | tuple):
            places += [((i, j), a.slot) for j, a in enumerate(argument) if isinstance(a, Ref)]
    return places


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, slope: float = 1.0) -> Tensor:
    return scale * torch.where(x > 0, x, alpha * torch.expm1(slope * x.clamp_max(0.0)))


_BATCHABLE = {torch.ops.aten.elu.default: _elu}  # torch has no batching rule for its backward pass


def results_of(out: Any) -> Sequence[Any]:
    """The results of an operation, one or many."""
    return [out] if isinstance(out, Tensor) else out


@contextlib.contextmanager
def refusing(call: Call, rule: Rule) -> Iterator[None]:
    """Turns what torch cannot do into a refusal."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise refusal_of(call, rule, error) from error


def refusal_of(call: Call, rule: Rule, error: Exception) -> Refusal:
    """What torch cannot do, as a refusal."""
    return Refusal(f"{call.op} ({rule.kind}): {first_line(error)}")
