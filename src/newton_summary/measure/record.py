"""The operations of one real evaluation of a loss, recorded as they run (docs/engine.md).

What is recorded is what happened: values that decide a branch, numbers from attributes, effects and random draws are
seen as they were, because the loss was called once, by itself, on real tensors.  Only operations on values that move
with the parameters are kept; everything else they use is a constant, known by its value.

A value is known by where it lies in memory.  Whether it moves is what autograd says: it requires a gradient, and comes
from a parameter.  Values made where gradients are off move only if autograd finds a gradient for them later, as the
results of a custom ``autograd.Function`` do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary._effects import Effects, effects_of
from newton_summary.measure.journal import Journal
from newton_summary.measure.lowering import CONSTANT
from newton_summary.measure.memory import Memory, Views, geometry, overlaps

aten = torch.ops.aten


class Refusal(Exception):
    """Why a loss cannot be measured by this engine: an operation, and what is the matter with it."""


class Ref:
    """The place of a value among all values: one object for each number, so that comparing is cheap."""

    __slots__ = ("slot",)

    def __init__(self, slot: int) -> None:
        self.slot = slot

    def __repr__(self) -> str:
        return f"%{self.slot}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ref, (self.slot,)


_REFS: list[Ref] = []


def ref(slot: int) -> Ref:
    """The reference to a slot."""
    while len(_REFS) <= slot:
        _REFS.append(Ref(len(_REFS)))
    return _REFS[slot]


class Record(NamedTuple):
    """One operation: what was called, on what, where the result goes, and of which shape it was."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: int
    shape: Any


@dataclass(slots=True)
class Leaf:
    """A value that no recorded operation made: a parameter, or a constant."""

    slot: int
    tensor: Tensor
    parameter: int | None = None

    def signature(self) -> tuple[Any, ...]:
        """What operations on it are recorded for."""
        t = self.tensor
        strides = t.stride() if t.layout is torch.strided else t.layout
        return (self.slot, self.parameter, t.shape, strides, t.dtype, t.device)


@dataclass(slots=True)
class Recording:
    """A loss as it was computed once.

    Attributes:
        loss: its value, with the graph that autograd made.
        records: the operations, in order.
        leaves: what they start from.
        result: the slot of the loss, or nothing where it does not move.
        values: by slot, what was computed; for lowering.
    """

    loss: Tensor
    records: list[Record]
    leaves: list[Leaf]
    result: int | None
    values: dict[int, Any] = field(repr=False, default_factory=dict)

    def key(self) -> tuple[Any, ...]:
        """What two recordings have in common that one graph can stand for."""
        leaves = tuple(leaf.signature() for leaf in self.leaves)
        return (self.result, leaves, tuple(self.records))

    def operations(self) -> tuple[Any, ...]:
        """The operations alone, whatever the shapes."""
        return tuple(r.op for r in self.records)


def overwritten(x: Tensor, value: Tensor) -> Tensor:
    """A value that was replaced where autograd does not look: it moves as before."""
    shifted: Tensor = x + (value - CONSTANT(x)).to(x.dtype)
    return shifted


