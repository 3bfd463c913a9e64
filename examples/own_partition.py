"""Write your own partition

Groups can be anything: tensors, modules, parts of tensors. Here they are the heads of an attention layer, whose
weights lie together in one tensor.
"""

# %%
# A model that reads an image row by row: scikit-learn's digits, eight tokens of eight pixels.
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary import plots

WIDTH, HEADS = 32, 4
SIZE = WIDTH // HEADS


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(8, WIDTH), nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(8 * WIDTH, 10)

    def forward(self, rows):
        x = self.embed(rows) + self.position
        q, k, v = self.qkv(x).view(-1, 8, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).flatten(1))


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


torch.manual_seed(0)
images, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
batches = list(zip(((images.float().view(-1, 8, 8) - 4.9) / 6).split(100), classes.split(100), strict=True))
model = Reader()

# %%
# A group is a list of parameters, of their names, or of pairs of a parameter and an index into it. Head h owns rows of
# `qkv.weight` three times over, for its queries, keys and values, and columns of `out.weight`.
rows = torch.arange(3 * WIDTH).view(3, HEADS, SIZE)
groups = {
    f"head {h}": [
        ("qkv.weight", rows[:, h].flatten()),
        ("qkv.bias", rows[:, h].flatten()),
        ("out.weight", (slice(None), slice(h * SIZE, (h + 1) * SIZE))),
    ]
    for h in range(HEADS)
}
groups |= {"input": ["embed.weight", "embed.bias", "position"], "output": ["out.bias", "head.weight", "head.bias"]}
partition = ns.Partition(groups, model)
print(partition)

# %%
# Every entry has to be in just one group; what is forgotten is named.
try:
    ns.Partition({name: members for name, members in groups.items() if name != "head 2"}, model)
except ValueError as error:
    print(error)

# %%
# Whatever takes a partition takes this one: training, …
optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, partition=partition)
for _epoch in range(10):
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.3f}", {name: float(f"{rate:.2g}") for name, rate in optimizer.rates.items()})

# %%
# … and measuring: do the heads of a trained layer work against each other, or at different things?
summary = ns.summarize(loss_fn, model, batches, partition=partition)
plots.correlations(summary).figure.savefig("heads.png", dpi=110)
