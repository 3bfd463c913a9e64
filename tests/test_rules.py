"""Every rule in the registry against derivatives of its operation along random curves."""

from __future__ import annotations

import operator

import pytest
import torch

from newton_summary.measure import rules
from newton_summary.measure.rules import Elementwise, General, has_rule, register_rule
from newton_summary.testing import check_rule

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)
INDEX = torch.tensor([[2, 0], [1, 1], [0, 2]])


def x(*shape, positive=False):
    value = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    return value.abs() + 0.5 if positive else value


def kinked(*shape):
    """Values away from the kinks at 0, ±½, 1, 3 and 6."""
    value = x(*shape)
    return value.sign() * (value.abs() + 0.05)


def small(*shape):
    return torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * 1.6 - 0.8


# Each operation with arguments; those that move are given by their places.
SAMPLES = [
    *((op, (x(3, 4),), [0]) for op in (aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.expm1.default)),
    *((op, (x(3, 4),), [0]) for op in (aten.sin.default, aten.cos.default, aten.square.default, aten.silu.default)),
    *((op, (x(3, 4),), [0]) for op in (aten.gelu.default, aten.softplus.default, aten.erf.default, aten.erfc.default)),
    *((op, (x(3, 4),), [0]) for op in (aten.atan.default, aten.sinh.default, aten.cosh.default, aten.asinh.default)),
    (aten.exp2.default, (x(3, 4),), [0]),
    *((op, (x(3, 4, positive=True),), [0]) for op in (aten.log.default, aten.log1p.default, aten.log2.default)),
    *((op, (x(3, 4, positive=True),), [0]) for op in (aten.log10.default, aten.sqrt.default, aten.rsqrt.default)),
    *(
        (op, (x(3, 4, positive=True),), [0])
        for op in (aten.reciprocal.default, aten.lgamma.default, aten.digamma.default)
    ),
    *((op, (small(3, 4),), [0]) for op in (aten.asin.default, aten.acos.default, aten.atanh.default, aten.tan.default)),
    *((op, (kinked(3, 4),), [0]) for op in (aten.relu.default, aten.leaky_relu.default, aten.abs.default)),
    *((op, (kinked(3, 4),), [0]) for op in (aten.relu6.default, aten.hardtanh.default, aten.hardswish.default)),
    (aten.acosh.default, (x(3, 4, positive=True) + 1,), [0]),
    (aten.elu.default, (kinked(3, 4),), [0]),
    (aten.elu.default, (kinked(3, 4), 0.7, 1.3, 0.9), [0]),
    (aten.threshold.default, (kinked(3, 4), 0.0, 0.3), [0]),
    (aten.clamp.default, (kinked(3, 4), -0.02, 1.0), [0]),
    (aten.clamp_min.default, (kinked(3, 4), 0.01), [0]),
    (aten.clamp_max.default, (kinked(3, 4), 0.01), [0]),
    *((aten.pow.Tensor_Scalar, (x(3, 4, positive=True), e), [0]) for e in (0, 1, 2, 3, 2.5, -1)),
    (aten.mm.default, (x(3, 4), x(4, 2)), [0, 1]),
    (aten.bmm.default, (x(2, 3, 4), x(2, 4, 2)), [0, 1]),
    (aten.addmm.default, (x(2), x(3, 4), x(4, 2)), [0, 1, 2]),
    (aten.mul.Tensor, (x(3, 4), x(3, 4)), [0, 1]),
    (aten.mul.Tensor, (x(3, 4), x(3, 1)), [0, 1]),
    (aten.mul.Tensor, (x(4), x(2, 3, 4)), [0, 1]),
    (aten.mul.Tensor, (x(3, 4), 0.3), [0]),
    (aten.addcmul.default, (x(4), x(3, 4), x(3, 1)), [0, 1, 2]),
    (
        aten.convolution.default,
        (x(2, 4, 5, 5), x(6, 2, 3, 3), x(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
        [0, 1, 2],
    ),
    (aten.convolution.default, (x(2, 3, 4), x(3, 2, 3), None, [2], [0], [1], True, [0], 1), [0, 1]),
    *((op, (x(3, 4), -1, False), [0]) for op in (aten._softmax.default, aten._log_softmax.default)),
    (aten.native_layer_norm.default, (x(2, 3, 4), [3, 4], None, None, 1e-5), [0]),
    (aten.add.Tensor, (x(3, 4), x(4)), [0, 1]),
    (aten.sub.Tensor, (x(4), x(3, 4)), [0, 1]),
    (aten.add.Tensor, (x(3, 4), 1.0), [0]),
    (aten.where.self, (x(3, 4) > 0, x(4), x(3, 1)), [1, 2]),
    (aten.masked_fill.Scalar, (x(3, 4), x(3, 1) > 0, 2.0), [0]),
    (aten.masked_fill.Tensor, (x(3, 4), x(3, 4) > 0, x()), [0, 2]),
    (aten.constant_pad_nd.default, (x(3, 4), [1, 2], 5.0), [0]),
    (aten.cat.default, ([x(3, 2), x(3, 4), x(3, 1)], 1), [(0, 0), (0, 1)]),
    (aten.stack.default, ([x(3, 2), x(3, 2), x(3, 2)], -1), [(0, 0), (0, 2)]),
    (aten.max_pool2d_with_indices.default, (x(2, 3, 4, 4), [2, 2], [2, 2]), [0]),
    (aten.max_pool3d_with_indices.default, (x(2, 1, 4, 4, 4), [2, 2, 2], [2, 2, 2]), [0]),
    (aten.adaptive_max_pool2d.default, (x(2, 3, 4, 4), [2, 1]), [0]),
    (aten.adaptive_max_pool3d.default, (x(2, 3, 4, 4, 4), [2, 1, 2]), [0]),
    (aten.kthvalue.default, (x(3, 4), 2, 1), [0]),
    *((op, (x(3, 5), 1), [0]) for op in (aten.median.dim, aten.mode.default, aten.cummax.default, aten.cummin.default)),
    *((op, (x(3, 4), 1), [0]) for op in (aten.max.dim, aten.min.dim, aten.cumsum.default)),
    (aten.select.int, (x(3, 4), 1, 2), [0]),
    (aten.max.dim, (x(3, 4), 0, True), [0]),
    (aten.topk.default, (x(3, 4), 2, 1), [0]),
    (aten.sort.default, (x(3, 4), 0), [0]),
    *((op, (x(3, 4), [2, 6]), [0]) for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)),
    (aten.unsqueeze.default, (x(3, 4), 1), [0]),
    (aten.squeeze.default, (x(3, 1, 4),), [0]),
    (aten.squeeze.dim, (x(3, 1, 4), 1), [0]),
    (aten.squeeze.dims, (x(3, 1, 4), [1]), [0]),
    *((op, (x(3, 4),), [0]) for op in (aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default)),
    *((op, (x(3, 4),), [0]) for op in (aten.neg.default, aten.tril.default, aten.triu.default, aten.t.default)),
    (aten.t.default, (x(4),), [0]),
    (aten.expand.default, (x(3, 1), [2, 3, 4]), [0]),
    (aten.mul.Scalar, (x(3, 4), 0.3), [0]),
    (aten.div.Scalar, (x(3, 4), 0.3), [0]),
    (aten.div.Tensor, (x(3, 4), 0.3), [0]),
    (aten._to_copy.default, (x(3, 4),), [0]),
    (aten.transpose.int, (x(3, 4, 2), 0, -1), [0]),
    (aten.permute.default, (x(3, 4, 2), [2, 0, -2]), [0]),
    *((op, (x(3, 4),), [0]) for op in (aten.sum.default, aten.mean.default, aten.trace.default, aten.diagonal.default)),
    *((op, (x(3, 4), [-1], True), [0]) for op in (aten.sum.dim_IntList, aten.mean.dim)),
    (aten.slice.Tensor, (x(3, 6), 1, 1, 5, 2), [0]),
    (aten.index_select.default, (x(3, 4), 1, torch.tensor([3, 0, 0])), [0]),
    (aten.flip.default, (x(3, 4), [0, -1]), [0]),
    (aten.gather.default, (x(3, 4), 1, INDEX), [0]),
    (aten.index.Tensor, (x(3, 4), [None, INDEX]), [0]),
    (aten.index.Tensor, (x(3, 2, 3), [INDEX[:, 0], None, INDEX[:, 1]]), [0]),
    (aten.embedding.default, (x(3, 4), INDEX), [0]),
    (aten.avg_pool2d.default, (x(2, 3, 4, 4), [2, 2]), [0]),
    (aten._adaptive_avg_pool2d.default, (x(2, 3, 4, 4), [2, 1]), [0]),
    (aten.roll.default, (x(3, 4), [1], [1]), [0]),
    (aten.as_strided.default, (x(3, 4), [2, 2], [1, 4], 1), [0]),
    (aten.unfold.default, (x(3, 6), 1, 3, 2), [0]),
    (aten.im2col.default, (x(1, 2, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]), [0]),
    (aten.col2im.default, (x(1, 8, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]), [0]),
    *((op, (x(3, 4), 0.7), [0]) for op in (aten.add.Scalar, aten.sub.Scalar)),
    *((op, (x(2, 2, 3), [6]), [0]) for op in (aten.upsample_nearest1d.default, aten._upsample_nearest_exact1d.default)),
    (aten.upsample_linear1d.default, (x(2, 2, 3), [5], False), [0]),
    *(
        (op, (x(2, 2, 3, 3), [6, 5]), [0])
        for op in (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)
    ),
    *(
        (op, (x(2, 2, 3, 3), [6, 5], True), [0])
        for op in (aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default)
    ),
    *(
        (op, (x(2, 2, 6, 6), [3, 4], False), [0])
        for op in (aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)
    ),
    *(
        (op, (x(2, 1, 2, 2, 2), [3, 4, 3]), [0])
        for op in (aten.upsample_nearest3d.default, aten._upsample_nearest_exact3d.default)
    ),
    (aten.upsample_trilinear3d.default, (x(2, 1, 2, 2, 2), [3, 4, 3], False), [0]),
    *((op, (x(2, 2, 3), [1, 1]), [0]) for op in (aten.reflection_pad1d.default, aten.replication_pad1d.default)),
    *((op, (x(1, 2, 3, 3, 3), [1] * 6), [0]) for op in (aten.reflection_pad3d.default, aten.replication_pad3d.default)),
    (aten.avg_pool3d.default, (x(1, 2, 4, 4, 4), [2, 2, 2]), [0]),
    (aten._adaptive_avg_pool3d.default, (x(1, 2, 4, 4, 4), [2, 1, 2]), [0]),
    (aten.linalg_lu_solve.default, (*torch.linalg.lu_factor(x(2, 3, 3)), x(2, 3, 4)), [2]),
    (aten.reflection_pad2d.default, (x(1, 2, 3, 3), [1, 1, 1, 1]), [0]),
    (aten.replication_pad2d.default, (x(1, 2, 3, 3), [1, 1, 1, 1]), [0]),
    (aten.repeat.default, (x(3, 4), [2, 1, 2]), [0]),
    (aten.select_scatter.default, (x(3, 4), x(3), 1, 2), [0, 1]),
    (aten.slice_scatter.default, (x(3, 4), x(3, 2), 1, 0, 2), [0, 1]),
    (aten.index_put.default, (x(3, 4), [torch.tensor([2, 0])], x(2, 4)), [0, 2]),
    (aten._unsafe_index_put.default, (x(3, 4), [torch.tensor([2, 2])], x(2, 4), True), [0, 2]),
    (aten.scatter.src, (x(3, 4), 1, torch.tensor([[0, 3], [1, 2], [2, 0]]), x(3, 2)), [0, 3]),
    (aten.scatter.value, (x(3, 4), 1, torch.tensor([[0, 3], [1, 2], [2, 0]]), 0.3), [0]),
    (aten.scatter_add.default, (x(3, 4), 1, INDEX, x(3, 2)), [0, 3]),
    (aten.index_add.default, (x(3, 4), 0, torch.tensor([2, 2]), x(2, 4)), [0, 3]),
    # general
    (aten.atan2.default, (x(3, 4), x(3, 4)), [0, 1]),
    (aten.linalg_vector_norm.default, (x(3, 4), 2, [1]), [0]),
    (aten.prod.dim_int, (x(3, 4), 1), [0]),
    (aten.linalg_inv_ex.default, (x(3, 3) + 3 * torch.eye(3, dtype=torch.float64),), [0]),
    *(
        (op, (2 * kinked(3, 4),), [0])
        for op in (aten.i0.default, aten.special_i0e.default, aten.special_i1.default, aten.special_i1e.default)
    ),
]


def plain_layer_norm(value, shape, weight, bias, eps):
    dims = tuple(range(-len(shape), 0))
    centred = value - value.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


ELSEWHERE = {  # complex ones in test_lowering.py
    aten.linalg_solve_triangular.default,
    aten._grouped_mm.default,
    aten._fft_r2c.default,
    aten._fft_c2r.default,
    aten._fft_c2c.default,
    aten._conj.default,
    aten._neg_view.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
    aten.complex.default,
    aten.conj_physical.default,
    aten._conj_physical.default,
}
TRIANGLE = x(3, 3).tril() + 2 * torch.eye(3, dtype=torch.float64)


def test_a_triangular_system_with_a_constant_matrix():
    check_rule(aten.linalg_solve_triangular.default, TRIANGLE, x(3, 2), moving=[1], kwargs={"upper": False})


REFERENCE = {aten.native_layer_norm.default: plain_layer_norm}  # torch's own has a wrong third derivative


def identifier(sample):
    return str(sample[0]).removeprefix("aten.")


@pytest.mark.parametrize("sample", SAMPLES, ids=identifier)
def test_every_derivative_of_every_rule(sample):
    op, args, places = sample
    rule = None if has_rule(op) else General()
    check_rule(op, *args, moving=places, rule=rule, reference=REFERENCE.get(op))


def test_every_rule_is_tested():
    registered = set(rules._RULES) - {operator.getitem} - ELSEWHERE
    assert registered - {sample[0] for sample in SAMPLES} == set()


def grouped(a, b, ends):
    return torch.cat([a[start:end] @ m for m, start, end in zip(b, [0, *ends.tolist()], ends.tolist(), strict=False)])


def test_a_product_of_rows_by_experts():  # which torch has in single precision alone
    rule = rules._RULES[aten._grouped_mm.default]
    check_rule(grouped, x(5, 3), x(3, 3, 2), torch.tensor([2, 2, 5]), moving=[0, 1], rule=rule)
    check_rule(grouped, x(5, 3), x(3, 3, 2), torch.tensor([2, 2, 5]), moving=[1], rule=rule)


def test_a_user_can_add_a_rule(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    with pytest.raises(AssertionError, match=r"aten.erfinv.default has no rule of its own: register_rule"):
        check_rule(aten.erfinv.default, small(3, 4))
    register_rule(aten.erfinv.default, Elementwise())
    check_rule(aten.erfinv.default, small(3, 4))
