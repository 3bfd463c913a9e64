"""Losses whose second derivatives autograd gets wrong without a word: measured exactly, or refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import AutoEngine, ForwardEngine, NestedEngine, Refusal, nested, rules

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
        got = ns.summarize(loss_fn, model, [batch], direction=u, engine="forward", third=third)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "third derivatives are not finite")  # torch's of logcumsumexp
            expected = ns.summarize(loss_fn, model, [batch], direction=u, engine="nested", third=third)
        torch.testing.assert_close(got.hessian, by_differences(loss_fn, model, batch, u), rtol=1e-7, atol=1e-9)
        finite = expected.third.isfinite()
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


# Gradients that are not those of the loss -----------------------------------------------------------------------------


class Matrices(nn.Module):
    """Two matrices, the first of which has eigenvalues above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(3 * torch.eye(4, dtype=torch.float64) + 0.3 * normal(4, 4, seed=1))
        self.b = nn.Parameter(normal(4, 4, seed=2))


def rows_added(m: Matrices, places: list[int]) -> Tensor:
    h = (m.b @ m.a).sin()
    h[places] += m.a[: len(places)].cos()
    return h


def rows_scattered(m: Matrices, places: list[int], into: Callable[..., Tensor] = Tensor.scatter) -> Tensor:
    return into(m.b.sin(), 0, torch.tensor(places)[:, None].expand(-1, 4), m.a[: len(places)].cos())


NO_GRADIENT = {
    "cholesky": (lambda m: torch.linalg.cholesky(m.a) * m.b, "'a', of shape"),
    "eigenvalues": (lambda m: torch.linalg.eigvalsh(m.a) * m.b, "_linalg_eigh"),
    "eigenvectors": (lambda m: torch.linalg.eigh(m.a)[1].square() * m.b, "_linalg_eigh"),
    "solved by a factor": (lambda m: torch.cholesky_solve(m.b, m.a), "cholesky_solve"),
    "inverse of a factor": (lambda m: torch.cholesky_inverse(m.a) * m.b, "'a', of shape"),
    "pseudo-inverse": (lambda m: torch.linalg.pinv(m.a, hermitian=True) * m.b, "linalg_pinv"),
    "strides": (lambda m: m.b.sin().as_strided_scatter(m.a[:2, :2].exp(), (2, 2), (1, 2)), "not that of the loss"),
    "rows added": (lambda m: rows_added(m, [0, 0]), "index_put"),
    "rows scattered": (lambda m: rows_scattered(m, [0, 0]), "scatter"),
    "rows copied": (lambda m: m.b.sin().index_copy(0, torch.tensor([1, 1]), m.a[:2].cos()), "index_put"),
}
"""Operations whose gradient, as torch has it, is that of something else."""
GRADIENT = {
    "cholesky": lambda m: torch.linalg.cholesky(m.a @ m.a.t()) * m.b,
    "eigenvalues": lambda m: torch.linalg.eigvalsh(m.a + m.a.t()) * m.b,
    "solved by a factor": lambda m: torch.cholesky_solve(m.b, m.a.tril()),
    "inverse of a factor": lambda m: torch.cholesky_inverse(m.a.tril()) * m.b,
    "pseudo-inverse": lambda m: torch.linalg.pinv(m.a + m.a.t(), hermitian=True) * m.b,
    "rows added": lambda m: rows_added(m, [2, 0]),
    "rows scattered": lambda m: rows_scattered(m, [2, 0]),
    "rows scattered, added": lambda m: rows_scattered(m, [0, 0], Tensor.scatter_add),
}


def loss_of(function):
    return lambda m, x: (function(m) * normal(4, 4, seed=3).to(x)).sin().mean() * x.mean()


