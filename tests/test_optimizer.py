"""The optimizer: against slow twins and closed forms, and in the loops that users have."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import logging

import numpy as np
import pytest
import torch
from companions import loss_fn, same
from reference import PaperReference, cubic_by_bisection, dense_derivatives
from rounding import is_close
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
import newton_summary.optim.clipping
from newton_summary.optim.directions import Adam, Gradient, NAdam
from newton_summary.optim.rates import AveragedRates
from newton_summary.partition import default_partition
from newton_summary.solve import Status

DTYPE = torch.float64


def make_data(count: int = 120, dtype=DTYPE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator, dtype=dtype)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=dtype)).argmax(1)
    return x, y


def make_model(dtype=DTYPE, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout) if dropout else nn.Identity(), nn.Linear(8, 3)
    ).to(dtype)


def make_batches(size: int = 20, dtype=DTYPE):
    x, y = make_data(dtype=dtype)
    return list(zip(x.split(size), y.split(size), strict=True))


def make_loader(size: int = 20):
    return DataLoader(TensorDataset(*make_data()), batch_size=size, shuffle=True)


def run(model, optimizer, batches, steps: int, start: int = 0, scheduler=None) -> None:
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def close(model, other) -> bool:
    """The same but for rounding, after a few steps."""
    return all(is_close(p, q, 1e5) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def total_loss(model) -> float:
    return loss_fn(model, make_data()).item()


# Against closed forms and slow twins ----------------------------------------------------------------------------------


def quadratic():
    """½ θᵀ A θ − bᵀ θ over two tensors, with A positive definite."""
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(5, 5, generator=generator, dtype=DTYPE)
    a, b = root @ root.T + torch.eye(5, dtype=DTYPE), torch.randn(5, generator=generator, dtype=DTYPE)
    model = nn.ParameterDict({"w": torch.randn(3, generator=generator, dtype=DTYPE), "v": torch.zeros(2, dtype=DTYPE)})

    def loss(model, batch):
        theta = torch.cat([model["w"], model["v"]])
        return 0.5 * theta @ a @ theta - b @ theta

    return model, loss, a, b


def one_step(model, loss, partition) -> None:
    optimizer = ns.NewtonSummary.paper(
        model, loss, curvature_data=[None], partition=partition, lr=1.0, regularization=0.0, direction="gradient"
    )
    optimizer.partition.parameters  # noqa: B018
    loss(model, None).backward()
    optimizer.step()


def test_discrete_partition_is_newtons_step_when_no_rate_is_negative() -> None:
    model, loss, a, b = quadratic()
    with torch.no_grad():  # a point from which every rate of Newton's step is positive: θ = θ* + c A⁻¹-free choice
        optimum = torch.linalg.solve(a, b)
        offset = torch.linalg.eigh(a).eigenvectors[:, -1] * 0.7  # an eigenvector: η = 1/eigenvalue in every entry
        model["w"].copy_((optimum + offset)[:3])
        model["v"].copy_((optimum + offset)[3:])
    one_step(model, loss, ns.Partition.discrete(model))
    theta = torch.cat([model["w"], model["v"]]).detach()
    assert torch.allclose(theta, optimum, rtol=1e-10, atol=1e-10)


def test_newton_rates_on_the_discrete_partition_are_newtons_step() -> None:
    model = make_model()
    summary = ns.summarize(
        loss_fn, model, [make_data()], partition=ns.Partition.discrete(model), order=2, engine="nested"
    )
    partition = ns.Partition.canonical(model)
    flat = torch.cat([p.detach().flatten() for p in partition.parameters])
    x, y = make_data()

    def loss_of(vector):
        pieces = vector.split([p.numel() for p in partition.parameters])
        named = {
            n: v.view(p.shape) for n, v, p in zip(partition.parameter_names, pieces, partition.parameters, strict=True)
        }
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    gradient, hessian = torch.func.grad(loss_of)(flat), torch.func.hessian(loss_of)(flat)
    damped = hessian + 0.1 * torch.eye(len(flat), dtype=DTYPE)  # cross-entropy has flat directions
    expected = torch.linalg.solve(damped, gradient)
    assert (gradient.abs() > 0).all()
    # the same damping in the units of the summary: U (0.1 I) U with u = g
    ridged = ns.Summary(
        loss=summary.loss,
        gradient=summary.gradient,
        hessian=summary.hessian + 0.1 * torch.diag(gradient**2),
        names=summary.names,
    )
    assert torch.allclose(ns.solve.newton(ridged).sizes * gradient, expected, rtol=1e-10, atol=1e-10)


def test_trivial_partition_is_cauchys_step() -> None:
    model, loss, a, b = quadratic()
    theta = torch.cat([model["w"], model["v"]]).detach().clone()
    g = a @ theta - b
    one_step(model, loss, ns.Partition.trivial(model))
    expected = theta - (g @ g) / (g @ a @ g) * g
    assert torch.allclose(torch.cat([model["w"], model["v"]]).detach(), expected, rtol=1e-10, atol=1e-12)


def test_paper_mode_equals_its_slow_twin_over_100_steps() -> None:
    batches = make_batches()
    options = {"lr": 0.1, "regularization": 1.0, "every": 5, "momentum": 0.8, "rate_momentum": 0.5}
    model, twin_model = make_model(), make_model()
    optimizer = ns.NewtonSummary.paper(model, loss_fn, curvature_data=batches, **options)
    twin = PaperReference(twin_model, loss_fn, batches * 10, **options)
    for t in range(100):
        for m, o in ((model, optimizer), (twin_model, twin)):
            m.zero_grad()
            loss_fn(m, batches[t % len(batches)]).backward()
            o.step()
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)
    assert total_loss(model) < 0.5 * total_loss(make_model())


class DefaultReference:
    """The default rule with the shared target, in loops."""

    def __init__(self, rho: float) -> None:
        self.rho, self.seen, self.ceiling, self.scale, self.rates, self.alerts = rho, [], None, 0.0, None, 0

    def update(self, loss, g, h, third) -> np.ndarray:
        self.scale = max(float(loss), self.scale / 2)
        self.seen.append([x.numpy() / self.scale for x in (g, h, third.abs())])
        assert len(self.seen) <= 28, "from then on the average forgets exponentially"
        weights = np.array([n * (n + 1.0) for n in range(1, len(self.seen) + 1)])  # what 3 / (n + 2) makes
        g, h, t = (sum(w * s[i] for w, s in zip(weights, self.seen, strict=True)) / weights.sum() for i in range(3))
        before = np.ones(len(g)) if self.rates is None else self.rates
        times = (before @ self.seen[-1][1] @ before) / (before @ h @ before)
        if times > 2:  # an average that is more than twice too flat
            h, self.alerts = h * times / 2, self.alerts + 1
        shared = max(g.sum(), 0) / abs(h.sum())
        size = np.full(len(g), abs(h.sum()) / len(g))
        eta = cubic_by_bisection(g + self.rho * size * shared, h + self.rho * np.diag(size), t, 1.0)
        eta = np.maximum(eta, 0)
        if self.ceiling is not None:
            eta = np.minimum(eta, self.ceiling)
        grid = np.linspace(0, 1, 2_000_001)  # the line search, by looking everywhere
        norm = np.sqrt(np.sum(t ** (2 / 3) * eta**2))
        eta = eta * grid[np.argmin(-grid * (g @ eta) + grid**2 / 2 * (eta @ h @ eta) + grid**3 / 6 * norm**3)]
        self.ceiling = np.where(eta > 0, 2 * eta, np.inf if self.ceiling is None else self.ceiling)
        self.rates = eta
        return eta


def nadam_direction(gradients, moments, t):
    result = []
    for g, (m, v) in zip(gradients, moments, strict=True):
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.99).add_(0.01 * g**2)
        result.append((0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))
    return result


def test_default_rates_equal_their_slow_twin() -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, every=1, lr=0.5, partition="canonical", compare_every=0
    )
    twin = DefaultReference(rho=0.1)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for t in range(28):
        optimizer.zero_grad()
        loss_fn(model, batches[t % 6]).backward()
        along = nadam_direction([p.grad for p in model.parameters()], moments, t + 1)
        loss, g, h, third = dense_derivatives(loss_fn, model, batches[t % 6], optimizer.partition, along, 3)
        expected = twin.update(loss, g, h, torch.einsum("sss->s", third))
        optimizer.step()
        if optimizer.counts["halved"]:
            break
        assert np.allclose(list(optimizer.measured_rates.values()), expected, rtol=2e-6, atol=1e-9)
    assert t > 3
    assert twin.alerts, "the curvature never rose so much that the average was too flat"


# The five points of the default ---------------------------------------------------------------------------------------


def test_rates_at_most_double_between_measurements() -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, every=1, partition="canonical", compare_every=0
    )
    seen = []
    for t in range(60):
        run(model, optimizer, batches, 1, t)
        seen.append(torch.tensor(list(optimizer.measured_rates.values())))
    grown = [b[a > 0] / a[a > 0] for a, b in itertools.pairwise(seen)]
    assert max(float(g.max()) for g in grown) <= 2 + 1e-12
    assert any(float(g.max()) > 1.5 for g in grown), "no rate ever grew: the limit was not at work"


def test_a_curvature_that_rises_counts_at_once() -> None:
    """Ten times the curvature in one measurement, where the average of many would hardly move."""
    rule = AveragedRates(shrinkage=0.0, regularization=0.0)
    calm = ns.Summary(loss=1.0, gradient=[1.0, 1.0], hessian=[[1.0, 0.0], [0.0, 2.0]], third=[0.0, 0.0])
    steep = ns.Summary(loss=1.0, gradient=[1.0, 1.0], hessian=[[10.0, 0.0], [0.0, 20.0]], third=[0.0, 0.0])
    for _ in range(30):
        rule.update(calm)
    assert rule.rates.tolist() == pytest.approx([1.0, 0.5])
    rule.update(steep)
    assert rule.rates.tolist() == pytest.approx([0.2, 0.1])  # half of the last curvature, not a tenth of it
    for _ in range(60):
        rule.update(calm)
    assert rule.rates.tolist() == pytest.approx([1.0, 0.5], rel=0.02)


def test_the_step_goes_downhill_in_the_model_it_came_from() -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, every=1, partition="canonical", compare_every=0
    )
    for t in range(40):
        run(model, optimizer, batches, 1, t)
        mean, eta = optimizer.rule.average.value, torch.tensor(list(optimizer.measured_rates.values()), dtype=DTYPE)
        assert -mean.gradient @ eta + 0.5 * eta @ mean.hessian @ eta <= 0


def test_rates_are_halved_where_the_loss_leaves_its_model() -> None:
    """A wall near the starting point, which no derivative at that point can see."""
    model = nn.ParameterDict({"w": torch.tensor([1.0], dtype=DTYPE)})

    def loss(model, batch):
        w = model["w"][0]
        return 0.5 * w**2 + 1e3 * torch.relu(0.9 - w) ** 2

    optimizer = ns.NewtonSummary(model, loss, curvature_data=[None], direction="gradient", lr=1.0)
    loss(model, None).backward()
    optimizer.step()
    assert optimizer.counts["halved"] >= 3
    assert 0.85 < model["w"].item() < 1.0


def test_a_noisy_loss_is_taken_for_what_it_is() -> None:
    """A loss with a randomness of its own agrees with its model at no length of step: the rates stay as solved."""
    rates = []
    for noise in (0.0, 100.0):
        model, batches, calls = make_model(), make_batches(), itertools.count()

        def noisy(model, batch, noise=noise, calls=calls):
            return loss_fn(model, batch) + noise * next(calls)

        optimizer = ns.NewtonSummary(
            model, noisy, curvature_data=batches, engine="nested", partition="canonical", compare_every=0
        )
        run(model, optimizer, batches, 1)
        assert optimizer.counts == {"measured": 1, "failed": 0, "compared": 0, "halved": 0}
        rates.append(list(optimizer.measured_rates.values()))
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_curvature_below_the_rounding_of_the_whole_is_no_curvature() -> None:
    """The second group is rounding noise: alone, its rate would be 4e-9 / 1.1e-14."""
    hessian = [[1.0, 1e-9], [1e-9, 1e-15]]
    summary = ns.Summary(loss=1.0, gradient=[1.0, 5e-9], hessian=hessian, third=[0.0, 0.0])
    blind, careful = AveragedRates(target="invariant"), AveragedRates(target="invariant", precision=1e-7)
    for rule in (blind, careful):
        assert rule.update(summary) is Status.SOLVED
    assert blind.rates[1] > 1e5
    assert careful.rates.tolist() == pytest.approx([1.0, 0.05], abs=0.01)  # 5e-9 / 1e-7


@pytest.mark.parametrize("target", ["shared", "invariant"])
def test_a_bias_before_a_batch_norm_does_not_run_away(target) -> None:
    """The loss does not depend on it: all that is measured of it is rounding, in float32."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = make_batches(dtype=torch.float32)
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, every=5, target=target, partition="canonical", compare_every=0
    )
    before = loss_fn(model.eval(), make_data(dtype=torch.float32)).item()
    run(model.train(), optimizer, batches, 100)
    assert loss_fn(model.eval(), make_data(dtype=torch.float32)).item() < 0.3 * before
    assert model[0].bias.abs().max() < 10
    assert optimizer.measured_rates["0.bias"] < 100 * optimizer.measured_rates["0.weight"]


