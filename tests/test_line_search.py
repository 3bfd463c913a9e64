"""The search: how long steps are between measurements."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.optim.cadence import interval_at, is_time_to_search
from newton_summary.optim.line_search import LineSearch
from newton_summary.optim.multiplier import LearningRateMultiplier

EVERY = 5
GROWTH = 2 ** (EVERY / 20)


def valley(bottom: float, curvature: float = 1.0, floor: float = 1.0):
    return lambda size: floor + 0.5 * curvature * (size - bottom) ** 2


def followed(losses, count=80, every=EVERY) -> LineSearch:
    search = LineSearch()
    for number in range(count):
        search.search(losses[number % len(losses)] if isinstance(losses, list) else losses, every)
    return search


# The scale ------------------------------------------------------------------------------------------------------------


@given(bottom=st.floats(0.05, 20.0), curvature=st.floats(1e-3, 0.5), floor=st.floats(0.0, 10.0))
def test_the_scale_reaches_the_bottom_of_a_valley(bottom, curvature, floor) -> None:
    search = followed(valley(bottom, curvature, floor + 200 * curvature))
    assert search.step_size == pytest.approx(bottom, rel=1e-6)


@given(factor=st.floats(1e-6, 1e6))
def test_it_does_not_depend_on_the_unit_of_the_loss(factor) -> None:
    losses = [valley(0.5), valley(2.0, 3.0), valley(4.0, 0.1)]
    scaled = [lambda size, f=f: factor * f(size) for f in losses]
    assert followed(scaled).step_size == pytest.approx(followed(losses).step_size, rel=1e-9)


@pytest.mark.parametrize("every", [1, EVERY, 15, 50])
def test_it_agrees_with_parabolas_fitted_in_another_way(every) -> None:
    generator, growth = np.random.default_rng(0), 2 ** min(every / 20, 1)
    search, slope, curvatures, weights, trial = LineSearch(), 0.0, [], [], 1.0
    for number in range(1, 60):
        a, b, c = generator.normal(0.05, 0.1), generator.uniform(0.01, 0.3), generator.normal(0, 0.02)

        def loss(size, a=a, b=b, c=c):
            return 2.0 - a * size + b * size**2 + c * math.sin(3 * size)

        search.search(loss, every)
        points = trial * np.arange(3)
        quadratic, linear, constant = np.polyfit(points, [loss(x) for x in points], 2)
        share = max(3 / (number + 2), min(every / 100, 0.15))
        slope = (1 - share) * slope - share * linear / constant
        weights = [*(w * (1 - share) for w in weights), share]
        curvatures.append(2 * quadratic / constant)
        mean, square = (np.average(np.power(curvatures, power), weights=weights) for power in (1, 2))
        steepest = max((mean + math.sqrt(square)) / 2, quadratic / constant)
        best = 0.0 if slope <= 0 else math.inf if steepest <= 0 else slope / steepest
        size = min(best, growth * trial)
        trial = max(size, trial / growth)
        assert search.step_size == pytest.approx(size * min(20 / every, 1) ** 0.5, rel=1e-9, abs=1e-12)


def test_a_batch_counts_the_same_whatever_it_holds() -> None:
    """One whose loss is a hundred times the others' pulls no more than they do."""
    alike = followed([valley(1.0, 0.2), valley(3.0, 0.2)], count=200)
    uneven = followed([valley(1.0, 0.2), lambda size: 50 * valley(3.0, 0.2)(size)], count=200)
    assert uneven.step_size == pytest.approx(alike.step_size, rel=0.05)


def test_the_scale_doubles_in_twenty_steps_at_most_and_falls_at_once() -> None:
    search = followed(valley(1.0), count=40)
    for number in range(1, 5):
        search.search(lambda size: 1.0 - 0.1 * size, EVERY)
        assert search.step_size <= 1.0001 * GROWTH**number
    search = followed(valley(1.0), count=40)
    search.search(valley(0.3, 1.0, floor=0.16), EVERY)
    assert search.step_size < 0.4, "a steep curvature counts at once"
    search.search(valley(1.0), EVERY)
    assert 0.5 < search.step_size < 0.7, "and is remembered in part"
    for _ in range(100):
        search.search(valley(1.0), EVERY)
    assert search.step_size > 0.9, "for as long as the averages last"


def test_uphill_it_stands_still_and_goes_on_afterwards() -> None:
    search = followed(valley(1.0), count=40)
    for _ in range(30):
        search.search(valley(-3.0), EVERY)
    assert search.step_size == 0.0
    for _ in range(100):
        search.search(valley(1.0), EVERY)
    assert search.step_size == pytest.approx(1.0, rel=0.1)


