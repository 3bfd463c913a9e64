"""How often the weights are compared with their average, in an optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def make_loader():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 20, shuffle=True)


def make(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), **options)


def train(model, optimizer, steps, start=0):
    batches = list(make_loader())
    for number in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batches[number % len(batches)]).backward()
        optimizer.step()


def test_comparisons_are_twenty_steps_apart_once_they_have_grown_apart() -> None:
    model, optimizer = make()
    assert optimizer.compare_every == 20
    train(model, optimizer, 121)
    assert optimizer.counts["compared"] == 11  # before steps 0, 4, 8, 12, 18, 27, 40, 60 … 120


def test_an_interval_that_was_asked_for_holds_once_comparisons_have_grown_apart() -> None:
    model, optimizer = make(compare_every=8)
    train(model, optimizer, 40)
    assert optimizer.counts["compared"] == 7  # before steps 0, 4, 8, 12, 18, 26 and 34
    twin, resumed = make()  # with another interval
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, 40)
    assert resumed.compare_every == 8
    assert resumed.counts["compared"] == 12
