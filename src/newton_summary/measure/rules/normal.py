"""Softmax and standardisation: operations on the last dimensions with closed forms for every derivative.

Both work through the positions in blocks that fit a processor's cache: each tangent is read from memory once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.rules.base import Rule, Sums, add_cubes
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.jets import Groups, Jet, blocks, flat, rows_of


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
        result = torch.empty(((2 if call.third else 1) * n, *out.shape), dtype=out.dtype, device=out.device)
        rows, new = (
            jet.rows.reshape(n + m, *out.reshape(shape).shape),
            result.view(len(result), *out.reshape(shape).shape),
        )
        gram = out.new_zeros(n, n)
        third = out.new_zeros(n) if call.third else None
        values = self.values(call, out.reshape(shape), None if v is None else v.reshape(shape))
        for block in blocks(rows.shape[1], width * (n + m)):
            self.block(jet, rows[:, block], tuple(x[block] for x in values), new[:, block], gram, third, v is not None)
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
        centred = torch.sub(rows, _means(rows, p))
        c, a = centred[m:], centred[:m]
        weighted = c * w
        if add:
            gram.addmm_(weighted.reshape(n, -1), c.reshape(n, -1).T)
        first = new[n:] if third is not None else new
        if self.log:
            first.copy_(c)
        else:
            torch.mul(c, p, out=first)
        if third is None:
            return
        square = c * c
        variance = _means(square, p)
        if add:
            # Σ w c³ (− 3 var Σ w c, which is zero for log_softmax, where Σ p c = 0), and 3 Σ w c a
            cubes = (weighted * square).flatten(1).sum(1)
            if not self.log:
                cubes -= 3 * (weighted.sum(-1) * variance.squeeze(-1)).sum(1)
            third += cubes
            if m:
                place = rows_of(jet.first, jet.second)
                third[place] += 3 * (weighted[place] * a).flatten(1).sum(1)
        second = square.sub_(variance) if not self.log else -variance
        target = new[:n]
        target.copy_(second)
        if m:
            target[rows_of(jet.first, jet.second)] += a
        if not self.log:
            target.mul_(p)

    @override
    def sources(self, call: Call, adjoint: Any) -> dict[Place, tuple[Groups, Tensor]]:
        jet = call.jets[0]
        c, p, w = self._centred(call, adjoint)
        rows = c * w
        if not self.log:  # for log_softmax these sums are zero
            rows -= rows.sum(-1, keepdim=True) * p
        return {0: (jet.first, rows.view(jet.dot.shape))}

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
        z, r, v = values  # z = y r: in units where s = mean y² + ε is 1, with tangents scaled by r
        n, m = len(jet.first), len(jet.second)
        width = z.shape[1]
        y = (rows - rows.mean(-1, keepdim=True)) * r
        y1, y2 = y[m:], y[:m]
        s1 = 2 * _dots(y1, z) / width  # (n, positions)
        r1 = -0.5 * s1
        first = new[n:] if third is not None else new
        torch.addcmul(y1, r1.unsqueeze(-1), z, out=first)
        if add:
            a, total = _dots(y1, v), (v * z).sum(1)
            gram += _symmetric(a @ r1.T)
            gram.addmm_(s1 * (0.75 * total), s1.T)
            gram.addmm_((y1 * (-total / width).unsqueeze(-1)).reshape(n, -1), y1.reshape(n, -1).T)
        if third is None:
            return
        s2 = 2 * (y1 * y1).sum(-1) / width
        s3 = torch.zeros_like(s2)
        place = rows_of(jet.first, jet.second)
        if m:
            s2[place] += 2 * _dots(y2, z) / width
            s3[place] = 6 * (y1[place] * y2).sum(-1) / width
        r2 = 0.75 * s1 * s1 - 0.5 * s2
        if add:
            r3 = -1.875 * s1**3 + 2.25 * s1 * s2 - 0.5 * s3
            third += (3 * a * r2 + r3 * total).sum(1)
            if m:
                third[place] += 3 * (_dots(y2, v) * r1[place]).sum(1)
        target = new[:n]
        torch.mul(y1, 2 * r1.unsqueeze(-1), out=target)
        target.addcmul_(r2.unsqueeze(-1), z)
        if m:
            target[place] += y2


def _means(x: Tensor, p: Tensor) -> Tensor:
    """Means under p along the last dimension, kept: (n, positions, 1)."""
    return _dots(x, p).unsqueeze(-1)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of rows with one vector for each position: (n, positions)."""
    return (x * y).sum(-1)


def _symmetric(x: Tensor) -> Tensor:
    return x + x.T