def test_the_size_of_a_look_is_halved_until_the_loss_follows() -> None:
    search = LineSearch()
    search.search(lambda size: 1.0 + (10 * size) ** 2 - 5 * size, EVERY)
    assert search.halvings == 3
    assert 0 < search.step_size < 0.125


@pytest.mark.parametrize("cliff", [0.3, 1.5])
def test_it_stays_before_a_cliff(cliff) -> None:
    search = LineSearch()
    for _ in range(40):
        search.search(lambda size: math.inf if size > cliff else 1.0 - 0.1 * size, EVERY)
        assert 0 < search.step_size <= GROWTH * cliff
    assert search.halvings > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_changes_nothing(value) -> None:
    search = followed(valley(2.0), count=7)
    before = search.state_dict()
    search.search(lambda size: value, EVERY)
    assert search.state_dict() == before
    search.search(lambda size: 1.0 if size == 0 else value, EVERY)
    assert search.state_dict() == before


def test_a_loss_that_passes_through_zero_does_no_harm() -> None:
    search = followed([lambda size, c=c: c + 0.01 * (size - 2.0) ** 2 for c in (1.0, 0.0, -1.0, 1e-9, 0.5)], count=200)
    assert 1.5 < search.step_size <= 2.0, "where the loss is nearly 0 the parabolas are steep, in units of it"


@pytest.mark.parametrize("slope", [0.0, 1e-30, -1e-30])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_loss_that_has_become_constant_does_no_harm(level, slope) -> None:
    search = followed(lambda size: level - slope * size, count=20_000, every=20)
    for _ in range(1000):
        search.search(valley(1.0), 20)
    assert search.step_size == pytest.approx(1.0, rel=0.01)


def test_what_is_left_of_a_loss_when_it_is_rounded_away_tells_nothing() -> None:
    """The mean of a hundred losses of which single ones are 1.2e-7, the least that float32 has beside 1, or 0."""
    search, generator, quantum = followed(valley(2.0), count=60), np.random.default_rng(0), 1.2e-9
    for _ in range(300):
        left = int(generator.integers(0, 3))
        after = {0.0: left, 1.0: max(left - int(generator.integers(0, 2)), 0)}
        search.search(lambda size, after=after: quantum * after.get(min(size / search._trial, 1.0), after[1.0]), EVERY)
    assert search.step_size == pytest.approx(2.0, rel=1e-6)


def test_the_state_goes_through_json() -> None:
    search, twin = followed(valley(3.0), count=5), LineSearch()
    search.multiplier.compare(0.5, 1.0, 15)
    twin.load_state_dict(json.loads(json.dumps(search.state_dict())))
    for each in (search, twin):
        each.search(valley(2.5), EVERY)
    assert twin.state_dict() == search.state_dict()


# The multiplier -------------------------------------------------------------------------------------------------------


def falling(rate: float, count: int) -> LineSearch:
    """A run whose loss falls by this in its logarithm at each step, and is the same all along the step."""
    search = LineSearch()
    for number in range(count):
        search.search(lambda size, n=number: math.exp(-rate * n * EVERY), EVERY)
    return search


def steady(oscillating: bool = False) -> LineSearch:
    search = followed([lambda size, n=n: 0.97**n * valley(1.0)(size) for n in range(40)], count=40)
    for _ in range(10):
        search.multiplier.compare(0.6 if oscillating else 1.0, 1.0, 3 * EVERY)
    return search


def test_slopes_halve_the_scale_in_four_hundred_steps_at_most() -> None:
    search = steady()
    for number in range(1, 400 // EVERY + 1):
        search.search(valley(-3.0), EVERY)
        assert search.step_size == pytest.approx(0.5 ** (number * EVERY / 400), rel=1e-6)


def test_where_the_weights_oscillate_slopes_count_in_full() -> None:
    search = steady(oscillating=True)
    for _ in range(30):
        search.search(valley(-3.0), EVERY)
    assert search.step_size == 0.0


def test_a_growing_curvature_shortens_the_scale_as_ever() -> None:
    search, free = steady(), steady(oscillating=True)
    for number in range(1, 200):
        steep = valley(2.0**-number, 4.0 ** min(number, 5), floor=3.0)
        search.search(steep, EVERY)
        free.search(steep, EVERY)
        assert search.step_size >= free.step_size * (1 - 1e-12)
    assert search.step_size < 2.0**-8


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 5e-4])
@pytest.mark.parametrize("count", [200, 1000])
def test_the_multiplier_weighs_the_advantage_of_the_average_against_the_gain_of_an_eighth_of_the_run(
    rate, count
) -> None:
    eighth = min(rate * count * EVERY / 8, 0.3)
    for share in (0.0, 0.9, 1.1):
        search = falling(rate, count)
        search.multiplier.compare(math.exp(-share * eighth), 1.0, 15)
        assert search.multiplier.value == pytest.approx(1 + 0.06 * (1 - share) * eighth / max(eighth, 0.02), abs=0.003)
        assert (search.multiplier.value > 1) == (share < 1)


