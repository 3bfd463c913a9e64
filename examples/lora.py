"""LoRA on a small GPT-2

Which adapters of a fine-tuning do the same work? A GPT-2 that was trained for half a minute on the reference pages that
come with Python learns to write them in capital letters by adapters of low rank (LoRA, by peft): each adds B A, a
product of two narrow matrices, to a weight that stays as it is. `pip install 'newton-summary[plots,zoo]'`.
"""

# %%
# The model, before fine-tuning.
import warnings
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import newton_summary as ns
from newton_summary import plots

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])
capitals = torch.tensor([characters.index(c.upper() if c.upper() in characters else c) for c in characters])
LENGTH, BLOCKS = 48, 4


def some_batches(count, table=None):
    places = torch.randint(len(codes) - LENGTH, (count, 16))
    batches = codes[places[..., None] + torch.arange(LENGTH)]
    return list(batches if table is None else table[batches])


def loss_fn(model, batch):
    return model(input_ids=batch, labels=batch).loss


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=len(characters),
    n_positions=LENGTH,
    n_embd=48,
    n_layer=BLOCKS,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
    loss_type="ForCausalLM",
)
base = GPT2LMHeadModel(config)
train(base, torch.optim.Adam(base.parameters(), lr=3e-3), some_batches(300))

# %%
# Adapters of rank 4 on all of its linear layers. Only they are trained, so only they are measured: one group for all A
# and one for all B of the attention, and of the feed-forward layers, of each block.
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the libraries among each other
    model = get_peft_model(base, lora)
patterns = {
    f"{block + 1} {name} {matrix}": f"*.h.{block}.{module}.*lora_{matrix}*"
    for block in range(BLOCKS)
    for name, module in {"attention": "attn", "mlp": "mlp"}.items()
    for matrix in "AB"
}
partition = ns.Partition.from_patterns(model, patterns)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, partition=partition, every=1000, window=8)

# %%
# B begins at zero. So the first step does not move any A: its gradient is zero, and it is B that learns.
loss_fn(model, some_batches(1, capitals)[0]).backward()
first = monitor.measure(some_batches(8, capitals))
print(first)

# %%
# After 100 steps, both move.
train(model, optimizer, some_batches(100, capitals))
optimizer.zero_grad()
loss_fn(model, some_batches(1, capitals)[0]).backward()
advice = monitor.measure(some_batches(8, capitals))
print(f"loss {monitor.summary.loss:.2f}\n{advice}")

# %%
# On the left, how adapters interact: 1 where two do the same work, so that either makes the other's best step shorter;
# 0 where they do not touch. Pairs along the diagonal stand out: A and B of one adapter act through their product only.
# On the right, the best factor on the learning rate of each, all others standing still, with 90 % intervals. It is
# often advised to give B a larger rate than A (LoRA+); along Adam's steps, for this model and at this moment, the
# intervals of most pairs overlap.
figure = Figure(figsize=(10.8, 5.2), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
plots.correlations(monitor.summary, left, "How adapters interact in the loss")
for row, group in enumerate(advice.groups):
    colour = "#d55e00" if group.name.endswith("A") else "#0072b2"
    right.plot([max(group.low, 0.1), min(group.high, 100)], [row, row], color=colour, alpha=0.5, linewidth=5)
    right.plot(max(group.alone, 0.11), row, marker="o" if group.alone > 0.11 else "<", color=colour)
right.set(xscale="log", xlim=(0.1, 100), ylim=(len(partition) - 0.5, -0.5))
right.set_title("Best factor: A orange, B blue")
right.set_xticks([0.1, 1, 10, 100], ["≤ 0.1×", "1×", "10×", "100×"])
right.axvline(1.0, color="black", linewidth=0.8)
right.set_yticks(range(len(partition)), partition.names, fontsize=9)
right.grid(axis="x", color="0.9")
figure.savefig("lora.png", dpi=130)

# %%
# The mean between A and B of one adapter, and between those of different ones:
between = plots.matrices.correlations_of(monitor.summary).view(2 * BLOCKS, 2, 2 * BLOCKS, 2)
within = between[:, 0, :, 1].diagonal().mean()
across = (between.sum() - between.diagonal(dim1=0, dim2=2).sum()) / (2 * BLOCKS * (2 * BLOCKS - 1) * 4)
print(f"{within:.2f} within an adapter, {across:.2f} across")
