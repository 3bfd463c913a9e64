"""What recording and lowering share: names for values, and what happens when memory is written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary._effects import Effects, effects_of
from newton_summary.measure.journal import Journal
from newton_summary.measure.lowering import CONSTANT
from newton_summary.measure.memory import Memory, Views, geometry
from newton_summary.measure.record import Leaf, Record, Refusal, ref
from newton_summary.measure.unwatched import as_unwatched

aten = torch.ops.aten


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
        self._sloped: dict[int, tuple[Any, Any]] = {}

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
        out = as_unwatched(func, args, kwargs)
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
        as_it_was = target.detach()
        for slot, value in self.values.items():  # what it was before it was written into is this tensor, too
            if value is target:
                self.values[slot] = as_it_was
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
        elif func in SLOPED:
            self._sloped[out.untyped_storage()._cdata] = func, out  # is refused where it turns up again
        elif torch.is_grad_enabled() and isinstance(out, Tensor) and self.counts(out):
            self.name(out, self.constant(out.detach().clone()))  # autograd has zeros for its derivatives


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

SLOPED = {aten._standard_gamma.default, aten._sample_dirichlet.default}
"""Draws that have a slope by what they are drawn from, and no second derivative: torch finds it by a series."""


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
