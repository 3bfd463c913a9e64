"""Models, losses and batches that the engines are tested on: seeded constructors, in float64."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():  # torch's own deprecation, on the first forward differentiation
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")


@dataclass
class Case:
    """A model, a loss and a batch."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], tuple[Any, Any, Any]]) -> Callable[[], Case]:
    """Registers a constructor; its random draws are seeded and its tensors float64."""

    def build(dtype: torch.dtype = torch.float64) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, loss_fn, batch = function()
        to = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        return Case(model.to(dtype), loss_fn, torch.utils._pytree.tree_map(to, batch))

    CASES[function.__name__] = build
    return build


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def images(channels=3, size=8, n=3, classes=4):
    return torch.randn(n, channels, size, size), torch.randint(classes, (n,))


class Custom(nn.Module):
    """Parameters by name, and no forward of its own: the loss says what to do with them."""

    def __init__(self, **shapes) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


# The paper's networks, small -----------------------------------------------------------------------------------------


@case
def mlp():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, cross_entropy, (torch.randn(7, 6), torch.randint(4, (7,)))


@case
def lenet():
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(45, 6), nn.Tanh(), nn.Linear(6, 4))
    return model, cross_entropy, images(size=14)


@case
def vgg():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ELU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    return model, cross_entropy, images()


@case
def bigmlp():
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.ELU())]
    return (
        nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, 4)),
        cross_entropy,
        (torch.randn(5, 6), torch.arange(5) % 4),
    )


# Other kinds of networks ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


@case
def residual_training():
    return Residual(), cross_entropy, images(size=6)


