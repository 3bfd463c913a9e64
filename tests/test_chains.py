"""Operations on every entry of one value as one curve, against torch's own derivatives of them and nested passes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine, Loss, rules
from newton_summary.measure.rules import TABLE, Call, Elementwise, register_rule
from newton_summary.measure.rules.chain import Chain, Earlier, Link, can_link

aten = torch.ops.aten


def gelu_of_gpt2(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


CURVES = {
    "gelu of GPT-2": gelu_of_gpt2,
    "gelu of CLIP": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "bell": lambda x: torch.exp(-x * x) * torch.sin(3 * x) - x / 2 + 1,
    "cap": lambda x: 5 * torch.tanh((x - 1) / 5),
    "read in between": lambda x: torch.tanh(2 * x.sin()) + x.sin() * x.sin().sum(),
    "twice": lambda x: torch.tanh(x.exp() * 0.1) + torch.cos(x.exp() * 0.1),
    "kinked": lambda x: F.leaky_relu(x * x - 1).exp() * x,
}


class Layers(nn.Module):
    def __init__(self, curve):
        super().__init__()
        torch.manual_seed(0)
        self.curve = curve
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((3, 5), (5, 4)))

    def forward(self, x):
        for layer in self.layers:
            x = self.curve(layer(x))
        return x


def loss_fn(model, batch):
    return model(batch).square().mean()


def kinds_of(curve):
    model, engine = Layers(curve).double(), ForwardEngine()
    ns.summarize(loss_fn, model, [torch.randn(6, 3, dtype=torch.float64)], engine=engine)
    return engine.kinds(Loss(loss_fn, model))


@pytest.mark.parametrize("third", ["diagonal", "full"])
@pytest.mark.parametrize("name", CURVES)
def test_chains_agree_with_nested_passes(name, third):
    model, batch = Layers(CURVES[name]).double(), torch.randn(6, 3, dtype=torch.float64)
    got, expected = (
        ns.summarize(loss_fn, model, [batch], order=3, third=third, engine=engine) for engine in ("forward", "nested")
    )
    for one, other in ((got.hessian, expected.hessian), (got.third, expected.third)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


def test_what_acts_on_every_entry_is_one_operation():
    kinds = kinds_of(gelu_of_gpt2)
    assert not {"tanh.default", "pow.Tensor_Scalar", "mul.Tensor"} & set(kinds)
    assert {kind for op, kind in kinds.items() if "pow.Tensor_Scalar → " in op} == {"elementwise"}


def test_a_rule_of_somebodys_own_is_asked(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    asked = []

    def slopes(call, order):
        asked.append(order)
        return TABLE[aten.tanh.default].derivatives(call, order)

    register_rule(aten.tanh.default, Elementwise(slopes))
    kinds = kinds_of(lambda x: x.sin().tanh().cos())
    assert asked
    assert "tanh.default" in kinds


def test_a_result_that_is_read_in_between_ends_a_chain():
    kinds = kinds_of(CURVES["read in between"])
    assert "sin.default" in kinds
    assert any(" → " in op for op in kinds)


def test_a_large_change_of_units_is_no_link():
    kinds = kinds_of(lambda x: torch.tanh(1e-20 * x).sin() * 1e20)
    assert "tanh.default → sin.default" in kinds


UNITS = {
    "first": lambda x, unit: gelu_of_gpt2(x / unit),
    "read twice": lambda x, unit: x / unit * torch.tanh(x * (1 / unit)),
    "later": lambda x, unit: torch.tanh(torch.sin(x / unit * 1e-13) * 1e13) + x / unit,
}


@pytest.mark.parametrize("curve", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("unit", [1e14, 1e20])
def test_units_do_not_matter_in_single_precision(curve, unit):
    batch = torch.randn(6, 3)
    found = []
    for size in (1.0, unit):
        model = Layers(lambda x, size=size: curve(x, size))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(size)
        direction = [p.detach().clone() for p in model.parameters()]
        found.append(ns.summarize(loss_fn, model, [batch], order=3, direction=direction, engine="forward"))
    torch.testing.assert_close(found[1].hessian, found[0].hessian, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1].third, found[0].third, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu of GPT-2", "cap"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_squares_and_cubes_of_tangents_in_half_precision_are_numbers(kind, name):
    model, batch = Layers(CURVES[name]).to(kind), torch.randn(6, 3).to(kind)
    exact = copy.deepcopy(model).double()
    direction = [0.01 * p.detach() for p in model.parameters()]
    found = ns.summarize(loss_fn, model, [batch], order=3, direction=direction, engine="forward")
    wide = [u.double() for u in direction]
    expected = ns.summarize(loss_fn, exact, [batch.double()], order=3, direction=wide, engine="forward")
    for one, other in ((found.hessian, expected.hessian), (found.third, expected.third)):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_curve_that_turns_fast_is_measured_in_half_precision(kind):
    model = Layers(lambda x: (x * 90).sin() * (x * 90).cos()).to(kind)
    direction = [0.1 * p.detach() for p in model.parameters()]
    ns.summarize(loss_fn, model, [torch.randn(6, 3).to(kind)], direction=direction, order=2, engine="forward")


def test_a_slope_that_is_too_steep_to_be_cubed_counts_for_nothing_where_the_curve_is_flat():
    chain = Chain([Link(aten.exp.default, (Earlier(0),), {}), Link(aten.tanh.default, (Earlier(1),), {})])
    x = torch.tensor([50.0])  # exp is 5e21, its cube no number in single precision; tanh is 1
    slopes = chain.derivatives(Call(chain, (x,), {}, chain(x), {}), 3)
    assert all(float(slope) == 0 for slope in slopes)


ONE = [(aten.tanh.default, ()), (aten.sin.default, ()), (aten.silu.default, ()), (aten.sigmoid.default, ())]
ONE += [(aten.square.default, ()), (aten.pow.Tensor_Scalar, (3,)), (aten.gelu.default, ()), (aten.neg.default, ())]
ONE += [(aten.mul.Tensor, (-0.7,)), (aten.mul.Scalar, (1.3,)), (aten.div.Tensor, (1.5,)), (aten.div.Scalar, (-2.0,))]
ONE += [(aten.add.Scalar, (0.3,)), (aten.sub.Scalar, (0.3,)), (aten.add.Tensor, (0.5,)), (aten.sub.Tensor, (0.5,))]
TWO = [(aten.mul.Tensor, {}), (aten.add.Tensor, {"alpha": 0.5}), (aten.sub.Tensor, {}), (aten.sub.Tensor, {"alpha": 2})]


@st.composite
def chains(draw):
    links = []
    for number in range(draw(st.integers(1, 7))):
        earlier = st.integers(0, number).map(Earlier)
        if draw(st.booleans()):
            op, rest = draw(st.sampled_from(ONE))
            links.append(Link(op, (draw(earlier), *rest), {}))
        else:
            op, kwargs = draw(st.sampled_from(TWO))
            links.append(Link(op, (draw(earlier), draw(earlier)), kwargs))
    return Chain(links)


def test_a_division_by_zero_is_no_link():
    assert can_link(aten.div.Tensor, (None, 2.0), [True, False], {})
    assert not can_link(aten.div.Tensor, (None, 0.0), [True, False], {})


@given(chains(), st.integers(0, 2**31))
def test_the_derivatives_are_those_of_the_operations_one_after_another(chain, seed):
    x = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    y = chain(x)
    got = chain.derivatives(Call(chain, (x.detach(),), {}, y.detach(), {}), 3)
    for slope in got:
        y = torch.autograd.grad(y.sum(), x, create_graph=True)[0] if y.requires_grad else torch.zeros_like(x)
        expected = y.detach()
        found = torch.zeros_like(expected) if slope is None else slope.expand_as(expected)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * max(1.0, float(expected.abs().max())))
