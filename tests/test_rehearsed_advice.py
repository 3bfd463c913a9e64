"""Rehearsed advice: what trainings come to, by hand; what is chosen; that nothing changes; how it is applied, told."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.watch.rate_search import MOST_CHANGES, SURE, Outcome, Trial, candidates, confirmed, follow
from newton_summary.watch.rehearsed_advice import HELD_OUT, RehearsedAdvice, RehearsedGroup

pytestmark = pytest.mark.filterwarnings("ignore:.* batches are few for trials")  # small lists are quick


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_model(dtype=torch.float64, noisy: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if noisy else []
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *between, nn.Linear(8, 3)).to(dtype)


def make_batches(count: int = 12, size: int = 16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 5, generator=generator, dtype=dtype)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=dtype)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


def by_layer(model, lr, kind=torch.optim.Adam, **options):
    return kind([{"params": list(m.parameters()), "lr": lr, "name": n} for n, m in model.named_children()], **options)


# Choosing, in closed form ---------------------------------------------------------------------------------------------


def landscape(*best: float, cliff: float = math.inf):
    """A run whose losses are squares of each group's distance from its best level; beyond a cliff it diverges."""

    def run(levels):
        distances = [level - own for level, own in zip(levels, best, strict=True)]
        loss = sum(d * d for d in distances) if max(levels) <= cliff else math.inf
        losses = torch.full((10,), float(loss), dtype=torch.float64)
        gains = torch.tensor([-2.0 * d for d in distances], dtype=torch.float64)
        return Outcome(losses, losses, gains.clamp(min=0), (-gains).clamp(min=0))

    return run


def test_all_rates_go_where_they_suit_and_no_further() -> None:
    for best in (-2, -1, 0, 1, 2):
        found = follow(landscape(best + 0.1, best + 0.1), ("a", "b"), (True, True))
        assert found.path[-1] == (best, best)
        assert len(found.path) == 1 + abs(best)
    assert follow(landscape(50), ("a",), (True,)).path[-1] == (MOST_CHANGES,)


def test_a_single_group_goes_by_itself() -> None:
    assert follow(landscape(0, 2.1, 0), "abc", (True,) * 3).path == ((0, 0, 0), (0, 1, 0), (0, 2, 0))
    assert follow(landscape(-2, 0, 0), "abc", (True,) * 3).path == ((0, 0, 0), (-1, 0, 0), (-2, 0, 0))
    found = follow(landscape(1.1, 1.1, 2.1), "abc", (True,) * 3)  # all, and one more
    assert found.path[-1] == (1, 1, 2)
    assert [t.words for t in found.trials if t.verdict == "better"][:1] == ["all rates × 3"]


def test_a_group_without_a_rate_stays() -> None:
    assert follow(landscape(2.1, 2.1), "ab", (True, False)).path[-1] == (2, 0)


def test_what_is_better_on_one_of_both_losses_is_not_accepted() -> None:
    """A smaller rate lowers the one, a larger rate the other."""

    def run(levels):
        own = torch.tensor([float(levels[0])] * 4, dtype=torch.float64)
        return Outcome(own, -own, torch.zeros(1), torch.zeros(1))

    found = follow(run, ("a",), (True,))
    assert found.path == ((0,),)
    assert [t.verdict for t in found.trials] == ["not better", "not better"]


def test_a_larger_rate_needs_room() -> None:
    """× 3 is better; but × 9 diverges, or is worse than none."""
    for best, cliff in ((1.1, 1), (0.9, 2)):
        found = follow(landscape(best, cliff=cliff), ("a",), (True,))
        assert found.path == ((0,),)
        assert found.trials[0].verdict == "no room"
    assert follow(landscape(1.1, cliff=2), ("a",), (True,)).path == ((0,), (1,))


def test_what_diverges_is_worse_than_anything() -> None:
    found = follow(landscape(-3, -3, cliff=-2), "ab", (True, True))
    assert found.path == ((0, 0), (-1, -1), (-2, -2), (-3, -3))
    assert follow(landscape(0, cliff=-9), ("a",), (True,)).path == ((0,),)


