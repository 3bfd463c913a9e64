"""Every rule in the registry against derivatives of the operation along random curves, by nested backward passes."""

from __future__ import annotations

import operator
from itertools import product

import pytest
import torch
from torch import Tensor

from newton_summary.measure import rules
from newton_summary.measure.rules import Call, Elementwise, Jet, Sums, register_rule, rule_for

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
    (aten.upsample_nearest2d.vec, (x(1, 2, 3, 3), None, [2.0, 2.0]), [0]),
    (aten.upsample_bilinear2d.vec, (x(1, 2, 3, 3), None, False, [2.0, 2.0]), [0]),
    (aten.reflection_pad2d.default, (x(1, 2, 3, 3), [1, 1, 1, 1]), [0]),
    (aten.replication_pad2d.default, (x(1, 2, 3, 3), [1, 1, 1, 1]), [0]),
    (aten.repeat.default, (x(3, 4), [2, 1, 2]), [0]),
    (aten.select_scatter.default, (x(3, 4), x(3), 1, 2), [0, 1]),
    (aten.slice_scatter.default, (x(3, 4), x(3, 2), 1, 0, 2), [0, 1]),
    (aten.index_put.default, (x(3, 4), [torch.tensor([2, 0])], x(2, 4)), [0, 2]),
    (aten._unsafe_index_put.default, (x(3, 4), [torch.tensor([2, 2])], x(2, 4), True), [0, 2]),
    (aten.scatter.src, (x(3, 4), 1, torch.tensor([[0, 3], [1, 2], [2, 0]]), x(3, 2)), [0, 3]),
    (aten.scatter_add.default, (x(3, 4), 1, INDEX, x(3, 2)), [0, 3]),
    (aten.index_add.default, (x(3, 4), 0, torch.tensor([2, 2]), x(2, 4)), [0, 3]),
    # general
    (aten.atan2.default, (x(3, 4), x(3, 4)), [0, 1]),
    (aten.linalg_vector_norm.default, (x(3, 4), 2, [1]), [0]),
    (aten.prod.dim_int, (x(3, 4), 1), [0]),
    (aten.linalg_inv_ex.default, (x(3, 3) + 3 * torch.eye(3, dtype=torch.float64),), [0]),
]


def plain_layer_norm(value, shape, weight, bias, eps):
    dims = tuple(range(-len(shape), 0))
    centred = value - value.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


REFERENCE = {aten.native_layer_norm.default: plain_layer_norm}  # torch's own has a wrong third derivative


class Curve:
    """Arguments that move with four rates: x(η) = x + Σ η_i ẋ_i + ½ Σ η_i² ẍ_i, and the scalar ⟨w, f(x(η))⟩."""

    size = 4

    def __init__(self, op, args, places, third, seed=0) -> None:
        GENERATOR.manual_seed(seed)
        self.op, self.args = op, args
        self.jets = {}
        for number, place in enumerate(places):
            value = args[place] if isinstance(place, int) else args[place[0]][place[1]]
            first = [(0, 1, 2), (3, 1), (2,)][number]
            second = [(1, 2), (1,), ()][number] if third else ()
            self.jets[place] = Jet(second, first, x(len(first) + len(second), *value.shape))
        self.out = op(*args)

    def call(self, third):
        bent = frozenset(self.jets)
        return Call(self.op, self.args, {}, self.out, dict(self.jets), third, bent)

    def first_result(self):
        return self.out if isinstance(self.out, Tensor) else self.out[0]

    def scalar(self, eta, weight, accelerated=True):
        args = [list(a) if isinstance(a, list) else a for a in self.args]
        for place, jet in self.jets.items():
            value = args[place] if isinstance(place, int) else args[place[0]][place[1]]
            for row, group in zip(jet.dot, jet.first, strict=True):
                value = value + eta[group] * row
            for row, group in zip(jet.ddot, jet.second, strict=True):
                value = value + 0.5 * eta[group] ** 2 * row * accelerated
            if isinstance(place, int):
                args[place] = value
            else:
                args[place[0]][place[1]] = value
        out = REFERENCE.get(self.op, self.op)(*args)
        out = out if isinstance(out, Tensor) else out[0]
        return (out * weight).sum()

    def derivatives(self, weight, accelerated=True):
        """Of orders 1 to 3, in full."""
        eta = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(self.size)]
        tensors = [torch.zeros((self.size,) * d, dtype=torch.float64) for d in (1, 2, 3)]

        def descend(value, index):
            if len(index) == 3 or not value.requires_grad:
                return
            slopes = torch.autograd.grad(value, eta, create_graph=True, allow_unused=True)
            for i, slope in enumerate(slopes):
                if slope is not None:
                    tensors[len(index)][(*index, i)] = slope.detach()
                    descend(slope, (*index, i))

        descend(self.scalar(eta, weight, accelerated), ())
        return tensors


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.abs().max())))


