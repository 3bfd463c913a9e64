"""Train with nothing to tune

`NewtonSummary` is a `torch.optim.Optimizer` for the loop that you have. It has no learning rate to search for: every
20 steps it asks, on a fresh batch, whether each tensor is better now than on average lately: then its steps become
longer, else shorter.
"""

# %%
# Handwritten digits, four fifths of them to train on.
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary import plots

torch.manual_seed(0)
images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = (images.float() - 4.9) / 6.0
order = torch.randperm(len(images))
train, test = order[:1437], order[1437:]
loader = DataLoader(TensorDataset(images[train], classes[train]), batch_size=50, shuffle=True)

model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# %%
# Two things are asked for that torch's optimizers do not need: the loss as a function of model and batch, and data to
# measure on. The optimizer reads those batches by itself, in an order of its own. If you know how many steps you will
# take, say so: steps then shrink to nothing at the end.
epochs = 15
optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, steps=epochs * len(loader))
history = {name: [] for name in optimizer.partition.names}
for epoch in range(epochs):
    total = 0.0
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        total += loss.item()
        for name, rate in optimizer.rates.items():
            history[name].append(rate)
    if epoch % 5 == 4:
        right = (model(images[test]).argmax(1) == classes[test]).float().mean()
        print(f"epoch {epoch + 1:2}: training loss {total / len(loader):.4f}, test accuracy {right:.1%}")

# %%
# The rates that it found, before they went to zero, in units of Adam's learning rate. They differ, and they change.
print({name: float(f"{rates[3 * len(rates) // 4]:.2g}") for name, rates in history.items()})
ax = plots.rates(history, Figure(figsize=(8, 3.8), layout="constrained").subplots())
ax.figure.savefig("rates.png", dpi=110)

# %%
# What it did: comparisons of the weights with their average, each of which takes as long as a step. `state_dict()` has
# everything that is needed to go on bit for bit.
print(dict(optimizer.counts))
