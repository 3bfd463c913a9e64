"""The scale of the rates: against the rule written out, and in training."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.optim.cadence import ComparisonCadence
from newton_summary.optim.directions import SOAP, NAdam
from newton_summary.optim.first_length import best_length, first_scale
from newton_summary.optim.rate_adaptation import Constants, RateAdaptation

# The rule -------------------------------------------------------------------------------------------------------------


def reference(pairs, gain=2.0, settling=50) -> float:
    """The rule as a sum over all comparisons: (loss at the weights, at their average, steps, steps since the last)."""
    signs = np.sign([average - here for here, average, _, _ in pairs])
    return float(
        np.exp(gain * sum(sign * gap / (t + settling) for sign, (_, _, t, gap) in zip(signs, pairs, strict=True)))
    )


def made_up(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(count, 2, generator=generator, dtype=torch.float64).tolist()
    return [(here, average, 10 * n + 4, 10) for n, (here, average) in enumerate(losses)]


def followed(pairs, constants=None) -> RateAdaptation:
    adaptation = RateAdaptation(constants)
    for pair in pairs:
        adaptation.compare(*pair)
    return adaptation


def test_the_scale_is_that_of_the_rule_written_out() -> None:
    pairs = made_up(30)
    assert followed(pairs).scale == pytest.approx(reference(pairs), rel=1e-12)
    constants = {"gain": 1.5, "settling": 7}
    assert followed(pairs, Constants(**constants)).scale == pytest.approx(reference(pairs, **constants), rel=1e-12)


def test_a_constant_and_a_factor_of_the_loss_change_nothing() -> None:
    pairs = made_up(30)
    for factor, constant in ((1.0, -3.0), (1e-6, 0.0), (1e6, 5e6)):
        other = [(factor * a + constant, factor * b + constant, *rest) for a, b, *rest in pairs]
        assert followed(other).scale == pytest.approx(followed(pairs).scale, rel=1e-8)


def test_steps_grow_while_the_weights_are_better_and_shrink_while_their_average_is() -> None:
    better, worse = ([(here, 1.0, 10 * n, 10) for n in range(1, 20)] for here in (0.9, 1.1))
    assert followed(better).scale > 1 > followed(worse).scale
    assert followed(better).advantage == pytest.approx(-0.1)
    assert followed(worse).advantage == pytest.approx(0.1)


def test_losses_that_are_equal_or_no_numbers_tell_nothing() -> None:
    adaptation = followed([(1.0, math.nan, 10, 10), (math.inf, 1.0, 20, 10), (1e200, 0.0, 30, 10)])
    assert adaptation.scale == 1.0
    same = followed([(1.0, 1.0, 10 * n, 10) for n in range(1, 20)])
    assert same.scale == 1.0
    assert same.advantage == 0.0


def test_a_scale_that_is_held_stays_and_the_advantage_does_not() -> None:
    adaptation = RateAdaptation()
    adaptation.compare(1.0, 0.5, 10, 10, holds=True)
    assert adaptation.scale == 1.0
    assert adaptation.advantage == 0.5


def test_a_divergence_is_above_the_first_loss_and_far_above_the_average() -> None:
    adaptation = RateAdaptation()
    adaptation.begin(2.0)
    assert not adaptation.may_have_diverged(50.0, 1.0), "there is nothing to compare with"
    assert adaptation.may_have_diverged(math.nan, 1.0)
    for n in range(1, 10):
        adaptation.compare(1.0 + 0.1 * (-1) ** n, 1.0, 10 * n, 10)
    before = adaptation.state_dict()
    assert not adaptation.may_have_diverged(1.99, 0.5), "not above the first loss"
    assert not adaptation.may_have_diverged(2.1, 1.2), "a difference as large as nine usual ones"
    assert adaptation.may_have_diverged(2.1, 1.05)
    assert adaptation.state_dict() == before, "a question changes nothing"
    adaptation.roll_back()
    assert adaptation.scale == before["scale"] / 2
    assert adaptation.cuts == 1


def test_the_average_is_over_the_last_quarter_of_the_run() -> None:
    """Its mean age, in units of the steps taken, tends to 1/5: weights of the shape t^4 on [0, 1] ... of t."""
    adaptation, age = RateAdaptation(), 0.0
    for step in range(10, 20_000, 10):
        age = (age + 10) * (1 - adaptation.share(step, 10))
    assert age / step == pytest.approx(1 / (adaptation.constants.window + 1), rel=0.01)
    assert adaptation.share(4, 4) == 0.5, "the weights are not their own average after the first steps, either"


@pytest.mark.parametrize(("minimum", "expected"), [(1.0, 1.0), (0.1, 0.5), (5.0, 4.0), (7.0, 8.0), (1e9, 32.0)])
def test_the_best_length_is_that_of_a_valley_to_a_power_of_two(minimum, expected) -> None:
    evaluated = []

    def loss_after(size: float) -> float:
        evaluated.append(size)
        return (size - minimum) ** 2 - 10

    assert best_length(loss_after) == expected
    assert evaluated == [2.0**n for n in range(-1, len(evaluated) - 1)]
    assert first_scale(loss_after) == pytest.approx(min(max(math.sqrt(expected / 3), 1 / 3), 3))


def test_a_loss_that_is_no_number_or_flat_makes_the_first_rate_no_smaller_than_a_third() -> None:
    for loss_after in (lambda size: math.nan, lambda size: 1.0, lambda size: size):
        assert first_scale(loss_after) == pytest.approx(math.sqrt(1 / 6))


def test_comparisons_grow_apart_up_to_their_interval() -> None:
    cadence, steps = ComparisonCadence(every=40), [0]
    cadence.take(0)
    while cadence.due < 400:
        steps.append(cadence.due)
        assert cadence.take(cadence.due) == steps[-1] - steps[-2]
    assert steps[:8] == [0, 4, 8, 12, 18, 27, 40, 60]
    assert {b - a for a, b in pairwise(steps[9:])} == {40}


# In the optimizer -----------------------------------------------------------------------------------------------------


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def make_loader():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(80, 5).double(), torch.randint(3, (80,))), 20, shuffle=True)


def make(**options):
    torch.manual_seed(1)
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), **options)


def wide():
    """A network that can fit all samples."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)).double()


