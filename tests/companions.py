"""What the tests of trainings and of the integrations share."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name, folder, monkeypatch, **settings):
    """The names that an example leaves, run in a folder with tiny settings."""
    monkeypatch.chdir(folder)
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    return runpy.run_path(str(EXAMPLES / name))


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_loader(batches=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * batches, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=16)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def same(model, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
