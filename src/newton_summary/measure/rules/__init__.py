"""What each operation does to tangents (docs/engine.md): a registry that users can extend."""

from __future__ import annotations

import operator
from typing import Any

import torch
from typing_extensions import override

from newton_summary.measure.rules import linear as lin
from newton_summary.measure.rules.base import Rule, Sums
from newton_summary.measure.rules.bilinear import (
    Bilinear,
    Convolution,
    Entrywise,
    GroupedProduct,
    MatrixProduct,
)
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.chain import Chain
from newton_summary.measure.rules.elementwise import TABLE, Elementwise
from newton_summary.measure.rules.general import General
from newton_summary.measure.rules.jets import Groups, Jet, Part, combine
from newton_summary.measure.rules.linear import Concatenation, Linear, Selection
from newton_summary.measure.rules.normal import Softmax, Standardisation

__all__ = [
    "KINKED",
    "Bilinear",
    "Call",
    "Elementwise",
    "General",
    "Groups",
    "Jet",
    "Linear",
    "Part",
    "Place",
    "Rule",
    "Sums",
    "combine",
    "has_rule",
    "is_replaced",
    "register_rule",
    "rule_for",
]

aten = torch.ops.aten


def _upsampled(dims: int, *smooth: str) -> list[Any]:
    """Operations that resize ``dims`` dimensions."""
    names = [f"upsample_{kind}{dims}d" for kind in ("nearest", *smooth)]
    names += [f"_upsample_nearest_exact{dims}d"]
    names += [f"_upsample_{kind}2d_aa" for kind in smooth if dims == 2]
    return [getattr(aten, name).default for name in names]


_RULES: dict[Any, Rule] = {
    **TABLE,
    aten.mm.default: Bilinear(MatrixProduct()),
    aten.bmm.default: Bilinear(MatrixProduct()),
    aten._grouped_mm.default: Bilinear(GroupedProduct()),
    aten.addcmul.default: Bilinear(Entrywise(1, 2), left=1, right=2, bias=0),
    aten._softmax.default: Softmax(log=False),
    aten._log_softmax.default: Softmax(log=True),
    aten.native_layer_norm.default: Standardisation(),
    aten.addmm.default: Bilinear(MatrixProduct(), left=1, right=2, bias=0),
    aten.mul.Tensor: Bilinear(Entrywise()),
    aten.convolution.default: Bilinear(Convolution(), bias=2),
    aten.cat.default: Concatenation(0),
    aten.stack.default: Concatenation(0),
    aten.max_pool2d_with_indices.default: Selection(lin.pooled(2)),
    aten.max_pool3d_with_indices.default: Selection(lin.pooled(3)),
    aten.adaptive_max_pool2d.default: Selection(lin.pooled(2)),
    aten.adaptive_max_pool3d.default: Selection(lin.pooled(3)),
    aten.add.Tensor: Linear(0, 1, rows=lin.added),
    aten.sub.Tensor: Linear(0, 1, rows=lin.added),
    aten.complex.default: Linear(0, 1, rows=lin.completed),
    aten.where.self: Linear(1, 2, rows=lin.chosen),
    aten.masked_fill.Scalar: Linear(0, 2, rows=lin.filled),
    aten.masked_fill.Tensor: Linear(0, 2, rows=lin.filled),
    aten.constant_pad_nd.default: Linear(0, 2, rows=lin.padded),
}
_EXTREMES = (
    aten.max.dim,
    aten.min.dim,
    aten.topk.default,
    aten.sort.default,
    aten.median.dim,
    aten.kthvalue.default,
    aten.mode.default,
    aten.cummax.default,
    aten.cummin.default,
)
_RULES |= {op: Selection(lin.along_dim) for op in _EXTREMES}
_RULES |= {
    op: Linear(0, rows=rows)
    for rows, ops in {
        lin.reshaped: (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.alias.default,
            aten.clone.default,
            aten.lift_fresh_copy.default,
        ),
        lin.expanded: (aten.expand.default,),
        lin.same: (
            aten._conj.default,
            aten.conj_physical.default,
            aten._conj_physical.default,
            aten._neg_view.default,
            aten.neg.default,
            aten.tril.default,
            aten.triu.default,
        ),
        lin.scaled: (aten.mul.Scalar, aten.div.Scalar, aten.div.Tensor),
        lin.cast: (aten._to_copy.default,),
        lin.transposed: (aten.t.default, aten.transpose.int),
        lin.permuted: (aten.permute.default,),
        lin.summed: (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim),
        lin.at_dim(): (aten.select.int, aten.slice.Tensor, aten.index_select.default, aten.cumsum.default),
        lin.flipped: (aten.flip.default,),
        lin.gathered: (aten.gather.default,),
        lin.indexed: (aten.index.Tensor,),
        lin.embedded: (aten.embedding.default,),
        lin.transformed: (aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default),
        lin.paired: (aten.view_as_real.default,),
        lin.unpaired: (aten.view_as_complex.default,),
        lin.identical: (aten.add.Scalar, aten.sub.Scalar),
        lin.folded(1): (aten.reflection_pad1d.default, aten.replication_pad1d.default, *_upsampled(1, "linear")),
        lin.folded(2): (
            aten.avg_pool2d.default,
            aten._adaptive_avg_pool2d.default,
            aten.reflection_pad2d.default,
            aten.replication_pad2d.default,
            *_upsampled(2, "bilinear", "bicubic"),
        ),
        lin.folded(3): (
            aten.avg_pool3d.default,
            aten._adaptive_avg_pool3d.default,
            aten.reflection_pad3d.default,
            aten.replication_pad3d.default,
            *_upsampled(3, "trilinear"),
        ),
    }.items()
    for op in ops
}
_RULES |= {
    op: Linear(*places)
    for places, ops in {
        (0,): (
            aten.diagonal.default,
            aten.roll.default,
            aten.as_strided.default,
            aten.unfold.default,
            aten.im2col.default,
            aten.col2im.default,
            aten.repeat.default,
            aten.trace.default,
        ),
        (0, 3): (aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_add.default),
        (1,): (aten.linalg_solve_triangular.default,),
        (2,): (aten.linalg_lu_solve.default,),
        (0, 1): (aten.select_scatter.default, aten.slice_scatter.default),
        (0, 2): (aten.index_put.default, aten._unsafe_index_put.default),
    }.items()
    for op in ops
}