@pytest.mark.parametrize("rate", [0.0, -1e-3])
def test_where_a_run_gains_nothing_a_slight_advantage_shortens_steps(rate) -> None:
    search = falling(rate, 100)
    search.multiplier.compare(1.0, 1.0, 15)
    assert search.multiplier.value == 1.0
    search.multiplier.compare(0.99, 1.0, 15)
    assert search.multiplier.value == pytest.approx(1 + 0.06 * math.log(0.99) / 0.02)


def test_the_multiplier_has_limits() -> None:
    search = falling(1e-3, 200)
    for _ in range(50):
        search.multiplier.compare(0.5, 1.0, 15)
    assert search.multiplier.value == 2 / 3
    for _ in range(50):
        search.multiplier.compare(1.0, 1.0, 15)
    assert search.multiplier.value == 1.4


def test_a_fall_that_shorter_steps_have_brought_is_no_gain_of_the_run() -> None:
    """What the weights gain on their average, while that stays where it is."""
    search = LineSearch()
    for advantage, comparisons in ((0.5, 100), (0.05, 40)):
        for _ in range(comparisons):
            for _ in range(3):
                search.search(lambda size, a=advantage: math.exp(a), EVERY)
            search.multiplier.compare(1.0, math.exp(advantage), 3 * EVERY)
    assert search.multiplier.value == 2 / 3


