"""Operations that are linear in what moves: they do to tangents what they do to values, and add nothing to the sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.arena import empty
from newton_summary.measure.rules.base import Rule, Sums
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.jets import Jet, Part, combine, lift

aten = torch.ops.aten

Rows: TypeAlias = Callable[[Call, Place, Tensor], Tensor]
"""Applies the operation to the rows of one argument, the others at zero."""


class Linear(Rule):
    """An operation that is linear in some of its arguments together.

    Args:
        places: the positions of those arguments; a list counts with everything in it.
        rows: how it acts on rows.  Default: ``torch.vmap`` of the operation.
    """

    kind = "linear"

    def __init__(self, *places: int, rows: Rows | None = None) -> None:
        self.places = places or (0,)
        self.rows = rows

    @override
    def takes(self, places: set[Place]) -> bool:
        return {p if isinstance(p, int) else p[0] for p in places} <= set(self.places)

    @override
    def is_curved(self, call: Call) -> bool:
        return False

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        act = self.rows or self._vmapped
        if len(call.jets) == 1:
            (place, jet), *_ = call.jets.items()
            rows = act(call, place, jet.rows)
            return self._outputs(call, jet, rows)
        parts = [
            Part(jet.second, jet.first, act(call, place, jet.rows), place in call.spare)
            for place, jet in call.jets.items()
        ]
        return combine(sorted(parts, key=lambda p: -len(p.first)), call.out)

    def _outputs(self, call: Call, jet: Jet, rows: Tensor) -> Any:
        if isinstance(call.out, Tensor):
            shape = (len(jet.rows), *call.out.shape)
            return jet.like(rows if rows.shape == shape else rows.expand(shape))
        return tuple(jet.like(r) if o.is_floating_point() else None for o, r in zip(call.out, rows, strict=False))

    def _of(self, call: Call, place: Place) -> Callable[[Tensor], Any]:
        """The operation as a linear function of one argument."""
        zeros: dict[Place, Any] = {}
        for position in self.places:
            argument = call.args[position] if position < len(call.args) else None
            if isinstance(argument, Tensor):
                zeros[position] = torch.zeros_like(argument)
            elif isinstance(argument, list):
                zeros |= {(position, i): torch.zeros_like(a) for i, a in enumerate(argument) if isinstance(a, Tensor)}
            elif isinstance(argument, int | float):
                zeros[position] = 0
        return lambda value: call.with_arguments(zeros | {place: value})

    def _vmapped(self, call: Call, place: Place, rows: Tensor) -> Tensor:
        result: Tensor = torch.vmap(self._of(call, place))(rows)
        return result


def reshaped(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Operations that only change the shape, or nothing."""
    shape = (rows.shape[0], *call.out.shape)
    try:
        return rows.view(shape)
    except RuntimeError:  # strides that do not allow it
        return empty(rows.shape, rows).copy_(rows).view(shape)