@pytest.mark.parametrize("outlier", [-1.0, -1e6])
@pytest.mark.parametrize(("raised", "accepted"), [(3, True), (4, False)])
def test_what_is_not_sure_is_not_accepted(raised: int, accepted: bool, outlier: float) -> None:
    """Of ten differences so many, the smallest, are the wrong way.

    Ranks count, not sizes: the signed ranks sum to −43 and −35, with a standard error of √385 = 19.6.
    """
    differences = [outlier, *[-0.1 - i / 100 for i in range(9 - raised)], *[0.01 + i / 1000 for i in range(raised)]]

    def run(levels):
        losses = torch.zeros(10) + max(0, levels[0]) if levels != (-1,) else torch.tensor(differences)
        return Outcome(losses.double(), losses.double(), torch.zeros(1), torch.zeros(1))

    assert 35 / math.sqrt(385) < SURE < 43 / math.sqrt(385)
    assert ((-1,) in follow(run, ("a",), (True,)).path) == accepted


def outcome(training, averaged) -> Outcome:
    return Outcome(torch.tensor(training).double(), torch.tensor(averaged).double(), torch.zeros(1), torch.zeros(1))


def test_the_mean_decides_what_is_lower() -> None:
    """Most batches are lower, but one is far higher."""
    one, other = (outcome(losses, losses) for losses in ([-1.0] * 19 + [100.0], [0.0] * 20))
    assert not one.is_better(other)
    assert not one.is_lower(other)
    assert not other.is_better(one)  # by ranks it is not
    assert other.is_lower(one)


def test_both_losses_must_be_lower_and_one_surely() -> None:
    none, sure, chance = [1.0] * 10, [0.9] * 10, [0.0, *[1.01] * 9]  # lower in the mean, by one of ten
    before = outcome(none, none)
    assert outcome(sure, chance).is_better(before)
    assert outcome(chance, sure).is_better(before)
    assert not outcome(chance, chance).is_better(before)
    assert not outcome(sure, none).is_better(before)
    assert outcome(chance, chance).is_lower(before)


def test_rounding_is_no_gain() -> None:
    assert not outcome([0.999995] * 10, [0.999995] * 10).is_better(outcome([1.0] * 10, [1.0] * 10))
    assert outcome([0.99998] * 10, [0.99998] * 10).is_better(outcome([1.0] * 10, [1.0] * 10))
    assert not outcome([-1.000005] * 10, [-1.000005] * 10).is_better(outcome([-1.0] * 10, [-1.0] * 10))
    assert not outcome([math.inf] * 10, [math.inf] * 10).is_better(outcome([math.inf] * 10, [math.inf] * 10))


def test_single_groups_are_tried_where_there_are_several() -> None:
    now = Outcome(torch.ones(2), torch.ones(2), torch.tensor([3.0, 5.0, 9.0]), torch.tensor([1.0, 9.0, 1.0]))
    assert candidates(now, "abc", (True, True, False)) == {
        "all rates × 3": (1, 1, 0),
        "all rates ÷ 3": (-1, -1, 0),
        "`a` × 3": (1, 0, 0),
        "`b` ÷ 3": (0, -1, 0),
    }
    assert len(candidates(now, "abc", (True, False, False))) == 2
    diverged = Outcome(now.training, now.averaged, torch.full((3,), math.nan), torch.full((3,), math.nan))
    assert len(candidates(diverged, "abc", (True, True, True))) == 2


def test_the_furthest_that_is_confirmed() -> None:
    run = landscape(1.4)
    assert confirmed(run, [(0,)]) == (0,)
    assert confirmed(run, [(0,), (1,), (2,)]) == (2,)
    assert confirmed(run, [(0,), (1,), (3,)]) == (1,)
    assert confirmed(run, [(0,), (-1,), (3,)]) == (0,)


# A training, by hand --------------------------------------------------------------------------------------------------


