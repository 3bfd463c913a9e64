"""Nine small problems of all kinds, on which optimizers are compared untuned (benchmarks/untuned.py).

Each fits a CPU core: a run of a thousand steps takes seconds, or a minute at most.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from newton_summary.errors import UsageError
from newton_summary.measure import LossFunction, preserved_randomness
from newton_summary_experiments import data
from newton_summary_experiments.data import Batch
from newton_summary_experiments.models import initialised, lenet, mlp
from newton_summary_experiments.tasks import cross_entropy

CHARACTERS = 65
_LENGTH = 64


@dataclass(frozen=True)
class Samples:
    """What a problem is trained and validated on: pairs of inputs and targets."""

    train: Batch
    validation: Batch

    def __len__(self) -> int:
        return len(self.train[1])


@dataclass(frozen=True)
class Problem:
    """A model, its data and the length of a run.

    Args:
        name: what the command line calls it.
        build: makes the model from a seed.
        read: reads its samples; they are kept for the next time.
        steps: the length of a run.
        batch_size: of training batches and of those that curvature is measured on.
        loss_fn: the loss, a mean over the batch.
        score: the name of the validation score: ``"accuracy"`` or ``"loss"``.
    """

    name: str
    build: Callable[[int], nn.Module]
    read: Callable[[], Samples]
    steps: int
    batch_size: int = 100
    loss_fn: LossFunction = cross_entropy
    score: str = "accuracy"

    def make_model(self, seed: int, scale: float = 1.0) -> nn.Module:
        """The model with the initial weights that a seed stands for, all tensors of two axes or more times a scale."""
        model = self.build(seed)
        if scale != 1.0:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        parameter.mul_(scale)
        return model


# Models ---------------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Images of 784 pixels to a code of 16 numbers and back to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp([784, 128, 16, 128, 784], nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the pixels, shape (B, 784)."""
        logits: Tensor = self.layers(x)
        return logits


class Residual(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.around = nn.Sequential() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of ``after`` channels, at 1/stride of the size."""
        y = torch.relu(self.norm1(self.conv1(x)))
        z: Tensor = self.norm2(self.conv2(y)) + self.around(x)
        return z.relu()


def resnet() -> nn.Sequential:
    """A residual network with batch norm for images at half their size."""
    return nn.Sequential(
        OrderedDict(
            shrink=nn.AvgPool2d(2),
            stem=nn.Conv2d(3, 12, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(12),
            relu=nn.ReLU(),
            block1=Residual(12, 12, 1),
            block2=Residual(12, 24, 2),
            block3=Residual(24, 48, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(48, 10),
        )
    )


class Block(nn.Module):
    """A transformer's layer, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, length, width), as its argument."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        further: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + further


class Transformer(nn.Module):
    """A character transformer: two layers of width 64."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(_LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)
        for name, parameter in self.named_parameters():
            if name in ("token.weight", "position.weight"):
                nn.init.normal_(parameter, 0.0, 0.02)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, 1 / math.sqrt(parameter.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters, shape (B, length, characters)."""
        logits: Tensor = self.head(self.norm(self.blocks(self.token(x) + self.position.weight[: x.shape[1]])))
        return logits


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A model with its own initial weights, from a seed."""

    def make(seed: int) -> nn.Module:
        with preserved_randomness():
            torch.manual_seed(seed)
            return build()

    return make


def _drawn(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A model with the initial weights of the paper, from a seed."""
    return lambda seed: initialised(build, seed)


# Losses ---------------------------------------------------------------------------------------------------------------


def reconstruction(model: Any, batch: Batch) -> Tensor:
    """The mean binary cross-entropy of a reconstruction, a pixel."""
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def next_character(model: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next characters."""
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


# Samples --------------------------------------------------------------------------------------------------------------


@cache
def _digits() -> Samples:
    found = data.digits()
    return Samples(found.train, found.validation)


@cache
def images(source: data.Source, most: int | None = None) -> Samples:
    """Images and their classes, at most so many to train on."""
    found = data.read(source)
    return Samples((found.train[0][:most], found.train[1][:most]), found.validation)


@cache
def pixels(most: int) -> Samples:
    """Images of MNIST as inputs, and their pixels between 0 and 1 as targets."""

    def paired(images: Tensor) -> Batch:
        low, high = images.amin(), images.amax()
        return images, ((images - low) / (high - low)).flatten(1)

    found = data.read(data.MNIST)
    return Samples(paired(found.train[0][:most]), paired(found.validation[0]))


@cache
def text() -> Samples:
    """The plays of Shakespeare, as a million characters."""
    places = [folder / "tinyshakespeare.txt" for folder in data.folders()]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UsageError("tinyshakespeare.txt is not there. Looked for\n" + "\n".join(f"  {p}" for p in places))
    text = path.read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([index[c] for c in text])
    count = (len(codes) - 1) // _LENGTH
    x, y = codes[: count * _LENGTH].view(-1, _LENGTH), codes[1 : count * _LENGTH + 1].view(-1, _LENGTH)
    split = count * 9 // 10
    return Samples((x[:split], y[:split]), (x[split:], y[split:]))


# The suite ------------------------------------------------------------------------------------------------------------

_deep = partial(mlp, [784, *([256] * 11), 10], nn.ELU)
_paper_mlp = partial(mlp, [784, 1024, 200, 100, 10])

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("digits", _drawn(partial(mlp, [64, 128, 64, 32, 10])), _digits, 1200),
        Problem("mlp", _drawn(_paper_mlp), partial(images, data.MNIST, 5000), 1000),
        Problem("mlp-all", _drawn(_paper_mlp), partial(images, data.MNIST), 1080),
        Problem("deep", _drawn(_deep), partial(images, data.MNIST, 5000), 1000),
        Problem("lenet", _drawn(lenet), partial(images, data.CIFAR10), 1296),
        Problem("resnet", seeded(resnet), partial(images, data.CIFAR10), 1080),
        Problem("logistic", _drawn(partial(mlp, [784, 10])), partial(images, data.MNIST, 5000), 1000),
        Problem("autoencoder", seeded(Autoencoder), partial(pixels, 5000), 1000, loss_fn=reconstruction, score="loss"),
        Problem("transformer", seeded(Transformer), text, 1000, 16, next_character, "loss"),
    )
}
