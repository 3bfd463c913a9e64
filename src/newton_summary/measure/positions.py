"""Wide products a few positions at a time: a linear head over a vocabulary, and the cross-entropy that follows.

The tangents of logits are by far the widest of a language model: (groups) × (positions) × (vocabulary).  What is done
to them acts on every position by itself, up to results with few entries for each, such as the log-probability of the
label.  So they are pushed from the product to those results for some positions, and then for the next: every rule
sees fewer positions, and the sums that it adds to are sums over positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from newton_summary.measure.arena import empty
from newton_summary.measure.rules import Bilinear, Call, Elementwise, Jet, Part, Place, Rule, Sums, combine

aten = torch.ops.aten

ENTRIES = 1 << 25
"""Entries of tangents that are held at a time: enough for efficient products, little beside a language model."""

_NARROW = 4  # results have at most this fraction of the product's entries

_UNCHANGED = {aten.reshape.default, aten.alias.default, aten.clone.default}
_PLAIN = {aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten._to_copy.default}
_NUMBERS = {aten.mul.Tensor, aten.div.Tensor}
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}
_SUMS = {aten.sum.dim_IntList, aten.mean.dim}
_SOFTMAX = {aten._log_softmax.default, aten._softmax.default}

Arguments: TypeAlias = Callable[[Sequence[Any], slice], tuple[Any, ...]]
"""The arguments after the first for some positions of a value, seen as a matrix (positions, width)."""


@dataclass(frozen=True, slots=True)
class Member:
    """An operation on every position by itself.

    Args:
        number: which of a graph's operations it is.
        op: the operation.
        rule: what it does to tangents; none where it only changes shapes, or leaves positions out.
        curved: whether it adds to the sums.
        source: the slot of its argument.
        out: that of its result.
        rest: its other arguments.
        index: the positions of the product that its result has, in order; none for all.
        exits: whether its result is narrow.
        spare: whether nobody else reads its argument's tangents.
    """

    number: int
    op: Any
    rule: Rule | None
    curved: bool
    source: int
    out: int
    rest: Arguments
    index: Tensor | None = None
    exits: bool = False
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A product and what follows it, up to narrow results.

    Args:
        place: where the product has the value whose rows are positions.
        members: the product, then the others, in an order in which they can run.
        numbers: which of a graph's operations these are.
    """

    place: int
    members: tuple[Member, ...]
    numbers: frozenset[int]

    @property
    def head(self) -> Member:
        """The product."""
        return self.members[0]


# Finding them ---------------------------------------------------------------------------------------------------------


def find_sections(instructions: Sequence[Any], steps: Sequence[Any], values: Sequence[Any]) -> list[Section]:
    """All sections of a graph.

    Args:
        instructions: its operations.
        steps: what each does to tangents, or nothing.
        values: by slot.
    """
    readers: dict[int, list[int]] = {}
    for number, (instruction, step) in enumerate(zip(instructions, steps, strict=True)):
        if step is not None:
            for slot in instruction.reads:
                readers.setdefault(slot, []).append(number)
    found = []
    for number, (instruction, step) in enumerate(zip(instructions, steps, strict=True)):
        if step is not None and instruction.op in _PRODUCTS and isinstance(step.rule, Bilinear):
            section = _section(number, instructions, steps, values, readers)
            if section is not None:
                found.append(section)
    return found


