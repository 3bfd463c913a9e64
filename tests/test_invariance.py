"""Training is the same after θ_s = α_s θ̃_s + β_s in every group (docs/method.md, section 3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import newton_summary as ns
from newton_summary.optim.directions import Adam, Gradient, Momentum

STEPS = 50


class Reparameterised(nn.Module):
    """The same function of other parameters: θ_s = α_s θ̃_s + β_s, with numbers of its own for each tensor."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = [base]  # not a submodule: its parameters are not ours
        self.names = [name for name, _ in base.named_parameters()]
        self.alpha = [
            float(10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)) for _ in self.names
        ]
        self.alpha[1] *= -1
        self.beta = [float(torch.randn((), generator=generator, dtype=torch.float64)) for _ in self.names]
        self.tensors = nn.ParameterList(nn.Parameter(torch.empty_like(p)) for p in base.parameters())
        self.put(list(base.parameters()))

    @torch.no_grad()
    def put(self, thetas) -> None:
        for p, theta, a, b in zip(self.tensors, thetas, self.alpha, self.beta, strict=True):
            p.copy_((theta - b) / a)

    def thetas(self):
        return [a * p + b for p, a, b in zip(self.tensors, self.alpha, self.beta, strict=True)]

    def forward(self, x):
        return torch.func.functional_call(self.base[0], dict(zip(self.names, self.thetas(), strict=True)), (x,))


def make_problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 200, 20)]
    return model, batches


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run_both(make_optimizer, synchronise: bool) -> float:
    """The largest relative difference between the two trainings, over all steps."""
    model, batches = make_problem()
    twin = Reparameterised(model, seed=3)
    pairs = [(m, make_optimizer(m, batches)) for m in (model, twin)]
    worst = 0.0
    for step in range(STEPS):
        for m, optimizer in pairs:
            optimizer.zero_grad()
            loss_fn(m, batches[step % len(batches)]).backward()
            optimizer.step()
        for p, q in zip(model.parameters(), twin.thetas(), strict=True):
            worst = max(worst, float((p - q).detach().abs().max() / p.detach().abs().max()))
        if synchronise:
            twin.put(list(model.parameters()))
    moved = sum(
        float((p - q).detach().abs().sum())
        for p, q in zip(model.parameters(), make_problem()[0].parameters(), strict=True)
    )
    assert moved > 0.1, "a training that stands still is invariant to everything"
    return worst


def paper(direction, **options):
    def make(model, batches):
        return ns.NewtonSummary.paper(model, loss_fn, curvature_data=batches, direction=direction(), every=5, **options)

    return make


@pytest.mark.parametrize("direction", [Gradient, Momentum])
@pytest.mark.parametrize("regularization", [0.0, 1.0])
def test_each_step_of_the_paper_mode_is_invariant(direction, regularization) -> None:
    assert (
        run_both(paper(direction, regularization=regularization, lr=0.3 if regularization else 0.03), synchronise=True)
        < 1e-9
    )


@pytest.mark.parametrize("direction", [Gradient, Momentum])
def test_the_whole_trajectory_is_invariant_where_training_is_stable(direction) -> None:
    assert run_both(paper(direction, regularization=1.0, lr=0.1), synchronise=False) < 1e-8


def default(target):
    def make(model, batches):
        return ns.NewtonSummary(
            model,
            loss_fn,
            curvature_data=batches,
            direction=Adam(eps=0.0),
            partition="canonical",
            target=target,
            every=5,
            compare_every=5,
            engine="nested",
        )

    return make


def test_the_default_with_the_invariant_target_is_invariant_but_for_epsilon() -> None:
    assert run_both(default("invariant"), synchronise=True) < 1e-9


def test_the_shared_target_is_not_invariant() -> None:
    assert run_both(default("shared"), synchronise=True) > 1e-3


def measured_pair():
    model, batches = make_problem()
    twin = Reparameterised(model, seed=3)
    pair = [ns.summarize(loss_fn, m, batches[:1], engine="nested") for m in (model, twin)]
    return *pair, torch.tensor(twin.alpha, dtype=torch.float64)


def test_an_isotropic_ridge_breaks_the_invariance() -> None:
    summary, twin, alpha = measured_pair()
    for solver, invariant in ((ns.solve.cubic, True), (lambda s: ns.solve.ridge(s, 1e-2), False)):
        # u = g is α g after the change of variables, so that the same step has η̃ = η / α²
        difference = (solver(summary).sizes - alpha**2 * solver(twin).sizes).abs().max() / solver(
            summary
        ).sizes.abs().max()
        assert (difference < 1e-9) == invariant
