"""Eleven problems on which no default was chosen: other layers, other losses, other units (benchmarks/untuned.py).

Recurrent networks, attention over patches, dropout, a sampled latent code, embeddings, a hinge, absolute errors, and
tables whose columns are as they were measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from newton_summary_experiments import data
from newton_summary_experiments.data import Batch
from newton_summary_experiments.models import mlp
from newton_summary_experiments.suite import (
    CHARACTERS,
    Problem,
    Samples,
    images,
    next_character,
    pixels,
    seeded,
    text,
)

_USERS, _ITEMS, _RANK = 200, 300, 8
_VALIDATING = 10  # one sample in so many
_SEED = 20261126  # of the samples; no run has it

# Models ---------------------------------------------------------------------------------------------------------------


class TextLSTM(nn.Module):
    """A character model: one recurrent layer."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.token = nn.Embedding(CHARACTERS, width)
        self.layer = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters, shape (B, length, characters)."""
        logits: Tensor = self.head(self.layer(self.token(x))[0])
        return logits


class RowGRU(nn.Module):
    """Two recurrent layers that read an image row by row."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.GRU(28, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, 10)."""
        logits: Tensor = self.head(self.layers(x.squeeze(1))[0].mean(1))
        return logits


class PatchTransformer(nn.Module):
    """Attention, with dropout, over the 16 patches of an image."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits


def convnet() -> nn.Sequential:
    """Convolutions with group norm and dropout, for images of 32 × 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 8 * 8, 10),
    )


class VariationalAutoencoder(nn.Module):
    """Images of 784 pixels to a code of 16 normal variables and back to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp([784, 128, 32], nn.ReLU), mlp([16, 128, 784], nn.ReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels, shape (B, 784), mean and log variance of the code, shape (B, 16)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


class Factors(nn.Module):
    """Ratings as scalar products of what is known of users and items."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(_USERS, _RANK), nn.Embedding(_ITEMS, _RANK)

    def forward(self, pairs: Tensor) -> Tensor:
        """Shape (B,), from pairs of indices, shape (B, 2)."""
        ratings: Tensor = (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1)
        return ratings


# Losses ---------------------------------------------------------------------------------------------------------------


def evidence(model: Any, batch: Batch) -> Tensor:
    """The negative evidence lower bound, a pixel."""
    logits, mean, log_variance = model(batch[0])
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    bound: Tensor = functional.binary_cross_entropy_with_logits(logits, batch[1]) + divergence / batch[1].shape[1]
    return bound


def hinge(model: Any, batch: Batch) -> Tensor:
    """The mean hinge loss over classes."""
    return functional.multi_margin_loss(model(batch[0]), batch[1])


def _regression(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Batch], Tensor]:
    """A mean error of predictions, shape (B,) or (B, 1)."""
    return lambda model, batch: measure(model(batch[0]).flatten(), batch[1])


# Samples --------------------------------------------------------------------------------------------------------------


def _split(x: Tensor, y: Tensor) -> Samples:
    """Nine tenths, at random, to train on."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(_SEED))
    x, y, count = x[order], y[order], len(y) // _VALIDATING
    return Samples((x[count:], y[count:]), (x[:count], y[:count]))


@cache
def _table(load: Callable[[], tuple[Any, Any]]) -> Samples:
    """A table of scikit-learn's, in the units that it comes in."""
    x, y = map(torch.as_tensor, load())
    return _split(x.float(), y.float() if y.is_floating_point() else y.long())


@cache
def _ratings() -> Samples:
    """Noisy entries of a matrix of rank 8, one in nine or so of all."""
    generator = torch.Generator().manual_seed(_SEED)
    users, items = (torch.randn(n, _RANK, generator=generator) for n in (_USERS, _ITEMS))
    pairs = torch.stack([torch.randint(n, (6600,), generator=generator) for n in (_USERS, _ITEMS)], dim=1)
    exact = (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(1)
    return _split(pairs, exact + 0.1 * torch.randn(len(pairs), generator=generator))


_friedman1 = partial(datasets.make_friedman1, 4400, noise=1.0, random_state=_SEED)
_friedman2 = partial(datasets.make_friedman2, 4400, noise=10.0, random_state=_SEED)
_diabetes = partial(datasets.load_diabetes, return_X_y=True, scaled=False)
_cancer = partial(datasets.load_breast_cancer, return_X_y=True)

# The suite ------------------------------------------------------------------------------------------------------------


def _dense(inputs: int, outputs: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[int], nn.Module]:
    return seeded(partial(mlp, [inputs, 64, 64, outputs], activation))


_mnist = partial(images, data.MNIST, 5000)
_absolute, _squared, _huber = map(_regression, (functional.l1_loss, functional.mse_loss, functional.smooth_l1_loss))

HELD_OUT = {
    problem.name: problem
    for problem in (
        Problem("lstm", seeded(TextLSTM), text, 1000, 16, next_character, "loss"),
        Problem("gru", seeded(RowGRU), _mnist, 1000),
        Problem("patches", seeded(PatchTransformer), _mnist, 1000),
        Problem("convnet", seeded(convnet), partial(images, data.CIFAR10), 1080),
        Problem("vae", seeded(VariationalAutoencoder), partial(pixels, 5000), 1000, loss_fn=evidence, score="loss"),
        Problem("hinge", _dense(784, 10), _mnist, 1000, loss_fn=hinge),
        Problem("factors", seeded(Factors), _ratings, 1000, loss_fn=_squared, score="loss"),
        Problem("friedman1", _dense(10, 1, nn.Tanh), partial(_table, _friedman1), 1000, 100, _absolute, "loss"),
        Problem("friedman2", _dense(4, 1), partial(_table, _friedman2), 1000, 100, _squared, "loss"),
        Problem("diabetes", _dense(10, 1), partial(_table, _diabetes), 1000, 32, _huber, "loss"),
        Problem("cancer", _dense(30, 2), partial(_table, _cancer), 1000, 32),
    )
}
