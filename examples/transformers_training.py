"""Train a model of Hugging Face transformers

`NewtonSummary` is passed to the `Trainer`, and a callback logs its rates. With any other optimizer the same callback
says how the learning rate of every group should change (`pip install 'newton-summary[transformers]'`).
"""

# %%
# A tiny language model with random weights, and sequences that count; nothing is downloaded. Attention that is computed
# step by step (`"eager"`), with a mask in every batch, is measured by the fast engine; other attention of this library
# looks into its masks while it runs, which leaves the slower one.
import os

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import newton_summary as ns
from newton_summary.integrations.transformers import MonitorCallback, own_loss

STEPS = int(os.environ.get("STEPS", "100"))
starts = torch.arange(400)[:, None] % 29
sequences = (starts + torch.arange(16) * (1 + starts % 3)) % 29
data = [{"input_ids": s, "labels": s, "attention_mask": torch.ones_like(s)} for s in sequences]


def make_model():
    set_seed(0)
    config = GPT2Config(
        vocab_size=29,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def make_trainer(model, optimizer):
    arguments = TrainingArguments(
        "logs",
        max_steps=STEPS,
        per_device_train_batch_size=20,
        logging_steps=10,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


# %%
# With nothing to tune. The groups are the parts of the network.
model = make_model()
optimizer = ns.NewtonSummary(
    model,
    own_loss,
    curvature_data=DataLoader(data, batch_size=20, shuffle=True),
    partition=ns.Partition.by_module(model, depth=3),
    steps=STEPS,
)
trainer = make_trainer(model, optimizer)
trainer.add_callback(MonitorCallback(log=trainer.log))
print(f"NewtonSummary: loss {trainer.train().training_loss:.3f}")
print({name: float(f"{rate:.2g}") for name, rate in optimizer.measured_rates.items()})

# %%
# With AdamW, whose learning rate is too small, and a monitor that says so.
model = make_model()
trainer = make_trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
callback = MonitorCallback(every=20, partition=ns.Partition.by_module(model, depth=3))
trainer.add_callback(callback)
print(f"AdamW: loss {trainer.train().training_loss:.3f}")
print(callback.monitor.advice)
