"""Small models, losses and batches, in float64: what every engine has to measure exactly."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newton_summary import Partition


@dataclass
class Case:
    """A model, a loss and a batch of five samples."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any

    @property
    def loss(self) -> Tensor:
        return self.loss_fn(self.model, self.batch)

    def direction(self, seed: int = 1) -> dict[str, Tensor]:
        """Random entries of both signs, by parameter name."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def labels(*shape, classes=3):
    return torch.randint(classes, shape)


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weight, under a second name."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


class Shared(nn.Module):
    """One block that the model holds under three names and goes through three times."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.blocks = nn.ModuleList([block] * 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Unused(nn.Module):
    """A parameter in the middle that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.spare = nn.Parameter(torch.ones(2, 2))
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Tempered(nn.Module):
    """A temperature, that is a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) / self.temperature


class Attention(nn.Module):
    """Self-attention through the fused function, which by itself has no second derivatives on the CPU."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=bias) for bias in (True, False, False))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.core = kind(3, 2, batch_first=True)

    def forward(self, x):
        return self.core(x)[0]


class Reversing(torch.autograd.Function):
    """The identity, with a backward of its own: gradients change their sign, as in adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.last(Reversing.apply(torch.tanh(self.first(x))).sin())


class Stopped(nn.Module):
    """Values behind ``detach`` and ``torch.no_grad``, which count as constants."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            scale = self.last.weight.square().sum()
        return self.last(h * h.detach().exp()) * scale


class Polynomial(nn.Module):
    """A sum of monomials c·Π θ^k in three scalars, of which two share a tensor."""

    MONOMIALS = ((1.5, (4, 1, 0)), (-0.7, (1, 2, 3)), (2.0, (0, 1, 1)), (0.3, (2, 2, 2)), (1.0, (1, 0, 0)))

    def __init__(self):
        super().__init__()
        self.pair = nn.Parameter(torch.tensor([0.9, -1.3]))
        self.single = nn.Parameter(torch.tensor(1.1))

    def forward(self, factor):
        theta = (self.pair[0], self.pair[1], self.single)
        terms = [c * theta[0] ** k[0] * theta[1] ** k[1] * theta[2] ** k[2] for c, k in self.MONOMIALS]
        return factor * sum(terms)

    def derivative(self, index: tuple[int, ...]) -> float:
        """The derivative of the polynomial according to these scalars, term by term."""
        theta = [*self.pair.tolist(), self.single.item()]
        total = 0.0
        for coefficient, powers in self.MONOMIALS:
            k = list(powers)
            for i in index:
                coefficient *= k[i]
                k[i] -= 1
            if coefficient:
                total += coefficient * float(np.prod([t**n for t, n in zip(theta, k, strict=True)]))
        return total


class Normalised(nn.Module):
    """Weight, instance and group normalisation around one another, on channels of a signal."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
        self.instance = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(1, 2)

    def forward(self, x):
        return self.group(torch.tanh(self.instance(self.first(x)))).tanh()


def frozen_body():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    return model


