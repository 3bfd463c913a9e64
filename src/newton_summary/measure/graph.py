"""A loss as a list of tensor operations that have rules, lowered from what was recorded (docs/engine.md)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary._effects import effects_of
from newton_summary.measure.arena import Layout
from newton_summary.measure.chains import with_chains
from newton_summary.measure.lowering import CONSTANT, lowering_of, square_of
from newton_summary.measure.record import Record, Recording, Ref, Refusal, ref, slots_in
from newton_summary.measure.tracer import Tracer

aten = torch.ops.aten


@dataclass(slots=True)
class Instruction:
    """One operation: what is called, with which arguments, and where the result goes.

    It is the last to use some values, and the first to use some inputs.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    reads: tuple[int, ...]
    nested: bool
    last_use: tuple[int, ...] = ()
    first_use: tuple[int, ...] = ()

    def arguments(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the values in place of the references."""
        if self.nested:
            return tuple(fill(a, values) for a in self.args)
        return tuple(values[a.slot] if type(a) is Ref else a for a in self.args)

    def keywords(self, values: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments with the values in place of the references."""
        return {k: fill(v, values) for k, v in self.kwargs.items()} if self.kwargs else self.kwargs


@dataclass(slots=True)
class Graph:
    """A loss as a list of operations.

    Attributes:
        instructions: in an order in which they can run.
        inputs: for each input its slot, the number of the leaf of a recording that it is, and that of the parameter.
        constants: slots of tensors that are the same for every recording.
        result: the slot of the loss.
        slots: how many values there are.
        plan: what each operation does to tangents, once that is known.
        coarsest: the least precise type of the values that move, once that is known.
        kinked: whether some operation has a slope that jumps.
        widest: the bytes of its largest value.
        layouts: where tangents lie in memory, for each kind of request.
        sections: what is pushed a few positions at a time, once that is known.
        tangents: the bytes of one direction's tangents, without and with all of the third order, once they are known.
    """

    instructions: list[Instruction]
    inputs: list[tuple[int, int, int | None]]
    constants: list[tuple[int, Tensor]]
    result: int
    slots: int
    plan: list[Any] | None = None
    coarsest: torch.dtype = torch.float64
    kinked: bool = False
    widest: int = 0
    layouts: dict[Any, Layout] = field(default_factory=dict)
    sections: list[Any] = field(default_factory=list)
    tangents: dict[bool, int] = field(default_factory=dict)

    def run(
        self,
        tensors: Sequence[Tensor | Callable[[], Tensor]],
        instead: Mapping[Any, Callable[..., Any]] | None = None,
        constants: Sequence[Any] | None = None,
        whole: bool = True,
    ) -> list[Any]:
        """Every value, by slot.  Differentiable with respect to the inputs.

        Args:
            tensors: one for each of :attr:`inputs`; or what gives it, called where it is used first.
            instead: what to call in place of some operations.
            constants: values by slot, from which to take what counts as a constant.  Default: as it is computed anew.
            whole: whether all values are kept, not the loss alone.
        """
        replaced = instead or {}
        values: list[Any] = [None] * self.slots
        waiting: dict[int, Callable[[], Tensor]] = {}
        for (slot, _, _), tensor in zip(self.inputs, tensors, strict=True):
            if isinstance(tensor, Tensor):
                values[slot] = tensor
            else:
                waiting[slot] = tensor
        for slot, tensor in self.constants:
            values[slot] = tensor
        for step in self.instructions:
            for slot in step.first_use:
                if slot in waiting:
                    values[slot] = waiting.pop(slot)()
            if step.op is CONSTANT:
                values[step.out] = values[step.reads[0]].detach() if constants is None else constants[step.out]
            else:
                op = replaced.get(step.op, step.op)
                values[step.out] = op(*step.arguments(values), **step.keywords(values))
            if not whole:
                for slot in step.last_use:
                    values[slot] = None
        if self.result in waiting:  # a parameter that is the loss
            values[self.result] = waiting[self.result]()
        return values


def lower(recording: Recording) -> Graph:
    """Breaks recorded operations up into those that have rules.

    Raises:
        Refusal: an operation cannot be broken up.
    """
    assert recording.result is not None
    needed = _needed(recording.records, recording.result)
    lowerer = _Lowerer()
    with torch.no_grad():
        for leaf in recording.leaves:
            if leaf.slot in needed:
                lowerer.known[leaf.slot] = lowerer.new_slot(leaf.tensor.detach())
                if leaf.parameter is not None:
                    lowerer.moving.add(lowerer.known[leaf.slot])
        inputs = [
            (lowerer.known[leaf.slot], number, leaf.parameter)
            for number, leaf in enumerate(recording.leaves)
            if leaf.slot in needed
        ]
        for record in recording.records:
            if record.out in needed:
                lowerer.lower(record, recording.values)
    if lowerer.refusal is not None:
        raise lowerer.refusal
    return _compile(lowerer, inputs, lowerer.known[recording.result])


def _needed(records: Sequence[Record], result: int) -> set[int]:
    """The slots that a result depends on."""
    needed = {result}
    for record in reversed(records):
        if record.out in needed:
            needed.update(record.reads)
    return needed


_PLAIN_FORM = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
"""Operations that want a value to lie in memory as it did when they were recorded, and those that do not."""

_VIEWS = {*_PLAIN_FORM, aten.reshape.default, aten.alias.default, aten.clone.default, aten.expand.default}
_VIEWS |= {aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor}
_VIEWS |= {aten.t.default, aten.transpose.int, aten.permute.default}
"""Between a length and its square."""


class _Lowerer(Tracer):
    """Runs recorded operations one by one, and records what they are made of.

    Attributes:
        known: the slot here of every slot of the recording; several, for an operation with several results.
        moving: the slots here of what moves with the parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self._made: dict[int, Record] = {}
        self.moving: set[int] = set()

    @override
    def slot_of(self, tensor: Tensor) -> int | None:
        return self.find(tensor)

    @override
    def counts(self, value: Tensor) -> bool:
        return True  # constants are computed anew each time, too

    @override
    def put(self, op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], out: Any) -> int:
        slot = super().put(op, args, kwargs, out)
        if op is not CONSTANT and not self.moving.isdisjoint(slots_in((args, tuple(v for _, v in kwargs)))):
            self.moving.add(slot)
        return slot

    def lower(self, record: Record, values: Mapping[int, Any]) -> None:
        """Lowers one operation."""
        if record.op is operator.getitem:
            several = self.known[record.args[0].slot]
            if isinstance(several, list):
                self.known[record.out] = several[record.args[1]]
                return
        else:
            self._made[record.out] = record
            result = self._square(record, values)
            if result is NotImplemented:
                result = self._run(record, values)
            if result is not NotImplemented:
                one = isinstance(result, Tensor)
                self.known[record.out] = self._slot(result) if one else [self._slot(r) for r in result]
                return
        args = _mapped(record.args, self.known)
        kwargs = tuple((k, _mapped(v, self.known)) for k, v in record.kwargs)
        self.known[record.out] = self.put(record.op, args, kwargs, values[record.out])

    def _square(self, record: Record, values: Mapping[int, Any]) -> Any:
        """The square of a length as a sum of squares: it has derivatives where the length, which is zero, has none."""
        length = self._maker(squared_slot(record))
        views = []
        while length is not None and length.op in _VIEWS:
            views.append(length)
            length = self._maker(getattr(length.args[0], "slot", None))
        square = None if length is None else square_of(length.op)
        if length is None or square is None or any(slots_in(view.args[1:]) for view in views):
            return NotImplemented

        def seen(*args: Any, **kwargs: Any) -> Any:
            result = square(*args, **kwargs)
            for view in reversed(views):
                if result is NotImplemented:
                    break
                result = _PLAIN_FORM.get(view.op, view.op)(result, *view.args[1:], **dict(view.kwargs))
            return result

        return self._run(length._replace(op=seen), values)

    def _maker(self, slot: int | None) -> Record | None:
        """The operation that made a value of the recording."""
        return None if slot is None else self._made.get(slot)

    def _run(self, record: Record, values: Mapping[int, Any]) -> Any:
        """Calls what stands for an operation, and records what that calls."""
        function = lowering_of(record.op) if isinstance(record.op, torch._ops.OpOverload) else record.op
        if function is None:
            return NotImplemented
        self._memories.clear()
        self._named.clear()
        self._objects.clear()
        for slot in set(record.reads):
            if isinstance(self.known[slot], int) and isinstance(values[slot], Tensor):
                self.name(values[slot], self.known[slot])
        args = fill(record.args, values)
        kwargs = {k: fill(v, values) for k, v in record.kwargs}
        with self:
            return function(*args, **kwargs)

    def _slots_of(self, values: Any) -> list[int]:
        """The slots of all tensors among some arguments that are known."""
        if isinstance(values, Tensor):
            slot = self.find(values)
            return [] if slot is None else [slot]
        return [s for v in values for s in self._slots_of(v)] if isinstance(values, list | tuple) else []

    def _slot(self, result: Any) -> int | None:
        if not isinstance(result, Tensor):
            return None
        slot = self.find(result)
        return self.constant(result) if slot is None else slot

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        slots = self._slots_of((args, tuple(kwargs.values())))
        effects = effects_of(func)
        if not slots or effects.forgets:
            return func(*args, **kwargs)
        if not self.moving.isdisjoint(slots):
            function = lowering_of(func)
            if function is not None:
                with self:
                    result = function(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func is aten.detach.default:
            func = CONSTANT
        if effects.draws or func is aten._local_scalar_dense.default:
            self.refuse(f"{func} within an operation cannot be computed anew")
        return self.run(func, args, kwargs, effects)


def squared_slot(record: Record) -> int | None:
    """What an operation gives the square of."""
    slots = [getattr(argument, "slot", None) for argument in record.args]
    if record.op is aten.square.default or (record.op is aten.pow.Tensor_Scalar and record.args[1] == 2):
        return slots[0]
    return slots[0] if record.op is aten.mul.Tensor and slots[0] == slots[1] else None


def _compile(lowerer: _Lowerer, inputs: list[tuple[int, int, int | None]], result: int) -> Graph:
    """What was lowered as a list of instructions, without what the loss does not need."""
    needed = _needed(lowerer.records, result)
    records = with_chains([r for r in lowerer.records if r.out in needed], lowerer.moving, result)
    needed = _needed(records, result)
    number = {slot: i for i, slot in enumerate(sorted(needed))}
    instructions = [_instruction(r, number) for r in records]
    graph = Graph(
        instructions,
        [(number[slot], leaf, parameter) for slot, leaf, parameter in inputs if slot in needed],
        [(number[leaf.slot], leaf.tensor.detach()) for leaf in lowerer.leaves if leaf.slot in needed],
        number[result],
        len(number),
    )
    inputs_left = {slot for slot, _, _ in graph.inputs}
    for step in instructions:
        step.first_use = tuple(s for s in step.reads if s in inputs_left)
        inputs_left.difference_update(step.first_use)
    seen = {graph.result}
    for step in reversed(instructions):
        step.last_use = tuple(s for s in dict.fromkeys((*step.reads, step.out)) if s not in seen)
        seen.update(step.last_use)
    return graph


def _instruction(record: Record, number: Mapping[int, int]) -> Instruction:
    op = _PLAIN_FORM.get(record.op, record.op)
    args, kwargs = _by_position(op, _mapped(record.args, number), record.kwargs)
    named = {k: _mapped(v, number) for k, v in kwargs.items()}
    reads = dict.fromkeys((*slots_in(args), *slots_in(tuple(named.values()))))
    nested = any(isinstance(a, tuple) for a in args)
    listed = tuple(list(a) if isinstance(a, tuple) else a for a in args)
    return Instruction(op, listed, named, number[record.out], tuple(reads), nested)


def _by_position(op: Any, args: tuple[Any, ...], named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those that can stand by position put there."""
    result, kwargs = list(args), dict(named)
    if isinstance(op, torch._ops.OpOverload):
        for argument in op._schema.arguments[len(result) :]:
            if argument.kwarg_only or argument.name not in kwargs:
                break
            result.append(kwargs.pop(argument.name))
    return tuple(result), kwargs


# References -----------------------------------------------------------------------------------------------------------


def _mapped(argument: Any, number: Mapping[int, Any]) -> Any:
    """An argument with other slots."""
    if type(argument) is Ref:
        return ref(number[argument.slot])
    if isinstance(argument, list | tuple):
        return tuple(_mapped(a, number) for a in argument)
    return argument


def fill(argument: Any, values: Any) -> Any:
    """An argument with values in place of references."""
    if type(argument) is Ref:
        return values[argument.slot]
    if isinstance(argument, list | tuple):
        return [fill(a, values) for a in argument]
    return argument


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


__all__ = ["Graph", "Instruction", "Refusal", "first_line", "lower"]