def expanded(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Broadcasting to the shape of the result."""
    return lift(rows, call.out.dim()).expand(rows.shape[0], *call.out.shape)


def same(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Operations that act on the last dimensions or on every entry: the rows are one more dimension in front."""
    result: Tensor = call.op(rows, *call.args[1:], **call.kwargs)
    return result


def identical(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Sums with numbers."""
    return rows.to(call.out.dtype)


def transformed(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Fourier transforms."""
    result: Tensor = call.op(rows, [_shift(d, rows) for d in call.args[1]], *call.args[2:])
    return result


def paired(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(rows.resolve_conj())


def unpaired(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Pairs of real numbers as complex ones."""
    return torch.view_as_complex(rows.contiguous())


def completed(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Real or imaginary parts as complex numbers."""
    rows = lift(rows, call.out.dim())
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    return torch.complex(rows, zero) if place == 0 else torch.complex(zero, rows)


def cast(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Conversions of type or device."""
    return rows.to(call.out)


def at_dim(position: int = 1) -> Rows:
    """Operations along one dimension, given at this position."""

    def act(call: Call, place: Place, rows: Tensor) -> Tensor:
        args = list(call.args)
        dim = args[position] if position < len(args) else 0
        if rows.dim() == 1:  # of single numbers, along the one dimension that torch lets them have
            dim, rows = 0, rows.unsqueeze(1)
        args[0] = rows
        args[position : position + 1] = [_shift(dim, rows)]
        result: Tensor = call.op(*args, **call.kwargs)
        return result.reshape(len(rows), *call.out.shape) if rows.dim() == 2 else result

    return act


def _shift(dim: int, rows: Tensor) -> int:
    """A dimension of a value as one of its rows."""
    return dim + 1 if dim >= 0 else dim


def transposed(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``t`` and ``transpose``."""
    first, second = (call.args[1], call.args[2]) if len(call.args) > 1 else (0, -1)
    if rows.dim() == 1 or (rows.dim() < 3 and len(call.args) == 1):
        return rows
    return rows.transpose(_shift(first, rows), _shift(second, rows))


def permuted(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``permute``."""
    dims = rows.dim() - 1
    return rows.permute(0, *(d % dims + 1 for d in call.args[1]))


def _reduced_dims(call: Call, rows: Tensor) -> list[int]:
    dims = call.args[1] if len(call.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    return [_shift(d, rows) for d in dims] if dims else list(range(1, rows.dim()))


def summed(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Sums and means."""
    dims = _reduced_dims(call, rows) if rows.dim() > 1 else []
    keep = bool(call.args[2]) if len(call.args) > 2 else False
    if not dims:
        return rows
    return rows.sum(dims, keepdim=keep) if call.op.overloadpacket is aten.sum else rows.mean(dims, keepdim=keep)


def flipped(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``flip``."""
    return rows if rows.dim() == 1 else rows.flip([_shift(d, rows) for d in call.args[1]])


def added(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Sums and differences of two."""
    factor = 1 if place == 0 else call.kwargs.get("alpha", 1)
    if place == 1 and call.op.overloadpacket is aten.sub:
        factor = -factor
    rows = rows if factor == 1 else rows * factor
    return lift(rows, call.out.dim()).to(call.out.dtype)


def scaled(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Products and quotients with numbers."""
    result: Tensor = call.op(rows, call.args[1])
    return result


def gathered(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``gather``."""
    dim, where = call.args[1], call.args[2]
    if where.dim() == 0 or rows.dim() == 1:
        return rows.reshape(-1, *[1] * max(where.dim(), 1)).expand(-1, *where.shape) if where.dim() else rows
    return rows.gather(_shift(dim, rows), where.expand(rows.shape[0], *where.shape))


def indexed(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Indexing by tensors."""
    taken = [i for i, index in enumerate(call.args[1]) if index is not None]
    if taken[-1] - taken[0] + 1 != len(taken):  # the result's dimensions would move to the front
        result: Tensor = torch.vmap(lambda r: call.with_arguments({place: r}))(rows)
        return result
    return torch.ops.aten.index.Tensor(rows, [None, *call.args[1]])  # type: ignore[no-any-return]


def embedded(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Rows of a table."""
    return rows.index_select(1, call.args[1].flatten()).view(len(rows), *call.out.shape)


def padded(call: Call, place: Place, rows: Tensor) -> Tensor:
    """Padding by a number."""
    return aten.constant_pad_nd.default(rows, call.args[1], 0)  # type: ignore[no-any-return]


def folded(dims: int) -> Rows:
    """Operations over the last ``dims`` dimensions and a batch dimension: the rows join the batch."""

    def act(call: Call, place: Place, rows: Tensor) -> Tensor:
        if rows.dim() - 1 < dims + 2:
            rows_4d = rows
            result = call.op(rows_4d, *call.args[1:], **call.kwargs)
        else:
            result = call.op(rows.flatten(0, 1), *call.args[1:], **call.kwargs)
        return result.reshape(len(rows), *call.out.shape)  # type: ignore[no-any-return]

    return act


def chosen(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``where``: the branch that a tangent comes from keeps it, the other one is zero."""
    rows = lift(rows, call.out.dim()).to(call.out.dtype)
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    pair = (rows, zero) if place == 1 else (zero, rows)
    return torch.where(call.args[0], *pair).expand(len(rows), *call.out.shape)


def filled(call: Call, place: Place, rows: Tensor) -> Tensor:
    """``masked_fill``."""
    if place == 0:
        return torch.where(call.args[1], 0.0, lift(rows, call.out.dim()))
    return torch.where(call.args[1], lift(rows, call.out.dim()), 0.0)


class Concatenation(Linear):
    """``cat`` and ``stack``: each argument's rows fill a place of their own."""

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        stack = call.op is aten.stack.default
        dim = (call.args[1] if len(call.args) > 1 else 0) % call.out.dim()
        first = tuple(dict.fromkeys(g for jet in call.jets.values() for g in jet.first))
        second = tuple(g for g in first if any(g in jet.second for jet in call.jets.values()))
        rows = empty((len(second) + len(first), *call.out.shape), call.out).zero_()
        start = 0
        for i, value in enumerate(call.args[0]):
            size = 1 if stack else value.shape[dim] if value.dim() == call.out.dim() else 0
            jet = call.jets.get((0, i))
            if jet is not None:
                place = [second.index(g) for g in jet.second] + [len(second) + first.index(g) for g in jet.first]
                target = rows.select(dim + 1, start) if stack else rows.narrow(dim + 1, start, size)
                if place == list(range(place[0], place[-1] + 1)):
                    target[place[0] : place[-1] + 1].copy_(jet.rows)
                else:
                    target[place] = jet.rows
            start += size
        return Jet(second, first, rows)


class Selection(Rule):
    """The largest or smallest entries: the result moves as the entry that was chosen.

    Args:
        rows: rows of the argument and the result's indices to rows of the result.
    """

    kind = "linear"

    def __init__(self, rows: Callable[[Call, Tensor, Tensor], Tensor]) -> None:
        self.rows = rows

    @override
    def takes(self, places: set[Place]) -> bool:
        return places == {0}

    @override
    def is_curved(self, call: Call) -> bool:
        return False

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        jet = call.jets[0]
        return (jet.like(self.rows(call, jet.rows, call.out[1])), None)


def pooled(dims: int) -> Callable[[Call, Tensor, Tensor], Tensor]:
    """Max-pooling of the last ``dims`` dimensions, by the saved places of the largest entries."""

    def act(call: Call, rows: Tensor, where: Tensor) -> Tensor:
        n, first = len(rows), -dims
        places = where.flatten(first).expand(n, *where.shape[:first], -1)
        return rows.flatten(first).gather(-1, places).view(n, *where.shape)

    return act


def along_dim(call: Call, rows: Tensor, where: Tensor) -> Tensor:
    """``max(dim)`` and the like."""
    if rows.dim() == 1:
        return rows
    position = 2 if call.op.overloadpacket in (aten.topk, aten.kthvalue) else 1
    dim = _shift(call.args[position] if len(call.args) > position else -1, rows)
    keep = where.dim() == rows.dim() - 1
    places = (where if keep else where.unsqueeze(dim - 1 if dim > 0 else dim)).unsqueeze(0)
    picked = rows.gather(dim, places.expand(len(rows), *places.shape[1:]))
    return picked if keep else picked.squeeze(dim)
