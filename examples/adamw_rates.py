"""Learning rates for AdamW, layer by layer

Which learning rate, and is it the same for every layer? `suggest_rates` measures and tries out; a `Monitor` watches
the training that you have. Neither changes it.
"""

# %%
# A small network on scikit-learn's handwritten digits, and an AdamW with a rate that is a guess, and a bad one.
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns

images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
data = TensorDataset((images.float() - 4.9) / 6.0, classes)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def start():
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), loader


# %%
# One call suggests a rate for every tensor, for a training of so many steps. `before` is the guess; the suggestion does
# not depend on it.
model, loader = start()
guess = torch.optim.AdamW(model.parameters(), lr=1e-4)
suggested = ns.suggest_rates(loss_fn, model, loader, guess, steps=5 * len(loader))
print(suggested)

# %%
# `param_groups` are ready for the optimizer's own constructor; all other hyperparameters are kept.
rated = torch.optim.AdamW(suggested.param_groups)


def train(model, loader, optimizer, monitor=None, epochs=5):
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            if monitor is not None:
                monitor.step(batch)
            optimizer.step()
            losses.append(loss.item())
    return losses


rated_losses = train(model, loader, rated)

# %%
# A monitor beside the guess says what is wrong with it: one line in the loop, and training is the same bit for bit.
model, loader = start()
guess = torch.optim.AdamW(model.parameters(), lr=1e-4)
monitor = ns.Monitor(model, loss_fn, optimizer=guess, every=20)
guess_losses = train(model, loader, guess, monitor)
print(monitor)

# %%
# Its factors are those of the best single step, so they are larger than what is good for a long training; that *all*
# rates are too small is what they agree on. What the trainings came to, torch's default rate among them:
model, loader = start()
default_losses = train(model, loader, torch.optim.AdamW(model.parameters()))

ax = Figure(figsize=(6, 3.6), layout="constrained").subplots()
runs = {"1e-4 everywhere": guess_losses, "1e-3 everywhere, torch's default": default_losses, "suggested": rated_losses}
for name, losses in runs.items():
    ax.semilogy(range(10, len(losses) + 1), torch.tensor(losses).unfold(0, 10, 1).mean(1), label=name, linewidth=1.2)
    print(f"{name:33} mean loss of the last epoch {sum(losses[-36:]) / 36:.3f}")
ax.set(xlabel="step", ylabel="training loss, mean of 10 steps")
ax.legend(frameon=False)
ax.figure.savefig("losses.png", dpi=110)
