"""Suggested learning rates: closed forms, the search, what they leave alone, and that training with them is good."""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.watch.lr_finder import SuggestedRates, Tried, is_as_good, profile, search
from newton_summary_experiments.data import digits
from newton_summary_experiments.models import initialised, mlp


def make_model(noisy: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if noisy else [nn.Identity(), nn.Identity()]
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *between, nn.Linear(8, 3))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_data(count: int = 128):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return x, (x @ torch.randn(5, 3, generator=generator)).argmax(1)


def make_batches():
    x, y = make_data()
    return list(zip(x.split(16), y.split(16), strict=True))


# Parts ----------------------------------------------------------------------------------------------------------------


def test_the_profile_in_closed_form() -> None:
    summary = ns.Summary(1.0, [2.0, 3.0, -1.0], [[4.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.5]], [0.0, 0.0, 1.0])
    shared = 4.0 / 8.0
    mean = np.sqrt([shared * 0.5, shared * 6.0, shared * shared])
    hessian = summary.hessian.numpy()
    expected = mean * abs(np.dot([2.0, 3.0, -1.0], mean) / (mean @ hessian @ mean))
    assert profile(summary).tolist() == pytest.approx(expected.tolist())
    assert profile(summary.scale([0.01] * 3)).tolist() == pytest.approx((100 * expected).tolist())


def test_the_profile_limits_what_one_group_wants() -> None:
    summary = ns.Summary(1.0, [1.0, 1.0], [[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0])  # the second wants an infinite rate
    rates = profile(summary)
    assert (rates[1] / rates[0]).item() == pytest.approx(math.sqrt(200 / 1.0))
    with pytest.raises(ValueError, match="does not change"):
        profile(ns.Summary(1.0, [0.0], [[0.0]], [0.0]))


def tried(loss: float, dead: bool = False) -> Tried:
    return Tried(torch.tensor([loss]), dead)


@pytest.mark.parametrize("best", [1.0, 1.5, 3.0, 0.3, 20.0, 1 / 30, 1e9])
def test_the_search_ends_between_worse_multiples(best: float) -> None:
    multiple, found = search(lambda m: tried(math.inf if m > 40 * best else 1 + abs(math.log(m / best))))
    scores = {m: one.median for m, one in found.items()}
    assert list(scores) == sorted(scores)
    assert scores[multiple] == min(scores.values())
    if 1 / 64 <= best <= 64:
        assert abs(math.log2(multiple / best)) <= 0.5 + 1e-9
    else:
        assert multiple == 64


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("noise", "expected"), [(0.04, 4.0), (0.004, 1.0)])
def test_the_search_takes_the_largest_of_what_is_equally_good(noise, expected, shift, scale) -> None:
    """Differences of 0.02 are within the standard error of 16 batches where each has one of 0.1, not of 0.01.

    How hard a batch is, is the same for all, and does not count.
    """
    hard = torch.linspace(0, 30, 16, dtype=torch.float64)
    sign = torch.tensor([*[1.0, -1.0] * 3, 1.0, 0.0, 0.0, -1.0, *[1.0, -1.0] * 3], dtype=torch.float64)
    scores = {0.5: 0.5, 1.0: 0.0, 2.0: 0.012, 4.0: 0.02, 8.0: 0.1}
    multiples = []

    def run(m):
        multiples.append(m)
        return Tried(shift + scale * (hard + scores[m] + (2.4 * noise * sign if m > 1 else 0)))

    multiple, seen = search(run)
    assert multiple == expected
    assert sorted(multiples) == list(seen) == ([0.5, 1, 2, 4, 8] if expected > 1 else [0.5, 1, 2])


def test_the_search_prefers_what_learns_on() -> None:
    """A network that died has a low loss soon, that of a constant."""
    multiple, seen = search(lambda m: tried(0.1, dead=True) if m > 0.2 else tried(1 + abs(math.log(m / 0.1))))
    assert multiple == 1 / 8
    assert seen[1.0].dead
    assert seen[1.0].median == pytest.approx(0.1)
    multiple, seen = search(lambda m: tried(0.1, dead=True) if m > 0.05 else tried(1 + abs(math.log(m * 1000))))
    assert multiple == 1 / 1024  # six doublings are counted from where nothing fails
    multiple, seen = search(lambda m: tried(math.inf if m > 0.2 else 1 + abs(math.log(m / 0.1)), dead=True))
    assert multiple == 1 / 8  # where all die, the best of them


