"""Look at a network's interactions

How do the layers of a network interact in its loss, before training and after it? This measures a small convolutional
network on scikit-learn's handwritten digits (real images, inside that package:
`pip install 'newton-summary[experiments]'`).
"""

# %%
# Any model, any loss, and batches to measure on.
import torch
from sklearn.datasets import load_digits
from torch import nn

import newton_summary as ns
from newton_summary import plots

torch.manual_seed(0)
images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = (images.float().view(-1, 1, 8, 8) - 4.9) / 6.0
batches = list(zip(images.split(200), classes.split(200), strict=True))

model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.Tanh(),
    nn.Conv2d(8, 16, 3, stride=2, padding=1),
    nn.Tanh(),
    nn.Flatten(),
    nn.Linear(256, 32),
    nn.Tanh(),
    nn.Linear(32, 10),
)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# %%
# Along the gradient over all images, with one group for each tensor, the loss has these exact derivatives. `gradient`
# says how fast the loss falls as each group moves, `hessian` how the moves of two groups interact, `third` how fast
# the curvature of each group changes on the way ([method](../method.md), section 1).
before = ns.summarize(loss_fn, model, batches)
for name, slope, curvature, third in zip(
    before.names, before.gradient, before.hessian.diagonal(), before.third, strict=True
):
    print(f"{name:10}  slope {slope:9.2e}  curvature {curvature:9.2e}  third {third:9.2e}")

# %%
# The same as a picture, and H̄⁻¹ beside it, in blocks of weights and biases. Red: a step of one group makes the best
# step of the other shorter. Blue: longer.
plots.interactions(before, title="Before training").savefig("before.png", dpi=110)

# %%
# Now train, with nothing to tune, and measure again.
optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches)
for _epoch in range(20):
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

after = ns.summarize(loss_fn, model, batches)
print(f"loss {before.loss:.3f} before, {after.loss:.4f} after")
plots.interactions(after, title="After training").savefig("after.png", dpi=110)

# %%
# Entries of H̄ are in units of the loss, so large groups look important. Correlations H̄_ij / √|H̄_ii H̄_jj| are free
# of that: 1 where two groups do the same work, −1 where each makes room for the other.
plots.strongest(after, count=12).figure.savefig("strongest.png", dpi=110)

# %%
# Coarser groups need no new measurement: entries of merged groups add.
layers = after.merge(
    {
        "first": ["0.weight", "0.bias"],
        "second": ["2.weight", "2.bias"],
        "third": ["5.weight", "5.bias"],
        "last": ["7.weight", "7.bias"],
    }
)
print(layers.names)
print(layers.hessian)
