"""One sweep over a graph: values, adjoints, tangents, and the sums that they give (docs/engine.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure import positions
from newton_summary.measure.arena import arena, is_large
from newton_summary.measure.budget import tangent_bytes, together
from newton_summary.measure.graph import first_line
from newton_summary.measure.positions import is_wide, push_section
from newton_summary.measure.pull import Curved, pull
from newton_summary.measure.record import Refusal
from newton_summary.measure.request import Request
from newton_summary.measure.rules import Call, Groups, Jet, Place, Sums
from newton_summary.measure.tape import Tape, refusal_of
from newton_summary.summary import Summary


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
        calls: list[Curved] | None = [] if request.full else None
        with torch.no_grad(), arena(tape.graph.layouts, (*request.kind, groups)):
            final = _push(tape, request, sums, calls, groups, is_last)
        if calls:
            pull(calls, groups, sums)
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
    tape: Tape, request: Request, sums: Sums, calls: list[Curved] | None, groups: Groups, is_last: bool
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
                    raise refusal_of(call, step.rule, error) from error
                if holders is not None:
                    holders.add(jets[instruction.out], 2 if step.rule.kind == "general" else 1)
                if calls is not None and step.curved and step.rule.is_curved(call):
                    calls.append(Curved(call, step.rule, adjoint))
        for slot in instruction.last_use:
            if holders is not None:
                holders.add(jets[slot], -1)
            jets[slot] = values[slot] = None
    begin([graph.result])  # a parameter that is the loss
    result: Jet | None = jets[graph.result]
    return result


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