def test_the_standard_error_of_a_difference() -> None:
    """Of 0, 1, 2, 3 the median deviation is 1, and the error 1.4826 / √4 around the mean of 1.5."""
    rising = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert is_as_good(rising - 0.759, torch.zeros(4))
    assert not is_as_good(rising - 0.758, torch.zeros(4))
    assert not is_as_good(torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]), torch.zeros(5))  # nothing but one explosion
    assert is_as_good(torch.zeros(1), torch.zeros(1))
    assert not is_as_good(torch.ones(1), torch.zeros(1))


def test_the_search_refuses_to_choose_between_divergences() -> None:
    with pytest.raises(ValueError, match="every trial diverged"):
        search(lambda _: tried(math.inf))


# The whole ------------------------------------------------------------------------------------------------------------


def test_the_suggestion_does_not_depend_on_the_rates_there_were() -> None:
    model = make_model()
    found = [
        ns.suggest_rates(loss_fn, model, make_batches(), torch.optim.Adam(model.parameters(), lr=lr), steps=10)
        for lr in (1e-3 / 30, 1e-3 * 30)
    ]
    assert found[0].rates == pytest.approx(found[1].rates, rel=1e-6)
    assert found[0].trials == pytest.approx(found[1].trials, rel=1e-6)
    assert found[0].before != found[1].before


def test_nothing_of_the_users_changes() -> None:
    model = make_model(noisy=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*make_data()), 16, shuffle=True)
    for batch in loader:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

    def state() -> list[torch.Tensor]:
        optimized = [v for p in model.parameters() for v in optimizer.state[p].values()]
        gradients = [p.grad for p in model.parameters()]
        return [copy.deepcopy(t) for t in (torch.get_rng_state(), *model.state_dict().values(), *optimized, *gradients)]

    before, groups = state(), copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    drawn = np.random.get_state()[1].copy()  # noqa: NPY002
    suggested = ns.suggest_rates(loss_fn, model, loader, optimizer, steps=6)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert [{**g, "params": None} for g in optimizer.param_groups] == groups
    assert (np.random.get_state()[1] == drawn).all()  # noqa: NPY002
    assert model.training
    again = ns.suggest_rates(loss_fn, model, loader, optimizer, steps=6)
    assert again.rates == suggested.rates


def test_random_numbers_are_those_of_the_seed_and_no_other_device_is_seeded(monkeypatch) -> None:
    """Torch's own function seeds accelerators of every kind, those too that are first used after the block."""
    model, seeded = make_model(noisy=True), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=adam)
    found = []
    for _ in range(2):
        torch.rand(3)  # the user's own random numbers have no part in it
        rates = ns.suggest_rates(loss_fn, model, make_batches(), adam, steps=6)
        advice = monitor.rehearse(2 * make_batches(), steps=8)
        found.append((rates.trials, advice.left, advice.trials))
    assert found[0] == found[1]
    assert seeded == []


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_training_changes_is_put_back(fails: bool) -> None:
    """Also what deep copies would refuse, and also where a training ends with an error."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.head = nn.utils.weight_norm(nn.Linear(8, 3))  # whose deep copy is refused
            self.norm, self.calls, self.log = nn.BatchNorm1d(8), 0, []

        def forward(self, x):
            self.calls += 1
            self.hidden = self.norm(self.layer(x)).tanh()  # so is that of a tensor with a graph
            self.log.append(self.hidden)
            if fails and self.calls == 7:
                raise KeyError("a mistake of the user's")
            return self.head(self.hidden)

    torch.manual_seed(0)
    model, teacher = Counting(), nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    generator, fired = torch.Generator().manual_seed(3), []

    def with_teacher(model, batch):
        x = batch.pop("x").mul_(1.0)
        noise = torch.randn(x.shape, generator=generator)
        return (model(x + 0.1 * noise) - teacher(x)).square().mean()

    batches = [{"x": x} for x in torch.randn(4, 16, 5)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with_teacher(model, dict(batches[0])).backward()
    optimizer.step()
    scheduler.step()
    optimizer.register_step_post_hook(lambda *_: fired.append("step"))
    for p in model.parameters():
        p.register_hook(lambda g: fired.append("gradient"))
    waiting = with_teacher(model, dict(batches[0]))  # its graph needs the parameters as they are

    def tensors():
        held = {**model.state_dict(keep_vars=True), **{f"teacher.{k}": v for k, v in teacher.state_dict().items()}}
        held |= {f"state {i} {k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
        held |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        return held | {f"batch {i}": b["x"] for i, b in enumerate(batches)} | {"hidden": model.hidden}

    before = {name: (t, t._version, t.detach().clone()) for name, t in tensors().items()}
    random, own = torch.get_rng_state(), generator.get_state()
    plain = (model.calls, list(model.log), model.training, str(optimizer.param_groups), str(scheduler.state_dict()))
    if fails:
        with pytest.raises(KeyError, match="a mistake"):
            ns.suggest_rates(with_teacher, model, batches, optimizer, steps=6)
    else:
        ns.suggest_rates(with_teacher, model, batches, optimizer, steps=6)
    for name, (tensor, version, content) in before.items():
        assert tensors()[name] is tensor or name.startswith("teacher"), name
        assert torch.equal(tensor, content), name
        assert tensors()[name]._version == version, name
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), own)
    now = (model.calls, list(model.log), model.training, str(optimizer.param_groups), str(scheduler.state_dict()))
    assert now == plain
    assert fired == []
    waiting.backward()


class Signed(torch.optim.SGD):
    """What it remembers beside its groups is lost where it is pickled, as torch's own class leaves it out."""

    sign = False

    def __init__(self, parameters, lr=1e-3, sign=True) -> None:
        super().__init__(parameters, lr)
        self.sign = sign

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad.sign() if self.sign else p.grad) * group["lr"])


