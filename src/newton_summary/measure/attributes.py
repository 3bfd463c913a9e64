"""What a loss may change besides tensors: attributes of modules, and generators of random numbers of its own."""

from __future__ import annotations

import functools
import operator
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (list, dict, OrderedDict, set, deque, Counter, defaultdict)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FOUND = (nn.Module, *_GENERATORS)
_DEPTH = 3  # how deep closures and objects are looked into


_INTERNAL = {"_parameters", "_buffers", "_modules"}
"""What is looked at by itself.  Hooks are containers: transformers adds some, and notes in an attribute that it has."""


def owners(model: nn.Module, loss_fn: Any) -> tuple[list[nn.Module], list[Any]]:
    """The modules and the other objects whose attributes a loss is likely to change, each once.

    They are the modules of the model, what a loss function captured (in its closure, its defaults, the globals that it
    names, the object that it is a method of), and what those hold as attributes.
    """
    modules: dict[int, nn.Module] = {id(m): m for m in model.modules()}
    objects: dict[int, Any] = {}
    for found in _captured(loss_fn, _DEPTH, set()):
        if isinstance(found, nn.Module):
            modules |= {id(m): m for m in found.modules()}
        else:
            objects[id(found)] = found
    for module in modules.values():
        for name in vars(module).keys() - _INTERNAL:
            if isinstance(value := vars(module)[name], _GENERATORS):
                objects[id(value)] = value
    return list(modules.values()), list(objects.values())


def _captured(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """Modules, generators and objects with attributes that a function or an object leads to."""
    if depth < 0 or id(value) in seen or isinstance(value, type | types.ModuleType | str | bytes | int | float):
        return
    seen.add(id(value))
    if isinstance(value, _FOUND):
        yield value
        return
    for inner in _inside(value):
        yield from _captured(inner, depth - 1, seen)
    if _is_plain_object(value):
        yield value


def _inside(value: Any) -> list[Any]:
    """What a function, a method, a partial application, a container or an object holds."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]
    if type(value) in (list, tuple):
        return list(value[:64])
    if type(value) is dict:
        return list(value.values())[:64]
    return [held for held in vars(value).values() if isinstance(held, _FOUND)] if _is_plain_object(value) else []


def _is_plain_object(value: Any) -> bool:
    """Whether it is of a class that a user wrote, with attributes that can be set."""
    kind = type(value)
    known = kind.__module__.partition(".")[0] in ("torch", "numpy", "builtins", "newton_summary", "functools")
    return (
        not known and isinstance(getattr(value, "__dict__", None), dict) and not callable(getattr(kind, "__get__", 0))
    )


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


class Attributes:
    """What some modules and objects hold in their attributes, to be restored.

    Rebound attributes get their old values back, plain containers in attributes of modules their old entries, and
    parameters are frozen as they were.  What tensors hold is not looked at: see
    :class:`~newton_summary.measure.journal.Journal`.
    """

    def __init__(self, modules: list[nn.Module], objects: list[Any]) -> None:
        self._tables = []
        self._containers = []
        self._trainable = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]
        for module in modules:
            own = vars(module)
            tables = (own, *(own.get(name) for name in ("_parameters", "_buffers", "_modules")))
            self._tables += [(t, dict(t)) for t in tables if isinstance(t, dict)]  # those of scripts are not
            for name in own.keys() - _INTERNAL:
                if type(value := own[name]) in _CONTAINERS:
                    self._containers.append((value, value.copy()))
        for thing in objects:
            if not isinstance(thing, _GENERATORS):
                self._tables.append((vars(thing), dict(vars(thing))))

    def restore(self) -> None:
        """Puts everything back that has changed."""
        for table, before in self._tables:
            _put_back(table, before)
        for value, before in self._containers:
            _refill(value, before)
        for parameter, trainable in self._trainable:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    if table.keys() == before.keys() and all(map(operator.is_, table.values(), before.values())):
        return
    table.clear()
    table.update(before)


def _refill(value: Any, before: Any) -> None:
    if isinstance(value, dict):
        _put_back(value, before)
    elif len(value) != len(before) or (
        not isinstance(value, set) and any(a is not b for a, b in zip(value, before, strict=True))
    ):
        value.clear()
        value.update(before) if isinstance(value, set) else value.extend(before)


def generator_rewinds(objects: list[Any]) -> list[Callable[[], None]]:
    """For each generator among some objects a function that takes it back to where it is now."""
    return [_rewind(g) for g in objects if isinstance(g, _GENERATORS)]


def _rewind(generator: Any) -> Callable[[], None]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _discard(generator.set_state(state))
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def _discard(_: Any) -> None:
    pass
