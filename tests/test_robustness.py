"""What loops do that nobody thought of, and what their authors are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import newton_summary as ns


def make_model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, steps: int, start: int = 0, scheduler=None) -> None:
    batches = make_batches()
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(model, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# Warnings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedules", [False, True])
def test_warnings_are_of_the_users_line(schedules) -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="leave it out") as made:
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), steps=20, lr=0.01)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0) if schedules else None
    with pytest.warns(UserWarning, match="is not trained by this optimizer") as while_frozen:
        train(model, optimizer, 5, scheduler=scheduler)
        model[0].bias.requires_grad_(True)
        train(model, optimizer, 1, 5, scheduler)
        model[1] = nn.Linear(8, 8)
        train(model, optimizer, 14, 6, scheduler)
    with pytest.warns(UserWarning, match="the run is over") as over:
        train(model, optimizer, 1, 20, scheduler)
    found = [warning.filename for caught in (made, while_frozen, over) for warning in caught]
    assert found == [__file__] * 5