def test_a_learning_rate_in_the_place_of_the_scale_is_warned_of() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="lr=0.001 makes every step 1000 times shorter .* usually 1"):
        optimizer = ns.NewtonSummary(model, loss_fn, lr=1e-3)
    torch.optim.lr_scheduler.LinearLR(ns.NewtonSummary(model, loss_fn), start_factor=1e-3)  # a warm-up may begin there
    optimizer.load_state_dict(ns.NewtonSummary(model, loss_fn, lr=0.1).state_dict())
    ns.NewtonSummary(model, loss_fn, lr=0.0)


@pytest.mark.filterwarnings("ignore:the 30 steps of steps= were taken")
def test_lambda_goes_to_zero_over_the_last_quarter_when_the_steps_are_known() -> None:
    model, batches = make_model(), make_batches()
    options = {"steps": 30, "direction": "gradient", "every": 100, "partition": "canonical", "compare_every": 0}
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, **options)
    lengths = []
    for t in range(40):
        before = [p.detach().clone() for p in model.parameters()]
        run(model, optimizer, batches, 1, t)
        p, q = next(model.parameters()), before[0]
        lengths.append(float((q - p.detach()).norm() / (optimizer.measured_rates["0.weight"] * p.grad.norm())))
    assert lengths[:23] == pytest.approx([1.0] * 23)
    assert lengths[26] == pytest.approx(0.8 / 1.5)
    assert lengths[30:] == [0.0] * 10


