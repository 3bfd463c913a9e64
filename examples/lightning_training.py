"""Train in Lightning

`NewtonSummary` is what `configure_optimizers` returns, and a callback logs its rates. With any other optimizer the same
callback says how the learning rate of every group should change (`pip install 'newton-summary[lightning]'`).
"""

# %%
# A module as Lightning has them. The loss is also a function of module and batch, so that it can be measured.
import os

import pytorch_lightning as lightning
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.integrations.lightning import MonitorCallback

EPOCHS = int(os.environ.get("EPOCHS", "10"))
lightning.seed_everything(0, verbose=False)
images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = (images.float() - 4.9) / 6.0
loader = DataLoader(TensorDataset(images, classes), batch_size=100, shuffle=True)


def loss_fn(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Digits(lightning.LightningModule):
    """A classifier."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 10))
        self.make_optimizer = make_optimizer

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, number):
        loss = loss_fn(self, batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self)


def train(module, callback, name):
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[callback],
        logger=CSVLogger("logs", name=name),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


# %%
# With nothing to tune.
module = Digits(lambda module: ns.NewtonSummary(module, loss_fn, curvature_data=loader, steps=EPOCHS * len(loader)))
trainer = train(module, MonitorCallback(), "newton-summary")
print(f"NewtonSummary: loss {trainer.callback_metrics['loss']:.4f}")
print({name: float(f"{rate:.2g}") for name, rate in trainer.optimizers[0].measured_rates.items()})

# %%
# With Adam, whose learning rate is too small, and a monitor that says so.
callback = MonitorCallback(loss_fn, data=loader, every=30)
trainer = train(Digits(lambda module: torch.optim.Adam(module.parameters(), lr=1e-4)), callback, "adam")
print(f"Adam: loss {trainer.callback_metrics['loss']:.4f}")
print(callback.monitor.advice)
