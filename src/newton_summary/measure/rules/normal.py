"""Softmax and standardisation: operations on the last dimensions with closed forms for every derivative.

Both work through the positions in blocks that fit a processor's cache: each tangent is read from memory once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.half import wide
from newton_summary.measure.rules.base import Rule, Sums, add_cubes
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.jets import Groups, Jet, add_rows, blocks, dots, flat, rows_of


class _Local(Rule):
    """An operation on vectors, (positions, width), each by itself.

    Subclasses say what one block of positions gives.
    """

    kind = "closed form"

    @override
    def takes(self, places: set[Place]) -> bool:
        return places == {0}

    @override
    def is_curved(self, call: Call) -> bool:
        return True

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        jet, out = call.jets[0], call.out if isinstance(call.out, Tensor) else call.out[0]
        v = adjoint if isinstance(adjoint, Tensor) or adjoint is None else adjoint[0]
        width = self.width(call, out)
        shape = (-1, width)
        n, m = len(jet.first), len(jet.second)
        result = call.target((2 if call.third else 1) * n)
        positions = out.reshape(shape).shape
        rows, new = jet.rows.reshape(n + m, *positions).contiguous(), result.view(len(result), *positions)
        v = None if v is None else wide(v.reshape(shape).contiguous())
        values = tuple(map(wide, self.values(call, wide(out.reshape(shape).contiguous()), v)))
        gram = values[0].new_zeros(n, n)
        third = values[0].new_zeros(n) if call.third else None
        for block in blocks(rows.shape[1], width * (n + m)):
            here = wide(rows[:, block])  # of half precision squares and cubes may be no numbers
            target = new[:, block] if here.dtype == new.dtype else torch.empty_like(new[:, block], dtype=here.dtype)
            self.block(jet, here, tuple(x[block] for x in values), target, gram, third, v is not None)
            if target.dtype != new.dtype:
                new[:, block] = target
        if v is not None:
            sums.add_square(jet.first, gram)
            if third is not None:
                sums.add_diagonal(jet.first, third)
        jets = Jet(jet.first if call.third else (), jet.first, result)
        return jets if isinstance(call.out, Tensor) else (jets, *(None,) * (len(call.out) - 1))

    def width(self, call: Call, out: Tensor) -> int:
        """How many entries each vector has."""
        raise NotImplementedError

    def values(self, call: Call, out: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        """What the blocks need: tensors with one row for each position."""
        raise NotImplementedError

    def block(
        self,
        jet: Jet,
        rows: Tensor,
        values: tuple[Tensor, ...],
        new: Tensor,
        gram: Tensor,
        third: Tensor | None,
        add: bool,
    ) -> None:
        """Fills in the tangents of some positions and adds to the sums."""
        raise NotImplementedError


class Softmax(_Local):
    """``softmax`` or ``log_softmax`` along the last dimension.

    With p the softmax and c_i = ẋ_i − p·ẋ_i, everything is made of cumulants of c under p.
    """

    def __init__(self, log: bool) -> None:
        self.log = log

    @override
    def takes(self, places: set[Place]) -> bool:
        return places == {0}

    @override
    def width(self, call: Call, out: Tensor) -> int:
        return out.shape[-1]

    @override
    def values(self, call: Call, out: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        p = out.exp() if self.log else out
        if v is None:
            return (p, p)
        if self.log:
            return (p, -v.sum(1, keepdim=True) * p)
        return (p, p * (v - (p * v).sum(1, keepdim=True)))

    @override
    def block(
        self,
        jet: Jet,
        rows: Tensor,
        values: tuple[Tensor, ...],
        new: Tensor,
        gram: Tensor,
        third: Tensor | None,
        add: bool,
    ) -> None:
        p, w = values
        n, m = len(jet.first), len(jet.second)
        place = rows_of(jet.first, jet.second)
        x, a = rows[m:], rows[:m]
        first = new[n:] if third is not None else new
        c = torch.sub(x, _means(x, p), out=first)
        if add:
            weighted = c * w
            gram.addmm_(weighted.view(n, -1), c.view(n, -1).T)
        if third is None:
            if not self.log:
                first.mul_(p)
            return
        accelerations = _means(a, p)
        square = c * c
        variance = _means(square, p)
        if add:
            # Σ w c³ − 3 var Σ w c, and 3 Σ w c a, where Σ w c times the mean of a is left out
            third += dots(weighted.flatten(1), square.flatten(1))
            if m:
                add_rows(third, place, 3 * dots(weighted[place].flatten(1), a.flatten(1)))
            if not self.log:  # for log_softmax Σ w c = 0
                tilt = weighted.sum(-1)
                third -= 3 * dots(tilt, variance.squeeze(-1))
                if m:
                    add_rows(third, place, -3 * dots(tilt[place], accelerations.squeeze(-1)))
        second = new[:n]
        if m == n:
            torch.sub(a, accelerations.add_(variance), out=second)
            if not self.log:
                second.add_(square).mul_(p)
        else:
            second.copy_(-variance) if self.log else torch.sub(square, variance, out=second)
            if m:
                add_rows(second, place, a - accelerations)
            if not self.log:
                second.mul_(p)
        if not self.log:
            first.mul_(p)

    @override
    def sources(self, call: Call, adjoint: Any) -> dict[Place, tuple[Groups, Tensor]]:
        jet = call.jets[0]
        c, p, w = self._centred(call, adjoint)
        rows = c * w
        if not self.log:  # for log_softmax these sums are zero
            rows -= rows.sum(-1, keepdim=True) * p
        return {0: (jet.first, rows.reshape(jet.dot.shape))}

    @override
    def add_third(self, call: Call, adjoint: Any, moving: Any, groups: Groups, sums: Sums) -> None:
        jet = call.jets[0]
        c, p, w = self._centred(call, adjoint)
        weights = c.new_zeros(len(groups), *p.shape)
        if moving is not None:
            v = moving.reshape(weights.shape)
            weights += -v.sum(-1, keepdim=True) * p if self.log else p * (v - (p * v).sum(-1, keepdim=True))
        both = tuple(g for g in groups if g in jet.first)
        if adjoint is not None and both:
            some = c[rows_of(jet.first, both)]
            twist = some * w
            weights[rows_of(groups, both)] += twist / 3 if self.log else twist / 3 - twist.sum(-1, keepdim=True) * p
        add_cubes(weights.flatten(1), flat(c), groups, jet.first, sums)

    def _centred(self, call: Call, adjoint: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All c_i, p, and the weights w with v̄ · f''[ẋ_i, ẋ_j] = Σ w c_i c_j."""
        jet, out = call.jets[0], call.out.reshape(-1, call.out.shape[-1])
        p, w = self.values(call, out, None if adjoint is None else adjoint.reshape(out.shape))
        rows = jet.dot.reshape(-1, *out.shape)
        return rows - _means(rows, p), p, w