def slope_by_values(loss_fn, model, batch, u, h=1e-4) -> float:
    """The slope along u from values of the loss alone."""
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    values = []
    for k in range(-3, 4):
        with torch.no_grad():
            for p, p0, v in zip(parameters, before, u, strict=True):
                p.copy_(p0 + k * h * v)
            values.append(loss_fn(model, batch))
    with torch.no_grad():
        for p, p0 in zip(parameters, before, strict=True):
            p.copy_(p0)
    return float(STEPS @ torch.stack(values) / h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", [AutoEngine, ForwardEngine])
@pytest.mark.parametrize("name", NO_GRADIENT)
def test_what_has_no_gradient_of_its_own_is_refused(name, engine, dtype) -> None:
    function, culprit = NO_GRADIENT[name]
    model, batch, loss_fn = Matrices(), torch.ones(4, dtype=torch.float64), loss_of(function)
    u = [normal(4, 4, seed=i) for i in (4, 5)]
    gradients = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, u, strict=True))
    assert abs(slope - slope_by_values(loss_fn, model, batch, u)) > 0.01 * abs(slope)
    model, batch, u = model.to(dtype), batch.to(dtype), [v.to(dtype) for v in u]
    chosen = engine()
    for _ in range(2):
        with pytest.raises(Refusal, match=culprit):
            ns.summarize(loss_fn, model, [batch], direction=u, engine=chosen)


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("name", GRADIENT)
def test_what_is_built_as_it_should_be_is_exact(name) -> None:
    model, batch, loss_fn = Matrices(), torch.ones(4, dtype=torch.float64), loss_of(GRADIENT[name])
    u = [normal(4, 4, seed=i) for i in (4, 5)]
    summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=AutoEngine())
    torch.testing.assert_close(summary.hessian, by_differences(loss_fn, model, batch, u, 1e-4), rtol=1e-6, atol=1e-9)
    single = ns.summarize(
        loss_fn, model.float(), [batch.float()], direction=[v.float() for v in u], engine=AutoEngine()
    )
    torch.testing.assert_close(
        single.hessian, summary.hessian, rtol=1e-3, atol=1e-3 * float(summary.hessian.abs().max())
    )


def test_a_direction_that_stays_among_symmetric_matrices_is_measured() -> None:
    """The loss along it is that of a symmetric matrix, and so autograd's gradient is right."""
    model, batch = Matrices(), torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        model.a.copy_(model.a + model.a.t())
    u = [normal(4, 4, seed=4) + normal(4, 4, seed=4).t(), normal(4, 4, seed=5)]
    loss_fn = loss_of(lambda m: torch.linalg.eigvalsh(m.a) * m.b)
    summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=AutoEngine())
    torch.testing.assert_close(summary.hessian, by_differences(loss_fn, model, batch, u, 1e-4), rtol=1e-6, atol=1e-9)


def test_what_is_detached_or_decided_is_no_objection() -> None:
    """The gradient is then another one by intention."""
    model, batch = network(), normal(6, 4)
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]

    def loss_fn(m, x) -> Tensor:
        h = m(x)
        with torch.no_grad():
            scale = h.square().sum()
        rounded = h + (h.round() - h).detach()
        return (rounded * scale * (h > 0) + h.sum().item() * h).sin().mean()

    slope = sum(
        float((g * v).sum())
        for g, v in zip(torch.autograd.grad(loss_fn(model, batch), list(model.parameters())), u, strict=True)
    )
    assert abs(slope - slope_by_values(loss_fn, model, batch, u)) > 0.01 * abs(slope)
    got, expected = (
        ns.summarize(loss_fn, model, [batch], direction=u, engine=e) for e in (ForwardEngine(), NestedEngine())
    )
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)


