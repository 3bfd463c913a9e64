"""Losses whose second derivatives autograd gets wrong without a word: measured exactly, or refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import AutoEngine, ForwardEngine, NestedEngine, Refusal, rules

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # torch's own words, once in a process

ENGINES = [AutoEngine, ForwardEngine, NestedEngine]
STEPS = torch.tensor([-1.0, 9, -45, 0, 45, -9, 1], dtype=torch.float64) / 60


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).double()


def by_differences(loss_fn, model, batch, u, h=1e-3) -> Tensor:
    """H̄ from differences of the gradient."""
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]

    def slopes(group, distance) -> Tensor:
        with torch.no_grad():
            parameters[group].copy_(before[group] + distance * u[group])
        gradients = torch.autograd.grad(loss_fn(model, batch), parameters)
        with torch.no_grad():
            parameters[group].copy_(before[group])
        return torch.stack([(g * v).sum() for g, v in zip(gradients, u, strict=True)])

    return torch.stack(
        [STEPS @ torch.stack([slopes(s, k * h) for k in range(-3, 4)]) / h for s in range(len(parameters))]
    )


# Functions whose backward pass hides what it depends on ---------------------------------------------------------------


class KeptResult(torch.autograd.Function):
    """As is often written: the result is kept without its graph."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.y = y.detach()
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y.square())


class WithoutGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return g * ctx.saved_tensors[0].cos()


class InNumpy(torch.autograd.Function):
    """Its forward pass cannot be recorded, either."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()))


class InNumpyAndRight(InNumpy):
    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def attended_by_sparse_scores(h: Tensor) -> Tensor:
    places = torch.tensor([[0, 1, 2, 2], [1, 0, 2, 1]])
    return torch.sparse.softmax(torch.sparse_coo_tensor(places, h[0], (6, 6)), 1).to_dense()


def multiplied_by_sparse_weights(h: Tensor) -> Tensor:
    places = torch.tensor([[0, 1, 2, 2], [1, 0, 2, 2]])
    return torch.sparse.mm(torch.sparse_coo_tensor(places, h[0], (6, 6)), h)


REFUSED_BY_NESTED = {
    "a kept result": (KeptResult.apply, "KeptResult"),
    "gradients off": (WithoutGradients.apply, "WithoutGradients"),
    "numpy": (InNumpy.apply, "InNumpy"),
    "a sparse softmax": (attended_by_sparse_scores, "SparseSoftmax"),
    "sparse weights": (multiplied_by_sparse_weights, "not symmetric"),
}
EXACT_BY_FORWARD = {"a kept result", "gradients off"}


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("name", REFUSED_BY_NESTED)
def test_what_is_hidden_from_autograd_is_exact_or_refused(name, engine) -> None:
    function, culprit = REFUSED_BY_NESTED[name]
    model, batch, chosen = network(), normal(6, 4), engine()
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    loss_fn = lambda m, x: (function(m(x)) - 0.3).square().mean()  # noqa: E731
    for _ in range(2):
        if name in EXACT_BY_FORWARD and engine is not NestedEngine:
            summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=chosen)
            expected = by_differences(loss_fn, model, batch, u)
            torch.testing.assert_close(summary.hessian, expected, rtol=1e-7, atol=1e-9)
        elif engine is ForwardEngine:
            with pytest.raises(Refusal):
                ns.summarize(loss_fn, model, [batch], direction=u, engine=chosen)
        else:
            with pytest.raises(Refusal, match=culprit):
                ns.summarize(loss_fn, model, [batch], direction=u, engine=chosen)


def test_a_right_function_that_cannot_be_recorded_is_measured() -> None:
    model, batch = network(), normal(6, 4)
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    loss_fn = lambda m, x: (InNumpyAndRight.apply(m(x)) - 0.3).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match="InNumpyAndRight"):
        summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=AutoEngine())
    torch.testing.assert_close(summary.hessian, by_differences(loss_fn, model, batch, u), rtol=1e-7, atol=1e-9)


def test_what_is_detached_stays_a_constant_in_every_order() -> None:
    """Differences of the gradient are no judge of it."""
    model, batch = network(), normal(6, 4)
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    constant = model(batch).detach()
    loss_fn = lambda m, x: (m(x) * m(x).detach()).sin().mean()  # noqa: E731
    known = lambda m, x: (m(x) * constant).sin().mean()  # noqa: E731
    expected = by_differences(known, model, batch, u)
    for engine in ("forward", "nested"):
        summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=engine)
        torch.testing.assert_close(summary.hessian, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("engine", ["auto", "nested"])
def test_hooks_that_make_of_a_gradient_none(engine) -> None:
    def loss_fn(model, x) -> Tensor:
        h = model[:2](x)
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return (model[2](h) - 0.3).square().mean()

    with pytest.raises(Refusal, match="the gradient of nothing"):
        ns.summarize(loss_fn, network(), [normal(6, 4)], direction=list(network().parameters()), engine=engine)


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("engine", ["auto", "nested"])
def test_gradients_that_are_scaled_by_frequency(engine) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = torch.tensor([0, 1, 1, 2])
    with pytest.raises(Refusal, match="scale_grad_by_freq"):
        ns.summarize(lambda m, x: m(x).square().mean(), model, [batch], engine=engine)


# What torch cannot differentiate twice --------------------------------------------------------------------------------


def chosen_by_cond(h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("function", [chosen_by_cond, lambda h: torch.special.zeta(h.exp() + 2, 2.0)])
def test_errors_of_torch_are_refusals(function) -> None:
    loss_fn = lambda m, x: function(m(x)).square().mean()  # noqa: E731
    for engine in ENGINES:
        model = network()
        with pytest.raises(Refusal) as refusal:
            ns.summarize(loss_fn, model, [normal(6, 4)], direction=list(model.parameters()), engine=engine())
        assert not re.search("0x[0-9a-f]{6}", str(refusal.value))  # the same reason at every measurement


@pytest.mark.parametrize("engine", ["auto", "forward", "nested"])
def test_a_complex_loss_is_refused(engine) -> None:
    model = network()
    with pytest.raises(ValueError, match="must be a real number"):
        ns.summarize(
            lambda m, x: torch.fft.fft(m(x)).sum(),
            model,
            [normal(6, 4)],
            direction=list(model.parameters()),
            engine=engine,
        )


def test_what_is_refused_for_the_third_order_is_measured_up_to_the_second(monkeypatch) -> None:
    class Twice(rules.General):
        def push(self, call, adjoint, sums):
            if call.third:
                raise NotImplementedError
            return super().push(call, adjoint, sums)

    monkeypatch.setitem(rules._RULES, torch.ops.aten.special_i0e.default, Twice())
    model, batch, engine = network(), normal(6, 4), ForwardEngine()
    u = list(model.parameters())
    loss_fn = lambda m, x: torch.special.i0e(m(x)).sin().mean()  # noqa: E731
    with pytest.raises(Refusal, match="i0e"):
        ns.summarize(loss_fn, model, [batch], direction=u, engine=engine)
    got = ns.summarize(loss_fn, model, [batch], direction=u, engine=engine, order=2)
    torch.testing.assert_close(got.hessian, by_differences(loss_fn, model, batch, u), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("function", [torch.special.erfcx, lambda x: x.logcumsumexp(1)])
def test_values_that_are_expanded(function) -> None:
    model, batch = network(), normal(6, 4)
    u = list(model.parameters())
    loss_fn = lambda m, x: function(m(x)[0].unsqueeze(1).expand(4, 3)).sin().mean()  # noqa: E731
    for third in ("diagonal", "full"):
        got, expected = (
            ns.summarize(loss_fn, model, [batch], direction=u, engine=e, third=third) for e in ("forward", "nested")
        )
        torch.testing.assert_close(got.hessian, by_differences(loss_fn, model, batch, u), rtol=1e-7, atol=1e-9)
        finite = expected.third.isfinite()  # torch's third derivative of logcumsumexp is not
        torch.testing.assert_close(got.third[finite], expected.third[finite], rtol=1e-8, atol=1e-9)
        assert bool(got.third.isfinite().all())


@pytest.mark.parametrize("engine", ["forward", "nested"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_constants(layout, engine) -> None:
    sparse = torch.eye(6, dtype=torch.float64).roll(1, 0).mul(2)
    sparse = sparse.to_sparse() if layout == "coo" else sparse.to_sparse_csr()
    model, batch = network(), normal(6, 4)
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    multiply = torch.sparse.mm if layout == "coo" else torch.matmul
    loss_fn = lambda m, x: multiply(sparse, m(x)).sin().mean()  # noqa: E731
    summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=engine)
    torch.testing.assert_close(summary.hessian, by_differences(loss_fn, model, batch, u), rtol=1e-7, atol=1e-9)


# Views of parameters --------------------------------------------------------------------------------------------------


class Viewed(nn.Module):
    """It computes with views of its parameter that were made before."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(4, 4) / 2)
        self.views = [self.w[:2], self.w[2:]]

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.views[0].t()).tanh() @ self.views[1]


