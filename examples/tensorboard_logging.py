"""See it in TensorBoard

A monitor beside any optimizer, and the optimizer itself, tell TensorBoard what they measure: scalars for each group,
and pictures of how the groups interact (`pip install 'newton-summary[tensorboard]'`).
"""

# %%
# A small network and handwritten digits.
import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.integrations.tensorboard import TensorBoard

EPOCHS = int(os.environ.get("EPOCHS", "10"))
torch.manual_seed(0)
images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = (images.float() - 4.9) / 6.0
loader = DataLoader(TensorDataset(images, classes), batch_size=100, shuffle=True)


def make_model():
    return nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 10))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer):
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return loss_fn(model, (images, classes)).item()


# %%
# Adam with a learning rate that is too small, and a monitor that says so: `newton_summary/alone/GROUP` is the factor by
# which the learning rate of a group should change.
model = make_model()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=30).attach(loader)
with TensorBoard("logs/adam") as board:
    board.attach(monitor)
    print(f"Adam: loss {train(model, optimizer):.4f}")
print(monitor.advice)

# %%
# And with nothing to tune: `newton_summary/rate/GROUP` is the learning rate of a group.
model = make_model()
optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, steps=EPOCHS * len(loader))
with TensorBoard("logs/newton-summary") as board:
    board.attach(optimizer)
    print(f"NewtonSummary: loss {train(model, optimizer):.4f}")

# %%
# Now look at both: `tensorboard --logdir logs`.