@case
def residual_evaluating():
    model = Residual()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(5, 3, 6, 6))
    return model.eval(), cross_entropy, images(size=6)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(n, t, width)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tied input and output embeddings, learned places, dropout."""

    def __init__(self, vocabulary=7, width=8, heads=2, layers=2, context=5) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])))


@case
def gpt():
    text = torch.randint(7, (3, 6))
    loss = lambda model, b: F.cross_entropy(model(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())  # noqa: E731
    return GPT(), loss, text


def recurrent(kind):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    return (
        Recurrent(),
        lambda m, b: (m(b["x"]) - b["y"]).square().mean(),
        {"x": torch.randn(3, 4, 3), "y": torch.randn(3, 2)},
    )


@case
def gru():
    return recurrent(nn.GRU)


@case
def lstm():
    return recurrent(nn.LSTM)


@case
def autoencoder():
    model = nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 2), nn.SiLU(), nn.Linear(2, 8))
    return model, lambda m, x: F.binary_cross_entropy_with_logits(m(x), x), torch.rand(5, 8)


@case
def binary_cross_entropy_of_probabilities():
    model = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8), nn.Sigmoid())
    return model, lambda m, x: F.binary_cross_entropy(m(x), x), torch.rand(5, 8)


@case
def pinn_by_autograd():
    def loss(model, x):
        x = x.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        return (slope[:, 1] - 0.1 * bend[:, 0] + u[:, 0] * slope[:, 0]).square().mean()

    return (
        nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)),
        loss,
        torch.randn(6, 2),
    )


@case
def pinn_by_functions():
    def loss(model, x):
        u = lambda point: model(point).squeeze(-1)  # noqa: E731
        slope = torch.func.vmap(torch.func.grad(u))(x)
        bend = torch.func.vmap(torch.func.hessian(u))(x)[:, 0, 0]
        return (slope[:, 1] - bend).square().mean()

    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)), loss, torch.randn(6, 2)


@case
def unusual_convolutions():
    layers = [nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), nn.SiLU(), nn.ConvTranspose2d(4, 3, 2, stride=2)]
    model = nn.Sequential(
        *layers, nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 3, dilation=2), nn.AdaptiveAvgPool2d(1)
    )
    return nn.Sequential(*model, nn.Flatten()), cross_entropy, images(4, 9, classes=2)


@case
def one_dimension():
    layers = [
        nn.Conv1d(2, 3, 3),
        nn.Tanh(),
        nn.MaxPool1d(2),
        nn.Conv1d(3, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4, 3),
    ]
    return nn.Sequential(*layers), cross_entropy, (torch.randn(4, 2, 11), torch.randint(3, (4,)))


@case
def tensor_acrobatics():
    def loss(m, x):
        a = (x @ m.a).tanh()  # 5 × 6
        b = torch.where(a > 0, a * m.s, a.exp())
        c = torch.cat([b.clamp(-0.3, 2.0), m.b[None].expand(5, 4)], 1)  # 5 × 10
        left, right = c.split([4, 6], dim=1)
        picked = right.gather(1, torch.tensor([[0, 2], [1, 1], [3, 0], [5, 4], [2, 2]]))
        mixed = torch.einsum("ij,kj,k->ik", left, m.c, m.c.sum(1))[:, [0, 2, 2]]
        rows = mixed[torch.tensor([4, 0, 0])]
        return (picked.sum() + rows.square().sum() + torch.stack([left, left.flip(0)]).prod(0).sum()) * m.s.sigmoid()

    return Custom(a=(4, 6), b=(4,), c=(3, 4), s=(), unused=(3,)), loss, torch.randn(5, 4)


@case
def shared_weights():
    return (
        Custom(w=(4, 4), v=(4,)),
        lambda m, x: (((x @ m.w).tanh() @ m.w).tanh() @ m.w @ m.v).square().mean(),
        torch.randn(5, 4),
    )


@case
def general_operations():
    def loss(m, x):
        a = (x @ m.w).tanh()
        norm = torch.linalg.vector_norm(a + 2, dim=1)
        ratio = a.exp().cumsum(1).log() / (2 + a.sin())
        return norm.mean() + ratio.logsumexp(1).mean() + torch.hypot(a, 3 + a * a).var()

    return Custom(w=(4, 4)), lambda m, x: loss(m, x), torch.randn(5, 4)


@case
def losses():
    def loss(m, batch):
        x, y = batch
        z = x @ m.w + m.b
        several = [F.huber_loss(z, y, delta=0.7), F.smooth_l1_loss(z, y), F.mse_loss(z, y), F.l1_loss(z, y)]
        several += [F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean"), F.soft_margin_loss(z, y.sign())]
        several += [F.cross_entropy(z, y.softmax(1)), F.cross_entropy(z, y.argmax(1), label_smoothing=0.1)]
        weights = torch.tensor([1.0, 2.0, 0.5], dtype=z.dtype)
        several += [F.cross_entropy(z, y.argmax(1), weight=weights, ignore_index=1)]
        return sum((i + 1) * v for i, v in enumerate(several))

    return Custom(w=(4, 3), b=(3,)), loss, (torch.randn(6, 4), torch.randn(6, 3))


@case
def more_activations():
    functions = [F.logsigmoid, F.hardswish, F.mish, F.selu, F.celu, F.softsign, F.tanhshrink]
    functions += [F.leaky_relu, F.relu6, F.softplus, lambda z: F.gelu(z, approximate="tanh"), lambda z: F.glu(z, dim=0)]

    def loss(m, x):
        z = x @ m.w + m.b
        return sum(((i + 1) * f(z)).sin().mean() for i, f in enumerate(functions))

    return Custom(w=(4, 3), b=(3,)), loss, torch.randn(6, 4)


# Traps ----------------------------------------------------------------------------------------------------------------


@case
def detached():
    def loss(m, x):
        h = (x @ m.a).tanh()
        return ((h * h.detach()) @ m.b + (h @ m.b).detach().exp() * h.sum(1)).square().mean()

    return Custom(a=(4, 3), b=(3,)), loss, torch.randn(5, 4)


@case
def no_grad_block():
    def loss(m, x):
        h = (x @ m.a).tanh()
        with torch.no_grad():
            target = (h @ m.b).softmax(0)
        return ((h @ m.b).exp() * target).sum()

    return Custom(a=(4, 3), b=(3,)), loss, torch.randn(5, 4)


@case
def straight_through_by_detach():
    def loss(m, x):
        h = (x @ m.a).tanh()
        return ((h + (h.round() - h).detach()) @ m.b).square().mean() + h.sin().sum()

    return Custom(a=(4, 3), b=(3,)), loss, torch.randn(5, 4)


@case
def boolean_mask():
    def loss(m, x):
        h = (x @ m.a).tanh()
        return torch.where(x[:, :1] > 0, h, h.square()).sum() + h.masked_fill(x[:, :3] > 0.5, 2.0).square().mean()

    return Custom(a=(4, 3)), loss, torch.randn(5, 4)


@case
def checkpointed():
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))

    def loss(m, x):
        return torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).tanh().square().mean()

    return inner, loss, torch.randn(5, 4)


# Normalisation that torch differentiates three times -----------------------------------------------------------------


def _normalised(x: Tensor, dims, eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


@contextlib.contextmanager
def plain_normalisation(monkeypatch) -> Iterator[None]:
    """Layer, batch and group normalisation by simple operations: torch's own have a wrong third derivative."""

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        y = _normalised(x, tuple(range(-len(shape), 0)), eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def channels(p, x):
        return p.view(-1, *[1] * (x.dim() - 2))

    def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if training:
            y = _normalised(x, (0, *range(2, x.dim())), eps)
        else:
            y = (x - channels(mean, x)) / (channels(var, x) + eps).sqrt()
        return y if weight is None else y * channels(weight, x) + channels(bias, x)

    def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
        y = _normalised(x.reshape(len(x), groups, -1), -1, eps).reshape(x.shape)
        return y if weight is None else y * channels(weight, x) + channels(bias, x)

    with monkeypatch.context() as patch:
        for function in (layer_norm, batch_norm, group_norm):
            patch.setattr(F, function.__name__, function)
        yield
