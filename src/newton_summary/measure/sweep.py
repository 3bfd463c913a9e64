"""One sweep over a graph: values, adjoints, tangents, and the sums that they give (docs/engine.md)."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure import positions
from newton_summary.measure.arena import arena, is_large
from newton_summary.measure.budget import held, tangent_bytes, together
from newton_summary.measure.gradient import Gradient, GradientAlong
from newton_summary.measure.graph import Graph, Instruction, first_line
from newton_summary.measure.lowering import CONSTANT
from newton_summary.measure.positions import find_sections, is_wide, push_section
from newton_summary.measure.record import Leaf, Ref, Refusal
from newton_summary.measure.rules import KINKED, Call, Groups, Jet, Place, Rule, Sums, rule_for
from newton_summary.measure.rules.jets import rows_of
from newton_summary.partition import Partition
from newton_summary.summary import Summary


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    partition: Partition
    direction: Sequence[Tensor]
    order: int
    third: str

    @property
    def gradients(self) -> GradientAlong:
        """Finds gradients along the direction."""
        return GradientAlong(self.partition, self.direction)

    @property
    def diagonal(self) -> bool:
        """Whether the third order's diagonal is wanted."""
        return self.order == 3 and self.third == "diagonal"

    @property
    def full(self) -> bool:
        """Whether all of the third order is wanted."""
        return self.order == 3 and self.third == "full"

    @property
    def at_once(self) -> int:
        """How many groups' tangents an entry needs at the same time."""
        return 3 if self.full else min(self.order, 2)

    @property
    def kind(self) -> tuple[int, str]:
        """What is asked for, whatever the direction."""
        return self.order, self.third

    def jet(self, parameter: int, wanted: Groups) -> Jet | None:
        """A parameter's tangents by some groups: u, split by groups."""
        label, u = self.partition.labels[parameter], self.direction[parameter]
        here = tuple(g for g in self.partition.groups_of[parameter] if g in wanted)
        if not here:
            return None
        rows = (
            u.unsqueeze(0)
            if isinstance(label, int)
            else torch.stack([torch.where(label.to(u.device) == g, u, 0.0) for g in here])
        )
        return Jet((), here, rows.detach())

    def part_bytes(self) -> int:
        """The bytes of a group's tangents of parameters that are split between groups, on average, rounded up."""
        pairs = zip(self.partition.labels, self.partition.groups_of, self.direction, strict=True)
        total = sum(len(groups) * u.nbytes for label, groups, u in pairs if not isinstance(label, int))
        return -(-total // len(self.partition))


@dataclass(slots=True)
class _Step:
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
            wanted += [v for v in _several(value) if _moves(v)]
        found: list[Tensor | None] = [None] * (len(wanted) + len(leaves))
        if self.loss.requires_grad and found:
            by = [*wanted, *leaves.values()]
            found = list(torch.autograd.grad(self.loss, by, allow_unused=True, retain_graph=keep))
        rest = iter(found)
        for slot in slots:
            value = self.values[slot]
            several = [next(rest) if _moves(v) else None for v in _several(value)]
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


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _plan(graph: Graph, values: Sequence[Any]) -> list[_Step | None]:
    """The rule of each operation that moves with the parameters; made once for each graph."""
    if graph.plan is None:
        types = {v.dtype.to_real() for v in values if _moves(v)}
        graph.coarsest = max(types, key=lambda t: torch.finfo(t).eps, default=torch.float64)
        reached = {graph.result}
        for instruction in reversed(graph.instructions):
            if instruction.out in reached and instruction.op is not CONSTANT:
                reached.update(instruction.reads)
        strided = [v for v in values if isinstance(v, Tensor) and v.layout is torch.strided]
        graph.widest = max((v.nbytes for v in strided), default=0)
        graph.kinked = any(i.op in KINKED and i.out in reached for i in graph.instructions)
        bent: set[int] = set()
        plan: list[_Step | None] = []
        for instruction in graph.instructions:
            step = _step(instruction, values, bent) if instruction.out in reached else None
            if step is not None and (step.curved or step.bent):
                bent.add(instruction.out)
            plan.append(step)
        graph.plan = plan
        graph.sections = find_sections(graph.instructions, plan, values)
    return graph.plan


def _step(instruction: Instruction, values: Sequence[Any], bent: set[int]) -> _Step | None:
    out = values[instruction.out]
    if any(_any_moves(v) for v in instruction.keywords(values).values()):
        raise Refusal(f"{instruction.op} takes a moving tensor by a keyword only")
    if instruction.op is CONSTANT or not any(_moves(v) for v in _several(out)):
        return None
    places = tuple((place, slot) for place, slot in _places(instruction) if _any_moves(values[slot]))
    moving = dict.fromkeys((place for place, _ in places), _UNKNOWN)
    call = Call(instruction.op, instruction.arguments(values), instruction.keywords(values), out, moving)
    rule = rule_for(call)
    if rule.kind != "linear" and any(isinstance(values[s], Tensor) and values[s].is_complex() for _, s in places):
        raise Refusal(f"{instruction.op} takes complex numbers: write it with their real and imaginary parts")
    if rule.kind == "general" and any(isinstance(v, Tensor) and v.is_complex() for v in _several(out)):
        raise Refusal(f"{instruction.op} gives complex numbers: compute it without them")
    return _Step(rule, places, rule.is_curved(call), frozenset(place for place, slot in places if slot in bent))


def _any_moves(value: Any) -> bool:
    return any(_moves(v) for v in value) if isinstance(value, list | tuple) else _moves(value)


def _places(instruction: Instruction) -> list[tuple[Place, int]]:
    places: list[tuple[Place, int]] = []
    for i, argument in enumerate(instruction.args):
        if isinstance(argument, Ref):
            places.append((i, argument.slot))
        elif isinstance(argument, list | tuple):
            places += [((i, j), a.slot) for j, a in enumerate(argument) if isinstance(a, Ref)]
    return places


def sweep(tape: Tape, request: Request, weight: float, memory: float | None = None) -> Summary:
    """Pushes all tangents over a graph with its values and adjoints known; a tape serves once.

    Args:
        tape: values and adjoints.
        request: what is asked for.
        weight: the number of samples.
        memory: bytes that values, adjoints and tangents may take.  Default: what is free, less a reserve.

    Raises:
        MemoryError: that is too little for the groups that are needed at the same time.
    """
    size, device = len(request.partition), request.partition.device
    parts = _parts(tape, request, memory)
    total = _Total(request, size, device)
    for groups in parts:
        is_last = groups is parts[-1]
        sums = Sums(size, device, request.diagonal, request.full)
        calls: list[_Curved] | None = [] if request.full else None
        with torch.no_grad(), arena(tape.graph.layouts, (*request.kind, groups)):
            final = _push(tape, request, sums, calls, groups, is_last)
        if calls:
            _pull(calls, groups, sums)
        total.take(groups, sums, final, alone=len(parts) == 1)
    tape.final = total.final
    return Summary(
        loss=tape.loss.detach(),
        gradient=total.gradient,
        hessian=total.hessian,
        third=total.third,
        names=request.partition.names,
        weight=weight,
    )


def _parts(tape: Tape, request: Request, memory: float | None) -> list[Groups]:
    """The groups of each sweep."""
    graph = tape.graph
    if request.full not in graph.tangents:
        graph.tangents[request.full] = tangent_bytes(graph, tape.steps, tape.values, request.full)
    one = (2 if request.diagonal else 1) * graph.tangents[request.full] + request.part_bytes()
    known = 0 if memory is None else tape.held()
    partition = request.partition
    return together(len(partition), max(one, 1), known, memory, partition.device, request.at_once)


class _Total:
    """What all sweeps give, together."""

    def __init__(self, request: Request, size: int, device: torch.device) -> None:
        def zeros(dims: int) -> Tensor:
            return torch.zeros((size,) * dims, dtype=torch.float64, device=device)

        self.gradient = zeros(1)
        self.hessian = zeros(2) if request.order > 1 else None
        self.third = zeros(3 if request.full else 1) if request.order > 2 else None
        self.final: Jet | None = None
        self._seconds: dict[int, Tensor] = {}

    def take(self, groups: Groups, sums: Sums, final: Jet | None, alone: bool) -> None:
        """Takes the entries of the groups of one sweep, which are the same in every sweep that has them."""
        third = sums.diagonal if sums.diagonal is not None else None
        if self.third is not None and self.third.dim() == 3:
            third = sums.third
        if alone:
            self.hessian = None if self.hessian is None else sums.hessian
            self.third, self.final = third, final
        else:
            place = torch.tensor(groups, device=self.gradient.device)
            for own, new in ((self.hessian, sums.hessian), (self.third, third)):
                if own is not None and new is not None:
                    grid = torch.meshgrid(*[place] * own.dim(), indexing="ij")
                    own[grid] = new[grid]
            if final is not None:
                self._seconds |= dict(zip(final.second, final.ddot, strict=True))
                rows = list(self._seconds.values())
                if rows:
                    self.final = Jet(tuple(self._seconds), (), torch.stack(rows))
        if final is not None:
            self.gradient[list(final.first)] = final.dot.double()


def _push(
    tape: Tape, request: Request, sums: Sums, calls: list[_Curved] | None, groups: Groups, is_last: bool
) -> Jet | None:
    """Pushes the tangents of some groups to the loss, and gives the loss's own.

    Args:
        tape: values and adjoints.
        request: what is asked for.
        sums: where the curvature goes.
        calls: gathers all curved operations, with their tangents, where they are needed later.
        groups: the groups.
        is_last: whether values and adjoints may be freed as soon as no operation uses them any more.
    """
    graph = tape.graph
    values = tape.values if is_last else list(tape.values)
    adjoints = tape.adjoints if is_last else dict(tape.adjoints)
    jets: list[Any] = [None] * graph.slots
    size = graph.widest * 2 * len(groups)
    holders = _Holders() if calls is None and is_large(size) else None
    parameters = {slot: number for slot, _, number in graph.inputs if number is not None}
    sections = {section.head.number: section for section in graph.sections} if calls is None else {}
    done: frozenset[int] = frozenset()

    def begin(inputs: Iterable[int]) -> None:
        """Places what moves by itself, once it is used: what is whole for a moment need not be so longer."""
        for slot in inputs:
            if slot in parameters:
                jets[slot] = request.jet(parameters.pop(slot), groups)
                if holders is not None:
                    holders.add(jets[slot], 2)

    for number, (instruction, step) in enumerate(zip(graph.instructions, tape.steps, strict=True)):
        begin(instruction.first_use)
        section = sections.get(number)
        if section is not None:
            begin(slot for member in section.numbers for slot in graph.instructions[member].first_use)
        if section is not None and is_wide(section, instruction, jets, values, request.diagonal, positions.ENTRIES):
            assert step is not None
            weights = adjoints if request.order > 1 else None
            try:
                narrow = push_section(
                    section, instruction, step.places, values, jets, weights, request.diagonal, sums, positions.ENTRIES
                )
            except (RuntimeError, NotImplementedError) as error:
                raise Refusal(f"{instruction.op} and what follows it: {first_line(error)}") from error
            for slot, jet in narrow.items():
                jets[slot] = jet
                if holders is not None:
                    holders.add(jet, 1)
            done |= section.numbers
        if step is not None and number not in done:
            found = {place: jets[slot] for place, slot in step.places if jets[slot] is not None}
            if found:
                args = instruction.arguments(values)
                out = values[instruction.out]
                spare = holders.spare(step.places, jets, instruction.last_use) if holders is not None else _NOTHING
                kwargs = instruction.keywords(values)
                call = Call(instruction.op, args, kwargs, out, found, request.diagonal, step.bent, spare)
                adjoint = adjoints.pop(instruction.out, None) if request.order > 1 else None
                try:
                    jets[instruction.out] = step.rule.push(call, adjoint, sums)
                except (RuntimeError, NotImplementedError) as error:
                    raise _refusal(call, step.rule, error) from error
                if holders is not None:
                    holders.add(jets[instruction.out], 2 if step.rule.kind == "general" else 1)
                if calls is not None and step.curved and step.rule.is_curved(call):
                    calls.append(_Curved(call, step.rule, adjoint))
        for slot in instruction.last_use:
            if holders is not None:
                holders.add(jets[slot], -1)
            jets[slot] = values[slot] = None
    begin([graph.result])  # a parameter that is the loss
    result: Jet | None = jets[graph.result]
    return result


@contextlib.contextmanager
def _refusing(call: Call, rule: Rule) -> Iterator[None]:
    """Turns what torch cannot do into a refusal."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise _refusal(call, rule, error) from error


def _refusal(call: Call, rule: Rule, error: Exception) -> Refusal:
    return Refusal(f"{call.op} ({rule.kind}): {first_line(error)}")


_NOTHING: frozenset[Place] = frozenset()


class _Holders:
    """How many jets look at each piece of memory, so that rules may overwrite what nobody else will read.

    What counts twice is never overwritten: a direction, which is the user's, and what the general rule gives, which
    may be a value of the graph.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, jets: Any, count: int) -> None:
        """Counts the jets of a value: one, several, or none."""
        for jet in (jets,) if isinstance(jets, Jet) else jets or ():
            if jet is not None:
                self._counts[_memory(jet)] += count

    def spare(
        self, places: Sequence[tuple[Place, int]], jets: Sequence[Any], last_use: Sequence[int]
    ) -> frozenset[Place]:
        """The places of jets with memory of their own that are used for the last time."""
        return frozenset(
            place
            for place, slot in places
            if slot in last_use
            and isinstance(jets[slot], Jet)
            and self._counts[_memory(jets[slot])] == 1
            and sum(slot == other for _, other in places) == 1
        )


