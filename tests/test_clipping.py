"""Broken and exploding batches, injected into training and into measurements."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary.optim import clipping as guards
from newton_summary.optim.clipping import GradientClipping
from newton_summary.optim.rates import AveragedRates
from newton_summary.solve import Status

ONE = torch.ones(())


def loss_fn(model, batch):
    x, y, factor = batch
    return factor * functional.cross_entropy(model(x), y)


def make_batches():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 1).long()
    return [(a, b, ONE) for a, b in zip(x.split(50), y.split(50), strict=True)]


def broken(kind):
    x, y, _ = make_batches()[0]
    return {
        "not a number": (torch.full_like(x, torch.nan), y, ONE),
        "infinite": (x * torch.inf, y, ONE),
        "a loss a million times as large": (x, y, 1e6 * ONE),
    }[kind]


KINDS = ["not a number", "infinite", "a loss a million times as large"]


def train(kind, training, measuring, steps=200, at=100, direction="nadam"):
    """The mean loss over all good batches after every step, and the optimizer."""
    torch.manual_seed(1)
    model, batches = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)), make_batches()
    data = [*batches[:3], broken(kind), *batches[3:]] if measuring else batches
    if direction == "AdamW's":
        direction = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"every": 5, "partition": "canonical", "lr": 3.0, "direction": direction}
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=data, **options)
    losses = []
    for t in range(steps):
        optimizer.zero_grad()
        loss_fn(model, broken(kind) if training and t == at else batches[t % 8]).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(sum(loss_fn(model, batch).item() for batch in batches) / 8)
    return losses, optimizer


@pytest.mark.parametrize("direction", ["nadam", "momentum", "AdamW's"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_training_batch_costs_a_few_steps(kind, direction) -> None:
    losses, _ = train(kind, training=True, measuring=False, at=60, direction=direction)
    assert max(losses[60:70]) < 2 * losses[59]
    assert min(losses[61:]) < losses[59], "it did not go on"
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_measuring_batch_costs_a_measurement(kind) -> None:
    losses, optimizer = train(kind, training=False, measuring=True)
    assert 2 <= optimizer.counts["failed"] <= 6  # of 40; one draw in nine, of those for comparisons too
    assert max(losses) < 1.1 * losses[0], "nothing was thrown off"
    assert min(losses[100:]) < losses[0] / 10, "it did not go on"  # where it ends is chance: eight batches, rates × 3
    losses, _ = train(kind, training=True, measuring=True)
    assert min(losses[100:]) < losses[0] / 10


def test_a_first_gradient_that_is_broken_is_waited_out() -> None:
    losses, _ = train("not a number", training=True, measuring=False, at=0)
    assert losses[-1] < losses[0] / 15


def apply(guard, *gradients):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    guard.apply(parameters, lambda number: number)
    return [p.grad for p in parameters]


def test_gradients_are_shortened_all_together_and_else_kept_bit_for_bit() -> None:
    guard, a, b, c = GradientClipping(), torch.tensor([3.0, 4.0]), torch.tensor([[1e-20]]), torch.tensor([1e10])
    assert all(map(torch.equal, apply(guard, a, b, c), (a, b, c)))
    assert guard.usual == pytest.approx([5.0, 1e-20, 1e10])
    taken = apply(guard, 2.9 * a, 2.9 * b, 100 * c)
    assert all(map(torch.equal, taken, (2.9 * a, 2.9 * b, 100 * c))), "most of them are not too long"
    usual = [5 * 1.019, 1e-20 * 1.019, 1e10 * 1.99]
    assert guard.usual == pytest.approx(usual)
    taken = apply(guard, 900 * a, 9 * b, 20 * c)  # 883, 8.8 and 10 times what is usual
    share = 3 / (20 / 1.99)
    for gradient, expected in zip(taken, (900 * a, 9 * b, 20 * c), strict=True):
        torch.testing.assert_close(gradient, share * expected)
    assert guard.usual == pytest.approx(
        [usual[0] * 1.99, 0.99 * usual[1] + 0.09e-20, 0.99 * usual[2] + 0.2e10], rel=1e-5
    )


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e6])
def test_gradients_are_refused_all_together(broken) -> None:
    guard = GradientClipping()
    apply(guard, torch.tensor([1.0]), torch.tensor([2.0]))
    assert [float(g) for g in apply(guard, torch.tensor([broken]), torch.tensor([3e6]))] == [0.0, 0.0]
    counted = [1.0, 2.0] if broken != 1e6 else [1.99, 3.98]
    assert guard.usual == pytest.approx(counted), "what is not finite is not counted"


def test_gradients_that_grow_for_good_are_followed() -> None:
    guard = GradientClipping()
    apply(guard, torch.tensor([1.0]))
    taken = [float(apply(guard, torch.tensor([1e6]))[0]) for _ in range(80)]
    usual = [1.99**t for t in range(11)]
    assert taken[:11] == pytest.approx([0.0 if 1e6 / u > 1000 else 3 * u for u in usual], rel=1e-5)
    assert taken[-1] == 1e6


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, math.nan, math.inf])),
            st.one_of(st.floats(1e-3, 1e3), st.just(0.0)),
        ),
        min_size=1,
        max_size=7,
    )
)
def test_numbers_and_tensors_follow_the_same_rule(cases) -> None:
    norms, usual = ([float(np.float32(x)) for x in column] for column in zip(*cases, strict=True))
    share, moved = guards._follow(norms, usual)
    shares, tensor = guards._follow_on_device(torch.tensor(norms), torch.tensor(usual))
    assert float(shares) == pytest.approx(share, rel=1e-5)
    assert tensor.tolist() == pytest.approx(moved, rel=1e-5)


def test_a_tensor_without_a_gradient_has_no_say() -> None:
    guard, parameters = GradientClipping(), [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for t in range(4):
        for parameter, gradient in zip(parameters, (1.0, 5.0, 1.0), strict=True):
            parameter.grad = None if t % 2 and gradient == 5.0 else torch.tensor([gradient])
        guard.apply(parameters, lambda numbers: numbers)
        assert guard.usual == pytest.approx([1.0, 5.0, 1.0])
        assert [float(p.grad) for p in parameters if p.grad is not None] == [1.0, 5.0, 1.0][:: 2 if t % 2 else 1]


def test_nothing_is_known_before_the_first_gradient_that_is_not_zero() -> None:
    guard = GradientClipping()
    for first in (torch.tensor([torch.inf]), torch.tensor([0.0])):
        apply(guard, first)
    assert float(apply(guard, torch.tensor([1e-3]))[0]) == pytest.approx(1e-3)


def test_half_precision_does_not_overflow_and_sparse_gradients_are_looked_at() -> None:
    large = torch.full((100,), 6e4, dtype=torch.float16)
    assert torch.equal(apply(GradientClipping(), large)[0], large)
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    embedding.weight.grad._values()[0] = torch.nan
    GradientClipping().apply([embedding.weight], lambda number: number)
    assert torch.equal(embedding.weight.grad.to_dense(), torch.zeros(5, 2))


def test_the_paper_is_followed_to_the_letter() -> None:
    model, batches = nn.Linear(6, 3), make_batches()
    optimizer = ns.NewtonSummary.paper(model, loss_fn, curvature_data=batches)
    loss_fn(model, broken("not a number")).backward()
    optimizer.step()
    assert torch.isnan(model.weight.grad).any()


def test_an_explosion_is_believed_the_second_time() -> None:
    rule = AveragedRates()
    calm = ns.Summary(loss=1.0, gradient=[1.0], hessian=[[1.0]], third=[0.0])
    assert rule.update(calm) is Status.SOLVED
    assert rule.update(calm * 2000.0) is Status.OUTLIER
    resumed = AveragedRates()
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert rule.update(calm) is Status.SOLVED
    assert rule.update(calm * 2000.0) is Status.OUTLIER
    for one in (rule, resumed):
        assert one.update(calm * 2000.0) is Status.SOLVED


def test_a_resumed_run_knows_what_is_usual() -> None:
    _, optimizer = train("infinite", training=True, measuring=False, steps=20, at=10)
    usual = optimizer._clipping.usual
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer._clipping.usual == usual


def test_parameters_of_several_types_are_looked_at_together() -> None:
    guard = GradientClipping()
    narrow, wide = torch.tensor([1.0]).bfloat16(), torch.tensor([2.0], dtype=torch.float64)
    apply(guard, narrow, wide)
    assert guard.usual == [1.0, 2.0]
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2).double()])

    def loss_fn(m, x):
        return m[1](m[0](x).double()).square().mean()

    batches = [torch.randn(8, 3) for _ in range(4)]
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches)
    before = loss_fn(model, batches[0]).item()
    for x in batches * 3:
        optimizer.zero_grad()
        loss_fn(model, x).backward()
        optimizer.step()
    assert loss_fn(model, batches[0]).item() < before