def test_the_invariant_target_is_an_option() -> None:
    rates = []
    for target in ("shared", "invariant"):
        model, batches = make_model(), make_batches()
        optimizer = ns.NewtonSummary(
            model, loss_fn, curvature_data=batches, target=target, partition="canonical", compare_every=0
        )
        run(model, optimizer, batches, 1)
        rates.append(list(optimizer.measured_rates.values()))
    assert rates[0] != rates[1]


# Directions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_inner",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1),
        lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    ],
)
def test_a_rate_of_one_repeats_the_step_of_another_optimizer(make_inner) -> None:
    model, twin, batches = make_model(), make_model(), make_batches()
    optimizer = ns.NewtonSummary(
        model,
        loss_fn,
        curvature_data=batches,
        direction=make_inner(model.parameters()),
        lr=1.0,
        partition="canonical",
        compare_every=0,
    )
    optimizer.rule = _FixedRates(torch.ones(4, dtype=DTYPE))
    optimizer._backtrack = lambda *measured: None
    run(model, optimizer, batches, 20)
    run(twin, make_inner(twin.parameters()), batches, 20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


class _FixedRates:
    def __init__(self, rates) -> None:
        self.rates = rates

    def update(self, summary):
        return Status.SOLVED


def test_rates_are_in_the_units_of_the_other_optimizer() -> None:
    model, batches = make_model(), make_batches()
    inner = torch.optim.SGD(model.parameters(), lr=0.25)
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, direction=inner, partition="canonical", compare_every=0
    )
    run(model, optimizer, batches, 1)
    assert list(optimizer.measured_rates.values()) == pytest.approx((optimizer.rule.rates * 0.25).tolist())