KINKED = {op for op, rule in _RULES.items() if isinstance(rule, Selection) or getattr(rule, "piecewise_linear", False)}
KINKED |= {aten.where.self, aten.elu.default}
"""Operations with slopes, of the first or second order, that may jump where rounding moves a value."""

_GENERAL = General()


class _Item(Rule):
    """Taking one of several results."""

    kind = "linear"

    @override
    def takes(self, places: set[Place]) -> bool:
        return True

    @override
    def is_curved(self, call: Call) -> bool:
        return False

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        return call.jets[0][call.args[1]]  # type: ignore[index]


_RULES[operator.getitem] = _Item()
_ORIGINAL = dict(_RULES)


def register_rule(op: Any, rule: Rule) -> None:
    """Says what an operation does to tangents.

    Args:
        op: an operator such as ``torch.ops.mylib.myop.default``.
        rule: :class:`Linear`, :class:`Bilinear`, :class:`Elementwise` or another :class:`Rule`.

    Example:
        >>> register_rule(torch.ops.aten.erfinv.default, Elementwise())
    """
    _RULES[op] = rule


def has_rule(op: Any) -> bool:
    """Whether there is a rule for this very operation."""
    return op in _RULES


def is_replaced(op: Any) -> bool:
    """Whether somebody gave an operation another rule than it comes with."""
    return _RULES.get(op) is not _ORIGINAL.get(op)


def rule_for(call: Call) -> Rule:
    """The rule of an operation, which a chain is itself; the general one where none takes the arguments that move."""
    rule = call.op if isinstance(call.op, Chain) else _RULES.get(call.op, _GENERAL)
    return rule if rule.takes(set(call.jets)) else _GENERAL