@pytest.mark.parametrize(("average", "here"), [(math.nan, 1.0), (1.0, math.nan), (0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_losses_without_a_ratio_do_not_change_the_multiplier(average, here) -> None:
    search = LineSearch()
    search.multiplier.compare(average, here, 15)
    assert search.multiplier.value == 1.0


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


@pytest.mark.parametrize("partition", ["trivial", "canonical"])
def test_a_look_sees_the_loss_along_the_step_and_at_averaged_weights(partition, monkeypatch) -> None:
    model, optimizer = make(partition=partition, line_search_every=4)
    train(model, optimizer, 24)  # with searches after 0, 1, 2, 4, 8, 12, 16 and 20
    average = [optimizer.state[p]["average"].clone() for p in model.parameters()]
    backward(model, optimizer, 24)
    u = optimizer._current_direction()
    along = [u[p] for p in model.parameters()]
    sizes = optimizer.partition.spread(optimizer._relative.value.tolist())
    twin = copy.deepcopy(model)
    stream = copy.deepcopy(optimizer._samples.stream)
    batch, random = stream.next(torch.device("cpu")), torch.get_rng_state()

    def loss_at(weights) -> float:
        copied = copy.deepcopy(twin)
        with torch.no_grad():
            for p, w in zip(copied.parameters(), weights, strict=True):
                p.copy_(w)
        torch.set_rng_state(random)
        return loss_fn(copied, batch).item()

    def search(self, loss_after, every):
        assert every == 4
        for size in (0.0, 1.3, 2.6, 0.4):
            moved = [p - size * f * v for p, v, f in zip(twin.parameters(), along, sizes, strict=True)]
            assert loss_after(size) == pytest.approx(loss_at(moved), rel=1e-12)
        return 1.5

    seen = []
    monkeypatch.setattr(LineSearch, "search", search)
    monkeypatch.setattr(LearningRateMultiplier, "compare", lambda self, *values: seen.append(values))
    optimizer._search.run(u, optimizer._relative.value, optimizer.state, optimizer._taken)
    ((there, here, steps),) = seen  # every third search compares
    assert torch.equal(torch.get_rng_state(), random)
    assert (here, steps) == (1.5, 12)
    assert there == pytest.approx(loss_at(average), rel=1e-12)
    for p, q in zip([*model.parameters(), *model.buffers()], [*twin.parameters(), *twin.buffers()], strict=True):
        assert torch.equal(p, q), "a search changed the model"
    for p, a in zip(model.parameters(), average, strict=True):
        assert torch.allclose(optimizer.state[p]["average"], a + 0.12 * (p - a))


def test_rates_are_proportions_times_the_scale_and_steps_have_the_multiplier() -> None:
    model, optimizer = make(partition="canonical", line_search_every=1, lr=1.2)
    train(model, optimizer, 6)
    backward(model, optimizer, 6)
    before = [p.detach().clone() for p in model.parameters()]
    u = optimizer._current_direction()
    optimizer.step()
    rates = optimizer._relative.value * optimizer._search.line_search.step_size
    assert list(optimizer.measured_rates.values()) == pytest.approx(rates.tolist())
    assert [g["rate"] for g in optimizer.param_groups] == pytest.approx(rates.tolist())
    assert optimizer._search.line_search.multiplier.value != 1.0
    factors = optimizer.partition.spread((1.2 * optimizer._search.line_search.multiplier.value * rates).tolist())
    for p, old, factor in zip(model.parameters(), before, factors, strict=True):
        assert torch.allclose(p, old - factor * u[p], rtol=1e-12)


def test_new_proportions_leave_the_size_to_the_line_search() -> None:
    model, optimizer = make(partition="canonical", every=3, line_search_every=3)
    train(model, optimizer, 10)
    optimizer._search.line_search.step_size = 0.37
    old = optimizer._relative.value
    backward(model, optimizer, 10)
    optimizer.measure(next(iter(make_loader())))
    new, hessian = optimizer._relative.value, optimizer.rule.average.value.hessian
    assert not torch.allclose(new, old)
    assert float(new @ hessian @ new) == pytest.approx(float(old @ hessian @ old))
    assert torch.allclose(new / new.sum(), optimizer.rule.rates / optimizer.rule.rates.sum())
    assert optimizer._search.line_search.step_size == 0.37


def test_a_tensor_without_a_gradient_at_first_is_trained_later() -> None:
    model, optimizer = make(line_search_every=2)
    model[4].bias.requires_grad_(False)
    train(model, optimizer, 6)
    before = model[4].bias.clone()
    model[4].bias.requires_grad_(True)
    train(model, optimizer, 6, 6)
    assert not torch.equal(model[4].bias, before)


def test_a_step_that_is_far_too_long_leaves_no_rounding(monkeypatch) -> None:
    model, optimizer = make(line_search_every=2)
    train(model, optimizer, 2)
    backward(model, optimizer, 2)
    seen = []

    def search(self, loss_after, every):
        seen.extend(loss_after(size) for size in (0.5, 1e20, 0.5))
        return 1.0

    monkeypatch.setattr(LineSearch, "search", search)
    optimizer._search.run(optimizer._current_direction(), optimizer._relative.value, optimizer.state, optimizer._taken)
    assert seen[0] == seen[2] != seen[1]


def test_one_group_is_measured_once_and_several_now_and_then() -> None:
    model, optimizer = make()
    train(model, optimizer, 100)
    assert optimizer.counts["measured"] == 1
    assert optimizer.counts["searched"] == sum(
        is_time_to_search(t, interval_at(0, optimizer.line_search_every)) for t in range(100)
    )
    model, optimizer = make(partition="canonical")
    train(model, optimizer, 100)
    assert optimizer.counts["measured"] > 1


def test_without_data_to_look_at_rates_are_those_measured_by_hand() -> None:
    model = make()[0]
    optimizer = ns.NewtonSummary(model, loss_fn)
    backward(model, optimizer, 0)
    optimizer.measure(next(iter(make_loader())))
    before = [p.detach().clone() for p in model.parameters()]
    u, (rate,) = optimizer._current_direction(), optimizer.measured_rates.values()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old - 1.5 * rate * u[p], rtol=1e-12)
    assert optimizer.counts["searched"] == 0
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
    assert resumed._search.line_search.state_dict() == optimizer._search.line_search.state_dict()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_at_the_end_of_a_run_of_known_length_steps_shrink_to_nothing() -> None:
    model, optimizer = make(steps=40)
    lengths = []
    for number in range(40):
        backward(model, optimizer, number)
        (scale,) = set(optimizer._scales())
        lengths.append(scale / optimizer._search.line_search.multiplier.value / 1.5)
        optimizer.step()
    assert lengths[:31] == pytest.approx([1.0] * 31)
    assert lengths[31:] == pytest.approx([0.1 * n for n in range(9, 0, -1)])


def test_looking_must_be_at_whole_steps() -> None:
    with pytest.raises(ValueError, match="line_search_every"):
        make(line_search_every=-1)


def test_without_looks_rates_are_those_measured() -> None:
    model, optimizer = make(partition="canonical", line_search_every=0)
    train(model, optimizer, 60)
    assert optimizer.counts["searched"] == 0
    assert optimizer.counts["measured"] > 1
    assert list(optimizer.measured_rates.values()) == optimizer.rule.rates.tolist()
    assert set(optimizer._scales()) == {1.5}


# The average ----------------------------------------------------------------------------------------------------------


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def test_the_average_takes_the_place_of_the_weights_where_it_is_better() -> None:
    model, optimizer = make(line_search_every=4)
    train(model, optimizer, 20)
    before, average = weights_of(model), [optimizer.state[p]["average"].clone() for p in model.parameters()]
    for advantage, expected in ((-0.1, before), (0.1, average)):
        optimizer._search.line_search.multiplier.advantage = advantage
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
    model, optimizer = make(line_search_every=4)
    other, evaluated = make(line_search_every=4)
    train(model, optimizer, 20)
    train(other, evaluated, 20)
    evaluated._search.line_search.multiplier.advantage = optimizer._search.line_search.multiplier.advantage = 0.1
    evaluated.eval()
    twin, resumed = make(line_search_every=4)
    twin.load_state_dict(other.state_dict())
    resumed.load_state_dict(copy.deepcopy(evaluated.state_dict()))
    for each in (evaluated, resumed):
        each.train()
    for m, o in ((model, optimizer), (other, evaluated), (twin, resumed)):
        train(m, o, 20, 20)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters(), model.parameters(), strict=True))