def backward(model, optimizer, number):
    batches = list(make_loader())
    torch.manual_seed(number)
    optimizer.zero_grad()
    loss_fn(model, batches[number % len(batches)]).backward()


def train(model, optimizer, count, start=0):
    for number in range(start, start + count):
        backward(model, optimizer, number)
        optimizer.step()


def test_new_proportions_leave_the_size_to_the_line_search() -> None:
    model, optimizer = make(partition="canonical", every=3, compare_every=3)
    train(model, optimizer, 10)
    optimizer._comparison.adaptation.scale = 0.37
    old = optimizer._relative.value
    backward(model, optimizer, 10)
    optimizer.measure(next(iter(make_loader())))
    new, hessian = optimizer._relative.value, optimizer.rule.average.value.hessian
    assert not torch.allclose(new, old)
    assert float(new @ hessian @ new) == pytest.approx(float(old @ hessian @ old))
    assert torch.allclose(new / new.sum(), optimizer.rule.rates / optimizer.rule.rates.sum())
    assert optimizer._comparison.adaptation.scale == 0.37


def test_a_tensor_without_a_gradient_at_first_is_trained_later() -> None:
    model, optimizer = make(compare_every=2)
    model[4].bias.requires_grad_(False)
    train(model, optimizer, 6)
    before = model[4].bias.clone()
    model[4].bias.requires_grad_(True)
    train(model, optimizer, 6, 6)
    assert not torch.equal(model[4].bias, before)


def test_without_data_to_look_at_rates_are_those_measured_by_hand() -> None:
    model = make()[0]
    optimizer = ns.NewtonSummary(model, loss_fn)
    backward(model, optimizer, 0)
    optimizer.measure(next(iter(make_loader())))
    before = [p.detach().clone() for p in model.parameters()]
    u, (rate,) = optimizer._current_direction(), optimizer.measured_rates.values()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old - rate * u[p], rtol=1e-12)
    assert optimizer.counts["compared"] == 0
    assert "average" not in optimizer.state[p]


@pytest.mark.parametrize("at", [0, 1, 6, 31])
def test_a_resumed_run_looks_as_if_nothing_had_happened(at) -> None:
    model, optimizer = make(partition="canonical")
    train(model, optimizer, at)
    twin, resumed = make(partition="canonical")
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 40, at)
    train(twin, resumed, 40, at)
    assert resumed.rates == optimizer.rates
    assert resumed._comparison.state_dict() == optimizer._comparison.state_dict()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_at_the_end_of_a_run_of_known_length_steps_shrink_to_nothing() -> None:
    model, optimizer = make(steps=40)
    lengths = []
    for number in range(40):
        backward(model, optimizer, number)
        (scale,) = set(optimizer._scales())
        lengths.append(scale)
        optimizer.step()
    assert lengths[:31] == pytest.approx([1.0] * 31)
    assert lengths[31:] == pytest.approx([0.1 * n for n in range(9, 0, -1)])


