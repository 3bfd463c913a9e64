"""The networks that engines are measured on: each with a batch, on random data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from newton_summary_experiments.models import lenet, mlp, vgg11
from newton_summary_experiments.suite import Block, Residual


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def images(n):
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


class GPT(nn.Module):
    def __init__(self, vocabulary=65, width=128, heads=4, layers=4, context=64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks, self.norm = nn.Sequential(*(Block(width, heads) for _ in range(layers))), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.blocks(self.tokens(x) + self.places.weight)) @ self.tokens.weight.T


def resnet():
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]]] = {
    "bigmlp": lambda: (mlp([3072, *[1024] * 20, 10], nn.ELU), images(100)),
    "vgg": lambda: (vgg11(), images(16)),
    "lenet": lambda: (lenet(), images(100)),
    "mlp": lambda: (mlp([784, 1024, 200, 100, 10]), (torch.randn(100, 784), torch.randint(10, (100,)))),
    "gpt": lambda: (GPT(), (torch.randint(65, (16, 64)), torch.randint(65, (16, 64)))),
    "resnet": lambda: (resnet(), images(32)),
}


def chain(depth: int):
    return mlp([1024] * depth + [10], nn.ELU), (torch.randn(100, 1024), torch.randint(10, (100,)))


MODELS |= {f"depth{depth}": lambda depth=depth: chain(depth) for depth in (5, 10, 20, 40)}