def _memory(jet: Jet) -> int:
    key: int = jet.rows.untyped_storage()._cdata
    return key


# All of the third order -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Curved:
    """A curved operation with its tangents and adjoint."""

    call: Call
    rule: Rule
    adjoint: Any

    def results(self) -> list[Tensor]:
        """Its differentiable results."""
        out = self.call.out
        return [o for o in _several(out) if _moves(o)]


def _pull(calls: list[_Curved], groups: Groups, sums: Sums) -> None:
    """Pulls the tangents of all adjoints through the graph, some groups at a time, and adds what they give.

    The adjoint of every argument of a curved operation gains v̄ · f''[ẋ_i, ·] as group i's rate moves; from there these
    rows go backward as gradients do, all in one batched backward pass.
    """
    arguments: list[Tensor] = []
    sources: list[tuple[Groups, Tensor]] = []
    with torch.no_grad():
        for curved in calls:
            if curved.adjoint is not None and curved.call.bent:
                with _refusing(curved.call, curved.rule):
                    found = curved.rule.sources(curved.call, curved.adjoint)
                for place, source in found.items():
                    if place in curved.call.bent:
                        arguments.append(curved.call.argument(place))
                        sources.append(source)
    results = [out for curved in calls for out in curved.results()]
    size = max(sum(out.numel() for out in results), 1)
    step = max(1, _PULLED // size)
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        rows = iter(_adjoint_tangents(arguments, [_chosen(s, some) for s in sources], results))
        with torch.no_grad():
            for curved in calls:
                several = [next(rows) if _moves(o) else None for o in _several(curved.call.out)]
                moving = several[0] if isinstance(curved.call.out, Tensor) else several
                if all(m is None for m in several):
                    moving = None
                with _refusing(curved.call, curved.rule):
                    curved.rule.add_third(curved.call, curved.adjoint, moving, some, sums)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, slope: float = 1.0) -> Tensor:
    return scale * torch.where(x > 0, x, alpha * torch.expm1(slope * x.clamp_max(0.0)))


_BATCHABLE = {torch.ops.aten.elu.default: _elu}  # torch has no batching rule for its backward pass

_PULLED = 1 << 26  # entries of adjoint tangents that are held at a time


def _adjoint_tangents(arguments: list[Tensor], sources: list[Tensor], results: list[Tensor]) -> Sequence[Tensor | None]:
    """The backward pass of many rows at once."""
    if not arguments:
        return [None] * len(results)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.autograd.grad(
            arguments, results, sources, retain_graph=True, allow_unused=True, is_grads_batched=True
        )


def _chosen(source: tuple[Groups, Tensor], groups: Groups) -> Tensor:
    """The rows of some groups, zero where there are none."""
    own, rows = source
    if own == groups:
        return rows
    result = rows.new_zeros((len(groups), *rows.shape[1:]))
    both = tuple(g for g in groups if g in own)
    if both:
        result[rows_of(groups, both)] = rows[rows_of(own, both)]
    return result


def _several(out: Any) -> Sequence[Any]:
    return [out] if isinstance(out, Tensor) else out
