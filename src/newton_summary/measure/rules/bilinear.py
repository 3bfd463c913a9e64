"""Products: operations that are linear in each of two arguments, with a bias perhaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.rules.base import Rule, Sums
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.jets import Groups, Jet, Part, combine, flat, lift, rows_of

aten = torch.ops.aten


class Product(Protocol):
    """A product f(a, b) and its transposes, with rows of directions on either side or on both.

    In every method a flag says which of the two arguments has rows in front; where both have, row goes with row.
    """

    def apply(self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None) -> Tensor:
        """f(a, b), with rows in front; into ``out`` if it is given."""
        ...

    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        """The a-gradient of v · f(a, b)."""
        ...

    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        """The b-gradient of v · f(a, b)."""
        ...


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
        a, b = call.jets.get(self.left), call.jets.get(self.right)
        parts = self._products(call, a, b)
        if self.bias is not None and self.bias in call.jets:
            jet = call.jets[self.bias]
            parts.append(Part(jet.second, jet.first, self._bias_rows(call, jet.rows)))
        if a is not None and b is not None and adjoint is not None:
            self._contract(call, adjoint, a, b, sums)
        return combine(sorted(parts, key=lambda p: -len(p.first)), call.out)

    def _products(self, call: Call, a: Jet | None, b: Jet | None) -> list[Part]:
        product, left, right = self.product, call.args[self.left], call.args[self.right]
        parts: list[Part] = []
        if a is not None:
            parts.append(Part(a.second, a.first, lambda out: product.apply(call, a.rows, right, (True, False), out)))
        if b is not None:
            parts.append(Part(b.second, b.first, lambda out: product.apply(call, left, b.rows, (False, True), out)))
        if a is not None and b is not None and call.third:
            common = tuple(g for g in a.first if g in b.first)
            if common:
                rows = [jet.dot[rows_of(jet.first, common)] for jet in (a, b)]
                parts.append(Part(common, (), 2 * product.apply(call, rows[0], rows[1], (True, True))))
        return parts

    def _bias_rows(self, call: Call, rows: Tensor) -> Tensor:
        if call.op is aten.convolution.default:
            return rows.view(len(rows), -1, *[1] * (call.out.dim() - 2))
        return lift(rows, call.out.dim())

    def _contract(self, call: Call, adjoint: Tensor, a: Jet, b: Jet, sums: Sums) -> None:
        """v̄ · f(ȧ_i, ḃ_j), and with second rows v̄ · (f(ä_i, ḃ_i) + f(ȧ_i, b̈_i))."""
        if self._contract_right(a, b):
            pulled, other = self.product.to_right(call, a.rows, adjoint, (True, False)), b
            own = a
        else:
            pulled, other = self.product.to_left(call, adjoint, b.rows, (False, True)), a
            own = b
        gradient = own.like(pulled)
        sums.add_cross(own.first, other.first, flat(gradient.dot) @ flat(other.dot).T)
        if call.third:
            self._add_accelerations(gradient, other, sums)
            self._add_accelerations(other, gradient, sums)

    def _add_accelerations(self, first: Jet, second: Jet, sums: Sums) -> None:
        """Adds 3 ẋ_i · ÿ_i to the third diagonal."""
        both = tuple(g for g in second.second if g in first.first)
        if both:
            one, two = first.dot[rows_of(first.first, both)], second.ddot[rows_of(second.second, both)]
            dots = torch.bmm(flat(one).unsqueeze(1), flat(two).unsqueeze(2)).flatten()
            sums.add_diagonal(both, 3 * dots)

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
        for group, row in zip(few.first, few.dot, strict=True):
            if by_left:
                pulled = self.product.to_right(call, row, moving, (False, True))
            else:
                pulled = self.product.to_left(call, moving, row, (True, False))
            values = flat(pulled) @ flat(many.dot).T
            sums.add_third(groups, (group,), many.first, values.unsqueeze(1))
            sums.add_third(groups, many.first, (group,), values.unsqueeze(2))

    def _contract_right(self, a: Jet, b: Jet) -> bool:
        """Whether to contract v̄ with the left side: the one with fewer rows, or with more entries to sum over."""
        if isinstance(self.product, Entrywise) and min(len(a.rows), len(b.rows)) > 2:
            return a.rows[0].numel() >= b.rows[0].numel()
        return len(a.rows) < len(b.rows)


def _each(function: Callable[..., Tensor], x: Tensor, y: Tensor, rows: tuple[bool, bool], out: Tensor | None) -> Tensor:
    """A function applied row by row."""
    n = len(x) if rows[0] else len(y)
    results = [function(x[i] if rows[0] else x, y[i] if rows[1] else y) for i in range(n)]
    return torch.stack(results) if out is None else torch.stack(results, out=out)


def multiply(a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None) -> Tensor:
    """Matrix products, plain (2 dimensions) or in batches (3)."""
    if rows == (True, False) and b.dim() == 2:
        n, p, q = a.shape
        flat = None if out is None else out.view(n * p, b.shape[1])
        return torch.mm(a.reshape(n * p, q), b, out=flat).view(n, p, b.shape[1])
    n = len(a) if rows[0] else len(b)
    if out is None:
        shape = (a.shape[-2], b.shape[-1])
        batch = () if b.dim() - rows[1] == 2 else (a.shape[-3],)
        out = a.new_empty((n, *batch, *shape))
    for i in range(n):
        torch.matmul(a[i] if rows[0] else a, b[i] if rows[1] else b, out=out[i])
    return out


class MatrixProduct(Product):
    """``mm``, ``bmm``, and ``addmm``'s product."""

    @override
    def apply(self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None) -> Tensor:
        return multiply(a, b, rows, out)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return multiply(v, b.mT, rows)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return multiply(a.mT, v, rows)


