"""Finds the chains of a graph: operations on every entry of one value that nothing else reads in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from newton_summary.measure.record import Record, Ref, ref
from newton_summary.measure.rules import is_replaced
from newton_summary.measure.rules.chain import Chain, Earlier, Link, can_link, is_straight

Made: TypeAlias = Mapping[int, Record]
"""The operation that gave a value, by its slot."""


def with_chains(records: Sequence[Record], moving: set[int], result: int) -> list[Record]:
    """The same operations, where chains have become one each, in the place of their last one.

    GPT-2 writes its GELU as eight operations, each of which would push the tangents of all groups through memory.

    Args:
        records: all that a result depends on, in order.
        moving: the slots of what moves with the parameters.
        result: the slot that must be kept.
    """
    made = {r.out: r for r in records if _can_link(r, moving)}
    readers: defaultdict[int, set[int]] = defaultdict(set)
    for record in records:
        for slot in record.reads:
            readers[slot].add(record.out)
    readers[result].add(-1)
    chains = _chains(made, readers)
    inner = {slot for members in chains.values() for slot in members[:-1]}
    kept = []
    for record in records:
        members = chains.get(record.out)
        if members is not None:
            kept.append(_one(members, made))
        elif record.out not in inner:
            kept.append(record)
    return kept


def _can_link(record: Record, moving: set[int]) -> bool:
    """Whether an operation can be one of a chain, which would not ask a rule of somebody's own."""
    is_value = [isinstance(a, Ref) and a.slot in moving for a in record.args]
    can = any(is_value) and can_link(record.op, record.args, is_value, dict(record.kwargs))
    return can and not is_replaced(record.op)


def _chains(made: Made, readers: Mapping[int, set[int]]) -> dict[int, list[int]]:
    """The slots of each chain's results, in order, by the last one of them.

    Where something else reads a result in between, a chain ends there, and the next one begins: with each such end
    there are new chains, until none is read in between.
    """
    ends: set[int] = set()
    while True:
        roots = _roots(made, ends)
        chains = {}
        for last, root in roots.items():
            is_read_outside = any(roots.get(reader) != root for reader in readers[last])
            if last in ends or is_read_outside:
                chains[last] = sorted(_members(last, root, made, ends))
        cuts = {slot for members in chains.values() for slot in members[:-1] if not readers[slot] <= set(members)}
        if cuts <= ends:
            break
        ends |= cuts
    return {last: members for last, members in chains.items() if len(members) > 1 and _is_curve(members, made)}


def _roots(made: Made, ends: set[int]) -> dict[int, int]:
    """The one value that each result depends on, where it does so by links alone."""
    roots: dict[int, int] = {}
    for slot, record in made.items():
        found = {read if read in ends else roots.get(read, read) for read in record.reads}
        if len(found) == 1:
            roots[slot] = found.pop()
    return roots


def _members(last: int, root: int, made: Made, ends: set[int]) -> set[int]:
    """The results that lead from a root to the last one."""
    members, waiting = {last}, [last]
    while waiting:
        new = {r for r in made[waiting.pop()].reads if r != root and r not in members and r not in ends}
        members |= new
        waiting += new
    return members


def _is_curve(members: Iterable[int], made: Made) -> bool:
    return not all(is_straight(made[slot].op, len(made[slot].reads)) for slot in members)


def _one(members: Sequence[int], made: Made) -> Record:
    """A chain as one operation."""
    records = [made[slot] for slot in members]
    (root,) = {slot for record in records for slot in record.reads} - set(members)
    number = {root: 0, **{slot: place for place, slot in enumerate(members, 1)}}
    links = [
        Link(r.op, tuple(Earlier(number[a.slot]) if isinstance(a, Ref) else a for a in r.args), dict(r.kwargs))
        for r in records
    ]
    return records[-1]._replace(op=Chain(links), args=(ref(root),), kwargs=())