def test_looking_must_be_at_whole_steps() -> None:
    with pytest.raises(ValueError, match="compare_every"):
        make(compare_every=-1)


def test_without_looks_rates_are_those_measured() -> None:
    model, optimizer = make(partition="canonical", compare_every=0)
    train(model, optimizer, 60)
    assert optimizer.counts["compared"] == 0
    assert optimizer.counts["measured"] > 1
    assert list(optimizer.measured_rates.values()) == optimizer.rule.rates.tolist()
    assert set(optimizer._scales()) == {1.0}


# The average ----------------------------------------------------------------------------------------------------------


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def make_plain(**options):
    model = wide()
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), **options)


def test_the_average_takes_the_place_of_the_weights_where_it_is_better() -> None:
    model, optimizer = make_plain(compare_every=4)
    train(model, optimizer, 20)
    before, average = weights_of(model), [optimizer.state[p]["average"].clone() for p in model.parameters()]
    for advantage, expected in ((-0.1, before), (0.1, average)):
        optimizer._comparison.adaptation.advantage = advantage
        optimizer.eval()
        optimizer.eval()
        for p, w in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p, w)
    with pytest.raises(RuntimeError, match="averaged weights"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w)


def test_a_run_does_not_depend_on_being_evaluated_or_saved_there() -> None:
    model, optimizer = make_plain(compare_every=4)
    other, evaluated = make_plain(compare_every=4)
    train(model, optimizer, 20)
    train(other, evaluated, 20)
    evaluated._comparison.adaptation.advantage = optimizer._comparison.adaptation.advantage = 0.1
    evaluated.eval()
    twin, resumed = make_plain(compare_every=4)
    twin.load_state_dict(other.state_dict())
    resumed.load_state_dict(copy.deepcopy(evaluated.state_dict()))
    for each in (evaluated, resumed):
        each.train()
    for m, o in ((model, optimizer), (other, evaluated), (twin, resumed)):
        train(m, o, 20, 20)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("factor", [1e4, math.inf, math.nan])
def test_after_a_divergence_the_weights_go_back_to_their_average(factor) -> None:
    model, batches = wide(), list(make_loader())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), compare_every=5)
    losses = []
    for t in range(160):
        if t == 62:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
        optimizer.zero_grad()
        loss = loss_fn(model, batches[t % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not max(losses[62:66]) < 3 * losses[0]
    assert max(losses[66:]) < losses[0]
    assert min(losses[66:]) < min(losses[:62]), "it did not go on"


def test_looks_in_step_with_the_batches_do_not_stop_a_run() -> None:
    """A period that is one longer than the list: every search is on the batch that comes next, for which steps of the
    others go uphill."""
    model, batches = wide(), list(make_loader())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, compare_every=len(batches) + 1)
    before = sum(loss_fn(model, batch).item() for batch in batches)
    for t in range(160):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
    assert sum(loss_fn(model, batch).item() for batch in batches) < before / 2


def test_a_plateau_of_vanished_gradients_is_left_without_an_explosion() -> None:
    """The first rate that is measured there is hundreds of times too long, and searches are rare."""
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    y = x[:, :4].argmax(1)
    hidden = [layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.ELU())]
    model = nn.Sequential(nn.Linear(20, 64), nn.ELU(), *hidden, nn.Linear(64, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    loader = DataLoader(TensorDataset(x, y), 20, shuffle=True)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, compare_every=50)
    losses = [loss_fn(model, (x, y)).item()]
    for _ in range(25):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        losses.append(loss_fn(model, (x, y)).item())
    assert max(losses) < 3 * losses[0]
    assert losses[-1] < 0.8 * losses[0]


def test_before_the_first_search_there_is_no_average() -> None:
    model, optimizer = make()
    before = weights_of(model)
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


# With the loss at the average ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["trivial", "canonical"])
def test_a_comparison_sees_the_loss_at_the_weights_and_at_their_average(partition, monkeypatch) -> None:
    """Dropout and batch norm are in: the same random numbers at both, and nothing of the model changes."""
    model, optimizer = make(partition=partition, compare_every=4)
    train(model, optimizer, 16)
    optimizer._comparison.cadence.due = 16
    average = [optimizer.state[p]["average"].clone() for p in model.parameters()]
    twin, stream = copy.deepcopy(model), copy.deepcopy(optimizer._samples.stream)
    batch, random, seen = stream.next(torch.device("cpu")), torch.get_rng_state(), []
    share = min(4.0 * 4 / (16 + 4.0), 0.5)
    expected = [torch.lerp(a, p.detach(), share) for a, p in zip(average, model.parameters(), strict=True)]

    def loss_at(weights) -> float:
        copied = copy.deepcopy(twin)
        with torch.no_grad():
            for p, w in zip(copied.parameters(), weights, strict=True):
                p.copy_(w)
        torch.set_rng_state(random)
        return loss_fn(copied, batch).item()

    monkeypatch.setattr(RateAdaptation, "compare", lambda self, *values: seen.append(values))
    optimizer._adapt()
    ((here, there, step, gap, holds),) = seen
    assert torch.equal(torch.get_rng_state(), random)
    assert (step, gap, holds) == (16, 4, False)
    assert here == pytest.approx(loss_at(twin.parameters()), rel=1e-12)
    assert there == pytest.approx(loss_at(expected), rel=1e-12)
    for p, q in zip([*model.parameters(), *model.buffers()], [*twin.parameters(), *twin.buffers()], strict=True):
        assert torch.equal(p, q), "a comparison changed the model"
    for p, a in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["average"], a, rtol=1e-14, atol=1e-15)