def test_the_loss_along_a_step_moves_views_made_before() -> None:
    model, x = Viewed(), normal(6, 4)
    loss_fn = lambda m, x: (m(x) - 0.3).square().mean()  # noqa: E731
    u, before = normal(4, 4, seed=1), model.w.detach().clone()
    losses = ns.measure.along.losses_along(loss_fn, model, x, [0.0, 0.1], direction=[u])
    expected = []
    for size in (0.0, 0.1):
        with torch.no_grad():
            model.w.copy_(before - size * u)
        expected.append(loss_fn(model, x).item())
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] != expected[1]


# Called past the functions that are composed -------------------------------------------------------------------------

NATIVE = {
    "layer": lambda y: torch.native_layer_norm(y, [4], None, None, 1e-5)[0],
    "batch": lambda y: torch.native_batch_norm(y, None, None, None, None, True, 0.1, 1e-5)[0],
    "batch, as exported": lambda y: torch.ops.aten._batch_norm_with_update(
        y, torch.ones(4).double(), None, torch.zeros(4).double(), torch.ones(4).double(), 0.1, 1e-5
    )[0],
}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("engine", [ForwardEngine, NestedEngine])
def test_native_normalisations_are_exact_or_refused_in_the_third_order(name, engine) -> None:
    model, x = network(), normal(6, 4, seed=1)

    def by(normalise):
        return lambda m, b: (normalise(m(b)) * normal(6, 4, seed=2)).sin().mean()

    def plain(y):
        dims = [1] if name == "layer" else [0]
        mean = y.mean(dims, keepdim=True)
        return (y - mean) / ((y - mean).square().mean(dims, keepdim=True) + 1e-5).sqrt()

    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    expected = ns.summarize(by(plain), model, [x], direction=u, engine=NestedEngine())
    second = ns.summarize(by(NATIVE[name]), model, [x], direction=u, order=2, engine=NestedEngine())
    torch.testing.assert_close(second.hessian, expected.hessian)
    if engine is NestedEngine or name == "batch, as exported":
        with pytest.raises(Refusal, match="lack terms" if engine is NestedEngine else "batch_norm_with_update"):
            ns.summarize(by(NATIVE[name]), model, [x], direction=u, engine=engine())
    else:
        got = ns.summarize(by(NATIVE[name]), model, [x], direction=u, engine=engine())
        torch.testing.assert_close(got.third, expected.third)
