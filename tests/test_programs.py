"""Random small programs: what is measured is exact or refused by name, and nothing of the user's changes."""

from __future__ import annotations

import contextlib
import warnings
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
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


def solved(m, layer, h):
    return torch.linalg.solve(layer.weight + 3 * torch.eye(WIDTH, dtype=h.dtype), h.sin().t()).t() + layer.bias


def factored(m, layer, h):
    return h @ torch.linalg.cholesky(layer.weight @ layer.weight.t() + torch.eye(WIDTH, dtype=h.dtype)) + layer.bias


def rows_written(m, layer, h):
    out = h.clone()
    out[[4, 0]] = layer(h)[:2].sin()
    out[:, [1, 3]] *= 2
    return out.index_copy(0, torch.tensor([2]), layer(h)[5:])


def rows_summed(m, layer, h):
    return torch.zeros_like(h).index_add(0, torch.tensor([1, 1, 0, 5, 3, 1]), layer(h).sin()) + h


def scattered(m, layer, h):
    places = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1], [0, 1], [2, 3]])
    return h.scatter(1, places, layer(h)[:, :2].sin()).scatter_reduce(1, places, h[:, :2], "mean")


def masks_used(m, layer, h):
    out = layer(h).masked_fill(h > 0.5, 0.3)
    out = torch.where(h.abs() > 0.2, out, out.square())
    return out.masked_scatter(h < -0.5, h.cos())


def complex_numbers(m, layer, h):
    z = torch.complex(layer(h), h + 0.3)
    return (z * z * (1j * h).exp()).real + torch.view_as_real(z)[..., 1]


def called_functionally(m, layer, h):
    return torch.func.functional_call(layer, {"weight": layer.weight * 2, "bias": layer.bias.sin()}, (h,))


def slope_mapped(m, layer, h):
    return torch.func.vmap(torch.func.grad(lambda row: layer(row).sin().sum()))(h)


def from_a_generator(m, layer, h):
    return torch.stack([row * (1 + i) for i, row in enumerate(layer(r) for r in h)])


def running_mean(m, layer, h):
    h = layer(h)
    m.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return h - m.mean


def hooked(m, layer, h):
    h = layer(h)
    if h.requires_grad:
        h.register_hook(lambda g: None if g is None else g.clone())  # torch calls hooks without gradients, too
    return h.sin()


def shuffled(m, layer, h):
    return layer(h)[torch.randperm(SAMPLES)] + h


def convolved(m, layer, h):
    weighted = h * torch.linspace(0.5, 1.5, WIDTH).to(h)  # else a layer norm sums to 0, and rounding decides the pool
    y = F.conv1d(
        F.pad(weighted.t()[None], (1, 1)), layer.weight[None, :, :3].transpose(0, 1).expand(WIDTH, WIDTH, 3), layer.bias
    )
    return F.max_pool1d(y, 2, 1, 0).mean(2).expand(SAMPLES, -1) + F.avg_pool1d(h[None], 3, 1, 1)[0]


def kept_in_containers(m, layer, h):
    found = {"first": [layer(h)], "second": (h.sin(), None)}
    found["first"].append(found.pop("second")[0])
    return sum(found["first"])


def decided_by_numpy(m, layer, h):
    return layer(h) * (2 if h.detach().numpy().sum() > 0 else 1)


def written_without_gradients(m, layer, h):
    with torch.no_grad():
        scale = h.square().sum(1, keepdim=True).add_(1).rsqrt_()
        scale[0].zero_()
    return layer(h) * scale


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
    "solved": solved,
    "factored": factored,
    "rows written": rows_written,
    "rows summed": rows_summed,
    "scattered": scattered,
    "masks": masks_used,
    "complex numbers": complex_numbers,
    "functional call": called_functionally,
    "slope mapped": slope_mapped,
    "generator": from_a_generator,
    "running mean": running_mean,
    "hook": hooked,
    "shuffled": shuffled,
    "convolved": convolved,
    "containers": kept_in_containers,
    "numpy": decided_by_numpy,
    "written aside": written_without_gradients,
    "cumulative": lambda m, layer, h: layer(h).cumprod(1) + h.logcumsumexp(0),
    "best": lambda m, layer, h: layer(h).topk(2, 1)[0].repeat(1, 2) * h,
    "ranked": lambda m, layer, h: layer(h).gather(1, h.argsort(1)),
    "parametrised": lambda m, layer, h: m.parametrised(layer(h)),
    "group norm": lambda m, layer, h: F.group_norm(layer(h), 2) + F.normalize(h, dim=1),
    "distances": lambda m, layer, h: torch.cdist(layer(h), h + 2) @ h / SAMPLES,
    "curves": lambda m, layer, h: F.gelu(layer(h)) + F.softplus(h) * F.leaky_relu(h),
    "logsumexp": lambda m, layer, h: layer(h) * layer(h).mean().logsumexp(0) + h.var(0),
    "concatenated": lambda m, layer, h: torch.cat([layer(h)[:3], h[3:]]).flip(0),
}
CONSTANTS = {
    "running mean",
    "written aside",
    "table",
    "item",
    "detached",
    "no gradient",
    "through",
    "overwritten",
    "penalty",
}
"""Pieces in which autograd takes for a constant what moves: differences of the gradient are no reference."""
ONCE = {"kernel", "distances", "parametrised", "cumulative"}
"""Pieces that autograd does not differentiate twice, or wrongly: double backward passes are no reference."""


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Encoding(UserDict):
    pass


def popped(model, batch):
    y = batch.pop("y")
    return (model(batch["x"].mul_(0.5)) - y).square().mean()


class Pair(NamedTuple):
    inputs: Tensor
    targets: list[Tensor]


def density(m, b):
    scale = F.softplus(m(b.inputs)[:, 0]) + 0.5
    return -torch.distributions.Normal(m(b.inputs)[:, 1], scale).log_prob(b.targets[0][:, 0]).mean()


FORMS: dict[str, tuple[Any, Any]] = {
    "named tuple": (lambda x, y: Pair(x, [y]), density),
    "nested": (
        lambda x, y: [{"x": [x]}, {"labels": y.argmax(1), "weights": (y.abs(),)}],
        lambda m, b: F.cross_entropy(m(b[0]["x"][0]), b[1]["labels"]) + (m(b[0]["x"][0]) * b[1]["weights"][0]).mean(),
    ),
    "robust": (
        lambda x, y: (x, y),
        lambda m, b: F.huber_loss(m(b[0]), b[1]) + F.margin_ranking_loss(m(b[0]), b[1], b[1].sign()),
    ),
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
    """The tensors of a batch, whatever holds them."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for v in batch.values() for t in vars_of(v)]
    if isinstance(batch, Sample):
        return [batch.x, batch.y]
    return [t for v in batch for t in vars_of(v)] if isinstance(batch, list | tuple) else []


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
    if not ONCE & set(pieces):
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