def _section(
    number: int,
    instructions: Sequence[Any],
    steps: Sequence[Any],
    values: Sequence[Any],
    readers: Mapping[int, Sequence[int]],
) -> Section | None:
    """The section that begins with a product, if all that follows acts on positions."""
    product, step = instructions[number], steps[number]
    place = _PRODUCTS[product.op]
    wide = values[product.out]
    bias = product.arguments(values)[0] if place == 1 else None
    if wide.shape[1] < 2 or (bias is not None and bias.dim() != 1) or product.kwargs:
        return None
    others = [slot for at, slot in step.places if at != place]
    if getattr(product.args[place], "slot", -1) in others:
        return None
    members = [Member(number, product.op, step.rule, step.curved, -1, product.out, _nothing)]
    index: dict[int, Tensor | None] = {product.out: None}
    waiting = [product.out]
    while waiting:
        slot = waiting.pop()
        for reader in readers.get(slot, ()):
            if len(steps[reader].places) != 1 or steps[reader].places[0] != (0, slot):
                return None
            member = _member(reader, instructions[reader], steps[reader], values, slot, index[slot])
            if member is None:
                return None
            members.append(member)
            index[member.out] = member.index
            if not member.exits:
                waiting.append(member.out)
    exits = [m.out for m in members if m.exits]
    if not exits or _NARROW * sum(values[slot].numel() for slot in exits) > wide.numel():
        return None
    members.sort(key=lambda m: m.number)
    return Section(place, tuple(_with_spares(members)), frozenset(m.number for m in members))


def _nothing(values: Sequence[Any], block: slice) -> tuple[Any, ...]:
    return ()


def _member(
    number: int, instruction: Any, step: Any, values: Sequence[Any], source: int, index: Tensor | None
) -> Member | None:
    """An operation as a member of a section, if it acts on the positions of a value one by one."""
    op, args, value, out = instruction.op, instruction.args, values[source], values[instruction.out]
    width = value.shape[-1]

    def member(
        rest: Arguments, rule: Rule | None = step.rule, exits: bool = False, index: Tensor | None = index
    ) -> Member:
        return Member(number, op, rule, step.curved, source, instruction.out, rest, index, exits)

    if not isinstance(out, Tensor):
        return None
    if op in _UNCHANGED:
        return member(_nothing, rule=None) if out.shape[-1:] == value.shape[-1:] else None
    if op is aten.slice.Tensor:
        return _sliced(member, instruction, value, index)
    numbers = all(not hasattr(a, "slot") for a in args[1:]) and not any(map(_refers, instruction.kwargs.values()))
    if numbers and out.shape == value.shape:
        if op in _SOFTMAX:
            return member(lambda _, block: (-1, *args[2:])) if args[1] % value.dim() == value.dim() - 1 else None
        if op in _PLAIN or op in _NUMBERS or isinstance(step.rule, Elementwise):
            if op is aten._to_copy.default:
                return member(_nothing) if value.device == out.device else None
            return None if instruction.kwargs or instruction.nested else member(lambda _, block: args[1:])
    if op is aten.mul.Tensor and hasattr(args[1], "slot") and out.shape == value.shape:
        other = values[args[1].slot]
        if isinstance(other, Tensor) and other.numel() == width == other.shape[-1]:
            slot = args[1].slot
            return member(lambda values, _: (values[slot].reshape(1, width),))
    if op in _SUMS and numbers and not instruction.kwargs and _is_last(args[1], value):
        return member(lambda _, block: ([1], *args[2:]), exits=True)
    if op is aten.gather.default and args[1] % value.dim() == value.dim() - 1 and not instruction.kwargs:
        slot = getattr(args[2], "slot", None)
        if slot is not None and values[slot].shape[:-1] == value.shape[:-1] and values[slot].dim() == value.dim():
            count = values[slot].shape[-1]
            return member(lambda values, block: (1, values[slot].reshape(-1, count)[block]), exits=True)
    return None


def _is_last(dims: Any, value: Tensor) -> bool:
    """Whether these dimensions are the last one alone."""
    return isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] % value.dim() == value.dim() - 1


def _refers(argument: Any) -> bool:
    return hasattr(argument, "slot")


def _sliced(member: Callable[..., Member], instruction: Any, value: Tensor, index: Tensor | None) -> Member | None:
    """A slice along a dimension that is not the last."""
    args = instruction.args
    dim = args[1] if len(args) > 1 else 0
    if value.dim() < 2 or dim % value.dim() == value.dim() - 1 or instruction.kwargs or any(map(_refers, args[1:])):
        return None
    lead = value.shape[:-1]
    count = value.numel() // value.shape[-1]
    known = torch.arange(count) if index is None else index
    chosen = aten.slice.Tensor(known.view(lead), dim % value.dim(), *args[2:]).flatten()
    return member(_nothing, rule=None, index=chosen)