@pytest.mark.parametrize("name", ["default", "one rate", "known length", "paper", "AdamW's step"])
def test_rates_are_those_that_are_applied(name) -> None:
    """All factors are in: λ_1 and its scheduler, the scale that comparisons find, the schedule."""
    model, batches = make_model(), make_batches()
    optimizer = MAKERS[name](model, batches)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
    run(model, optimizer, batches, 43, scheduler=scheduler)
    if name in ("default", "one rate", "AdamW's step"):
        assert all(scale != 1.0 for scale in optimizer._comparison.adaptation.scales)  # else the test tells less
    for number in range(4):  # comparisons in between change it before the step
        optimizer.zero_grad()
        loss_fn(model, batches[number]).backward()
        before, u, made = (
            [p.detach().clone() for p in model.parameters()],
            optimizer._current_direction(),
            dict(optimizer.counts),
        )
        rates, factor, measured = optimizer.rates, optimizer.factor, optimizer.measured_rates
        optimizer.step()
        if optimizer.counts != made:
            continue
        names = optimizer.partition.names
        assert rates == {s: optimizer.param_groups[0]["lr"] * factor * measured[s] for s in names}
        for p, old, groups in zip(model.parameters(), before, optimizer.partition.groups_of, strict=True):
            (group,) = groups
            size = rates[names[group]] / optimizer.direction.unit(p)
            torch.testing.assert_close(p.detach(), old - size * u[p], rtol=1e-12, atol=1e-14)


def test_reading_rates_changes_nothing() -> None:
    model, batches = make_model(), make_batches()
    optimizer = MAKERS["measured"](model, batches)
    run(model, optimizer, batches, 12)
    before = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        assert all((optimizer.rates, optimizer.measured_rates, optimizer.factor, optimizer.compare_every))
    assert str(optimizer.state_dict()) == str(before)


def test_the_old_name_of_compare_every_warns_and_works() -> None:
    model, batches = make_model(), make_batches()
    with pytest.warns(DeprecationWarning, match="compare_every"):
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, look_every=7)
    assert optimizer.compare_every == 7
    with pytest.warns(DeprecationWarning, match="compare_every"):
        assert optimizer.look_every == 7


def test_other_optimizer_over_other_parameters_is_refused() -> None:
    model = make_model()
    inner = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold parameter '3.weight', of shape \(3, 8\)"):
        ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=inner)