def test_the_advantage_is_that_of_the_last_comparisons() -> None:
    search = LineSearch()
    for _ in range(20):
        search.multiplier.compare(0.8, 1.0, 15)
    assert search.multiplier.advantage == pytest.approx(-math.log(0.8), rel=1e-2)
    search.multiplier.compare(2.0, 1.0, 15)
    assert search.multiplier.advantage < 0.0


@pytest.mark.parametrize("factor", [1e4, math.inf, math.nan])
def test_after_a_divergence_the_weights_go_back_to_their_average(factor) -> None:
    model, batches = wide(), list(make_loader())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), line_search_every=5)
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
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, line_search_every=len(batches) + 1)
    before = sum(loss_fn(model, batch).item() for batch in batches)
    for t in range(160):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
    assert sum(loss_fn(model, batch).item() for batch in batches) < before / 3


def test_a_divergence_is_ten_times_the_rule_and_three_times_the_average() -> None:
    search = LineSearch()
    search.search(lambda size: math.nan, EVERY)
    assert not search.may_have_diverged(1e9), "there is nothing to compare with"
    search = followed([valley(1.0, 0.01, 20.0), *[valley(1.0, 0.01, 2.0), valley(1.0, 0.01, 8.0)] * 50], count=101)
    assert not search.may_have_diverged(37.0)
    assert search.may_have_diverged(43.0)
    assert search.may_have_diverged(math.nan)
    before = search.state_dict()
    assert not search.has_diverged(100.0, math.nan)
    assert not search.has_diverged(100.0, 34.0)
    assert search.has_diverged(100.0, 33.0)
    assert search.has_diverged(math.nan, 9.9)
    assert search.state_dict() == before, "a question changes nothing"
    search.roll_back()
    assert search.step_size == 0
    assert search.state_dict()["_trial"] == before["_trial"] / 4


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
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, line_search_every=50)
    losses = [loss_fn(model, (x, y)).item()]
    for _ in range(25):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        losses.append(loss_fn(model, (x, y)).item())
    assert max(losses) < 3 * losses[0]
    assert losses[-1] < 0.8 * losses[0]


def test_early_in_a_run_an_explosion_is_three_times_what_there_was_at_first() -> None:
    search = followed([valley(4.0, 0.01, 4.0)], count=1)
    first = 4.0 + 0.01 * 16
    for _ in range(20):
        search.search(valley(3 * first, 0.01, 4.0), EVERY)
    assert search.may_have_diverged(3.1 * first), "whatever has become the rule"
    assert not search.may_have_diverged(2.9 * first)


def test_a_spike_late_in_a_run_is_undone_in_a_step() -> None:
    """Weights that are thrown far away where the loss is small: still far below that of the beginning.

    The next gradient is far longer than usual, which is reason to search.
    """
    model, batches = wide(), list(make_loader())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), line_search_every=5)

    def whole() -> float:
        return sum(loss_fn(model, batch).item() for batch in batches)

    losses = []
    for t in range(600):
        if t == 402:
            with torch.no_grad():
                model[0].weight.add_(0.3 * torch.randn_like(model[0].weight))
        losses.append(whole())
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
    assert 30 * losses[401] < losses[402] < losses[0], "a spike"
    assert max(losses[403:]) < losses[402] / 20
    assert losses[-1] < losses[401], "it did not go on"


def test_before_the_first_search_there_is_no_average() -> None:
    model, optimizer = make()
    before = weights_of(model)
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
