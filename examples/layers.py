"""The layers of a transformer

How the layers of a small GPT interact in its loss, before and after a short training on real English text (the
reference pages that come with Python): the picture at the top of the README.
"""

# %%
# Four blocks of attention and feed-forward layers on characters, each on what a layer norm makes of its input.
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary import plots

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])
LENGTH, WIDTH, HEADS, BLOCKS = 48, 48, 4, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.wide, self.narrow = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x):
        n, length, _ = x.shape
        inputs = self.norm1(x)
        q, k, v = (f(inputs).view(n, length, HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(len(characters), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(characters))

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position.weight)))


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


torch.manual_seed(0)
places = torch.randint(len(codes) - LENGTH - 1, (400, 16))
batches = list(codes[places[..., None] + torch.arange(LENGTH + 1)])
model = Language()

# %%
# One group for each kind of layer in each block.
kinds = {"attention q": "query", "k": "key", "v": "value", "out": "out", "mlp in": "wide", "mlp out": "narrow"}
patterns = {"embeddings": "*embedding*", "positions": "position*"}
for block in range(BLOCKS):
    patterns |= {f"{block + 1} {name}": f"blocks.{block}.{kind}.*" for name, kind in kinds.items()}
partition = ns.Partition.from_patterns(model, {**patterns, "norms": "*norm*", "head": "head.*"})

# %%
# After 400 steps of Adam at one rate for all: what does a measurement on eight batches along its next step say? On the
# left, how the layers interact, free of the units of their steps: 1 where two want the very same, so that each leaves
# nothing to do for the other. On the right, how many times larger each layer's learning rate would be best for the next
# step, all others standing still, with 90 % intervals; a triangle is for less than a quarter.
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, partition=partition, every=1000)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
optimizer.zero_grad()
loss_fn(model, batches[0]).backward()
advice = monitor.measure(batches[1:9])

figure = Figure(figsize=(10.8, 5.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
plots.correlations(monitor.summary, left, "How layers interact in the loss")
rows = range(len(partition))
for row, group in zip(rows, advice.groups, strict=True):
    right.plot([group.low, group.high], [row, row], color="#56b4e9", linewidth=5, solid_capstyle="butt")
    right.plot(max(group.alone, 0.27), row, marker="o" if group.alone > 0.27 else "<", color="#0072b2")
right.set(xscale="log", xlim=(0.25, 40), ylim=(len(partition) - 0.5, -0.5))
right.set_title("Best factor on its learning rate")
right.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5×", "1×", "2×", "5×", "10×", "20×"])
right.minorticks_off()
right.axvline(1.0, color="black", linewidth=0.8)
right.set_yticks(rows, partition.names, fontsize=8.5)
right.grid(axis="x", color="0.9")
figure.savefig("layers.png", dpi=130)
print(f"loss {monitor.summary.loss:.2f}\n{advice}")
