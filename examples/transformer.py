"""A transformer

A small language model on real English text: the reference pages that come with Python. What do attention and
feed-forward layers make of each other's steps, and does it train with nothing to tune?
"""

# %%
# Characters of `help("…")`, as the standard library holds them.
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary import plots

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])
print(f"{len(text):,} characters, {len(characters)} of them different")

LENGTH, WIDTH, HEADS = 32, 32, 4


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on what a layer norm makes of its input."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embedding, self.position = nn.Embedding(len(characters), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(characters))

    def forward(self, x):
        x = self.embedding(x) + self.position.weight
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


torch.manual_seed(0)
places = torch.randint(len(codes) - LENGTH - 1, (300, 16))
batches = list(codes[places[..., None] + torch.arange(LENGTH + 1)])
torch.manual_seed(1)
model = Language()

# %%
# A partition by patterns on the names of the parameters. The first pattern that a name matches counts.
partition = ns.Partition.from_patterns(
    model,
    {
        "qkv 1": "blocks.0.qkv.*",
        "out 1": "blocks.0.out.*",
        "mlp 1": "blocks.0.mlp.*",
        "qkv 2": "blocks.1.qkv.*",
        "out 2": "blocks.1.out.*",
        "mlp 2": "blocks.1.mlp.*",
        "norms": "*norm*",
        "head": "head.*",
        "embeddings": "*",
    },
)
print(partition)


# %%
# Training, 300 steps with one comparison in twenty; and AdamW at three rates beside it. The rates that the groups came
# to are printed without the schedule, which ends at 0.
def train(model, optimizer):
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


for lr in (1e-3, 3e-3, 1e-2):
    torch.manual_seed(1)
    other = Language()
    print(f"AdamW, {lr}: loss {train(other, torch.optim.AdamW(other.parameters(), lr=lr)):.3f} in the last 30 steps")

optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, partition=partition, steps=len(batches))
print(f"nothing tuned: loss {train(model, optimizer):.3f} in the last 30 steps")
print({name: float(f"{rate:.2g}") for name, rate in optimizer.measured_rates.items()})

# %%
# The interactions of the groups along the gradient, after training, free of the units of their steps.
summary = ns.summarize(loss_fn, model, batches[:8], partition=partition)
plots.correlations(summary).figure.savefig("correlations.png", dpi=110)