class Tracer(Journal):
    """What recording and lowering share: names for values, and what happens when memory is written."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.leaves: list[Leaf] = []
        self.values: dict[int, Any] = {}
        self.refusal: Refusal | None = None
        self._slots = 0
        self._memories: dict[int, Memory] = {}
        self._named: dict[int, list[tuple[Tensor, int]]] = {}
        self._objects: dict[int, int] = {}
        self._constants: dict[int, Leaf] = {}

    # Names ------------------------------------------------------------------------------------------------------------

    def slot_of(self, tensor: Tensor) -> int | None:
        """The slot of a tensor whose value moves, else nothing."""
        raise NotImplementedError

    def find(self, tensor: Tensor) -> int | None:
        """The slot of what lies where a tensor looks, if that is known."""
        slot = self._objects.get(id(tensor))
        if slot is None and tensor.layout is torch.strided:
            memory = self.memory_of(tensor)
            if memory is not None:
                slot = memory.read(geometry(tensor), self.emit)
        return slot

    def memory_of(self, tensor: Tensor) -> Memory | None:
        """What is known of the memory that a tensor looks at; nothing where no moving value lies in it."""
        key = tensor.untyped_storage()._cdata
        memory = self._memories.get(key)
        for named, slot in self._named.pop(key, ()):
            view = geometry(named)
            if memory is None:
                memory = self._memories[key] = Memory({view: slot}, (view, slot))
            memory.views[view] = slot
            memory.objects.append(id(named))
        return memory

    def new_slot(self, value: Any) -> int:
        """A name for a value, which is kept."""
        self.values[self._slots] = value
        self._slots += 1
        return self._slots - 1

    def name(self, tensor: Tensor, slot: int) -> None:
        """Notes that a tensor shows the value of a slot; how it looks at its memory is found out when asked."""
        self._objects[id(tensor)] = slot
        if tensor.layout is torch.strided:
            self._named.setdefault(tensor.untyped_storage()._cdata, []).append((tensor, slot))

    def constant(self, tensor: Tensor) -> int:
        """The slot of a value that does not move."""
        known = self._constants.get(id(tensor))
        if known is not None and known.tensor is tensor:
            return known.slot
        leaf = Leaf(self.new_slot(tensor), tensor)
        self.leaves.append(leaf)
        if tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._before:
            leaf.tensor = tensor.detach().clone()  # the original will be changed back
        else:
            self._constants[id(tensor)] = leaf
        return leaf.slot

    def emit(self, op: Any, slots: Sequence[int], views: Views) -> int:
        """Records an operation that did not run by itself."""
        first, *rest = (self.values[s] for s in slots)
        args = (ref(slots[0]), views, *(ref(s) for s in slots[1:]))
        try:
            with torch.no_grad():
                value = op(first, views, *rest)
        except ValueError as error:
            self.refuse(str(error))
            value = first
        return self.put(op, args, (), value)

    def put(self, op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], out: Any) -> int:
        """Records an operation."""
        slot = self.new_slot(out)
        shape = tuple(out.shape) if isinstance(out, Tensor) else tuple(_shape(o) for o in out)
        self.records.append(Record(op, args, kwargs, slot, shape))
        return slot

    def refuse(self, reason: str) -> None:
        """Notes why this cannot be measured; the loss goes on, as it would by itself."""
        self.refusal = self.refusal or Refusal(reason)

    # Operations -------------------------------------------------------------------------------------------------------

    def template(self, value: Any) -> Any:
        """An argument with references in place of tensors."""
        if isinstance(value, Tensor):
            slot = self.slot_of(value)
            return ref(self.constant(value) if slot is None else slot)
        if isinstance(value, list | tuple):
            return tuple(self.template(v) for v in value)
        return value

    def moves(self, values: Iterable[Any]) -> bool:
        """Whether any of these arguments moves."""
        for value in values:
            if isinstance(value, Tensor):
                if self.slot_of(value) is not None:
                    return True
            elif isinstance(value, list | tuple) and self.moves(value):
                return True
        return False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> Any:
        """Runs an operation that moves, and records it."""
        if effects.turns:
            return self._turn(func, args, kwargs)
        if effects.writes:
            for tensor in effects.written(args, kwargs):
                self.before_writing(tensor)
            if effects.names == ("out",) and not effects.positions:
                return self._run_into(func, args, kwargs)
            if func not in BESIDE:
                return self._run_in_place(func, args, kwargs, effects)
        templates = tuple(self.template(a) for a in args)
        plain = tuple((k, self.template(v)) for k, v in kwargs.items()) if kwargs else ()
        out = func(*args, **kwargs)
        if not effects.shares:
            self.claim(out)
        if effects.draws:
            self._drawn(func, templates, args, out)
        elif not effects.forgets:
            self.record(func, templates, plain, out)
        return out

    def record(self, func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], out: Any) -> None:
        """Records an operation and names its results."""
        if isinstance(out, Tensor):
            if out.layout is not torch.strided:
                self.refuse(f"{func} makes a tensor of layout {out.layout} of what moves: use a dense one")
            if self.counts(out):
                self.name(out, self.put(func, args, kwargs, out))
            return
        if not isinstance(out, list | tuple):
            return  # a number in Python, which is used as it is
        slot = self.put(func, args, kwargs, out)
        for i, one in enumerate(out):
            if isinstance(one, Tensor) and self.counts(one):
                self.name(one, self.put(operator.getitem, (ref(slot), i), (), one))

    def counts(self, value: Tensor) -> bool:
        """Whether a result can move."""
        return value.is_floating_point() or value.is_complex()

    def _run_in_place(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> Any:
        """Runs an operation that overwrites its first argument; records the functional one."""
        written = list(effects.written(args, kwargs))
        functional, target = functional_of(func), written[0]
        if len(written) != 1 or functional is None or target is not args[0] or target.layout is not torch.strided:
            if torch.is_grad_enabled() or any(t.layout is not torch.strided for t in written):
                self.refuse(f"{func} overwrites what moves, and has no form that does not")
            return self._run_constant(func, args, kwargs, written)
        if self.find(target) is None:
            self._adopt(target)
        templates = (ref(self._read(target)), *(self.template(a) for a in args[1:]))
        plain = tuple((k, self.template(v)) for k, v in kwargs.items())
        out = func(*args, **kwargs)
        drawn = effects.draws
        slot = self.constant(target.detach().clone()) if drawn else self.put(functional, templates, plain, target)
        self._written(target, slot)
        return out

    def _run_into(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation that writes into ``out``: records the one that does not, and a copy."""
        plain, target = _without_out(func), kwargs["out"]
        if plain is None:
            self.refuse(f"{func} writes what moves into a tensor, and has no form that does not")
            return func(*args, **kwargs)
        value = self.run(plain, args, {k: v for k, v in kwargs.items() if k != "out"}, effects_of(plain))
        self.run(aten.copy_.default, (target, value), {}, effects_of(aten.copy_.default))
        return target

    def _run_constant(self, func: Any, args: Any, kwargs: Mapping[str, Any], written: Sequence[Tensor]) -> Any:
        """Runs an operation whose results count as constants, as what is computed without gradients does."""
        out = func(*args, **kwargs)
        for tensor in written:
            if tensor.layout is torch.strided and self.find(tensor) is not None:
                self._written(tensor, self.constant(tensor.detach().clone()))
        return out

    def _turn(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation that makes its argument look at its memory in another way."""
        target, functional = args[0], functional_of(func)
        templates = tuple(self.template(a) for a in args)
        self.values[templates[0].slot] = target.detach()
        out = func(*args, **kwargs)
        self.name(target, self.put(functional, templates, tuple(kwargs.items()), target))
        return out

    def _adopt(self, tensor: Tensor) -> None:
        """Makes the memory of a constant one that holds moving values."""
        memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        whole = memory.clone()
        slot = self.constant(whole)
        self._memories[tensor.untyped_storage()._cdata] = Memory({geometry(memory): slot}, (geometry(memory), slot))

    def _read(self, tensor: Tensor) -> int:
        memory = self.memory_of(tensor)
        assert memory is not None
        return memory.read(geometry(tensor), self.emit)

    def _written(self, tensor: Tensor, slot: int) -> None:
        memory = self.memory_of(tensor)
        assert memory is not None
        for known in memory.objects:
            self._objects.pop(known, None)
        memory.objects.clear()
        memory.write(geometry(tensor), slot)

    def before_writing(self, tensor: Tensor) -> None:
        """Keeps what constants hold that were used already, and what is to be changed back."""
        self.protect(tensor)
        if not self._constants or tensor.layout is not torch.strided:
            return
        key = tensor.untyped_storage()._cdata
        for known, leaf in list(self._constants.items()):
            if leaf.tensor.layout is torch.strided and leaf.tensor.untyped_storage()._cdata == key:
                leaf.tensor = leaf.tensor.detach().clone()
                del self._constants[known]

    def _drawn(self, func: Any, templates: tuple[Any, ...], args: tuple[Any, ...], out: Any) -> None:
        """Records what an operation did with the random numbers that it drew."""
        if func is aten.native_dropout.default:
            keep = 1.0 - args[1] if args[2] is not False else 1.0
            factor = out[1].to(out[0].dtype) / keep if keep else torch.zeros_like(out[0])
            self.name(out[0], self.put(aten.mul.Tensor, (templates[0], ref(self.constant(factor))), (), out[0]))
        elif func is aten.rrelu_with_noise.default:
            is_random = len(args) > 4 and args[4]
            slope = sum(args[2:4]) / 2 if len(args) > 3 else (1 / 8 + 1 / 3) / 2
            factor = args[1].clone() if is_random else slope + (1 - slope) * (args[0] > 0).to(out.dtype)
            self.name(out, self.put(aten.mul.Tensor, (templates[0], ref(self.constant(factor))), (), out))
        # what else draws from moving values has no derivative by them, or is refused where it turns up again


class Recorder(Tracer):
    """A block in which one evaluation of a loss is recorded.

    Args:
        parameters: the tensors that it is differentiated by.
        names: their names.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self._parameters: dict[int, int] = {}
        owners: dict[int, list[int]] = {}
        for number, parameter in enumerate(parameters):
            leaf = Leaf(self.new_slot(parameter), parameter, number)
            self.leaves.append(leaf)
            self._parameters[id(parameter)] = leaf.slot
            if parameter.layout is torch.strided:
                owners.setdefault(parameter.untyped_storage()._cdata, []).append(number)
                self.name(parameter, leaf.slot)
        self._shared = set(owners)
        self._resolved: set[int] = set()
        for shared in owners.values():
            self._check_apart([parameters[n] for n in shared], [names[n] for n in shared])
        self._walked: set[Any] = set()

    def _check_apart(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        views = [geometry(p) for p in parameters]
        for i in range(len(views)):
            for j in range(i):
                if overlaps(views[i], views[j]):
                    self.refuse(f"parameters {names[j]!r} and {names[i]!r} are different tensors in the same memory")

    @override
    def slot_of(self, tensor: Tensor) -> int | None:
        if id(tensor) in self._resolved:
            return self.find(tensor)
        if tensor.requires_grad:
            if tensor.is_leaf:
                known = self._parameters.get(id(tensor))
                return known if known is None or tensor.layout is not torch.strided else self.find(tensor)
            slot = self.find(tensor)
            if slot is None:
                self._check_unknown(tensor)
            return slot
        return None if torch.is_grad_enabled() else self.find(tensor)

    def _check_unknown(self, tensor: Tensor) -> None:
        """Refuses a value that depends on parameters in a way that was not seen."""
        nodes = [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._walked:
                continue
            self._walked.add(node)
            if id(getattr(node, "variable", None)) in self._parameters:
                name = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
                self.refuse(
                    f"a tensor of shape {tuple(tensor.shape)} comes from a parameter by {name}, which cannot be "
                    "recorded: compute it within the loss, by operations of torch"
                )
                return
            nodes += [following for following, _ in node.next_functions]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return func(*args)
        if func is aten._efficientzerotensor.default:
            return aten.zeros.default(*args, **kwargs)  # what is computed with the other is computed out of sight
        if isinstance(func, torch._ops.HigherOrderOperator):
            if self.moves((*args, *kwargs.values())):
                self.refuse(f"{func} calls functions that cannot be recorded: call one of them by if, or by a loop")
            return func(*args, **kwargs)
        effects = effects_of(func)
        if effects.writes and self._writes_aside(func, args, kwargs, effects):
            return self._run_aside(func, args, kwargs, effects)
        if self._may_move(args) or (kwargs and self._may_move(kwargs.values())):
            out = self.run(func, args, kwargs, effects)
            if func is aten.clone.default and (args[0].is_conj() or args[0].is_neg()):
                self._resolved.add(id(out))  # by torch, within an operation, where autograd does not look
            return out
        for tensor in effects.written(args, kwargs) if effects.writes else ():
            self.before_writing(tensor)
        out = func(*args, **kwargs)
        if not effects.shares:
            self.claim(out)
        return out

    def _may_move(self, values: Iterable[Any]) -> bool:
        """Whether any of these arguments may move: whether autograd thinks so, or does not look."""
        if not torch.is_grad_enabled():
            return self.moves(values)
        for value in values:
            if isinstance(value, Tensor):
                if (value.requires_grad or id(value) in self._resolved) and self.slot_of(value) is not None:
                    return True
            elif isinstance(value, list | tuple) and self._may_move(value):
                return True
        return False

    def _writes_aside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> bool:
        """Whether moving values are written where autograd does not look: through ``detach`` or without gradients."""
        if func in BESIDE:
            return False
        for tensor in effects.written(args, kwargs):
            if tensor.layout is not torch.strided or self.memory_of(tensor) is None:
                continue
            if not torch.is_grad_enabled():
                return tensor.requires_grad or tensor.untyped_storage()._cdata in self._shared
            if not tensor.requires_grad:
                if self.moves(args):
                    self.refuse(f"{func} writes moving values through a detached tensor of shape {tuple(tensor.shape)}")
                return True
        return False

    def _run_aside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> Any:
        written = list(effects.written(args, kwargs))
        known = []
        for tensor in written:
            self.before_writing(tensor)
            known.append(self.find(tensor))
        out = func(*args, **kwargs)
        for tensor, slot in zip(written, known, strict=True):
            if slot is not None:
                value = ref(self.constant(tensor.detach().clone()))
                self._written(tensor, self.put(overwritten, (ref(slot), value), (), tensor))
        return out

    def is_hooked(self) -> bool:
        """Whether a hook may change the gradient of a value."""
        return any(isinstance(v, Tensor) and v._backward_hooks for v in self.values.values())

    def finish(self, loss: Tensor) -> Recording:
        """What was recorded.

        Raises:
            Refusal: something happened that cannot be recorded.
        """
        result = self.slot_of(loss) if loss.requires_grad else None
        if self.refusal is not None:
            raise self.refusal
        return Recording(loss, self.records, self.leaves, result, self.values)


BESIDE = {
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._batch_norm_with_update.default,
    aten.rrelu_with_noise.default,
    aten._fused_moving_avg_obs_fq_helper.default,
}
"""Operations that overwrite arguments beside what they compute."""


def functional_of(op: Any) -> Callable[..., Any] | None:
    """The operation that gives what this one writes in place."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    name = op._schema.name.removeprefix("aten::")
    if not op._schema.name.startswith("aten::") or not name.endswith("_"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None:
        return None
    overloads = [getattr(packet, one) for one in packet.overloads()]
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    same = [o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted]
    return same[0] if same else None


def _without_out(op: Any) -> Callable[..., Any] | None:
    """The operation that gives what this one writes into ``out``."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if a.name != "out"]
    overloads = [getattr(op.overloadpacket, one) for one in op.overloadpacket.overloads()]
    same = [o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted]
    return same[0] if same else None


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None