def by_hand(model, optimizer, batches, factors, steps: int):
    """The losses of the second half, those at averaged weights, progress and noise, with torch alone."""
    twin = copy.deepcopy(model)
    other = by_layer(twin, 0.0, type(optimizer))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in other.param_groups:
        group["lr"] *= factors[group["name"]]
    losses, weights, gradients = [], [], []
    for t in range(steps):
        other.zero_grad()
        loss = loss_fn(twin, batches[t % len(batches)])
        loss.backward()
        losses.append(loss.item())
        weights.append([p.detach().clone() for p in twin.parameters()])
        gradients.append([p.grad.clone() for p in twin.parameters()])
        other.step()
    half = steps // 2
    count = len(weights[0])
    first = [torch.stack([w[i] for w in weights[:half]]).mean(0) for i in range(count)]
    second = [torch.stack([w[i] for w in weights[half:]]).mean(0) for i in range(count)]
    slope = [torch.stack([g[i] for g in gradients[half:]]).mean(0) for i in range(count)]
    progress = [(s * (a - b)).sum().item() for s, a, b in zip(slope, first, second, strict=True)]
    noise = [
        sum((g[i] * (w[i] - second[i])).sum().item() for g, w in zip(gradients[half:], weights[half:], strict=True))
        / (steps - half)
        for i in range(count)
    ]
    with torch.no_grad():
        for p, a in zip(twin.parameters(), second, strict=True):
            p.copy_(a)
        averaged = [loss_fn(twin, batches[t % len(batches)]).item() for t in range(steps, steps + HELD_OUT)]
    return losses[half:], averaged, progress, noise


@pytest.mark.parametrize("steps", [8, 9])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_trial_is_the_training_that_would_follow(kind, steps: int) -> None:
    """A list of batches is read in its order: first trained on, then judged by."""
    model, batches = make_model(), make_batches()
    optimizer = by_layer(model, 1e-2, kind)
    for batch in batches[:5]:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.02
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, partition="by_module")
    advice = monitor.rehearse(batches, steps=steps)
    _, averaged, progress, noise = by_hand(model, optimizer, batches, dict.fromkeys("012", 1.0), steps)
    assert advice.left == pytest.approx(sum(averaged) / HELD_OUT, rel=1e-12)
    for told, pair in zip(advice.groups, ((0, 1), (2, 3)), strict=True):
        assert told.progress == pytest.approx(sum(progress[i] for i in pair), rel=1e-9)
        assert told.noise == pytest.approx(sum(noise[i] for i in pair), rel=1e-9)
    assert len(advice.trials) >= 4
    for trial in advice.trials:
        factors = {"1": 1.0, **dict(zip("02", trial.factors, strict=True))}
        losses, averaged, _, _ = by_hand(model, optimizer, batches, factors, steps)
        assert trial.training == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert trial.averaged == pytest.approx(sum(averaged) / HELD_OUT, rel=1e-12)


def test_gradients_are_clipped_as_in_the_loop() -> None:
    model, batches, calls = make_model(), make_batches(), []

    def clip() -> None:
        calls.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())

    optimizer = by_layer(model, 0.1, torch.optim.SGD)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    clipped = monitor.rehearse(batches, steps=8, before_step=clip)
    assert calls
    assert min(calls) > 0.1
    assert clipped.left > monitor.rehearse(batches, steps=8).left  # shorter steps


# It changes nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_users_changes(fails: bool) -> None:
    model = make_model(torch.float32, noisy=True)
    batches = make_batches(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2, partition="trivial")
    for batch in batches[:4]:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
        scheduler.step()

    def state():
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        tensors += [v for p in model.parameters() for v in optimizer.state[p].values()]
        return copy.deepcopy(tensors), str(optimizer.param_groups), str(scheduler.state_dict()), len(monitor.records)

    def fail() -> None:
        if fails:
            raise KeyError("a mistake of the user's")

    before = state()
    if fails:
        with pytest.raises(KeyError, match="a mistake"):
            monitor.rehearse(batches, steps=8, before_step=fail)
    else:
        assert monitor.rehearse(batches, steps=8) == monitor.rehearse(iter(batches), steps=8, before_step=fail)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert model.training
    assert monitor._taken == 4