class Standardisation(_Local):
    """``native_layer_norm`` without weight and bias: y r, with y the centred vector and r = (mean y² + ε)^(-1/2)."""

    @override
    def takes(self, places: set[Place]) -> bool:
        return places == {0}

    @override
    def width(self, call: Call, out: Tensor) -> int:
        width = 1
        for size in call.args[1]:
            width *= size
        return width

    @override
    def values(self, call: Call, out: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        r = call.out[2].reshape(-1, 1)
        return (out, r, out if v is None else v)

    @override
    def block(
        self,
        jet: Jet,
        rows: Tensor,
        values: tuple[Tensor, ...],
        new: Tensor,
        gram: Tensor,
        third: Tensor | None,
        add: bool,
    ) -> None:
        z, r, v = values  # z = y r with mean 0: in units where s = mean y² + ε is 1, with tangents scaled by r
        n, m = len(jet.first), len(jet.second)
        width = z.shape[1]
        place = rows_of(jet.first, jet.second)
        x2 = rows[:m]
        y1 = (rows[m:] - rows[m:].mean(-1, keepdim=True)).mul_(r)
        s1 = _dots(y1, z).mul_(2 / width)  # (n, positions)
        r1 = -0.5 * s1
        if add:
            a, total = _dots(y1, v), (v * z).sum(1)
            gram += _symmetric(a @ r1.T)
            gram.addmm_(s1 * (0.75 * total), s1.T)
            gram.addmm_((y1 * (-total / width).unsqueeze(-1)).view(n, -1), y1.view(n, -1).T)
        first = new[n:] if third is not None else new
        if third is None:
            torch.addcmul(y1, r1.unsqueeze(-1), z, out=first)
            return
        s2 = torch.linalg.vector_norm(y1, dim=-1).square_().mul_(2 / width)
        s3 = torch.zeros_like(s2)
        scale = r.squeeze(-1)
        if m:
            add_rows(s2, place, _dots(x2, z) * (2 / width * scale))
            add_rows(s3, place, _dots(y1[place], x2) * (6 / width * scale))
        r2 = 0.75 * s1 * s1 - 0.5 * s2
        mean = x2.mean(-1, keepdim=True)
        if add:
            r3 = -1.875 * s1**3 + 2.25 * s1 * s2 - 0.5 * s3
            third += (3 * a * r2 + r3 * total).sum(1)
            if m:
                pulled = (_dots(x2, v) - mean.squeeze(-1) * v.sum(1)) * scale
                add_rows(third, place, 3 * (pulled * r1[place]).sum(1))
        second = new[:n]
        if m == n:
            torch.sub(x2, mean, out=second).mul_(r).addcmul_(y1, 2 * r1.unsqueeze(-1))
        else:
            torch.mul(y1, 2 * r1.unsqueeze(-1), out=second)
            if m:
                add_rows(second, place, (x2 - mean).mul_(r))
        second.addcmul_(r2.unsqueeze(-1), z)
        torch.addcmul(y1, r1.unsqueeze(-1), z, out=first)


def _means(x: Tensor, p: Tensor) -> Tensor:
    """Means under p along the last dimension, kept: (n, positions, 1)."""
    if len(p) == 1:  # of a vocabulary, say, in one pass over memory
        return torch.mv(x[:, 0], p[0])[:, None, None]
    return _dots(x, p).unsqueeze(-1)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of rows with one vector for each position: (n, positions)."""
    return (x * y).sum(-1)


def _symmetric(x: Tensor) -> Tensor:
    return x + x.T