def _with_spares(members: Sequence[Member]) -> list[Member]:
    """The members, each knowing whether it is the only one to read the tangents of its argument."""
    root: dict[int, int] = {}
    for m in members:
        root[m.out] = root[m.source] if m.rule is None else m.out
    reads: dict[int, int] = {}
    for m in members[1:]:
        if m.rule is not None:
            reads[root[m.source]] = reads.get(root[m.source], 0) + 1
    heads = members[:1]
    return [*heads, *(replace(m, spare=m.rule is not None and reads[root[m.source]] == 1) for m in members[1:])]


# Running them ---------------------------------------------------------------------------------------------------------


def is_wide(
    section: Section, instruction: Any, jets: Sequence[Any], values: Sequence[Any], third: bool, most: int
) -> bool:
    """Whether the tangents of a section's product have more entries than may be held at a time."""
    return _rows(instruction, jets, third) * int(values[instruction.out].numel()) > most


def _rows(instruction: Any, jets: Sequence[Any], third: bool) -> int:
    groups = {g for slot in instruction.reads if isinstance(jets[slot], Jet) for g in jets[slot].first}
    return len(groups) * (2 if third else 1)


def push_section(
    section: Section,
    instruction: Any,
    places: Sequence[tuple[Place, int]],
    values: Sequence[Any],
    jets: Sequence[Any],
    adjoints: MutableMapping[int, Any] | None,
    third: bool,
    sums: Sums,
    most: int,
) -> dict[int, Jet]:
    """Pushes tangents through a section, some positions at a time.

    Args:
        section: the section.
        instruction: its product.
        places: those arguments of the product that move, and their slots.
        values: by slot.
        jets: by slot: the tangents of the product's arguments.
        adjoints: by slot, or nothing where no sums are wanted.
        third: whether the diagonal of the third order is wanted.
        sums: where the curvature goes.
        most: entries of tangents to hold at a time.

    Returns:
        The tangents of the narrow results, by slot.
    """
    found = {place: jets[slot] for place, slot in places if jets[slot] is not None}
    weights = {m.out: None if adjoints is None else adjoints.pop(m.out, None) for m in section.members if m.curved}
    matrices = {m.out: _matrix(values[m.out], m.exits, m.index, values[section.head.out]) for m in section.members}
    flat = {slot: None if v is None else v.reshape(matrices[slot].shape) for slot, v in weights.items()}
    positions, width = values[section.head.out].shape
    step = max(1, most // max(width * _rows(instruction, jets, third), 1))
    head = _Head(section, instruction.arguments(values), values[section.head.out], found, third, step, most)
    head.rule.contract(head.call(slice(0, positions)), weights.get(section.head.out), sums)
    results: dict[int, Jet] = {}
    for start in range(0, positions, step):
        end = min(start + step, positions)
        here: dict[int, Jet] = {}
        for m in section.members:
            block = _block(m.index, start, end)
            if block.stop == block.start or (m.source >= 0 and m.source not in here):
                continue
            if m is section.head:
                here[m.out] = head.push(block)
            elif m.rule is None:
                here[m.out] = _chosen(here[m.source], section, m, start, end)
            else:
                adjoint = flat.get(m.out)
                call = _call(m, here[m.source], matrices, values, block, third)
                here[m.out] = m.rule.push(call, None if adjoint is None else adjoint[block], sums)
                del call  # and with it tangents that nobody else reads
            if m.exits:
                _keep(results, m, here.pop(m.out), matrices[m.out], block)
    return {slot: jet.like(jet.rows.view(-1, *values[slot].shape)) for slot, jet in results.items()}


def _call(
    m: Member, jet: Jet, matrices: Mapping[int, Tensor], values: Sequence[Any], block: slice, third: bool
) -> Call:
    """An operation of a section, not its product, for some positions."""
    args = (matrices[m.source][block], *m.rest(values, block))
    out = matrices[m.out][block]
    out = out.squeeze(1) if m.exits and values[m.out].dim() < values[m.source].dim() else out
    return Call(m.op, args, {}, out, {0: jet}, third, spare=frozenset({0}) if m.spare else frozenset())


class _Head:
    """The product of a section, some positions at a time.

    What the tangents of its weight give has few rows, and is found for more positions at once: a product of a handful
    of rows takes as long as its weight takes to be read.

    Args:
        section: whose product it is.
        args: its arguments.
        value: its result.
        jets: the tangents of its arguments.
        third: whether the diagonal of the third order is wanted.
        step: how many positions come at a time.
        most: entries of tangents to hold at a time.
    """

    def __init__(
        self,
        section: Section,
        args: tuple[Any, ...],
        value: Tensor,
        jets: dict[Place, Jet],
        third: bool,
        step: int,
        most: int,
    ) -> None:
        assert isinstance(section.head.rule, Bilinear)
        self.rule = section.head.rule
        self._op, self._place = section.head.op, section.place
        self._args, self._value, self._jets, self._third = args, value, jets, third
        rows = sum(len(p.second) + len(p.first) for p in self.rule.right_parts(self.call(slice(0, step))))
        self._several = step * max(1, most // max(2 * rows * value.shape[1] * step, 1))
        self._start = self._end = 0
        self._of_weight: Jet | None = None

    def call(self, block: slice) -> Call:
        """The product for some positions."""
        args = list(self._args)
        args[self._place] = args[self._place][block]
        jets = {p: j.like(j.rows[:, block]) if p == self._place else j for p, j in self._jets.items()}
        return Call(self._op, tuple(args), {}, self._value[block], jets, self._third)

    def push(self, block: slice) -> Jet:
        """Its tangents for some positions."""
        if block.start >= self._end:
            self._start, self._end = block.start, min(block.start + self._several, len(self._value))
            call = self.call(slice(self._start, self._end))
            parts = self.rule.right_parts(call)
            self._of_weight = combine(parts, call.out) if parts else None
        known, here = self._of_weight, slice(block.start - self._start, block.stop - self._start)
        parts = [] if known is None else [Part(known.second, known.first, known.rows[:, here])]
        return self.rule.join(self.call(block), parts)


def _matrix(value: Tensor, exits: bool, index: Tensor | None, wide: Tensor) -> Tensor:
    """A value as a matrix: a row for each position that it has."""
    return value.reshape(len(wide) if index is None else len(index), -1)


def _block(index: Tensor | None, start: int, end: int) -> slice:
    """Where a value has the positions of the product from one to another."""
    if index is None:
        return slice(start, end)
    first, last = torch.searchsorted(index, torch.tensor([start, end])).tolist()
    return slice(first, last)


def _chosen(jet: Jet, section: Section, member: Member, start: int, end: int) -> Jet:
    """The tangents of a value that is the same, perhaps with fewer positions."""
    source = next(m for m in section.members if m.out == member.source)
    if member.index is source.index:
        return jet
    assert member.index is not None
    before = _block(source.index, start, end)
    had = torch.arange(start, end) if source.index is None else source.index[before]
    wanted = member.index[_block(member.index, start, end)]
    place = torch.searchsorted(had, wanted)
    if len(place) == len(had):
        return jet
    return jet.like(jet.rows.index_select(1, place.to(jet.rows.device)))


def _keep(results: dict[int, Jet], member: Member, jet: Jet, matrix: Tensor, block: slice) -> None:
    """Puts the tangents of some positions in their place among those of all."""
    if member.out not in results:
        rows = empty((len(jet.rows), *matrix.shape), jet.rows)
        results[member.out] = Jet(jet.second, jet.first, rows)
    results[member.out].rows[:, block] = jet.rows.reshape(len(jet.rows), -1, matrix.shape[1])