def test_one_group_is_never_measured_and_several_are_now_and_then() -> None:
    model, optimizer = make()
    assert optimizer.rates == {"all": 3e-3}
    train(model, optimizer, 1)
    assert optimizer.rates["all"] == 3e-3 * optimizer._comparison.adaptation.scale != 3e-3
    train(model, optimizer, 60)
    assert optimizer.counts["measured"] == 0
    assert optimizer.counts["compared"] >= 6
    assert optimizer.rates["all"] == pytest.approx(3e-3 * optimizer._comparison.adaptation.scale)
    model, optimizer = make(partition="canonical", every=20)
    train(model, optimizer, 50)
    assert optimizer.counts["measured"] == 3


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_direction_without_a_usual_rate_is_measured_once(direction) -> None:
    model, optimizer = make_plain(direction=direction)
    assert optimizer.rates == {}
    train(model, optimizer, 60)
    assert optimizer.counts["measured"] == 1


@pytest.mark.parametrize("direction", [None, "soap", "nadam"])
@pytest.mark.parametrize(("factor", "constant"), [(1.0, 3.0), (1.0, -1e3), (1e-4, 0.0), (1e4, -7.0)])
def test_training_is_the_same_with_another_constant_and_factor_in_the_loss(direction, factor, constant) -> None:
    """Fifty steps, ε aside; the loss becomes negative with some constants.

    Factors are of sides whose gradients have full rank: in a null space a basis is a matter of rounding.
    """

    def trained(loss, eps):
        model = wide()
        chosen = {"soap": SOAP(eps=eps, largest=8), "nadam": NAdam(eps=eps), None: None}[direction]
        optimizer = ns.NewtonSummary(model, loss, curvature_data=make_loader(), direction=chosen, compare_every=5)
        if chosen is None:
            for group in optimizer.param_groups:
                group["eps"] = eps
        batches = list(make_loader())
        for t in range(50):
            optimizer.zero_grad()
            loss(model, batches[t % len(batches)]).backward()
            optimizer.step()
        return model, optimizer

    eps = 1e-8
    model, optimizer = trained(loss_fn, eps)
    other, changed = trained(lambda m, batch: factor * loss_fn(m, batch) + constant, eps * factor)
    assert changed.rates["all"] == pytest.approx(optimizer.rates["all"], rel=1e-6)
    assert abs(math.log(optimizer.rates["all"] / 3e-3)) > 0.1, "the rate never moved"
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_model_with_batch_norms_keeps_its_weights() -> None:
    model, optimizer = make(compare_every=4)
    train(model, optimizer, 20)
    optimizer._comparison.adaptation.advantage = 0.1
    before = weights_of(model)
    optimizer.eval()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    optimizer.step()


def test_a_loss_that_becomes_negative_is_followed() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = 0.01 * x[:, :1]
    loader = DataLoader(TensorDataset(x, y), 20, shuffle=True)

    def likelihood(model, batch):
        mean, log_scale = model(batch[0]).chunk(2, dim=1)
        return (0.5 * ((mean - batch[1]) * (-log_scale).exp()).square() + log_scale).mean()

    model = nn.Linear(4, 2)
    optimizer = ns.NewtonSummary(model, likelihood, curvature_data=loader)
    for _ in range(60):
        for batch in loader:
            optimizer.zero_grad()
            likelihood(model, batch).backward()
            optimizer.step()
    optimizer.eval()
    assert likelihood(model, (x, y)).item() < -1.0