@pytest.mark.parametrize("partition", ["trivial", "canonical", "discrete"])
def test_steps_in_one_kernel_are_those_along_the_direction(partition):
    """With a scheduler, looks and a tensor that is frozen for a while; split tensors are never moved by the kernel."""

    class Longhand(NAdam):
        def update(self, groups, state):
            return super().update(groups, state)

    models, batches = (make_model(), make_model()), make_batches()
    for model, direction in zip(models, ("nadam", Longhand()), strict=True):
        options = {"partition": partition, "direction": direction, "compare_every": 7, "every": 20, "lr": 10.0}
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, **options)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.99)
        run(model, optimizer, batches, 30, scheduler=scheduler)
        model[0].bias.requires_grad_(False)
        run(model, optimizer, batches, 10, scheduler=scheduler)
        model[0].bias.requires_grad_(True)
        run(model, optimizer, batches, 10, scheduler=scheduler)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert total_loss(models[0]) < 0.5 * total_loss(make_model())


# State ----------------------------------------------------------------------------------------------------------------

MAKERS = {
    "default": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data),
    "one rate": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data, partition="trivial"),
    "measured": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data, every=3, partition="canonical"),
    "known length": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data, every=3, steps=50),
    "paper": lambda m, data: ns.NewtonSummary.paper(m, loss_fn, curvature_data=data, every=3, lr=0.1),
    "AdamW's step": lambda m, data: ns.NewtonSummary(
        m, loss_fn, curvature_data=data, every=3, direction=torch.optim.AdamW(m.parameters(), lr=1e-2)
    ),
    "discrete": lambda m, data: ns.NewtonSummary(
        m, loss_fn, curvature_data=data, every=15, partition=ns.Partition.discrete(m), engine="nested"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_exact_to_the_bit(name, dtype) -> None:
    data = DataLoader(TensorDataset(*make_data(dtype=dtype)), batch_size=20, shuffle=True)
    batches = make_batches(dtype=dtype)
    whole = make_model(dtype)
    whole_optimizer = MAKERS[name](whole, data)
    run(whole, whole_optimizer, batches, 17)

    first = make_model(dtype)
    optimizer = MAKERS[name](first, data)
    run(first, optimizer, batches, 10)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_model(dtype)
    second.load_state_dict(saved["model"])
    resumed = MAKERS[name](second, data)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.rates == optimizer.rates
    run(second, resumed, batches, 7, start=10)
    assert same(second, whole)
    assert resumed.rates == whole_optimizer.rates
    assert resumed.counts == whole_optimizer.counts


def test_deepcopy_goes_on_like_the_original_and_leaves_it_alone() -> None:
    model, batches = make_model(), make_batches()
    optimizer = MAKERS["default"](model, make_loader())
    run(model, optimizer, batches, 5)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    run(model, optimizer, batches, 5, start=5)
    assert not same(model, twin)
    run(twin, twin_optimizer, batches, 5, start=5)
    assert same(model, twin)


def test_state_of_something_else_is_refused() -> None:
    model = make_model()
    optimizer = MAKERS["default"](model, make_batches())
    with pytest.raises(ValueError, match="not that of a NewtonSummary"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    other = MAKERS["one rate"](model, make_batches())
    with pytest.raises(ValueError, match="other groups"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(("mine", "others"), list(itertools.permutations(["default", "paper", "adamw"], 2)))
def test_state_of_another_rule_or_direction_is_refused_and_changes_nothing(mine, others) -> None:
    def make(kind):
        model = make_model()
        if kind == "adamw":
            inner = torch.optim.AdamW(model.parameters())
            options = {"direction": inner, "partition": "canonical"}
            return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), **options)
        return model, MAKERS[kind](model, make_batches())

    (model, optimizer), (other_model, other) = make(mine), make(others)
    run(model, optimizer, make_batches(), 3)
    run(other_model, other, make_batches(), 5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the state is of an optimizer made of .*: make it as it was made"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_measuring_batches_do_not_depend_on_the_users_random_state() -> None:
    rates = []
    for seed in (0, 1):
        model = make_model()
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), every=2)
        torch.manual_seed(seed)
        run(model, optimizer, make_batches(), 6)
        rates.append(optimizer.rates)
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)


def test_the_loop_draws_the_same_random_numbers_with_and_without_measuring() -> None:
    model = make_model(dropout=0.5)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), every=1)
    torch.manual_seed(5)
    run(model, optimizer, make_batches(), 3)
    after = torch.get_rng_state()
    twin = make_model(dropout=0.5)
    torch.manual_seed(5)
    run(twin, torch.optim.SGD(twin.parameters(), lr=0.1), make_batches(), 3)
    assert torch.equal(after, torch.get_rng_state())


