"""What a loss may change besides what tensors hold: attributes, containers, variables, generators of random numbers."""

from __future__ import annotations

import dis
import functools
import itertools
import operator
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

_CONTAINERS = frozenset({list, dict, set, deque, Counter, defaultdict, OrderedDict})
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_ATOMS = {
    int,
    float,
    bool,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    Tensor,
    nn.Parameter,
}
_DEPTH = 3  # how deep functions, containers and objects are looked into
_WIDTH = 64  # how many entries of a container are
_LARGEST = 10_000  # entries of a container that is restored: what is larger is data
_STRANGERS = {"torch", "numpy", "newton_summary", "builtins", *sys.stdlib_module_names}
"""Whose functions and objects are not looked into."""

_INTERNAL = ("_parameters", "_buffers", "_modules")
"""What is looked at by itself."""

_HOOKS = {name for name, value in vars(nn.Module()).items() if type(value) in _CONTAINERS} - {*_INTERNAL}
"""Containers that every module has: transformers adds hooks, and notes in an attribute that it has."""


def owners(model: nn.Module, loss_fn: Any) -> tuple[list[nn.Module], list[Any]]:
    """The modules and the other things that a loss is likely to change, each once.

    They are the modules of the model; what a loss function captured (in its closure, its defaults, the globals that it
    names, the object that it is a method of), its variables themselves, where it may rebind them; and what modules and
    objects hold as attributes, in containers too.  A container that a function captured is looked into, and left as the
    function leaves it: it is where one notes what a loss was called with.
    """
    found: list[Any] = []
    seen: set[int] = set()
    _collect(loss_fn, _DEPTH, seen, found, False)
    modules = {id(m): m for m in model.modules()}
    waiting, others = list(modules.values()), []
    while waiting or found:
        for thing in found:
            if isinstance(thing, nn.Module):
                new = [m for m in thing.modules() if id(m) not in modules]
                modules |= {id(m): m for m in new}
                waiting += new
            else:
                others.append(thing)
        found.clear()
        for module in waiting:
            for name, value in vars(module).items():
                if name in _HOOKS:
                    others.append(value)
                elif type(value) not in _ATOMS and name not in _INTERNAL:
                    _collect(value, _DEPTH - 1, seen, found, True)
            for tensor in _tensors_of(module):
                for value in vars(tensor).values():
                    _collect(value, _DEPTH - 1, seen, found, True)
        waiting.clear()
    return list(modules.values()), others


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module itself: code hangs attributes on them, too."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]


@dataclass(frozen=True, slots=True)
class _Global:
    """A variable of a module of Python that a function rebinds."""

    table: dict[str, Any]
    name: str


def _collect(value: Any, depth: int, seen: set[int], found: list[Any], is_attribute: bool) -> None:
    """Adds what a value leads to: modules, generators, objects with attributes, variables, containers in attributes."""
    kind = type(value)
    if kind in _ATOMS or id(value) in seen:
        return
    if is_attribute or kind not in _CONTAINERS:
        seen.add(id(value))
    if isinstance(value, (nn.Module, *_GENERATORS)):
        found.append(value)
        return
    inner: Iterable[Any]
    if kind in (list, tuple, set, deque):
        inner = [v for v in value if type(v) not in _ATOMS] if len(value) <= _WIDTH else list(value)[:_WIDTH]
    elif kind in _CONTAINERS:
        inner = list(value.values())[:_WIDTH]
    elif kind is types.FunctionType:
        if value.__module__ is None or value.__module__.partition(".")[0] in _STRANGERS:
            return
        found.append(value)
        inner, is_attribute = _captured(value, found), False
    elif kind is types.MethodType:
        inner = [value.__self__, value.__func__]
    elif kind is functools.partial:
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, torch.optim.Optimizer):
        found += [value.state, *value.state.values(), *value.param_groups]
        return
    elif _is_plain_object(value):
        found.append(value)
        inner, is_attribute = [*getattr(value, "__dict__", {}).values(), *_slots(value).values()], True
    else:
        return
    if is_attribute and kind in _CONTAINERS:
        found.append(value)
    if depth > 0:
        for one in inner:
            _collect(one, depth - 1, seen, found, is_attribute)


def _captured(function: types.FunctionType, found: list[Any]) -> list[Any]:
    """What a function uses from outside; adds the variables that it may rebind."""
    cells = function.__closure__ or ()
    found += cells
    table = function.__globals__
    found += [_Global(table, name) for name in _rebound(function.__code__)]
    named = [table[name] for name in function.__code__.co_names if name in table]
    values = [_content(cell) for cell in cells]
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *named]


@functools.lru_cache(maxsize=1024)
def _rebound(code: types.CodeType) -> tuple[str, ...]:
    """The global variables that a function rebinds."""
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"})


def _is_plain_object(value: Any) -> bool:
    """Whether it is of a class that a user wrote, with attributes that can be set."""
    kind = type(value)
    return (
        (isinstance(getattr(value, "__dict__", None), dict) or "__slots__" in vars(kind))
        and kind.__module__.partition(".")[0] not in _STRANGERS
        and not isinstance(value, type | types.ModuleType | types.FunctionType)
        and not callable(getattr(kind, "__get__", 0))
    )


_NOTHING = object()


def _slots(value: Any) -> dict[str, Any]:
    """The attributes of an object that are not in a table."""
    kind: Any = type(value)
    found = {name: getattr(value, name, _NOTHING) for name in _names_of_slots(kind)}
    return {name: attribute for name, attribute in found.items() if attribute is not _NOTHING}


