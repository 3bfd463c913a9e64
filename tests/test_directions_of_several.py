"""Directions that are made of several optimizers, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary.optim.directions import StepOf


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def make_batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 40, 6, generator=generator)
    return [(a, (a[:, 0] > 0).long() + (a[:, 1] > 0).long()) for a in x]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def pair(model: nn.Module, muon: float = 1e-3, adamw: float = 1e-3) -> list[torch.optim.Optimizer]:
    """Muon for the matrix in the middle, AdamW for the rest."""
    rest = [p for name, p in model.named_parameters() if name != "2.weight"]
    return [torch.optim.Muon([model[2].weight], lr=muon, weight_decay=0.0), torch.optim.AdamW(rest, lr=adamw)]


def train(model, optimizer, steps, start=0):
    batches = make_batches()
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
    return sum(loss_fn(model, batch).item() for batch in batches) / len(batches)


def test_the_step_is_that_of_all_of_them():
    model, twin = make_model(), make_model()
    direction, members = StepOf(pair(model)), pair(twin)
    for batch in make_batches():
        for m in (model, twin):
            m.zero_grad()
            loss_fn(m, batch).backward()
        u = direction.update([], defaultdict(dict))
        assert set(u) == set(model.parameters())
        with torch.no_grad():
            for p, step in u.items():
                p -= step
        for member in members:
            member.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_each_has_a_group_whose_rate_is_in_its_units():
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=pair(model, 2e-3, 5e-4))
    assert optimizer.partition.names == ("Muon", "AdamW")
    assert optimizer.rates == {"Muon": 2e-3, "AdamW": 5e-4}
    before = train(model, optimizer, 1)
    assert train(model, optimizer, 150) < before / 3
    assert optimizer.counts["measured"] == 0
    assert optimizer.rates["Muon"] > 2e-3, "the weights get better still"


def test_a_partition_of_ones_own_may_split_them_further():
    model = make_model()
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=make_batches(), direction=pair(model), partition="canonical"
    )
    train(model, optimizer, 3)
    assert set(optimizer.rates) == {name for name, _ in model.named_parameters()}


def test_a_run_that_is_resumed_goes_on_as_it_did():
    def made(model):
        return ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=pair(model), every=3)

    model, resumed = make_model(), make_model(1)
    optimizer, successor = made(model), made(resumed)
    train(model, optimizer, 20)
    resumed.load_state_dict(model.state_dict())
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, successor)):
        train(m, o, 15, start=20)
    assert successor.rates == optimizer.rates
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_state_of_others_is_refused():
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=pair(model))
    other = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=pair(model)[::-1])
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"Muon|AdamW"):
        other.load_state_dict(optimizer.state_dict())


def test_lists_that_make_no_direction_are_refused():
    model = make_model()
    muon, adamw = pair(model)
    options = {"curvature_data": make_batches()}
    with pytest.raises(ValueError, match="both hold a parameter of shape"):
        ns.NewtonSummary(model, loss_fn, direction=[adamw, torch.optim.SGD(model.parameters(), lr=0.1)], **options)
    with pytest.raises(ValueError, match=r"does not hold parameter '0\.weight'"):
        ns.NewtonSummary(model, loss_fn, direction=[muon], **options)
    with pytest.raises(ValueError, match="LBFGS evaluates the loss in its step"):
        StepOf([muon, torch.optim.LBFGS([model[0].weight])])
    for nothing in ([], [muon, "adam"]):
        with pytest.raises(TypeError, match="a list of them, or a Direction"):
            ns.NewtonSummary(model, loss_fn, direction=nothing, **options)