# Schedulers and loops -------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 2.0, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    base = lr_scheduler.LRScheduler
    known = {n for n, c in vars(lr_scheduler).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    assert {n for n in known if not n.startswith("_")} <= set(SCHEDULERS) | {"ReduceLROnPlateau"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work_on_lambda(name) -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, every=3)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for t in range(6):
        run(model, optimizer, batches, 1, t, scheduler)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        seen.add(optimizer.param_groups[0]["lr"])
    assert len(seen) > 1


def test_lambda_scales_the_step() -> None:
    moves = []
    for factor in (1.0, 0.25):
        model, batches = make_model(), make_batches()
        optimizer = ns.NewtonSummary.paper(model, loss_fn, curvature_data=batches, lr=0.2 * factor)
        run(model, optimizer, batches, 1)
        moves.append([p - q for p, q in zip(model.parameters(), make_model().parameters(), strict=True)])
    for long, short in zip(*moves, strict=True):
        assert torch.allclose(0.25 * long, short, rtol=1e-9, atol=1e-15)


def test_plateau_reduces_lambda() -> None:
    optimizer = ns.NewtonSummary.paper(make_model(), loss_fn, curvature_data=make_batches(), lr=0.4)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    for _ in range(4):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_closure() -> None:
    model, twin, batches = make_model(), make_model(), make_batches()
    a = MAKERS["default"](model, batches)
    b = MAKERS["default"](twin, batches)

    def closure():
        b.zero_grad()
        loss = loss_fn(twin, batches[0])
        loss.backward()
        return loss

    run(model, a, batches, 1)
    value = b.step(closure)
    assert value.item() == pytest.approx(total_loss_on(make_model(), batches[0]))
    assert close(model, twin)


def total_loss_on(model, batch) -> float:
    return loss_fn(model, batch).item()


def test_explicit_measuring() -> None:
    model, twin, batches = make_model(), make_model(), make_batches()
    automatic = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, every=2, partition="canonical", compare_every=0
    )
    explicit = ns.NewtonSummary(twin, loss_fn, partition="canonical")
    for t in range(6):
        run(model, automatic, batches, 1, t)
        explicit.zero_grad()
        loss_fn(twin, batches[t]).backward()
        if t % 2 == 0:
            summary = explicit.measure(batches[t // 2])
            assert summary is explicit.summary
        explicit.step()
    assert close(model, twin)


def test_explicit_measuring_is_asked_for() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before measure"):
        optimizer.measure(make_batches()[0])
    loss_fn(model, make_batches()[0]).backward()
    with pytest.raises(RuntimeError, match="pass curvature_data, or call measure"):
        optimizer.step()


def test_a_step_without_gradients_does_nothing() -> None:
    model = make_model()
    optimizer = MAKERS["default"](model, make_batches())
    optimizer.step()
    assert same(model, make_model())
    assert optimizer.counts["measured"] == 0


# Odd models -----------------------------------------------------------------------------------------------------------


def test_frozen_and_unused_parameters_stay_and_the_others_learn() -> None:
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(5, 3)
            self.unused = nn.Linear(2, 2)
            self.frozen = nn.Linear(5, 3).requires_grad_(False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    model = Odd().double()
    before = copy.deepcopy(model)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), every=2)
    run(model, optimizer, make_batches(), 60)
    assert same(model.unused, before.unused)
    assert same(model.frozen, before.frozen)
    assert total_loss(model) < 0.5 * total_loss(before)
    assert optimizer.counts["failed"] == 0


def test_a_tensor_frozen_later_stays_and_the_others_learn() -> None:
    model, batches = make_model(), make_batches()
    optimizer = MAKERS["default"](model, batches)
    run(model, optimizer, batches, 5)
    model[0].weight.requires_grad_(False)
    frozen, before = model[0].weight.clone(), total_loss(model)
    run(model, optimizer, batches, 20, start=5)
    assert torch.equal(model[0].weight, frozen)
    assert total_loss(model) < before


def test_parameters_that_are_not_contiguous() -> None:
    model, twin, batches = make_model(), make_model(), make_batches()
    twin[0].weight = nn.Parameter(twin[0].weight.detach().t().contiguous().t())
    assert not twin[0].weight.is_contiguous()
    for m in (model, twin):
        run(m, MAKERS["default"](m, batches), batches, 10)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-7)


