"""The attention heads of a GPT-2

Which heads of a transformer do the same work? One group for each attention head of transformers' GPT-2 (small, with
random weights, trained for a minute on the reference pages that come with Python): its queries, keys and values, and
its share of the output projection, which are parts of tensors. `pip install 'newton-summary[plots,transformers]'`.
"""

# %%
# A GPT-2 of four blocks with four heads each, on characters.
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel

import newton_summary as ns
from newton_summary import plots

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])
LENGTH, BLOCKS, HEADS = 48, 4, 4

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=len(characters),
    n_positions=LENGTH,
    n_embd=48,
    n_layer=BLOCKS,
    n_head=HEADS,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
    loss_type="ForCausalLM",
)
model = GPT2LMHeadModel(config)
places = torch.randint(len(codes) - LENGTH, (400, 16))
batches = list(codes[places[..., None] + torch.arange(LENGTH)])


def loss_fn(model, batch):
    return model(input_ids=batch, labels=batch).loss


# %%
# One group for each head, and one for everything else.
partition = ns.Partition.heads(model)
print(partition)

# %%
# Train with Adam, and measure along its next step on eight batches.
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
optimizer.zero_grad()
loss_fn(model, batches[0]).backward()
summary = ns.summarize(loss_fn, model, batches[1:9], partition=partition, direction=optimizer, order=2)
print(f"loss {summary.loss:.2f}")

# %%
# Between two heads, 1 is where their steps do the same work, so that either makes the other's best step shorter; 0
# where they do not touch; negative (blue) where each makes room for the other. On the diagonal, a head whose own
# curvature along its step is negative has −1 (blue): by itself, it would go ever further. With such curvatures, entries
# between two heads may be above 1.
heads = {f"{b + 1}.{h + 1}": [f"transformer.h.{b}.attn.head{h}"] for b in range(BLOCKS) for h in range(HEADS)}
figure = Figure(figsize=(7.6, 6.4), layout="constrained")
named = summary.merge({**heads, "rest": ["rest"]})
plots.correlations(named, figure.subplots(), "Attention heads (block.head) of a small GPT-2")
figure.savefig("heads.png", dpi=110)

# %%
# Heads of one block share what they read and where they write. The mean between two heads of one block, and of
# different blocks:
between = plots.matrices.correlations_of(summary)[:-1, :-1].view(BLOCKS, HEADS, BLOCKS, HEADS)
same = torch.stack([between[b, :, b] for b in range(BLOCKS)])
within = (same.sum() - same.diagonal(dim1=1, dim2=2).sum()) / (BLOCKS * HEADS * (HEADS - 1))
across = (between.sum() - same.sum()) / (BLOCKS * (BLOCKS - 1) * HEADS**2)
print(f"{within:.2f} within a block, {across:.2f} across blocks")
