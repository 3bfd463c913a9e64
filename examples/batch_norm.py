"""A convolutional network with batch norm

What does batch norm do to the interactions between layers? Six convolutions on handwritten digits, with batch norm and
without it, and how their layers interact in the loss (`pip install 'newton-summary[plots]' scikit-learn`).
"""

# %%
# Convolutions, each followed by batch norm or by nothing, and a linear head on the mean over all positions.
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary import plots

images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = (images.float().view(-1, 1, 8, 8) - 4.9) / 6.0
LAYERS, CHANNELS = 6, 16


class Convolutional(nn.Module):
    def __init__(self, normalized):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(LAYERS):
            conv = nn.Conv2d(
                CHANNELS if i else 1, CHANNELS, 3, padding=1, stride=2 if i == 3 else 1, bias=not normalized
            )
            norm = nn.BatchNorm2d(CHANNELS) if normalized else nn.Identity()
            self.layers.append(nn.ModuleDict({"conv": conv, "norm": norm}))
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x):
        for layer in self.layers:
            x = functional.relu(layer["norm"](layer["conv"](x)))
        return self.head(x.mean((2, 3)))


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def some_batches(count):
    return [(images[chosen], classes[chosen]) for chosen in torch.randint(len(images), (count, 64))]


# %%
# Train both with Adam, the one without batch norm twice as long, because it is slower. Then measure along Adam's next
# step, on eight other batches. The models are in training mode, so each batch is normalised by its own mean and
# variance, and the derivatives go through these: some of torch's own higher derivatives of batch norm in training
# are [wrong](../torch-derivatives.md), these are exact. The running statistics stay as they are.
patterns = {}
for layer in range(LAYERS):
    patterns |= {f"conv {layer + 1}": f"layers.{layer}.conv.*", f"norm {layer + 1}": f"layers.{layer}.norm.*"}
patterns["head"] = "head.*"


def summary_after(steps, normalized):
    torch.manual_seed(0)
    model = Convolutional(normalized)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in some_batches(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_fn(model, some_batches(1)[0]).backward()
    groups = {name: pattern for name, pattern in patterns.items() if normalized or "norm" not in name}
    partition = ns.Partition.from_patterns(model, groups)
    return ns.summarize(loss_fn, model, some_batches(8), partition=partition, direction=optimizer)


summaries = {"with batch norm": summary_after(200, True), "without": summary_after(400, False)}
for name, summary in summaries.items():
    print(f"{name}: loss {summary.loss:.3f}")

# %%
# 1 (dark red): the steps of two layers do the same work, so that either makes the other's best step shorter; 0 (white):
# they do not touch. Without batch norm, neighbouring layers are nearly one: each scales what the next one gets, so both
# can lower the loss in the same way. With it, the scale of a convolution's output is taken out at once, and neighbours
# interact less; the head, into which the last convolution ran, feels it hardly at all any more, but the last batch norm
# instead, whose scale nothing takes out.
figure = Figure(figsize=(13, 5.8), layout="constrained")
for ax, (name, summary) in zip(figure.subplots(1, 2), summaries.items(), strict=True):
    plots.correlations(summary, ax, f"Layers {name}")
figure.savefig("batch_norm.png", dpi=90)

# %%
# One number for each network: the mean between two neighbouring layers, each with its batch norm.
neighbours = {}
for name, summary in summaries.items():
    layers = {str(i + 1): [f"{kind} {i + 1}" for kind in ("conv", "norm")] for i in range(LAYERS)}
    members = {layer: [group for group in groups if group in summary.names] for layer, groups in layers.items()}
    between = plots.matrices.correlations_of(summary.merge({**members, "head": ["head"]}))
    neighbours[name] = between[:LAYERS, :LAYERS].diagonal(1).mean()
    print(f"{name}: {neighbours[name]:.2f} between neighbouring layers")