def test_sparse_gradients_and_weights_of_half_precision() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(20, 4, sparse=True)
    batches = [(torch.randint(20, (16,)),) for _ in range(4)]
    optimizer = torch.optim.SGD(table.parameters(), lr=1e-2)
    bowl = lambda m, b: (m(b[0]) - 1).square().mean()  # noqa: E731
    advice = ns.Monitor(table, bowl, optimizer=optimizer).rehearse(batches, steps=8)
    assert advice.factors["weight"] > 1
    half = nn.Linear(4, 1).to(torch.bfloat16)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(4, 16, 4).to(torch.bfloat16)]
    square = lambda m, b: (m(b[0]) - b[1]).float().square().mean()  # noqa: E731
    optimizer = torch.optim.SGD(half.parameters(), lr=1e-2)
    assert math.isfinite(ns.Monitor(half, square, optimizer=optimizer).rehearse(batches, steps=8).left)


# Acting on it ---------------------------------------------------------------------------------------------------------


def bowls(steep: float = 1.0, flat: float = 1.0):
    """Two directions of their own curvature, with noise: what one layer's rate does, the other's does not."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"steep": torch.full((6,), 3.0), "flat": torch.full((6,), 3.0)})

    def loss(model, batch):
        return (
            0.5 * steep * (model["steep"] - batch).square().sum() + 0.5 * flat * (model["flat"] + batch).square().sum()
        )

    return model, loss, list(0.1 * torch.randn(200, 6))


@pytest.mark.parametrize(("lr", "low", "high"), [(1e-4, 100, 3**6), (1e-2, 3, 30), (2.2, 0.03, 0.4)])
def test_the_scale_is_found(lr: float, low: float, high: float) -> None:
    """At a curvature of 1, SGD is quick from 0.05 on and unstable from 2 on."""
    model, loss, batches = bowls()
    optimizer = torch.optim.SGD(model.values(), lr=lr)
    advice = ns.Monitor(model, loss, optimizer=optimizer, partition="trivial").rehearse(batches)
    assert low <= advice.factors["all"] <= high
    assert advice.acted < advice.left
    advice.apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * advice.factors["all"])


def test_the_group_that_is_too_slow_is_found() -> None:
    model, loss, batches = bowls(steep=10.0, flat=1e-2)
    optimizer = torch.optim.SGD([{"params": [model["steep"]]}, {"params": [model["flat"]]}], lr=0.03)
    advice = ns.Monitor(model, loss, optimizer=optimizer).rehearse(batches)
    assert advice.factors["steep"] == 1
    assert advice.factors["flat"] >= 27
    assert advice.words.startswith("multiply the rate of `flat` by")
    advice.apply(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.03, 0.03 * advice.factors["flat"]])


def test_where_training_has_ended_the_rates_stay() -> None:
    model, loss, batches = bowls()
    with torch.no_grad():
        for p in model.values():
            p.zero_()
    optimizer = torch.optim.SGD(model.values(), lr=0.03)
    advice = ns.Monitor(model, loss, optimizer=optimizer).rehearse(batches)
    assert advice.leaves
    assert advice.words.startswith("leave the rates as they are: over 40 steps no change lowered both")
    advice.apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.03


def test_divergence_in_words() -> None:
    model, loss, batches = bowls()
    torch.nn.init.constant_(model["flat"], 3.0)
    monitor = ns.Monitor(model, loss, optimizer=torch.optim.SGD(model.values(), lr=1e2), partition="trivial")
    advice = monitor.rehearse(batches)
    assert advice.left == math.inf
    assert advice.words == "divide all rates by 81: at the present ones training diverges within 40 steps"
    hopeless = ns.Monitor(model, loss, optimizer=torch.optim.SGD(model.values(), lr=1e12), partition="trivial")
    told = hopeless.rehearse(batches)
    assert told.words == "training diverges within 40 steps, at these rates and at all that were tried"
    assert told.leaves
    assert json.loads(json.dumps(told.to_dict(), allow_nan=False))["left"] is None


def made(factors, names=None, rates=None, parameters=()) -> RehearsedAdvice:
    names = names or [f"g{i}" for i in range(len(factors))]
    rates = rates or [0.1] * len(factors)
    groups = tuple(RehearsedGroup(n, r, f, 0.0, 0.0) for n, r, f in zip(names, rates, factors, strict=True))
    trials = (Trial("all rates × 3", (3.0,) * len(factors), 1.0, 1.0, "not better"),)
    return RehearsedAdvice(groups, 40, 2.0, 1.5, trials, "some words about `<g0>`", tuple(parameters))


def test_apply_multiplies_learning_rates_and_initial_ones() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b, c], "lr": torch.tensor(0.2)}])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    rate = optimizer.param_groups[1]["lr"]
    with pytest.warns(UserWarning, match="a scheduler was made"):
        made([3.0, 1 / 9], parameters=[(a,), (b,)]).apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.3)
    assert optimizer.param_groups[1]["lr"] is rate  # where a captured graph reads it
    assert rate.item() == pytest.approx(0.2 / 9)


def test_apply_takes_several_optimizers() -> None:
    model = make_model()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=1e-4), torch.optim.Adam(model[2].parameters(), lr=1e-4)]
    advice = ns.Monitor(model, loss_fn, optimizer=optimizers).rehearse(make_batches(), steps=10)
    assert set(advice.factors) == {"SGD", "Adam"}
    assert not advice.leaves
    advice.apply(optimizers)
    for optimizer, factor in zip(optimizers, advice.factors.values(), strict=True):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * factor)


def test_apply_refuses_one_rate_for_several_factors_by_name_and_changes_none() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [c]}, {"params": [a, b], "name": "body"}], lr=0.1)
    advice = made([3.0, 1.0, 9.0], ["w", "b", "head"], parameters=[(a,), (b,), (c,)])
    with pytest.raises(ValueError, match=r"'body' has one learning rate.*'w' × 3, 'b' × 1.*partition='trivial'"):
        advice.apply(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    made([3.0, 3.0, 9.0], parameters=[(a,), (b,), (c,)]).apply(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.9, 0.3])


# Telling --------------------------------------------------------------------------------------------------------------


def test_apply_refuses_an_optimizer_of_another_model() -> None:
    a, other = nn.Parameter(torch.ones(1)), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter that was rehearsed"):
        made([3.0], parameters=[(a,)]).apply(other)
    assert other.param_groups[0]["lr"] == 0.1


def test_the_words_say_what_to_do() -> None:
    from newton_summary.watch.rehearsed_advice import _told

    def told(*factors, rates=None) -> str:
        return _told(made(list(factors), rates=rates).groups)

    assert told(9.0, 9.0) == "multiply all rates by 9"
    assert told(1 / 3, 1 / 3) == "divide all rates by 3"
    assert told(1.0, 27.0, 1.0) == "multiply the rate of `g1` by 27"
    assert told(1.0, 1 / 9, 1.0, 1.0, 3.0) == "divide the rate of `g1` by 9; multiply the rate of `g4` by 3"
    assert told(1.0, 27.0, 1.0, 1.0, 27.0) == "multiply the rates of `g1`, `g4` by 27"
    assert told(3.0, 1.0, 3.0, 9.0) == "multiply all rates by 3, but leave that of `g1`, and multiply that of `g3` by 9"
    assert told(3.0, 3.0, 3.0, 9.0, 9.0) == "multiply all rates by 3, but multiply those of `g3`, `g4` by 9"
    assert told(3.0, 1.0, rates=[0.1, math.nan]) == "multiply all rates by 3"


def test_tables_and_dictionaries() -> None:
    advice = made([3.0, 1.0], ["a<b", "rest"], [0.1, math.nan])
    lines = repr(advice).splitlines()
    assert lines[0] == "Rehearsed over 40 steps: some words about `<g0>`"
    assert lines[1].split() == ["group", "learning", "rate", "factor", "advised"]
    assert lines[2].split() == ["a<b", "0.1", "3×", "0.3"]
    assert lines[3].split() == ["rest", "–", "1×", "–"]
    page = advice._repr_html_()
    assert "a&lt;b" in page
    assert "<li>some words about <code>&lt;g0&gt;</code></li>" in page
    assert page.count("color: #888") == 4  # the row of what is left as it is
    flat = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert flat["factor/a<b"] == 3.0
    assert flat["learning_rate/rest"] is None
    assert (flat["steps"], flat["left"], flat["acted"]) == (40, 2.0, 1.5)
    assert flat["words"] == "some words about `<g0>`"
    assert advice.factors == {"a<b": 3.0, "rest": 1.0}
    assert not advice.leaves
    with pytest.raises(AttributeError):
        advice.words = "others"


def test_of_batches_without_an_end_some_are_read() -> None:
    read, model = [], make_model()

    def forever():
        for batch in itertools.cycle(make_batches()):
            read.append(None)
            assert len(read) <= 3 * 8 + 2 * HELD_OUT
            yield batch

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, partition="trivial")
    assert monitor.rehearse(forever(), steps=8).trials
    assert len(read) > 8 + HELD_OUT


def test_misuse_is_refused() -> None:
    model, batches = make_model(), make_batches()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=adam)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 on"):
        monitor.rehearse(batches, steps=0)
    with pytest.raises(ValueError, match="steps must be at least 8, got 7"):
        monitor.rehearse(batches, steps=7)
    with pytest.raises(ValueError, match="empty"):
        monitor.rehearse([])
    detached = ns.Monitor(model, lambda m, b: loss_fn(m, b).detach(), optimizer=adam)
    with pytest.raises(ValueError, match=r"the loss does not depend on the parameters: .* neither detach it nor"):
        detached.rehearse(batches)
    split = ns.Monitor(model, loss_fn, optimizer=adam, partition="discrete")
    with pytest.raises(ValueError, match=r"'0.weight', of shape \(8, 5\), is split between groups"):
        split.rehearse(batches)
    monitor._processes = SimpleNamespace(count=2)
    with pytest.raises(ValueError, match="one of 2"):
        monitor.rehearse(batches)
    still = ns.Monitor(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(ValueError, match="no learning rate of the optimizer is above 0"):
        still.rehearse(batches)


def test_what_is_judged_on_its_own_batches_is_refused_or_warned_of() -> None:
    model, batches = make_model(), make_batches()
    monitor = ns.Monitor(model, loss_fn, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=r"^batches is empty"):
        monitor.rehearse([])
    loader = DataLoader(TensorDataset(*batches[0]), batch_size=16)
    for single in (batches[:1], iter(batches[:1]), loader):
        with pytest.raises(ValueError, match=r"rehearse\(\) got one batch: a training on it says nothing of others"):
            monitor.rehearse(single, steps=8)
    with pytest.warns(UserWarning, match="8 batches are few for trials of 8 steps: .* pass more than 8, or 28"):
        monitor.rehearse(batches[:8], steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.rehearse(batches[:9], steps=8)


@pytest.mark.parametrize("scheduled", [True, False])
def test_apply_warns_of_schedulers_that_would_undo_it(scheduled: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    warned = pytest.warns(UserWarning, match=r"make it anew after apply\(\)") if scheduled else nullcontext()
    with warned:
        made((3.0,), parameters=(tuple(model.parameters()),)).apply(optimizer)
    made((1.0,), parameters=(tuple(model.parameters()),)).apply(optimizer)  # changes nothing
    again = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0, last_epoch=0 if scheduled else -1)
    optimizer.step()
    again.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize("anew", [True, False])
def test_one_cycle_goes_on_at_rates_as_many_times_larger(anew: bool) -> None:
    def rates(factor: float) -> list[float]:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
        seen = []
        for t in range(11):
            if t == 3:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made((factor,), parameters=(tuple(model.parameters()),)).apply(optimizer)
                if anew:
                    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12, last_epoch=2)
            optimizer.step()
            schedule.step()
            seen.append(schedule.get_last_lr()[0])
        return seen[3:]

    assert rates(3.0) == pytest.approx([3 * rate for rate in rates(1.0)])


def test_frozen_rates_and_strangers_are_left_out() -> None:
    """A group of rate 0 is not advised, nor one that the optimizer does not hold."""
    model = make_model()
    optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 1e-4}, {"params": [model[0].bias], "lr": 0.0}])
    advice = ns.Monitor(model, loss_fn, optimizer=optimizer).rehearse(make_batches(), steps=10)
    assert advice.factors["0.weight"] > 1
    assert {advice.factors[name] for name in ("0.bias", "2.weight", "2.bias")} == {1.0}
    assert math.isnan(advice.groups[2].learning_rate)
    assert advice.words.startswith("multiply")