class Entrywise(Product):
    """``mul``, with broadcasting, of the arguments at these positions."""

    def __init__(self, left: int = 0, right: int = 1) -> None:
        self.left, self.right = left, right

    @override
    def apply(self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None) -> Tensor:
        dims = call.out.dim()
        a = lift(a, dims) if rows[0] else a
        b = lift(b, dims) if rows[1] else b
        if out is None:
            return torch.mul(a, b)
        result = torch.mul(a, b, out=out if torch.result_type(a, b) == out.dtype else None)
        return result if result is out else out.copy_(result)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return self._reduce(call, v, b, rows, call.args[self.left].shape)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return self._reduce(call, a, v, rows, call.args[self.right].shape)

    def _reduce(self, call: Call, x: Tensor, y: Tensor, rows: tuple[bool, bool], shape: torch.Size) -> Tensor:
        """The product, summed over what was broadcast."""
        product = self.apply(call, x, y, rows)
        dims = call.out.dim()
        padded = (1,) * (dims - len(shape)) + tuple(shape)
        summed = [i + 1 for i, (s, t) in enumerate(zip(padded, call.out.shape, strict=True)) if s == 1 and t != 1]
        if summed:
            product = product.sum(summed, keepdim=True)
        return product.reshape(len(product), *shape)


class Convolution(Product):
    """``convolution``, also transposed."""

    @override
    def apply(self, call: Call, a: Tensor, b: Tensor, rows: tuple[bool, bool], out: Tensor | None = None) -> Tensor:
        options = call.args[3:]
        if rows == (True, False):
            result = aten.convolution.default(a.flatten(0, 1), b, None, *options).view(len(a), *call.out.shape)
            return result if out is None else out.copy_(result)
        return _each(lambda x, w: aten.convolution.default(x, w, None, *options), a, b, rows, out)

    @override
    def to_left(self, call: Call, v: Tensor, b: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return _each(lambda g, w: self._backward(call, g, call.args[0], w, 0), v, b, rows, None)

    @override
    def to_right(self, call: Call, a: Tensor, v: Tensor, rows: tuple[bool, bool]) -> Tensor:
        return _each(lambda x, g: self._backward(call, g, x, call.args[1], 1), a, v, rows, None)

    def _backward(self, call: Call, v: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        result: Tensor = aten.convolution_backward.default(v, x, w, None, *call.args[3:], mask)[which]
        return result
