"""Random small programs: what is measured is exact or refused by name, and nothing of the user's changes."""

from __future__ import annotations

import contextlib
import warnings
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import newton_summary as ns
from newton_summary.measure import Refusal

SAMPLES, WIDTH = 6, 4


class Sine(torch.autograd.Function):
    """A function of somebody's own, right and twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Kernel(torch.autograd.Function):
    """As kernels written by hand have it: right, and differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Through(torch.autograd.Function):
    """A straight-through clamp."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Model(nn.Module):
    """Layers for the pieces of a program to use, with state that they change."""

    def __init__(self, pieces: list[str]) -> None:
        super().__init__()
        self.pieces = pieces
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in pieces])
        self.batch_norm, self.layer_norm = nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(5, WIDTH, max_norm=0.7)
        self.recurrent = nn.GRU(WIDTH, WIDTH)
        self.generator = torch.Generator().manual_seed(3)
        self.calls, self.history, self.scale = 0, [], 0.9
        self.captured = list(self.layers.parameters())  # not by the names that modules have

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = x
        for piece, layer in zip(self.pieces, self.layers, strict=True):
            h = PIECES[piece](self, layer, h)
            self.history.append(piece)
        return h


def in_place(m, layer, h):
    h = layer(h)
    h.mul_(1.5).add_(0.3)
    h.sigmoid_()
    return h


def slices_assigned(m, layer, h):
    out = torch.zeros(len(h), WIDTH, dtype=h.dtype)
    out[:, :2] = layer(h)[:, 2:]
    out[:, 2] = h[:, 0].sin()
    out[0].mul_(2)
    return out + h


def views_written(m, layer, h):
    h = layer(h)
    left, right = h[:, :2], h[:, 1:3]
    left.mul_(2)
    right.add_(left.sum(1, keepdim=True).sin())
    h[0] = left[1].sum()
    return h.t_().tanh().t()


def decided(m, layer, h):
    h = layer(h)
    return h.sin() if h.sum() > 0 else h.cos() * h


def masked(m, layer, h):
    h = layer(h).tanh()
    return h + h[h[:, 0] > 0].square().sum() / (1 + int((h[:, 0] > 0).sum()))


def repeated(m, layer, h):
    for _ in range(1 + int(h.detach().abs().sum()) % 3):
        h = layer(h).tanh()
    return h


def penalty(m, layer, h):
    x = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).tanh().square().sum(), x, create_graph=True)
    return h * slope.square().mean() + layer(h)


def inner_step(m, layer, h):
    loss = layer(h).tanh().square().mean()
    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], create_graph=True)
    return F.linear(h, layer.weight - 0.3 * weight, layer.bias - 0.3 * bias)


def attention(m, layer, h):
    q = layer(h).view(1, 1, SAMPLES, WIDTH)
    mask = torch.ones(SAMPLES, SAMPLES, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, q, h.view(1, 1, SAMPLES, WIDTH), mask).view(SAMPLES, WIDTH) + h


def looked_up(m, layer, h):
    return layer(h) + m.table(torch.tensor([0, 1, 1, 2, 3, 4]))


def noisy(m, layer, h):
    return layer(h) * (1 + 0.1 * torch.randn(h.shape, generator=m.generator, dtype=h.dtype))


def dropped(m, layer, h):
    return F.dropout(layer(h).sin(), 0.3)


def without_gradient(m, layer, h):
    with torch.no_grad():
        size = layer(h).norm()
    return layer(h) / (1 + size) + h


def overwritten(m, layer, h):
    h = layer(h)
    h.detach().clamp_(-1, 1)
    return h


def recurrent(m, layer, h):
    return m.recurrent(layer(h).unsqueeze(1))[0].squeeze(1)


PIECES: dict[str, Any] = {
    "linear": lambda m, layer, h: layer(h),
    "tanh": lambda m, layer, h: layer(h).tanh(),
    "in place": in_place,
    "slices": slices_assigned,
    "views": views_written,
    "decided": decided,
    "masked": masked,
    "repeated": repeated,
    "penalty": penalty,
    "inner step": inner_step,
    "attention": attention,
    "table": looked_up,
    "noise": noisy,
    "dropout": dropped,
    "no gradient": without_gradient,
    "overwritten": overwritten,
    "recurrent": recurrent,
    "batch norm": lambda m, layer, h: m.batch_norm(layer(h)),
    "layer norm": lambda m, layer, h: m.layer_norm(layer(h)),
    "item": lambda m, layer, h: layer(h) * (1 + h.mean().item()),
    "detached": lambda m, layer, h: layer(h) * h.detach(),
    "attribute": lambda m, layer, h: layer(h) * m.scale,
    "sine": lambda m, layer, h: Sine.apply(layer(h)),
    "kernel": lambda m, layer, h: Kernel.apply(layer(h)),
    "through": lambda m, layer, h: Through.apply(layer(h)) + h,
    "checkpoint": lambda m, layer, h: checkpoint(lambda x: m.layer_norm(layer(x)), h, use_reentrant=False),
    "captured": lambda m, layer, h: h + sum(p.square().sum() for p in m.captured),
    "tied": lambda m, layer, h: F.linear(layer(h).sin(), m.captured[0].t()),
    "mapped": lambda m, layer, h: torch.func.vmap(lambda row: layer(row).sin())(h),
    "complex": lambda m, layer, h: torch.fft.fft(layer(h)).abs() + h,
    "sorted": lambda m, layer, h: layer(h).sort(1)[0].cumsum(1),
    "single": lambda m, layer, h: layer(h).float().sin().double(),
    "softmax": lambda m, layer, h: layer(h).softmax(-1) * h,
    "pairs": lambda m, layer, h: torch.einsum("ij,kj->ik", layer(h), h) @ h / SAMPLES,
    "concatenated": lambda m, layer, h: torch.cat([layer(h)[:3], h[3:]]).flip(0),
}
CONSTANTS = {"table", "item", "detached", "no gradient", "through", "overwritten", "penalty"}
"""Pieces in which autograd takes for a constant what moves: differences of the gradient are no reference."""


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Encoding(UserDict):
    pass


def popped(model, batch):
    y = batch.pop("y")
    return (model(batch["x"].mul_(0.5)) - y).square().mean()


FORMS: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda x, y: (x, y), lambda m, b: (m(b[0]) - b[1]).square().mean()),
    "mapping": (lambda x, y: Encoding(x=x, y=y, name="a"), popped),
    "dataclass": (Sample, lambda m, b: (m(b.x) - b.y).square().mean() + 3),
}


def slopes_at(model, loss_fn, batch, u, moved, eta, seed):
    """The slope of every group after some have moved by η u, by one backward pass of a copy."""
    twin = copied(model)
    parameters = list(twin.parameters())
    with torch.no_grad():
        for group in moved:
            parameters[group].add_(eta * u[group])
    torch.manual_seed(seed)
    gradients = torch.autograd.grad(loss_fn(twin, batch()), parameters, allow_unused=True)
    return torch.stack([torch.zeros(()) if g is None else (g * v).sum() for g, v in zip(gradients, u, strict=True)])


def copied(model):
    """A model of the same values whose pieces capture its own parameters."""
    twin = Model(model.pieces).double()
    twin.load_state_dict(model.state_dict())
    twin.generator.set_state(model.generator.get_state())
    return twin.train(model.training)


def differences(model, loss_fn, batch, u, moved, seed, h):
    """The sum of some columns of H̄, by fourth-order differences of the gradient."""

    def slopes(k):
        return slopes_at(model, loss_fn, batch, u, moved, k * h, seed)

    return (8 * (slopes(1) - slopes(-1)) - (slopes(2) - slopes(-2))) / (12 * h)


def by_autograd(model, loss_fn, batch, u, seed):
    """H̄ by double backward passes of a copy."""
    twin = copied(model)
    parameters = list(twin.parameters())
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH), _no_fused_recurrence():
        first = torch.autograd.grad(loss_fn(twin, batch()), parameters, create_graph=True, allow_unused=True)
        rows = []
        for g, v in zip(first, u, strict=True):
            row = [None] * len(u)
            if g is not None and g.requires_grad:
                row = torch.autograd.grad((g * v).sum(), parameters, retain_graph=True, allow_unused=True)
            rows.append([0.0 if r is None else float((r * w).sum()) for r, w in zip(row, u, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@contextlib.contextmanager
def _no_fused_recurrence():
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def state_of(model, batch):
    values = [t.clone() for t in (*model.state_dict().values(), *vars_of(batch))]
    generators = [model.generator.get_state().tolist(), torch.get_rng_state().tolist()]
    return values, (model.calls, list(model.history), *generators)


def vars_of(batch):
    if isinstance(batch, UserDict):
        return [batch["x"], batch["y"]]
    return list(batch) if isinstance(batch, tuple) else [batch.x, batch.y]


def check(pieces, form, training, seed, engine) -> bool:
    """Measures twice, on a new and on a known program; whether it was measured, not refused."""
    torch.manual_seed(seed)
    model = Model(pieces).double().train(training)
    make, loss_fn = FORMS[form]
    x, y = torch.randn(2, SAMPLES, WIDTH, dtype=torch.float64)
    batch = make(x.clone(), y.clone())
    u = [torch.randn_like(p) for p in model.parameters()]
    torch.manual_seed(seed + 1)
    before = state_of(model, batch)
    for _ in range(2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                summary = ns.summarize(loss_fn, model, [batch], direction=u, order=2, engine=engine)
        except Refusal:
            summary = None
        values, others = state_of(model, batch)
        assert others == before[1]
        assert all(torch.equal(a, b) for a, b in zip(before[0], values, strict=True))
    if summary is None:
        return False
    again = lambda: make(x.clone(), y.clone())  # noqa: E731
    hessian, tolerance = summary.hessian, 1e-2 if "single" in pieces else 1e-5
    if "kernel" not in pieces:
        assert distance(hessian, by_autograd(model, loss_fn, again, u, seed + 1)) < tolerance
    if not CONSTANTS & set(pieces):
        for moved in (range(len(u)), [0], [len(u) - 1]):
            got, scale = hessian[:, list(moved)].sum(1), hessian.abs().max()
            by_steps = [differences(model, loss_fn, again, u, moved, seed + 1, h) for h in (1e-4, 1e-6)]
            assert min(distance(got, e, scale) for e in by_steps) < tolerance  # one of them may cross a kink
    return True


def distance(got, expected, scale=0.0) -> float:
    return float((got - expected).abs().max() / (max(expected.abs().max(), scale) + 1e-8))


PROGRAMS = {
    "pieces": st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4),
    "form": st.sampled_from(sorted(FORMS)),
    "training": st.booleans(),
    "seed": st.integers(0, 1000),
    "engine": st.sampled_from(["auto", "forward"]),
}
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],  # to shrink a program takes minutes
}


@settings(max_examples=40, **SETTINGS)
@given(**PROGRAMS)
def test_a_random_program_is_measured_exactly_or_refused(pieces, form, training, seed, engine) -> None:
    check(pieces, form, training, seed, engine)


@pytest.mark.slow
@settings(max_examples=400, **SETTINGS)
@given(**PROGRAMS)
def test_many_random_programs(pieces, form, training, seed, engine) -> None:
    check(pieces, form, training, seed, engine)


REFUSED = {"complex", "through"}
"""What the forward engine refuses: complex numbers, and derivatives that are not the function's."""


@pytest.mark.parametrize("piece", sorted(PIECES))
def test_each_piece_is_measured(piece) -> None:
    assert check([piece], "tuple", True, 0, "auto")
    assert check([piece, "tanh"], "mapping", False, 1, "forward") or piece in REFUSED
