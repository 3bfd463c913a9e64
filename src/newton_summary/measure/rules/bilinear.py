"""Products: operations that are linear in each of two arguments, with a bias perhaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.arena import empty
from newton_summary.measure.rules.base import Rule, Sums
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.jets import Groups, Jet, Part, blocks, combine, dots, flat, lift, rows_of

aten = torch.ops.aten


class Product(Protocol):
    """A product f(a, b) and its transposes, with rows of directions on either side or on both.

    In every method a flag says which of the two arguments has rows in front; where both have, row goes with row.
    """

    def apply(
        self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor, add: bool, factor: float = 1
    ) -> None:
        """Writes a multiple of f(a, b), with rows in front, or adds it."""
        ...

    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        """The a-gradient of v · f(a, b)."""
        ...

    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        """The b-gradient of v · f(a, b)."""
        ...

    def multiplications(self, call: Call) -> int:
        """How many f(a, b) takes."""
        ...

    def parts(self, adjoint: Tensor, entries: int) -> list[slice | None]:
        """Parts of the first dimension of both arguments and of the adjoint, where it is one of independent products.

        Args:
            adjoint: v.
            entries: what a whole has.

        Returns:
            Slices; nothing for a whole.
        """
        return [None]


class Bilinear(Rule):
    """An operation f(a, b) + bias.

    Args:
        product: how it multiplies.
        left: the position of a.
        right: the position of b.
        bias: the position of the bias.
    """

    kind = "multilinear"

    def __init__(self, product: Product, left: int = 0, right: int = 1, bias: int | None = None) -> None:
        self.product, self.left, self.right, self.bias = product, left, right, bias

    @override
    def takes(self, places: set[Place]) -> bool:
        return places <= {self.left, self.right, self.bias}

    @override
    def is_curved(self, call: Call) -> bool:
        return self.left in call.jets and self.right in call.jets

    # Forward ----------------------------------------------------------------------------------------------------------

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        self.contract(call, adjoint, sums)
        return self.join(call, self.right_parts(call))

    def join(self, call: Call, right: list[Part]) -> Jet:
        """The tangents of the result, where what :meth:`right_parts` gives is there."""
        parts = []
        if self.left in call.jets:
            a, other = call.jets[self.left], call.args[self.right]
            parts.append(self._part(call, a.second, a.first, lambda some: (a.rows[some], other), (True, False)))
        parts += right
        if self.bias is not None and self.bias in call.jets:
            jet = call.jets[self.bias]
            parts.append(Part(jet.second, jet.first, self._bias_rows(call, jet.rows)))
        return combine(sorted(parts, key=lambda p: -len(p.first)), call.out)

    def right_parts(self, call: Call) -> list[Part]:
        """What the right argument's tangents give, with the left one and with its tangents."""
        a, b = call.jets.get(self.left), call.jets.get(self.right)
        if b is None:
            return []
        left = call.args[self.left]
        parts = [self._part(call, b.second, b.first, lambda some: (left, b.rows[some]), (False, True))]
        common = tuple(g for g in a.first if g in b.first) if a is not None and call.third else ()
        if a is not None and common:
            x, y = (jet.dot[rows_of(jet.first, common)] for jet in (a, b))
            parts.append(self._part(call, common, (), lambda some: (x[some], y[some]), (True, True), 2))
        return parts

    def _part(
        self,
        call: Call,
        second: Groups,
        first: Groups,
        pair: Callable[[slice], tuple[Tensor, Tensor]],
        rows: tuple[bool, bool],
        factor: float = 1,
    ) -> Part:
        """Rows of products, computed where they are wanted."""

        def write(some: slice, out: Tensor, add: bool) -> None:
            self.product.apply(call, *pair(some), rows, out, add, factor)

        return Part(second, first, write)

    def _bias_rows(self, call: Call, rows: Tensor) -> Tensor:
        if call.op is aten.convolution.default:
            return rows.view(len(rows), -1, *[1] * (call.out.dim() - 2))
        return lift(rows, call.out.dim())

    def contract(self, call: Call, adjoint: Tensor | None, sums: Sums) -> None:
        """Adds v̄ · f(ȧ_i, ḃ_j), and with second rows 3 v̄ · (f(ä_i, ḃ_i) + f(ȧ_i, b̈_i)), where both sides move.

        One side's rows are pulled to the other through v̄, some at a time, and multiplied with its rows.
        """
        a, b = call.jets.get(self.left), call.jets.get(self.right)
        if a is None or b is None or adjoint is None:
            return
        if isinstance(self.product, Entrywise) and a.rows.shape[1:] == b.rows.shape[1:] == adjoint.shape:
            _contract_entries(call, adjoint, a, b, sums)
            return
        right = self._contract_right(call, a, b)
        own, other = (a, b) if right else (b, a)
        cross = adjoint.new_zeros(len(own.first), len(other.first))
        for part in self.product.parts(adjoint, len(own.rows) * max(own.rows[0].numel(), other.rows[0].numel())):
            if part is None:
                self._contract_part(call, adjoint, own, other, right, cross, sums)
            else:
                mine, theirs = (jet.like(jet.rows[:, part]) for jet in (own, other))
                self._contract_part(call, adjoint[part], mine, theirs, right, cross, sums)
        sums.add_cross(own.first, other.first, cross)

    def _contract_part(
        self, call: Call, adjoint: Tensor, own: Jet, other: Jet, right: bool, cross: Tensor, sums: Sums
    ) -> None:
        n, m = len(own.second), len(own.rows)
        step = max(1, _PULLED // max(other.rows[0].numel(), 1))
        for start in [*range(0, n, step), *range(n, m, step)]:
            end = min(start + step, n if start < n else m)
            rows = own.rows[start:end]
            if right:
                pulled = flat(self.product.to_right(call, rows, adjoint, (True, False)))
            else:
                pulled = flat(self.product.to_left(call, adjoint, rows, (False, True)))
            if start >= n:
                cross[start - n : end - n].addmm_(pulled, flat(other.dot).T)
            if call.third:
                groups, partners, theirs = (
                    (own.second[start:end], other.first, other.dot)
                    if start < n
                    else (own.first[start - n : end - n], other.second, other.ddot)
                )
                both = tuple(g for g in groups if g in partners)
                if both:
                    sums.add_diagonal(
                        both, 3 * dots(pulled[rows_of(groups, both)], flat(theirs[rows_of(partners, both)]))
                    )

    @override
    def sources(self, call: Call, adjoint: Any) -> dict[Place, tuple[Groups, Tensor]]:
        a, b = call.jets[self.left], call.jets[self.right]
        result: dict[Place, tuple[Groups, Tensor]] = {}
        if self.left in call.bent:
            result[self.left] = (b.first, self.product.to_left(call, adjoint, b.dot, (False, True)))
        if self.right in call.bent:
            result[self.right] = (a.first, self.product.to_right(call, a.dot, adjoint, (True, False)))
        return result

    @override
    def add_third(self, call: Call, adjoint: Any, moving: Any, groups: Groups, sums: Sums) -> None:
        if moving is None:
            return
        a, b = call.jets[self.left], call.jets[self.right]
        by_left = len(a.first) < len(b.first)
        few, many = (a, b) if by_left else (b, a)
        cheap = len(few.first) * len(many.first) < sums.size  # all rows of v̄̇ would be more
        for group, row in zip(few.first, few.dot, strict=True):
            if cheap:
                values = flat(moving) @ flat(self._pushed(call, group, row, many, by_left)).T
            elif by_left:
                values = flat(self.product.to_right(call, row, moving, (False, True))) @ flat(many.dot).T
            else:
                values = flat(self.product.to_left(call, moving, row, (True, False))) @ flat(many.dot).T
            sums.add_third(groups, (group,), many.first, values.unsqueeze(1))
            sums.add_third(groups, many.first, (group,), values.unsqueeze(2))

    def _pushed(self, call: Call, group: int, row: Tensor, many: Jet, by_left: bool) -> Tensor:
        """f(ȧ_i, ḃ_j) for one group on one side and all on the other; made once."""
        if group not in call.kept:
            out = call.kept[group] = empty((len(many.first), *call.out.shape), call.out)
            if by_left:
                self.product.apply(call, row, many.dot, (False, True), out, False)
            else:
                self.product.apply(call, many.dot, row, (True, False), out, False)
        return call.kept[group]

    def _contract_right(self, call: Call, a: Jet, b: Jet) -> bool:
        """Whether to pull the left side's rows to the right one: what takes fewer multiplications.

        Each row is pulled by one product, and then multiplied with all rows of the other side.
        """
        n, m = len(a.rows), len(b.rows)
        if isinstance(self.product, Entrywise) and min(n, m) <= 2:  # a product writes what is then read again
            return n < m
        each = self.product.multiplications(call)
        return n * each + n * m * b.rows[0].numel() < m * each + n * m * a.rows[0].numel()


def _contract_entries(call: Call, adjoint: Tensor, a: Jet, b: Jet, sums: Sums) -> None:
    """v̄ · (ȧ_i ḃ_j), and with second rows 3 v̄ · (ä_i ḃ_i + ȧ_i b̈_i), for products entry by entry.

    In blocks of entries that fit a cache, as curves go: both sides' rows are read from memory once.
    """
    x, y, v = flat(a.rows), flat(b.rows), adjoint.reshape(-1)
    n, m = len(a.second), len(b.second)
    cross = adjoint.new_zeros(len(a.first), len(b.first))
    pairs = [(a.second, 0, b.first, m), (a.first, n, b.second, 0)] if call.third else []
    shared = [(tuple(g for g in left if g in right), left, i, right, j) for left, i, right, j in pairs]
    shared = [pair for pair in shared if pair[0]]
    cubes = [adjoint.new_zeros(len(both)) for both, *_ in shared]
    for block in blocks(v.numel(), len(x) + len(y)):
        pulled, other = x[:, block] * v[block], y[:, block]
        cross.addmm_(pulled[n:], other[m:].T)
        for cube, (both, left, i, right, j) in zip(cubes, shared, strict=True):
            own, theirs = pulled[i : i + len(left)], other[j : j + len(right)]
            cube += dots(own[rows_of(left, both)], theirs[rows_of(right, both)])
    sums.add_cross(a.first, b.first, cross)
    for cube, (both, *_) in zip(cubes, shared, strict=True):
        sums.add_diagonal(both, 3 * cube)


_PULLED = 1 << 20  # entries that are pulled through an adjoint at a time


def multiply(
    a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None, add: bool = False, factor: float = 1
) -> Tensor:
    """Matrix products, plain (2 dimensions) or in batches (3)."""
    n = len(a) if rows[0] else len(b)
    if out is None:
        batch = (a if rows[0] else b).shape[1:-2]
        out = a.new_empty((n, *batch, a.shape[-2], b.shape[-1]))
    beta = 1 if add else 0
    if rows == (True, False) and b.dim() == 2:
        target = out.view(out.shape[:-1].numel(), out.shape[-1])
        torch.addmm(target, a.reshape(len(target), a.shape[-1]), b, beta=beta, alpha=factor, out=target)
        return out
    if out.dim() == 4 and out.shape[1] == 1:  # a batch of one, such as a head of attention: the rows are the batch
        x, y = a[:, 0] if rows[0] else a.expand(n, -1, -1), b[:, 0] if rows[1] else b.expand(n, -1, -1)
        torch.baddbmm(out[:, 0], x, y, beta=beta, alpha=factor, out=out[:, 0])
        return out
    product = torch.addmm if out.dim() == 3 else torch.baddbmm
    for i in range(n):
        x, y = a[i] if rows[0] else a, b[i] if rows[1] else b
        product(out[i], x, y, beta=beta, alpha=factor, out=out[i])
    return out


class MatrixProduct(Product):
    """``mm``, ``bmm``, and ``addmm``'s product."""

    @override
    def apply(
        self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor, add: bool, factor: float = 1
    ) -> None:
        multiply(a, b, rows, out, add, factor)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return multiply(v, b.mT, rows)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return multiply(a.mT, v, rows)

    @override
    def multiplications(self, call: Call) -> int:
        return int(call.out.numel()) * int(call.args[-1].shape[-2])

    @override
    def parts(self, adjoint: Tensor, entries: int) -> list[slice | None]:
        if adjoint.dim() == 2 or entries <= _PULLED:
            return [None]
        count = len(adjoint)
        step = max(1, count * _PULLED // entries)
        return [slice(start, start + step) for start in range(0, count, step)]


class Entrywise(Product):
    """``mul``, with broadcasting, of the arguments at these positions."""

    def __init__(self, left: int = 0, right: int = 1) -> None:
        self.left, self.right = left, right

    @override
    def apply(
        self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor, add: bool, factor: float = 1
    ) -> None:
        a, b = self._lifted(call, a, b, rows)
        if torch.result_type(a, b) != out.dtype:
            a, b = a.to(out.dtype), b.to(out.dtype)
        if add:
            out.addcmul_(a, b, value=factor)
        else:
            torch.mul(a, b, out=out)
            if factor != 1:
                out.mul_(factor)

    def _lifted(self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        dims = call.out.dim()
        return lift(a, dims) if rows[0] else a, lift(b, dims) if rows[1] else b

    @override
    def multiplications(self, call: Call) -> int:
        return int(call.out.numel())

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return self._reduce(call, v, b, rows, call.args[self.left].shape)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return self._reduce(call, a, v, rows, call.args[self.right].shape)

    def _reduce(self, call: Call, x: Tensor, y: Tensor, rows: tuple[bool, bool], shape: torch.Size) -> Tensor:
        """The product, summed over what was broadcast."""
        product = torch.mul(*self._lifted(call, x, y, rows))
        dims = call.out.dim()
        padded = (1,) * (dims - len(shape)) + tuple(shape)
        summed = [i + 1 for i, (s, t) in enumerate(zip(padded, call.out.shape, strict=True)) if s == 1 and t != 1]
        if summed:
            product = product.sum(summed, keepdim=True)
        return product.reshape(len(product), *shape)


class Convolution(Product):
    """``convolution``, also transposed."""

    @override
    def apply(
        self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor, add: bool, factor: float = 1
    ) -> None:
        step = max(1, _PULLED // max(call.out.numel(), 1)) if rows == (True, False) else 1
        for start in range(0, len(out), step):
            some = slice(start, start + step)
            x = a[some].flatten(0, 1) if rows[0] else a
            result = aten.convolution.default(x, b[start] if rows[1] else b, None, *call.args[3:])
            target = out[some]
            if add:
                target.add_(result.view(target.shape), alpha=factor)
            else:
                torch.mul(result.view(target.shape), factor, out=target)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return _each(lambda g, w: self._backward(call, g, call.args[0], w, 0), v, b, rows)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return _each(lambda x, g: self._backward(call, g, x, call.args[1], 1), a, v, rows)

    @override
    def multiplications(self, call: Call) -> int:
        x, weight, transposed = call.args[0], call.args[1], call.args[6]
        return int((x if transposed else call.out).numel() * weight[0].numel())

    def _backward(self, call: Call, v: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        result: Tensor = aten.convolution_backward.default(v, x, w, None, *call.args[3:], mask)[which]
        return result


class GroupedProduct(Product):
    """Rows of a matrix, some for each of several experts, times the matrices of these (``_grouped_mm``)."""

    @override
    def apply(
        self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor, add: bool, factor: float = 1
    ) -> None:
        if not add:
            out.zero_()  # rows after the last expert's
        for expert, some in _shares(call):
            out[:, some].add_(a[..., some, :] @ b[..., expert, :, :], alpha=factor)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        result = v.new_zeros(len(v) if rows[0] else len(b), *call.args[0].shape)
        for expert, some in _shares(call):
            result[:, some] = v[..., some, :] @ b[..., expert, :, :].mT
        return result

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        result = v.new_zeros(len(a) if rows[0] else len(v), *call.args[1].shape)
        for expert, some in _shares(call):
            result[:, expert] = a[..., some, :].mT @ v[..., some, :]
        return result

    @override
    def multiplications(self, call: Call) -> int:
        return int(call.out.numel()) * int(call.args[0].shape[-1])


def _shares(call: Call) -> list[tuple[int, slice]]:
    """The rows of each expert that has any."""
    ends = call.args[2].tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _each(function: Callable[..., Tensor], x: Tensor, y: Tensor, rows: tuple[bool, bool]) -> Tensor:
    """A function applied row by row."""
    n = len(x) if rows[0] else len(y)
    return torch.stack([function(x[i] if rows[0] else x, y[i] if rows[1] else y) for i in range(n)])