def test_kinks_where_the_parameters_are_are_no_objection() -> None:
    """Differences see half a slope there; autograd's is a convention."""
    model, batch = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double(), normal(6, 4)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    for loss_fn in (lambda m, x: (m(x) - 0.3).square().mean(), lambda m, x: m(x).abs().mean()):
        for kind in (torch.float64, torch.float32):
            ns.summarize(
                loss_fn, model.to(kind), [batch.to(kind)], direction=[v.to(kind) for v in u], engine=ForwardEngine()
            )
        model.double()


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_hooks_that_scale_gradients_are_taken_as_they_are(scale) -> None:
    """They mean what they say: the layers below count for so much."""
    model, batch = network(), normal(6, 4)
    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]

    def loss_fn(m, x) -> Tensor:
        h = m[0](x)
        h.register_hook(lambda g: scale * g)
        return (m[2](m[1](h)) - 0.3).square().mean()

    gradients = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    expected = torch.stack([(g * v).sum() for g, v in zip(gradients, u, strict=True)])
    summary = ns.summarize(loss_fn, model, [batch], direction=u, order=1, engine=AutoEngine())
    torch.testing.assert_close(summary.gradient, expected)


# What nested passes give where the forward engine refuses -------------------------------------------------------------


class Refusing(ForwardEngine):
    def measure(self, *_):
        raise Refusal("for a reason")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(normal(3, 4, seed=1)), nn.Parameter(normal(3, 1, seed=2))


def natively(m: Scaled) -> Tensor:
    """Torch's second derivatives of it lack terms."""
    return torch.ops.aten._weight_norm_interface(m.v, m.g, 0)[0]


def plainly(m: Scaled) -> Tensor:
    return m.v / m.v.norm(dim=1, keepdim=True) * m.g


def test_three_ways_to_second_derivatives() -> None:
    """Autograd's are wrong and those of the recorded operations are not, as differences of the gradient tell."""
    model, x, u = Scaled(), normal(6, 4), [normal(3, 4, seed=3), normal(3, 1, seed=4)]
    for curve in (Tensor.sin, lambda h: h.sin() * h.detach()):
        loss_fn, plain = (
            lambda m, x, f=f, w=w: f(x @ w(m).t()).mean() for f, w in ((curve, natively), (curve, plainly))
        )
        summary = ns.summarize(loss_fn, model, [x], direction=u, engine=AutoEngine())
        expected = ns.summarize(plain, model, [x], direction=u, engine=NestedEngine())
        torch.testing.assert_close(summary.hessian, expected.hessian)
        torch.testing.assert_close(summary.third, expected.third)


class HiddenSlope(torch.autograd.Function):
    """The slope of a sine: right, and what is differentiated further lacks terms."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx, g):
        return -g * ctx.saved_tensors[0].sin().detach()


class SineOfHiddenSlope(torch.autograd.Function):
    """Right up to second derivatives."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * HiddenSlope.apply(ctx.saved_tensors[0])


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize(
    ("function", "order", "dtype"),
    [
        (KeptResult, 2, torch.float64),
        (KeptResult, 2, torch.float32),
        (SineOfHiddenSlope, 3, torch.float64),  # third derivatives drown in the roundings of single precision
    ],
)
def test_nested_passes_in_place_of_the_forward_engine_are_held_to_differences(
    function, order, dtype, monkeypatch
) -> None:
    """As if torch had made these functions."""
    monkeypatch.setattr(nested, "own_derivatives", lambda _: [])
    model, batch = network().to(dtype), normal(6, 4).to(dtype)
    u = [normal(*p.shape, seed=i).to(dtype) for i, p in enumerate(model.parameters())]
    loss_fn = lambda m, x: (function.apply(m(x)) - 0.3).square().mean()  # noqa: E731
    right = lambda m, x: ((m(x).tanh() if order == 2 else m(x).sin()) - 0.3).square().mean()  # noqa: E731
    engines = NestedEngine(), AutoEngine(Refusing())
    got, expected = (ns.summarize(f, model, [batch], direction=u, engine=engines[0]) for f in (loss_fn, right))
    silent = (got.hessian, expected.hessian) if order == 2 else (got.third, expected.third)
    assert not torch.allclose(*silent, rtol=0.01)
    for _ in range(2):
        with pytest.raises(Refusal, match="second" if order == 2 else "third"):
            ns.summarize(loss_fn, model, [batch], direction=u, engine=engines[1])
    if order == 3:
        got, expected = (
            ns.summarize(f, model, [batch], direction=u, engine=engines[1], order=2) for f in (loss_fn, right)
        )
        torch.testing.assert_close(got.hessian, expected.hessian)


