"""Several optimizers taken as one: their next step, a monitor of both, suggested rates for both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import newton_summary as ns
from newton_summary.integrations.news import News
from newton_summary.measure.next_step import next_step
from newton_summary.measure.together import Together, together


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_batches(count: int = 8, size: int = 16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 5, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


def pair(model, muon: float = 0.02, adamw: float = 0.01):
    """Muon for the matrices, AdamW for the biases."""
    matrices, rest = ([p for p in model.parameters() if (p.dim() == 2) is two] for two in (True, False))
    return [torch.optim.Muon(matrices, lr=muon), torch.optim.AdamW(rest, lr=adamw, weight_decay=0.1)]


def train(model, optimizers, batches, monitor=None) -> None:
    for batch in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if monitor is not None:
            monitor.step(batch)
        for optimizer in optimizers:
            optimizer.step()


def test_the_next_step_of_several_is_the_step_of_each() -> None:
    model, batches = make_model(), make_batches()
    optimizers = pair(model)
    train(model, optimizers, batches[:3])
    loss_fn(model, batches[3]).backward()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    for given in (optimizers, tuple(optimizers[::-1])):
        along = next_step(given, parameters)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    for optimizer in optimizers:
        optimizer.step()
    for p, q, u in zip(parameters, before, along, strict=True):
        assert torch.equal(q - p, u)
        assert float(u.abs().max()) > 0


def test_one_optimizer_stays_itself_and_misuse_is_refused() -> None:
    model = make_model()
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert together(adam) is adam
    assert together([adam]) is adam
    assert isinstance(together(pair(model)), Together)
    with pytest.raises(ValueError, match=r"Adam and SGD both hold a parameter of shape \(8, 5\)"):
        together([adam, sgd])
    with pytest.raises(ValueError, match="empty"):
        together([])
    with pytest.raises(TypeError, match="list of them, got str"):
        together("adam")
    with pytest.raises(TypeError, match="got Linear"):
        ns.Monitor(model, loss_fn, optimizer=[adam, model[0]])
    with pytest.raises(TypeError, match="measures by itself"):
        ns.Monitor(model, loss_fn, optimizer=[sgd, ns.NewtonSummary(model[2], loss_fn)])
    lbfgs = torch.optim.LBFGS(model[2].parameters())
    with pytest.raises(ValueError, match="LBFGS evaluates the loss in its step"):
        ns.suggest_rates(loss_fn, model, make_batches(), [sgd, lbfgs])


def test_a_group_for_each_optimizer() -> None:
    model = make_model()
    partition = ns.Partition.by_optimizer(model, pair(model))
    assert (partition.names, partition.sizes) == (("Muon", "AdamW"), (40 + 24, 8 + 3))
    twice = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    assert ns.Partition.by_optimizer(model, twice).names == ("SGD 1", "SGD 2")
    assert ns.Partition.by_optimizer(model, twice[:1]).names == ("SGD", "not trained")
    with pytest.raises(ValueError, match="SGD holds no trainable parameter of this model"):
        ns.Partition.by_optimizer(model, [torch.optim.SGD(make_model().parameters(), lr=0.1)])


@pytest.mark.parametrize("attached", [False, True])
def test_a_monitor_of_two_changes_nothing_and_counts_a_step_of_both_as_one(attached: bool) -> None:
    results = []
    for watched in (False, True):
        model, batches = make_model(), make_batches()
        optimizers = pair(model)
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizers, every=3) if watched else None
        if monitor is not None and attached:
            monitor.attach(batches, repeats=2)
        train(model, optimizers, batches, None if attached else monitor)
        results.append([p.detach().clone() for p in model.parameters()])
        if monitor is not None:
            assert [record.step for record in monitor.records] == [0, 3, 6]
            assert monitor.records[0].names == ("Muon", "AdamW")
            assert monitor.records[0].learning_rates == (0.02, 0.01)
            assert repr(monitor).startswith("Monitor of Muon and AdamW: 2 groups, every 3 steps")
            monitor.close()
            hooks = [h for o in optimizers for h in (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks)]
            assert not any(hooks)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_actual_decrease_is_that_of_both_steps_and_is_told_once() -> None:
    model, batches = make_model(), make_batches()
    optimizers = pair(model)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizers, partition="canonical")
    news = News(monitor)
    loss_fn(model, batches[0]).backward()
    before = loss_fn(model, batches[1]).item()
    monitor.measure([batches[1]])
    optimizers[0].step()
    assert news.latest() is None
    optimizers[1].step()
    assert monitor.records[-1].actual_decrease == pytest.approx(before - loss_fn(model, batches[1]).item(), rel=1e-9)
    assert news.latest().step == 0
    assert news.latest() is None


def test_one_that_steps_twice_ends_a_step() -> None:
    model, batches = make_model(), make_batches()
    optimizers = pair(model)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizers, every=2)
    train(model, optimizers[:1], batches[:5], monitor)  # the other one never steps
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert monitor.records[0].actual_decrease == monitor.records[0].actual_decrease


def test_suggested_rates_for_two() -> None:
    model, batches = make_model(), make_batches()
    found = []
    for muon, adamw in ((0.02 / 30, 0.01), (0.02, 0.01 * 30)):
        optimizers = pair(model, muon, adamw)
        before = copy.deepcopy([p.detach() for p in model.parameters()])
        suggested = ns.suggest_rates(loss_fn, model, batches, optimizers, steps=10)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert suggested.before == {"Muon": muon, "AdamW": adamw}
        found.append(suggested)
    assert found[0].rates == pytest.approx(found[1].rates, rel=1e-6)
    first, second = found[0].by_optimizer
    assert [(g["name"], len(g["params"]), g["lr"]) for g in first] == [("Muon", 2, found[0].rates["Muon"])]
    assert [(g["name"], g["weight_decay"]) for g in second] == [("AdamW", 0.1)]
    assert found[0].param_groups == first + second
    train(model, [torch.optim.Muon(first), torch.optim.AdamW(second)], batches)
