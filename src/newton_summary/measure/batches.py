"""What a batch is made of: any nesting of containers, mappings and objects that hold tensors.

A loss gets containers of its own, so that it may pop a key or append to a list, as trainers do; tensors are shared.
Nothing is registered with torch: its own tree functions know other containers than these.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from newton_summary._checks import check_positive
from newton_summary.measure.attributes import generator_rewind, put_back

SizeOf: TypeAlias = int | Callable[[Any], int] | None
"""The number of samples in every batch, or what gives it; nothing where the tensors tell."""


_MOST_DESCRIBED = 6  # tensors of a batch


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with containers of its own, in which a function was applied to every tensor.

    Tuples, lists, mappings, dataclasses and other objects with attributes are looked into; everything else is shared.

    Example:
        >>> map_tensors({"x": torch.ones(2), "name": "a"}, torch.neg)
        {'x': tensor([-1., -1.]), 'name': 'a'}
    """
    return _mapped(batch, function, {})


def fresh(batch: Any) -> Any:
    """The same tensors in containers of their own; those made in inference mode as ones that autograd takes."""
    return map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device; objects that know how to move, such as packed sequences, do so by themselves."""

    def moved(value: Any) -> Any:
        knows_how = not isinstance(value, Tensor | nn.Module) and callable(getattr(value, "to", None))
        return value.to(device) if knows_how else _NOTHING

    return _mapped(batch, lambda t: t.to(device), {}, moved)


def tensors_of(batch: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in a batch, and where it is: ``[0]``, ``['x']``, ``.y``."""
    return [(path, value) for path, value in _leaves(batch, "", set()) if isinstance(value, Tensor)]


def described(batch: Any) -> str:
    """What a batch is made of, in words.

    Example:
        >>> described({"x": torch.ones(2, 3), "name": "a"})
        "a dict, batch['x']: float32 of shape (2, 3)"
    """
    shapes = ((path, t, "(nested)" if t.is_nested else tuple(t.shape)) for path, t in tensors_of(batch))
    found = [f"batch{path}: {str(t.dtype)[6:]} of shape {shape}" for path, t, shape in shapes]
    more = [] if len(found) <= _MOST_DESCRIBED else ["…"]
    return ", ".join([f"a {type(batch).__name__}", *found[:_MOST_DESCRIBED], *more])


def kept(batch: Any) -> Callable[[], None]:
    """A function that gives what is in a batch back what a loss changes there, besides what tensors hold.

    That is whether tensors take gradients, the gradients and attributes that they have, what arrays of numpy hold, and
    where generators of random numbers are.
    """
    leaves = [value for _, value in _leaves(batch, "", set())]
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    before = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
    attributes = [(vars(t), dict(vars(t))) for t in tensors]
    arrays = [(a, a.copy()) for a in leaves if isinstance(a, np.ndarray) and a.flags.writeable]
    rewind = generator_rewind(leaves)

    def restore() -> None:
        for array, content in arrays:
            np.copyto(array, content)
        rewind()
        for table, entries in attributes:
            put_back(table, entries)
        for tensor, requires_grad, gradient in before:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not gradient:
                tensor.grad = gradient

    return restore


def batch_size(batch: Any, given: SizeOf = None) -> int:
    """The number of samples in a batch: what is given, or the first dimension that most of its tensors have, else 1.

    Raises:
        ValueError: what is given is no positive number.
    """
    if given is not None:
        size = given(batch) if callable(given) else given
        check_positive("batch_size", size)
        return size
    counted = Counter(n for n in _rows(batch).values() if n > 1)
    return counted.most_common(1)[0][0] if counted else 1


class BatchSizes:
    """The sizes of several batches, by which they count in a mean; never a guess where a guess would matter.

    A size is taken from the first dimension of tensors.  Where these disagree, only the ratio between batches counts:
    as long as every tensor gives the same, it does not matter which of them has a row for each sample.

    Args:
        given: the size, or what gives it.

    Example:
        >>> sizes = BatchSizes()
        >>> [sizes(torch.ones(n, 3)) for n in (9, 1)]
        [9, 1]
    """

    def __init__(self, given: SizeOf = None) -> None:
        self.given = given
        self._first: dict[str, int] | None = None
        self._size = 1

    def __call__(self, batch: Any) -> int:
        """The size of the next batch.

        Raises:
            ValueError: its tensors disagree on how it compares with the first one.
        """
        if self.given is not None:
            return batch_size(batch, self.given)
        found = _rows(batch)
        if self._first is None:
            self._first, self._size = found, batch_size(batch)
            return self._size
        return round(self._size * self._ratio(self._first, found))

    def _ratio(self, first: Mapping[str, int], found: Mapping[str, int]) -> float:
        """How much larger a batch is than the first one."""
        if first.keys() != found.keys():
            raise ValueError(
                f"batches with different contents: {_listed(first)} in the first, {_listed(found)} in a later one; "
                f"{_CURE}"
            )
        rows = {path: (found[path], first[path]) for path in first}
        # what has one row where others have more is nothing that every sample has
        rows = {path: both for path, both in rows.items() if both != (1, 1)} or rows
        ratios = {path: n / m for path, (n, m) in rows.items()}
        if len(set(ratios.values())) > 1:
            a, b = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
            x, y = rows[a], rows[b]
            raise ValueError(
                f"how many samples a batch has is not clear: from the first batch to a later one, batch{a} goes from "
                f"{x[1]} to {x[0]} rows, batch{b} from {y[1]} to {y[0]}; {_CURE}"
            )
        return next(iter(ratios.values()), 1.0)