@pytest.mark.filterwarnings("ignore:measured by nested")
def test_differences_are_taken_once_for_a_program() -> None:
    model, batch, calls = network(), normal(6, 4), []

    def loss_fn(m, x) -> Tensor:
        calls.append(None)
        return (m(x) - 0.3).sin().square().mean()

    u = [normal(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    for engine in (AutoEngine(), AutoEngine(Refusing())):
        counts = []
        for _ in range(3):
            calls.clear()
            ns.summarize(loss_fn, model, [batch], direction=u, engine=engine)
            counts.append(len(calls))
        assert counts[1:] == [1, 1]
        assert counts[0] <= 2 + 2 * 7


# Draws, and losses that are infinite ----------------------------------------------------------------------------------


DRAWS = {
    "coins": lambda h: torch.bernoulli(h.sigmoid()),
    "coins, straight through": lambda h: torch.bernoulli(h.sigmoid()) - h.sigmoid().detach() + h.sigmoid(),
    "noise around": lambda h: torch.normal(h, 0.1),
    "noise of a width": lambda h: torch.normal(h, h.exp()),
    "counts": lambda h: torch.poisson(h.exp()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_without_slopes_are_constants(name) -> None:
    model, batch = network(), normal(6, 4)
    loss_fn = lambda m, x: (DRAWS[name](m(x)) * m(x).cos()).square().mean()  # noqa: E731
    u = list(model.parameters())
    got, expected = (
        ns.summarize(loss_fn, model, [batch], direction=u, engine=e()) for e in (ForwardEngine, NestedEngine)
    )
    torch.testing.assert_close(got.gradient, expected.gradient)
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)


@pytest.mark.filterwarnings("ignore:measured by nested")
@pytest.mark.parametrize("kind", [torch.distributions.Gamma, torch.distributions.Beta])
def test_draws_with_slopes_are_refused_with_what_to_draw_instead(kind) -> None:
    model = network()
    loss_fn = lambda m, x: kind(m(x).exp(), m(x).exp()).rsample().mean()  # noqa: E731
    with pytest.raises(Refusal, match=r"(_standard_gamma|_sample_dirichlet)\S* draws a tensor.*or detach the draw"):
        ns.summarize(loss_fn, model, [normal(6, 4)], direction=list(model.parameters()), engine=AutoEngine())
    loss_fn = lambda m, x: (kind(m(x).exp(), m(x).exp()).sample() * m(x)).mean()  # noqa: E731
    summary = ns.summarize(loss_fn, model, [normal(6, 4)], direction=list(model.parameters()), engine=ForwardEngine())
    assert summary.is_finite()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_loss_is_called_so_and_says_nothing_of_the_next(engine) -> None:
    """Labels that do not fit, for which torch's gradient is not that of the operations."""
    model, engine = network(), engine()
    u = list(model.parameters())

    def loss_fn(m, labels):
        scores = m(normal(12, 4)).view(6, 2, 4).log_softmax(-1)
        return nn.functional.ctc_loss(scores, labels, torch.tensor([6, 6]), torch.tensor([4, 4]))

    fits, does_not = torch.tensor([[1, 2, 1, 2]] * 2), torch.tensor([[1, 1, 1, 1]] * 2)
    with pytest.raises(ValueError, match="the loss is inf"):
        ns.summarize(loss_fn, model, [does_not], direction=u, engine=engine)
    if isinstance(engine, NestedEngine):  # which does not know the operation
        return
    summary = ns.summarize(loss_fn, model, [fits], direction=u, engine=engine)
    torch.testing.assert_close(summary.hessian, by_differences(loss_fn, model, fits, u), rtol=1e-6, atol=1e-8)