class Around(torch.optim.Optimizer):
    """An optimizer around another one, without a call of torch's ``__init__``, as some libraries have it."""

    def __init__(self, inner) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


class AroundWithHooks(Around):
    def __init__(self, inner) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


@pytest.mark.parametrize("around", [False, True])
def test_it_is_the_optimizers_own_step_that_is_tried(around: bool) -> None:
    """One step of every trial by hand."""
    batch = make_data(16)
    torch.manual_seed(1)
    model = nn.Linear(5, 3)
    optimizer = Signed(model.parameters(), lr=0.01)
    suggested = ns.suggest_rates(
        loss_fn, model, [batch], Around(optimizer) if around else optimizer, partition="trivial", steps=2
    )
    (rate,) = suggested.rates.values()
    gradients = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    for factor, score in suggested.trials.items():
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(twin.parameters(), gradients, strict=True):
                p -= factor * rate * g.sign()
            expected = loss_fn(twin, batch).item()
        assert score == pytest.approx(expected, rel=1e-5)
    assert optimizer.sign


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_what_is_added_to_a_loss_does_not_matter(kind) -> None:
    found = []
    for shift in (0.0, 100.0, -100.0):
        model = make_model().double()
        batches = [(x.double(), y) for x, y in make_batches()]
        optimizer = kind(model.parameters(), lr=1e-3)
        found.append(ns.suggest_rates(lambda m, b, s=shift: loss_fn(m, b) + s, model, batches, optimizer, steps=20))
    for other in found[1:]:
        assert other.chosen == found[0].chosen
        assert other.rates == pytest.approx(found[0].rates, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.99), "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"alpha": 0.9}),
        (torch.optim.NAdam, {}),
    ],
)
def test_the_groups_are_ready_for_the_optimizers_class(kind, options) -> None:
    model = make_model()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = kind([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.02, **options)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    partition = ns.Partition.by_module(model)
    suggested = ns.suggest_rates(loss_fn, model, make_batches(), optimizer, partition=partition, steps=6)
    assert set(suggested.rates) == {"0", "4"}
    new = kind(suggested.param_groups)
    assert [(g["name"], len(g["params"])) for g in new.param_groups] == [("0", 1), ("0", 1), ("4", 1), ("4", 1)]
    assert [g["weight_decay"] for g in new.param_groups] == [options.get("weight_decay", 0.0), 0.0] * 2
    for group in new.param_groups:
        assert group["lr"] == suggested.rates[group["name"]]
        assert not {"initial_lr", "max_lr", "min_lr"} & group.keys()
        assert all(group[key] == value for key, value in options.items() if key != "weight_decay")
    assert {id(p) for g in new.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    loss_fn(model, make_batches()[0]).backward()
    new.step()


def test_what_the_partition_leaves_out_stays_in_the_optimizer_as_it_was() -> None:
    model, critic = make_model(), nn.Linear(2, 2)
    model[0].requires_grad_(False)
    groups = [{"params": [*model.parameters(), critic.weight]}, {"params": [critic.bias], "lr": 0.3}]
    optimizer = torch.optim.Adam(groups, lr=0.02)
    suggested = ns.suggest_rates(loss_fn, model, make_batches(), optimizer, partition="trivial", steps=6)
    new = torch.optim.Adam(suggested.param_groups)
    assert [(g["name"], g["lr"]) for g in new.param_groups[1:]] == [("not suggested", 0.02), ("not suggested", 0.3)]
    assert [len(g["params"]) for g in new.param_groups] == [2, 3, 1]
    assert list(suggested.rates) == ["all"]


def test_the_search_goes_on_from_smaller_multiples_where_the_first_diverge() -> None:
    multiple, seen = search(lambda m: tried(math.inf if m > 0.05 else 1 + abs(math.log(m / 0.02))))
    assert multiple == 1 / 64
    assert math.isinf(seen[1.0].median)
    with pytest.raises(ValueError, match="every trial diverged"):
        search(lambda m: tried(math.inf))


def test_rates_are_for_the_length_of_the_training() -> None:
    def suggest(**options):
        model = make_model()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        return ns.suggest_rates(loss_fn, model, make_batches(), adam, **options)

    told, longer, peak = (
        suggest(steps=n, trial_steps=8, decays=d) for n, d in ((128, False), (2048, False), (128, True))
    )
    for name, rate in told.rates.items():
        assert longer.rates[name] == pytest.approx(rate / 16 ** (3 / 16))
        assert peak.rates[name] == pytest.approx(rate * 16 ** (3 / 16))
    assert told.trials[told.chosen] == peak.trials[peak.chosen]
    assert peak.chosen == pytest.approx(1.0)
    assert suggest(steps=4, trial_steps=8).rates == pytest.approx(peak.rates)  # not longer than in the trial
    guessed = suggest()
    assert (guessed.steps, guessed.trial_steps) == (10 * len(make_batches()), 8)
    assert suggest(steps=40_000, trial_steps=None).trial_steps == 120
    for bad in ({"steps": 0}, {"steps": 2.5}, {"trial_steps": 0}):
        with pytest.raises(ValueError, match="must be a whole number from 1 on"):
            suggest(**bad)


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 100, "trial_steps": 1}])
def test_a_trial_sees_what_its_first_step_does(options) -> None:
    """One loss alone is that before any step: all rates would be as good, and the largest be suggested."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.eye(2).repeat(4, 1)

    def bowl(model, batch):
        return 0.5 * (model(batch).squeeze(1) - 1).square().mean()

    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    suggested = ns.suggest_rates(bowl, model, [x, x], sgd, decays=True, **options)
    assert suggested.trial_steps == 2
    assert suggested.rates["weight"] == pytest.approx(2.0)  # curvature ½


def test_finding_rates_takes_a_twentieth_of_the_training() -> None:
    seen = 0

    def counted(model, batch):
        nonlocal seen
        seen += 1
        return loss_fn(model, batch)

    model = make_model()
    suggested = ns.suggest_rates(
        counted, model, make_batches(), torch.optim.Adam(model.parameters(), lr=1e-3), steps=2400
    )
    taken = len(suggested.trials) * suggested.trial_steps
    assert suggested.trial_steps == 19
    assert taken <= 0.05 * suggested.steps
    assert seen <= taken + 25  # the measurement, and what it evaluates


def test_layers_of_different_curvature_get_different_rates() -> None:
    model = nn.ParameterDict({"steep": torch.full((3,), 0.1), "flat": torch.full((3,), 1.0)})

    def bowl(model, batch):
        return 50 * model["steep"].square().sum() + 0.5 * model["flat"].square().sum()

    def after(rates, steps: int = 60) -> float:
        with torch.no_grad():
            theta = {"steep": torch.full((3,), 0.1), "flat": torch.full((3,), 1.0)}
            for _ in range(steps):
                theta = {k: v - rates[k] * (100.0 if k == "steep" else 1.0) * v for k, v in theta.items()}
        return 50 * theta["steep"].square().sum().item() + 0.5 * theta["flat"].square().sum().item()

    suggested = ns.suggest_rates(bowl, model, [None], torch.optim.SGD(model.values(), lr=1.0), steps=60)
    best = min(after({"steep": lr, "flat": lr}) for lr in np.geomspace(1e-4, 1, 41))
    assert after(suggested.rates) < best / 2
    assert suggested.rates["flat"] > 5 * suggested.rates["steep"]


def test_no_rates_are_suggested_that_kill_a_network() -> None:
    """In raw units large rates switch all units off at once, and the constant that is left is soon a good one."""
    torch.manual_seed(2)
    x = 100 * torch.rand(256, 6)
    y = 100 + x @ torch.tensor([3.0, -2, 1, 0, 2, -1]) / 100
    widths = [(6, 16), (16, 16)]
    hidden = [layer for a, b in widths for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(16, 1))
    batches = list(zip(x.split(16), y.split(16), strict=True))

    def huber(model, batch):
        return nn.functional.smooth_l1_loss(model(batch[0]).flatten(), batch[1])

    suggested = ns.suggest_rates(huber, model, batches, torch.optim.Adam(model.parameters(), lr=1e-3), steps=400)
    assert max(suggested.rates.values()) < 0.5  # 351 where the loss alone counted
    assert suggested.chosen < min(suggested.dead)
    assert set(suggested.dead) < set(suggested.trials)
    assert re.search(r"at \S+ these rates some tensor stops learning", repr(suggested))
    optimizer = torch.optim.Adam(suggested.param_groups)
    for i in range(400):
        optimizer.zero_grad()
        huber(model, batches[i % 16]).backward()
        optimizer.step()
    assert huber(model, (x, y)).item() < 30  # 64 there
    assert model[0].weight.grad.any()


def test_a_training_that_has_reached_its_end_has_not_died() -> None:
    """Where every margin is kept the loss is 0, and so are all gradients."""
    model = nn.Linear(2, 2)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    batches = [(10 * x, torch.tensor([0, 1] * 4))] * 4

    def margins(model, batch):
        return nn.functional.multi_margin_loss(model(batch[0]), batch[1], p=2)

    suggested = ns.suggest_rates(margins, model, batches, torch.optim.SGD(model.parameters(), lr=1.0), steps=16)
    assert min(suggested.trials.values()) == suggested.trials[suggested.chosen] == 0.0
    assert suggested.dead == ()


def test_notes_are_in_the_table_of_a_notebook_too() -> None:
    rates, trials = {"a": 1.0}, {1.0: 1.0, 4.0: 0.5}
    found = SuggestedRates(rates, rates, [], trials, 1.0, 400, 8, [], batches=1, dead=(4.0,))
    notes = [line.strip() for line in repr(found).splitlines()[3:]]
    assert [note[:14] for note in notes] == ["from one batch", "at 4× these ra"]
    assert all(note in found._repr_html_() for note in notes)
    assert len(repr(SuggestedRates(rates, rates, [], trials, 1.0, 400, 8, [], batches=2)).splitlines()) == 3


def test_rates_from_one_batch_are_said_to_be() -> None:
    def told(batches) -> str:
        model = make_model()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        return repr(ns.suggest_rates(loss_fn, model, batches, adam, partition="trivial", steps=2, trial_steps=2))

    assert "  from one batch, which trainings fit at almost any rate: pass several" in told(make_batches()[:1])
    assert "one batch" not in told(make_batches()[:2])


def test_an_argument_that_is_refused_is_called_by_its_name() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"^batches is empty"):
        ns.suggest_rates(loss_fn, model, [], torch.optim.Adam(model.parameters(), lr=1e-3), steps=4)


def test_of_batches_without_an_end_some_are_read() -> None:
    read = []

    def forever():
        for batch in itertools.cycle(make_batches()):
            read.append(None)
            assert len(read) <= 120
            yield batch

    model = make_model()
    suggested = ns.suggest_rates(loss_fn, model, forever(), torch.optim.Adam(model.parameters()))
    assert suggested.steps == 1000
    read.clear()
    ns.suggest_rates(loss_fn, model, forever(), torch.optim.Adam(model.parameters()), trial_steps=8)
    assert len(read) == 8


def test_the_table_is_readable() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    lines = repr(ns.suggest_rates(loss_fn, model, make_batches(), optimizer, steps=6)).splitlines()
    assert re.fullmatch(r"Suggested learning rates for 6 steps, from \d+ trials of 6 steps each", lines[0])
    assert lines[1].split() == ["group", "learning", "rate", "before", "factor"]
    assert [line.split()[0] for line in lines[2:]] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert all(line.split()[2] == "1e-05" for line in lines[2:])


def test_misuse_is_refused() -> None:
    model = make_model()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(TypeError, match="by itself"):
        ns.suggest_rates(loss_fn, model, make_batches(), ns.NewtonSummary(model, loss_fn))
    with pytest.raises(ValueError, match="does not hold parameter '0"):
        ns.suggest_rates(loss_fn, model, make_batches(), torch.optim.Adam(model[4].parameters()))
    with pytest.raises(ValueError, match="split between groups"):
        ns.suggest_rates(loss_fn, model, make_batches(), adam, partition=ns.Partition.discrete(model))
    with pytest.raises(ValueError, match="make the partition from it"):
        ns.suggest_rates(loss_fn, model, make_batches(), adam, partition=ns.Partition.canonical(make_model()))
    with pytest.raises(ValueError, match="the loss does not depend on the parameters"):
        ns.suggest_rates(lambda m, b: loss_fn(m, b).detach(), model, make_batches(), adam)
    with pytest.raises(ValueError, match="start from any above 0"):
        ns.suggest_rates(loss_fn, model, make_batches(), torch.optim.Adam(model.parameters(), lr=0.0))
    with pytest.raises(ValueError, match="LBFGS evaluates the loss in its step"):
        ns.suggest_rates(loss_fn, model, make_batches(), torch.optim.LBFGS(model.parameters()))
    ratefree = torch.optim.SGD(model.parameters(), lr=0.1)
    ratefree.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="is None: the optimizer sets it by itself"):
        ns.suggest_rates(loss_fn, model, make_batches(), ratefree)
    with pytest.raises(ValueError, match=r"scalar tensor, got a tensor of shape \(16,\)"):
        ns.suggest_rates(lambda m, b: m(b[0]).sum(1), model, make_batches(), adam)
    with pytest.raises(ValueError, match="empty"):
        ns.suggest_rates(loss_fn, model, [], adam)
    with pytest.raises(ValueError, match="not finite"):
        ns.suggest_rates(loss_fn, model, [(make_data()[0] * math.nan, make_data()[1])], adam)
    messages = set()
    for number in range(8):  # one is of the step, two are measured, all are trained on
        spoiled = make_batches()
        spoiled[number] = (spoiled[number][0] * math.nan, spoiled[number][1])
        with pytest.raises(ValueError, match="not finite on") as caught:
            ns.suggest_rates(loss_fn, model, spoiled, adam)
        messages.add(str(caught.value))
    assert "the loss or its derivatives are not finite on 1 of 2 batches: look for it in the data" in messages
    ns.suggest_rates(loss_fn, model, iter(make_batches()), adam, steps=4)  # a one-shot iterator is kept


@pytest.mark.slow
def test_training_on_digits_ends_no_worse_than_at_the_best_uniform_rate() -> None:
    images, classes = digits().train

    def end(groups, seed: int) -> float:
        model = initialised(lambda: mlp([64, 128, 64, 32, 10]), seed)
        optimizer = torch.optim.Adam(groups(model))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            for index in torch.randperm(len(classes), generator=generator).split(100):
                optimizer.zero_grad()
                loss_fn(model, (images[index], classes[index])).backward()
                optimizer.step()
        return loss_fn(model, (images, classes)).item()

    def suggested(model):
        adam = torch.optim.Adam(model.parameters(), lr=1e-2 / 30)
        loader = DataLoader(TensorDataset(images, classes), 100, shuffle=True)
        return ns.suggest_rates(loss_fn, model, loader, adam, steps=40 * len(loader)).param_groups

    def median(groups) -> float:
        return float(np.median([end(groups, seed) for seed in range(3)]))

    best = min(
        median(lambda model, lr=lr: [{"params": list(model.parameters()), "lr": lr}]) for lr in (1e-3, 3e-3, 1e-2, 3e-2)
    )
    assert median(suggested) <= 1.1 * best