@functools.lru_cache(maxsize=1024)
def _names_of_slots(kind: type) -> frozenset[str]:
    given = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = {name for slots in given for name in ((slots,) if isinstance(slots, str) else slots)}
    return frozenset(names - {"__dict__", "__weakref__"})


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _NOTHING


class Attributes:
    """What some modules and other things hold, to be restored.

    Rebound attributes and variables get their old values back, plain containers their old entries; parameters their
    gradients, the memory that they look at, and whether they take gradients.  What tensors hold is not looked at: see
    :class:`~newton_summary.measure.journal.Journal`.
    """

    def __init__(self, modules: list[nn.Module], others: list[Any]) -> None:
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []  # most containers of modules are
        self._slotted: list[tuple[Any, dict[str, Any]]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._globals: list[tuple[_Global, Any]] = []
        self._parameters: dict[int, tuple[Tensor, bool, Tensor | None, Tensor | None]] = {}
        for module in modules:
            own = vars(module)
            tables = (own, *(own.get(name) for name in _INTERNAL))
            self._tables += [(t, dict(t)) for t in tables if isinstance(t, dict)]  # those of scripts are not
            self._tables += [(vars(t), dict(vars(t))) for t in _tensors_of(module)]
            for p in module._parameters.values():
                if p is not None and id(p) not in self._parameters:
                    self._parameters[id(p)] = (p, p.requires_grad, p.grad, p.data if _has_plain_memory(p) else None)
        for thing in others:
            if type(thing) in _CONTAINERS:
                if not thing:
                    self._empty.append(thing)
                elif len(thing) <= _LARGEST:
                    self._containers.append((thing, thing.copy()))
            elif isinstance(thing, types.CellType):
                self._cells.append((thing, _content(thing)))
            elif isinstance(thing, _Global):
                self._globals.append((thing, thing.table.get(thing.name, _NOTHING)))
            elif not isinstance(thing, _GENERATORS):
                if hasattr(thing, "__dict__"):
                    self._tables.append((vars(thing), dict(vars(thing))))
                kind: Any = type(thing)
                names = _names_of_slots(kind)
                if names:
                    self._slotted.append((thing, {name: getattr(thing, name, _NOTHING) for name in names}))

    def restore(self) -> None:
        """Puts everything back that has changed."""
        for table, before in self._tables:
            put_back(table, before)
        for thing, slots in self._slotted:
            for name, attribute in slots.items():
                if getattr(thing, name, _NOTHING) is attribute:
                    continue
                if attribute is _NOTHING:
                    object.__delattr__(thing, name)
                else:
                    object.__setattr__(thing, name, attribute)
        for value in self._empty:
            if value:
                value.clear()
        for value, before in self._containers:
            _refill(value, before)
        for cell, content in self._cells:
            if _content(cell) is not content and content is not _NOTHING:
                cell.cell_contents = content
        for variable, content in self._globals:
            if content is _NOTHING:
                variable.table.pop(variable.name, None)
            else:
                variable.table[variable.name] = content
        for p, requires_grad, gradient, data in self._parameters.values():
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not gradient:
                p.grad = gradient
            if data is not None and p.data_ptr() != data.data_ptr():
                p.data = data


def _has_plain_memory(p: Tensor) -> bool:
    return type(p) is nn.Parameter and p.layout is torch.strided and p.device.type != "meta"


def put_back(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Gives a dictionary the entries that it had, where it has others."""
    if table.keys() == before.keys() and all(map(operator.is_, table.values(), before.values())):
        return
    table.clear()
    table.update(before)


def _refill(value: Any, before: Any) -> None:
    if isinstance(value, dict):
        put_back(value, before)
    elif len(value) != len(before) or (
        not all(map(operator.is_, value, before)) if not isinstance(value, set) else value != before
    ):
        value.clear()
        value.update(before) if isinstance(value, set) else value.extend(before)


def generators_behind(data: Any) -> list[Any]:
    """The generators of random numbers that batches are drawn or changed with: of a loader, its samplers and data set.

    Args:
        data: an iterable of batches.

    Example:
        >>> loader = DataLoader([1.0, 2.0], generator=torch.Generator())
        >>> len(generators_behind(loader))
        1
    """
    found: list[Any] = []
    seen: set[int] = set()
    known: set[int] = set()
    waiting = [data]
    for thing in waiting:  # which grows
        if id(thing) in known:
            continue
        known.add(id(thing))
        if isinstance(thing, DataLoader | Dataset | Sampler):  # torch's own among them
            waiting += [value for value in getattr(thing, "__dict__", {}).values() if type(value) not in _ATOMS]
        elif type(thing) in (list, tuple, dict):
            values = thing.values() if isinstance(thing, dict) else thing
            waiting += [value for value in itertools.islice(values, _WIDTH) if type(value) not in _ATOMS]
        else:
            _collect(thing, _DEPTH + 2, seen, found, True)
    return [g for g in found if isinstance(g, _GENERATORS)]


def reseed(generator: Any, seed: int) -> None:
    """Begins a generator anew."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed)


def generator_rewind(objects: list[Any]) -> Callable[[], None]:
    """A function that takes the generators among some objects back to where they are now."""
    others = (thing for thing in objects if type(thing) not in _CONTAINERS)  # most are, and told apart more quickly
    rewinds = [_rewind(g) for g in others if isinstance(g, _GENERATORS)]

    def rewind() -> None:
        for one in rewinds:
            one()

    return rewind


def _rewind(generator: Any) -> Callable[[], None]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _discard(generator.set_state(state))
    if isinstance(generator, random.SystemRandom):
        return lambda: None  # it has no state
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def _discard(_: Any) -> None:
    pass
