"""A physics-informed network

The loss of such a network has derivatives of the network in it, and is known to be hard for Adam: layers and loss
terms pull at very different scales. Any loss that autograd can differentiate can be measured; here it is that of the
heat equation.
"""

# %%
# The equation u_t = u_xx / 10 on 0 ≤ x ≤ 1 and 0 ≤ t ≤ 1, cold at both ends, from u(x, 0) = sin(πx) + ½ sin(3πx). Its
# solution is known.
import math

import torch
from matplotlib.figure import Figure
from torch import nn

import newton_summary as ns

torch.manual_seed(0)
DIFFUSION = 0.1


def exact(x, t):
    decay = DIFFUSION * math.pi**2
    return (-decay * t).exp() * (math.pi * x).sin() + 0.5 * (-9 * decay * t).exp() * (3 * math.pi * x).sin()


def start():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


# %%
# The loss: the equation's residual at random points, and the error at the walls and at the start. It calls
# `torch.autograd.grad` itself, which measuring sees through.
def loss_fn(model, batch):
    inside, edge, value = batch
    inside = inside.detach().requires_grad_()
    u = model(inside)
    (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
    residual = slope[:, 1] - DIFFUSION * bend[:, 0]
    return residual.square().mean() + 10 * (model(edge)[:, 0] - value).square().mean()


def draw(generator):
    inside, edge = torch.rand(256, 2, generator=generator), torch.rand(96, 2, generator=generator)
    edge[:32, 0], edge[32:64, 0], edge[64:, 1] = 0.0, 1.0, 0.0
    return inside, edge, exact(edge[:, 0], edge[:, 1])


generator = torch.Generator().manual_seed(0)
batches = [draw(generator) for _ in range(50)]

# %%
# How its layers interact at the start:
summary = ns.summarize(loss_fn, start(), batches[:4])
print(summary.names)
print((summary.hessian / summary.hessian.abs().max()).round(decimals=3))


# %%
# The same thousand steps with Adam at torch's default rate, with Adam at the best of four rates (found by running them
# all), and with nothing to tune.
def train(model, optimizer, steps=1000):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


grid = torch.cartesian_prod(torch.linspace(0, 1, 51), torch.linspace(0, 1, 51))
runs = {}
for name in ("Adam, 1e-3", "Adam, 3e-3", "Adam, 1e-2", "Adam, 3e-2", "newton-summary"):
    model = start()
    if name == "newton-summary":
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, steps=1000)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=float(name.split()[1]))
    runs[name] = train(model, optimizer)
    with torch.no_grad():
        error = (model(grid)[:, 0] - exact(grid[:, 0], grid[:, 1])).square().mean().sqrt()
    print(
        f"{name:15} mean loss of the last 50 steps {sum(runs[name][-50:]) / 50:.2e}, error of the solution {error:.4f}"
    )

# %%
# The losses, and the solution that was found last. What a search over rates would have found is the best of the four;
# nothing was searched for the last.
figure = Figure(figsize=(10, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
for name, losses in runs.items():
    left.semilogy(range(20, len(losses) + 1), torch.tensor(losses).unfold(0, 20, 1).mean(1), label=name, linewidth=1.2)
left.set(xlabel="step", ylabel="loss, mean of 20 steps")
left.legend(frameon=False, fontsize=8)
x = torch.linspace(0, 1, 51)
for t in (0.0, 0.2, 0.5, 1.0):
    with torch.no_grad():
        found = model(torch.stack([x, torch.full_like(x, t)], 1))[:, 0]
    right.plot(x, exact(x, torch.tensor(t)), color="0.7", linewidth=4)
    right.plot(x, found, color="black", linewidth=1)
right.set(xlabel="x", ylabel="u at t = 0, 0.2, 0.5 and 1 (grey: exact)")
figure.savefig("pinn.png", dpi=110)