def identifier(sample):
    return str(sample[0]).removeprefix("aten.")


def is_curved(sample):
    call = Curve(*sample, third=False).call(False)
    return rule_for(call).is_curved(call)


@pytest.mark.parametrize("sample", SAMPLES, ids=identifier)
@pytest.mark.parametrize("third", [False, True])
def test_tangents_and_curvature(sample, third):
    op, args, places = sample
    curve = Curve(op, args, places, third)
    call, out = curve.call(third), curve.first_result()
    rule = rule_for(call)
    weight = x(*out.shape)
    adjoint = weight if isinstance(curve.out, Tensor) else [weight, *(None,) * (len(curve.out) - 1)]
    sums = Sums(curve.size, out.device, third)
    with torch.no_grad():
        jet = rule.push(call, adjoint if rule.is_curved(call) else None, sums)
    jet = jet if isinstance(jet, Jet) else jet[0]
    assert jet.rows.shape[1:] == out.shape

    _, expected, _ = curve.derivatives(weight, accelerated=False)
    assert_same(sums.hessian, expected)
    if third:
        assert_same(sums.diagonal, torch.einsum("sss->s", curve.derivatives(weight)[2]))
    for other in (weight, x(*out.shape)):
        slope, bend, _ = curve.derivatives(other)
        for tensor, rows, groups in ((slope, jet.dot, jet.first), (bend.diagonal(), jet.ddot, jet.second)):
            if third or rows is jet.dot or tensor is slope:
                got = torch.zeros(curve.size, dtype=torch.float64)
                got[list(groups)] = (rows * other).flatten(1).sum(1) if rows.dim() > 1 else rows * other
                assert_same(got, tensor)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if is_curved(s)], ids=identifier)
def test_all_of_the_third_order(sample):
    op, args, places = sample
    curve = Curve(op, args, places, third=False)
    call, out = curve.call(False), curve.first_result()
    rule = rule_for(call)
    weight, groups = x(*out.shape), tuple(range(curve.size))
    moving = x(curve.size, *out.shape)
    several = isinstance(curve.out, Tensor)
    nothing = (None,) * (0 if several else len(curve.out) - 1)
    sums = Sums(curve.size, out.device, full=True)
    rule.add_third(
        call, weight if several else [weight, *nothing], moving if several else [moving, *nothing], groups, sums
    )
    expected = curve.derivatives(weight)[2]
    bends = torch.stack([curve.derivatives(row)[1] for row in moving])
    expected = expected + bends + bends.permute(1, 0, 2) + bends.permute(1, 2, 0)
    assert_same(sums.third, expected)

    found = rule.sources(call, weight if several else [weight, *nothing])
    hessian = torch.zeros(curve.size, curve.size, dtype=torch.float64)
    for place, (first, rows) in found.items():
        for (i, row), (j, dot) in product(
            zip(first, rows, strict=True), zip(curve.jets[place].first, curve.jets[place].dot, strict=True)
        ):
            hessian[i, j] += (row * dot).sum()
    assert_same(hessian, curve.derivatives(weight)[1])


def test_every_rule_is_tested():
    registered = set(rules._RULES) - {operator.getitem}
    assert registered - {sample[0] for sample in SAMPLES} == set()


def test_a_user_can_add_a_rule(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    sample = (aten.erfinv.default, (small(3, 4),), [0])
    call = Curve(*sample, third=True).call(True)
    assert rule_for(call).kind == "general"
    register_rule(aten.erfinv.default, Elementwise())
    assert rule_for(call).kind == "elementwise"
    test_tangents_and_curvature(sample, True)