def test_piecewise_linear_network_under_a_squared_error_learns() -> None:
    """Every third derivative on the diagonal is zero: no cubic term anywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    x, y = make_data()
    batches = [(x, y.double().unsqueeze(1))]

    def squared(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    start = squared(model, batches[0]).item()
    optimizer = ns.NewtonSummary(
        model, squared, curvature_data=batches, every=5, partition="canonical", compare_every=0
    )
    for _ in range(100):
        optimizer.zero_grad()
        squared(model, batches[0]).backward()
        optimizer.step()
    assert squared(model, batches[0]).item() < 0.2 * start
    assert float(optimizer.summary.third.abs().max()) < 1e-12


def test_split_tensors_move_by_the_rates_of_their_groups() -> None:
    model, batches = make_model(), make_batches()
    rows = {"top": [("0.weight", slice(0, 4))], "rest": [("0.weight", slice(4, 8)), "0.bias", "3.weight", "3.bias"]}
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=batches, partition=ns.Partition(rows, model), direction="gradient", lr=1.0
    )
    before = model[0].weight.detach().clone()
    run(model, optimizer, batches, 1)
    moved = (before - model[0].weight).detach() / model[0].weight.grad
    rates = torch.tensor(list(optimizer.measured_rates.values()), dtype=DTYPE)
    assert torch.allclose(moved[:4], rates[0].expand(4, 5), rtol=1e-6)
    assert torch.allclose(moved[4:], rates[1].expand(4, 5), rtol=1e-6)
    assert [group["name"] for group in optimizer.param_groups] == ["rest", "0.weight"]


def test_default_partition_is_canonical_until_there_are_very_many_tensors() -> None:
    assert default_partition(make_model()).names == ("0.weight", "0.bias", "3.weight", "3.bias")
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(80)))
    assert len(default_partition(deep)) == 80
    deeper = nn.Sequential(*(nn.Linear(2, 2) for _ in range(160)))
    assert len(default_partition(deeper)) == 100
    own = torch.nn.ParameterList(torch.ones(2) for _ in range(101))  # all of one module
    assert default_partition(own).sizes == (202,)


# Failure is data ------------------------------------------------------------------------------------------------------


def test_a_measurement_that_is_not_finite_keeps_the_rates_and_is_counted(caplog) -> None:
    model, batches = make_model(), make_batches()
    poisoned = (torch.full_like(batches[0][0], torch.nan), batches[0][1])
    optimizer = ns.NewtonSummary(
        model,
        loss_fn,
        curvature_data=[batches[0], poisoned, batches[1]],
        every=1,
        partition="canonical",
        compare_every=0,
    )
    run(model, optimizer, batches, 1)
    rates = optimizer.measured_rates
    with caplog.at_level(logging.INFO, logger="newton_summary"):
        run(model, optimizer, batches, 1, 1)
    assert optimizer.measured_rates == rates
    assert optimizer.counts["failed"] == 1
    assert optimizer.status is Status.NOT_FINITE
    assert "not finite" in caplog.text
    run(model, optimizer, batches, 1, 2)
    assert optimizer.counts == {"measured": 3, "failed": 1, "compared": 0, "halved": 0}
    assert optimizer.measured_rates != rates


def test_a_first_measurement_that_fails_takes_no_step() -> None:
    model, batches = make_model(), make_batches()
    poisoned = (torch.full_like(batches[0][0], torch.nan), batches[0][1])
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=[poisoned, batches[0]], every=1, partition="canonical", compare_every=0
    )
    run(model, optimizer, batches, 1)
    assert same(model, make_model())
    run(model, optimizer, batches, 1)
    assert not same(model, make_model())


@pytest.mark.parametrize(("every", "waits"), [(None, 5), (100, 5), (7, 5), (2, 2)])
def test_while_there_are_no_rates_measurements_are_soon_repeated(every, waits) -> None:
    model, batches = make_model(), make_batches()
    poisoned = (torch.full_like(batches[0][0], torch.nan), batches[0][1])
    data = [batches[0], poisoned, *batches]  # the first comparison is before the first measurement
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=data, every=every, direction="momentum")
    optimizer._samples.stream._open = lambda start: iter(data[start:])
    run(model, optimizer, batches, waits)
    assert same(model, make_model())
    assert optimizer.counts["measured"] == 1
    run(model, optimizer, batches, 1, start=waits)
    assert not same(model, make_model())
    assert optimizer.counts["measured"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"every": 0}, "every must be a whole number from 1 on, got 0"),
        ({"every": 2.5}, "every must be a whole number from 1 on, got 2.5"),
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"regularization": -1.0}, "regularization must not be negative"),
        ({"shrinkage": float("nan")}, "shrinkage must not be negative"),
        ({"target": "mean"}, "target must be 'shared' or 'invariant'"),
        ({"averaging": 1.0}, r"averaging must be in \[0, 1\)"),
        ({"direction": "sideways"}, "unknown direction 'sideways': choose one of gradient, momentum, adam"),
        ({"engine": "magic"}, "unknown engine 'magic'"),
        ({"curvature_data": []}, "curvature_data is empty"),
        ({"curvature_data": iter([1])}, "one-shot"),
        ({"curvature_data": make_batches()[0]}, r"curvature_data must be .* got one tuple: pass \[batch\]"),
        ({"curvature_data": {"x": torch.ones(2)}}, r"curvature_data must be .* got one dict: pass \[batch\]"),
        ({"partition": ns.Partition.canonical(make_model())}, "'0.weight' of the partition is not in this model"),
    ],
)
def test_misuse_raises_at_once(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ns.NewtonSummary(make_model(), loss_fn, **{"curvature_data": make_batches(), **arguments})


def test_parameters_on_several_devices_are_refused_at_once() -> None:
    model = make_model()
    model[3].to("meta")
    with pytest.raises(
        ValueError, match=r"parameter '3\.weight' is on meta, '0\.weight' on cpu: move the model to one"
    ):
        ns.NewtonSummary(model, loss_fn, curvature_data=make_batches())


def test_groups_cannot_be_added() -> None:
    optimizer = MAKERS["default"](make_model(), make_batches())
    with pytest.raises(RuntimeError, match="groups come from the partition"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_param_groups_show_names_and_rates() -> None:
    model, batches = make_model(), make_batches()
    optimizer = MAKERS["measured"](model, batches)
    assert set(optimizer.measured_rates.values()) == {3e-3}
    run(model, optimizer, batches, 1)
    shown = {group["name"]: group["rate"] for group in optimizer.param_groups}
    assert shown == optimizer.measured_rates
    assert all(group["lr"] == 1.0 for group in optimizer.param_groups)
    assert "0.weight" in repr(optimizer)


# Cost -----------------------------------------------------------------------------------------------------------------


def test_memory_is_flat_over_200_steps() -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, every=2, partition="canonical")

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    run(model, optimizer, batches, 20)
    before = living()
    run(model, optimizer, batches, 200, start=20)
    assert living() <= before + 2


def test_nothing_is_read_from_the_device_between_measurements(monkeypatch) -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, every=100, compare_every=100)
    run(model, optimizer, batches, 3)
    loss_fn(model, batches[3]).backward()
    monkeypatch.setattr(newton_summary.optim.clipping, "_HOST", "no device")
    for name in ("item", "tolist", "numpy", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, _forbidden)
    optimizer.step()


def _forbidden(*args, **kwargs):
    raise AssertionError("a value crossed to the host")


@pytest.mark.parametrize("direction", ["gradient", "momentum", "adam", Adam((0.8, 0.99)), Gradient()])
def test_training_goes_down_in_every_direction(direction) -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), direction=direction, every=5)
    run(model, optimizer, batches, 200)
    assert total_loss(model) < 0.3 * total_loss(make_model())


def test_where_the_model_has_no_minimum_the_target_is_taken() -> None:
    """Negative curvature in a group without a cubic term, more of it than the shrinkage makes up for."""
    rule = AveragedRates(shrinkage=0.5)
    summary = ns.Summary(loss=1.0, gradient=[1.0, 0.5], hessian=[[4.0, 0.0], [0.0, -1.0]], third=[0.0, 0.0])
    assert not ns.solve.cubic(ns.solve.shrink(summary, 0.5)).ok
    assert rule.update(summary) is Status.SOLVED
    assert rule.rates.tolist() == pytest.approx([0.5, 0.5])  # (1 + 0.5) / |4 − 1|


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_batches_train_as_dense_ones(layout) -> None:
    losses = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x, y = torch.randn(5, 8, 6, dtype=DTYPE).relu(), torch.randn(5, 8, 1, dtype=DTYPE)
        batches = [(b.to_sparse(layout=layout) if sparse else b, c) for b, c in zip(x, y, strict=True)]

        def error(model, batch):
            hidden = batch[0] @ model[0].weight.t() + model[0].bias
            return (model[2](hidden.tanh()) - batch[1]).square().mean()

        optimizer = ns.NewtonSummary(model, error, curvature_data=batches)
        for batch in batches:
            optimizer.zero_grad()
            losses.append(error(model, batch))
            losses[-1].backward()
            optimizer.step()
    dense, found = torch.stack(losses).detach().chunk(2)
    assert dense[-1] != dense[0]
    assert torch.allclose(found, dense, rtol=1e-3)  # another side of a matrix may be worth a factor


def test_the_first_rate_is_no_longer_than_the_best_first_step() -> None:
    """Steps of the usual 0.003 would lead beyond the valley: the best power of two of them is a quarter."""

    def loss_fn(model, batch):
        return (1000 * model(batch)).square().mean()

    model, batch = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
    nn.init.constant_(model.weight, 0.001)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=[batch])
    loss_fn(model, batch).backward()
    optimizer.step()
    assert optimizer.rates == {"weight": pytest.approx(0.25 * 0.003)}
    assert model.weight.item() == pytest.approx(0.001 - 0.25 * 0.003)