_CURE = "pass batch_size=, the number of samples or a function of the batch"


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"batch{path}" for path in list(found)[:3]) + (", …" if len(found) > 3 else "") or "nothing"


def _rows(batch: Any) -> dict[str, int]:
    """Numbers of rows, by where they are: of tensors, or where there are none of lists of plain values."""
    rows = {path: t.size(0) for path, t in tensors_of(batch) if t.dim() > 0 and t.size(0)}
    return rows or {path: len(v) for path, v in _leaves(batch, "", set()) if isinstance(v, list) and v}


def cut(batch: Any, slices: int, size: int) -> list[Any]:
    """A batch in parts of nearly equal size: slices of what has a row for each of its samples.

    Raises:
        ValueError: torch cannot cut one of its tensors.
    """
    count = min(slices, size)
    bounds = [(part * size // count, (part + 1) * size // count) for part in range(count)]
    return [section(batch, start, end, size) for start, end in bounds]


def section(batch: Any, start: int, end: int, size: int) -> Any:
    """The samples of a batch from one on, up to another."""

    def rows(t: Tensor) -> Tensor:
        if t.layout is torch.sparse_coo:
            return t.index_select(0, torch.arange(start, end, device=t.device))
        return t[start:end]

    return _with_rows(batch, size, rows)


def chosen(batch: Any, samples: Tensor, size: int) -> Any:
    """Some samples of a batch of this size, by their numbers."""
    return _with_rows(batch, size, lambda t: t.index_select(0, samples.to(t.device)))


def _with_rows(batch: Any, size: int, take: Callable[[Tensor], Tensor]) -> Any:
    """A batch in which what has a row for each of its samples has other rows."""

    def rows(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.size(0) != size:
            return t
        try:
            return take(t)
        except RuntimeError as error:
            kind = "a nested tensor" if t.is_nested else f"a tensor of layout {t.layout}"
            raise ValueError(
                f"torch cannot cut {kind}, which the batch has, along its first dimension: pass smaller batches instead"
            ) from error

    return map_tensors(batch, rows)


# Walking --------------------------------------------------------------------------------------------------------------

_Parts: TypeAlias = Sequence[tuple[Any, Any]]
_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def _parts(value: Any) -> _Parts | None:
    """The keys and values that a container or an object holds; nothing for what is not looked into."""
    if isinstance(value, torch.Size | types.MappingProxyType):
        return None
    if isinstance(value, list | tuple):
        is_plain = isinstance(value, list) and value and all(isinstance(v, _PLAIN) for v in value)
        return None if is_plain else list(enumerate(value))
    if isinstance(value, MutableMapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    if _has_attributes(value):
        own = vars(value)
        more = {k: v for k, v in vars(type(value)).items() if isinstance(v, Tensor) and k not in own}
        return [*own.items(), *more.items()]
    return None


def _has_attributes(value: Any) -> bool:
    if isinstance(value, (*_PLAIN, Tensor, nn.Module, type, types.ModuleType, types.FunctionType)):
        return False
    library = type(value).__module__.partition(".")[0] in ("torch", "numpy", "builtins")
    return not library and isinstance(getattr(value, "__dict__", None), dict)


_NOTHING = object()


def _mapped(
    value: Any,
    function: Callable[[Tensor], Tensor],
    known: dict[int, Any],
    first: Callable[[Any], Any] = lambda _: _NOTHING,
) -> Any:
    """See :func:`map_tensors`; ``first`` may have an answer of its own for a container or an object."""
    if isinstance(value, Tensor):
        return function(value)
    answer = first(value)
    if answer is not _NOTHING:
        return answer
    parts = _parts(value)
    if parts is None:
        return list(value) if type(value) is list else value
    if id(value) not in known:
        known[id(value)] = value  # a circle leads back to what it was
        known[id(value)] = _rebuilt(value, parts, [_mapped(v, function, known, first) for _, v in parts])
    return known[id(value)]


def _rebuilt(value: Any, parts: _Parts, new: Sequence[Any]) -> Any:
    """A container or an object of the same kind with other contents."""
    if isinstance(value, tuple):
        if all(a is b for a, b in zip(value, new, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if type(value) is list:
        return list(new)
    try:
        result = copy.copy(value)
    except Exception:  # it does not want to be copied
        return value
    if isinstance(value, list):
        result[:] = new
    elif isinstance(value, MutableMapping):
        for (key, old), one in zip(parts, new, strict=True):
            if one is not old:
                result[key] = one
    else:
        for (name, old), one in zip(parts, new, strict=True):
            if one is not old:
                object.__setattr__(result, name, one)
    return result


def _leaves(value: Any, path: str, seen: set[int]) -> list[tuple[str, Any]]:
    parts = None if isinstance(value, Tensor) else _parts(value)
    if parts is None:
        return [(path, value)]
    if id(value) in seen:
        return []
    seen.add(id(value))
    by_name = not isinstance(value, list | tuple | MutableMapping)
    return [leaf for key, v in parts for leaf in _leaves(v, f"{path}.{key}" if by_name else f"{path}[{key!r}]", seen)]