def sequential(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


def linear(n, m):
    return lambda: nn.Linear(n, m)


_BUILDERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor], Callable[[], Any]]] = {
    "mlp": (sequential(linear(3, 4), nn.Tanh, linear(4, 2)), squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "elu": (sequential(linear(3, 4), nn.ELU, linear(4, 3)), cross_entropy, lambda: (normal(5, 3), labels(5))),
    "relu": (sequential(linear(3, 4), nn.ReLU, linear(4, 2)), squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "conv": (
        sequential(lambda: nn.Conv2d(1, 2, 3), nn.Tanh, lambda: nn.MaxPool2d(2), nn.Flatten, linear(8, 3)),
        cross_entropy,
        lambda: (normal(5, 1, 6, 6), labels(5)),
    ),
    "batch norm": (
        sequential(linear(3, 4), lambda: nn.BatchNorm1d(4), nn.Tanh, linear(4, 2)),
        squared_error,
        lambda: (normal(5, 3), normal(5, 2)),
    ),
    "normalised": (Normalised, squared_error, lambda: (normal(5, 2, 4), normal(5, 2, 4))),
    "dropout": (
        sequential(linear(3, 6), nn.Tanh, nn.Dropout, linear(6, 2)),
        squared_error,
        lambda: (normal(5, 3), normal(5, 2)),
    ),
    "tied": (Tied, squared_error, lambda: (normal(5, 4), normal(5, 4))),
    "shared": (Shared, squared_error, lambda: (normal(5, 3), normal(5, 3))),
    "unused": (Unused, squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "scalar": (Tempered, cross_entropy, lambda: (normal(5, 3), labels(5))),
    "frozen": (frozen_body, squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "attention": (Attention, squared_error, lambda: (normal(5, 3, 4), normal(5, 3, 4))),
    "embedding": (
        sequential(lambda: nn.Embedding(6, 4), lambda: nn.LayerNorm(4), linear(4, 3)),
        cross_entropy,
        lambda: (labels(5, 2, classes=6), labels(5, 2)),
    ),
    "gru": (lambda: Recurrent(nn.GRU), squared_error, lambda: (normal(5, 3, 3), normal(5, 3, 2))),
    "lstm": (lambda: Recurrent(nn.LSTM), squared_error, lambda: (normal(5, 3, 3), normal(5, 3, 2))),
    "reversed gradients": (Reversed, squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "stopped gradients": (Stopped, squared_error, lambda: (normal(5, 3), normal(5, 2))),
    "polynomial": (Polynomial, lambda model, batch: model(batch).mean(), lambda: normal(5)),
}

CASES = tuple(_BUILDERS)
STOCHASTIC = ("dropout",)
OWN_BACKWARD = ("reversed gradients", "stopped gradients")
"""Where derivatives are what autograd says, and not those of the loss as a function."""


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A case by its name; the global random state is left alone."""
    build, loss_fn, batch = _BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = build().to(torch.float64)
        for p in model.parameters():
            if p.dim() == 1 and not isinstance(model, Polynomial):  # so that biases and scales are not special
                p.data += 0.3 * torch.randn_like(p)
        data = batch()
    return Case(model.to(dtype), loss_fn, cast(data, dtype))


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point tensors in another type."""
    if isinstance(batch, tuple):
        return tuple(cast(item, dtype) for item in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch


def masks(partition: Partition) -> list[dict[str, Tensor]]:
    """The partition matrix, read from the labels one group after another: ones where a group holds an entry."""
    result = []
    for group in range(len(partition)):
        columns = {}
        for name, label, p in zip(partition.parameter_names, partition.labels, partition.parameters, strict=True):
            belongs = torch.full(p.shape, label == group) if isinstance(label, int) else label == group
            columns[name] = belongs.to(p.dtype)
        result.append(columns)
    return result


def phi(case: Case, partition: Partition, direction: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """η ↦ L(θ + U I η), on copies of the parameters and buffers, from the random state of this moment."""
    columns = masks(partition)
    theta = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    state = torch.get_rng_state()

    def function(eta: Tensor) -> Tensor:
        torch.set_rng_state(state)
        moved = dict(theta)
        for name in partition.parameter_names:
            moved[name] = theta[name] + direction[name] * sum(e * c[name] for e, c in zip(eta, columns, strict=True))
        tensors = {**moved, **{name: b.clone() for name, b in case.model.named_buffers()}}
        wrapper = _Wrapper(case)
        with plain_normalisation():
            return torch.func.functional_call(wrapper, {f"model.{n}": t for n, t in tensors.items()}, (case.batch,))

    return function


@contextmanager
def plain_normalisation() -> Iterator[None]:
    """Replaces normalisations by their formulas: torch's own have wrong derivatives from the second or third order."""

    def standardised(x, dims, eps):
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dims, keepdim=True) + eps)

    def batch(x, mean, var, weight, bias, training, momentum, eps):
        assert training
        return standardised(x, 0, eps) * weight + bias

    def instance(x, mean, var, weight, bias, use_input_stats, momentum, eps):
        assert use_input_stats
        return standardised(x, 2, eps) * weight[:, None] + bias[:, None]

    def layer(x, shape, weight, bias, eps):
        return standardised(x, -1, eps) * weight + bias

    def weights(v, g, dim):
        assert dim == 0
        return g * v / torch.sqrt(v.square().sum((1, 2), keepdim=True))

    with (
        patch.multiple(F, batch_norm=batch, instance_norm=instance, layer_norm=layer),
        patch.object(torch, "_weight_norm", weights),
    ):
        yield


class _Wrapper(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.loss_fn = copy.deepcopy(case.model), case.loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def polynomial_summary(model: Polynomial, partition: Partition, direction: dict[str, Tensor], order: int) -> Tensor:
    """D^(order) of the polynomial in closed form: sums of its partial derivatives over groups."""
    u = [*direction["pair"].tolist(), direction["single"].item()]
    group_of = [next(s for s, m in enumerate(masks(partition)) if m["pair"][i]) for i in range(2)]
    group_of.append(next(s for s, m in enumerate(masks(partition)) if m["single"]))
    result = torch.zeros((len(partition),) * order, dtype=torch.float64)
    for index in product(range(3), repeat=order):
        result[tuple(group_of[i] for i in index)] += model.derivative(index) * float(np.prod([u[i] for i in index]))
    return result


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal up to this share of the largest entry expected."""
    actual, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (actual, expected))
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-8)
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of the largest entry"


def assert_symmetric(tensor: Tensor) -> None:
    for axes in permutations(range(tensor.dim())):
        assert torch.equal(tensor, tensor.permute(axes))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fails where the block changed anything of the user's, or fired a hook on a parameter."""

    def snapshot():
        flags = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.backends.mkldnn.enabled,
            torch.backends.mkldnn.deterministic,
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )
        modes = tuple(module.training for module in model.modules())
        numpy_state = np.random.get_state()  # noqa: NPY002
        generators = (torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:])
        tensors = [*model.named_parameters(), *model.named_buffers()]
        tensors += [(name, t) for m in model.modules() for name, t in vars(m).items() if isinstance(t, torch.Tensor)]
        identities = [(name, id(t), t.data_ptr(), t._version, t.requires_grad, id(t.grad)) for name, t in tensors]
        values = [t.detach().clone() for _, t in tensors if t.device.type != "meta"]
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return (flags, modes, generators, identities), values, grads

    fired = []
    handles = [p.register_hook(lambda g: fired.append(1)) for p in model.parameters() if p.requires_grad]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: fired.append(2)) for p in model.parameters() if p.requires_grad
    ]
    before = snapshot()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    after = snapshot()
    assert before[0] == after[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert not fired
