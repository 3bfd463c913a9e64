"""Write a solver

A solver is a function from a `Summary` to a `Step`. It knows no model and no data, so it can be tested by itself:
`newton_summary.testing` does.
"""

# %%
# The idea: choose rates that are safe whatever the other groups do. In ηᵀH̄η every mixed term is at most 2 |H̄_st η_s
# η_t| ≤ |H̄_st| (η_s² + η_t²), so the diagonal M_s = Σ_t |H̄_st| bounds the whole matrix, and each group can be solved
# by itself.
import torch
from torch import nn

import newton_summary as ns
from newton_summary.solve import Status, Step
from newton_summary.testing import check_solver


def bound(summary):
    return summary.hessian.abs().sum(1)


def safe(summary):
    limits = bound(summary)
    if not (summary.gradient.isfinite().all() and limits.isfinite().all()):
        return Step.failed(len(summary), Status.NOT_FINITE)
    if (limits == 0).any():
        return Step.failed(len(summary), Status.UNBOUNDED)
    sizes = summary.gradient / limits
    return Step(sizes.cpu(), float(decrease(summary, sizes)))


def decrease(summary, sizes):
    return summary.gradient @ sizes - bound(summary) @ sizes**2 / 2


# %%
# What can happen in normal work is a status, not an error. The conformance suite tries random problems, orders, units,
# and numbers that are not finite. It finds something:
try:
    check_solver(safe, decrease)
except AssertionError as error:
    print(str(error).partition("[")[0] + "another one")


# %%
# The step depends on the units of the groups: adding η_s² and η_t² compares what cannot be compared. Weighing them by
# the groups' own curvatures does not, and the bound still holds: 2 |η_s η_t| ≤ r η_s² + η_t² / r for every r > 0, here
# √(H̄_ss / H̄_tt).
def bound(summary):  # noqa: F811
    own = summary.hessian.diagonal().abs().sqrt()
    return (summary.hessian.abs() * own[:, None] / own).sum(1)


check_solver(safe, decrease)
print("passed")

# %%
# Measure, solve, apply: the three steps of the optimizer by hand, for this solver and for the package's own with a
# cubic term. Both are told nothing else, and go along the plain gradient of each batch.
generator = torch.Generator().manual_seed(0)
x = torch.randn(20, 50, 10, generator=generator)
batches = [(batch, torch.sin(batch @ torch.ones(10, 1) / 2)) for batch in x]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


for name, solver in {"safe": safe, "cubic": lambda summary: ns.solve.cubic(summary, nonnegative=True)}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    partition = ns.Partition.canonical(model)
    for batch in batches * 10:
        model.zero_grad()
        loss_fn(model, batch).backward()
        direction = [p.grad for p in model.parameters()]
        step = solver(ns.summarize(loss_fn, model, [batch], partition=partition, direction=direction))
        if step.ok:
            with torch.no_grad():
                for p, u, rate in zip(
                    model.parameters(), direction, partition.spread(step.sizes.tolist()), strict=True
                ):
                    p -= rate * u
    print(f"{name}: loss {sum(loss_fn(model, batch).item() for batch in batches) / len(batches):.4f} after 200 steps")
