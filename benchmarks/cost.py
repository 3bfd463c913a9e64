"""What a measurement of a decoder costs by its shape: a count layer by layer, held to the counter; what it predicts.

Run ``python benchmarks/cost.py`` (a minute or two): it writes results/cost.md and docs/images/cost.png.

A product of N positions with a matrix of P entries takes N P multiply-adds: a *pass*.  A gradient takes three of each.
A measurement takes three, too (the loss as it is recorded, its replay, and the adjoints of what goes in), and further

- a pass for each row that comes in: ẋ of every group that reaches it, for the third order ẍ as well;
- one for the matrix's own direction, and for the third order one where its group comes in as well;
- one that pulls the adjoint through that direction; the result meets all ẋ, which is Σ ẋ over N × inputs entries;
- where two things move, as in attention, the rows of both, and a pull of every row of one;
- Σ over entries of ẋ_i ẋ_j for whatever is curved.

So groups that stand late cost nothing before they come in, and cost all that comes after.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clock import multiply_adds
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine

ROOT = Path(__file__).parents[1]
Group = str


# The count ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A decoder and its batch.

    Args:
        kind: ``"gpt2"`` (layer norm, biases, tanh's GELU, positions) or ``"llama"`` (RMS norm, gated SiLU, rotations).
        layers: how many blocks.
        width: of the hidden states.
        hidden: of the MLPs.
        heads: of attention.
        shared: heads of keys and values.
        vocabulary: entries of it.
        tokens: of a sequence.
        sequences: in the batch.
        tied: whether the head is the embeddings' matrix.
    """

    kind: str
    layers: int
    width: int
    hidden: int
    heads: int
    shared: int
    vocabulary: int
    tokens: int
    sequences: int = 1
    tied: bool = True

    @property
    def positions(self) -> int:
        """In the batch."""
        return self.tokens * self.sequences

    @property
    def block(self) -> list[int]:
        """The entries of each matrix of a block."""
        d, h = self.width, self.hidden
        if self.kind == "gpt2":
            return [3 * d * d, d * d, d * h, h * d]
        return [d * d, *[d * (d // self.heads) * self.shared] * 2, d * d, d * h, d * h, h * d]

    @property
    def parameters(self) -> int:
        """Of matrices and embeddings."""
        return self.layers * sum(self.block) + (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def gradient(self) -> float:
        """Multiply-adds of a gradient; attention's backward pass computes its scores anew, so it takes five of two."""
        passes = 3 * self.positions * (self.layers * sum(self.block) + self.vocabulary * self.width)
        return passes + 7 * self.layers * self.positions * self.tokens * self.width


Groups = Callable[[str, int], Group]
"""The group of a tensor, by its short name and its block (−1: in no block)."""


def tensors(name: str, block: int) -> Group:
    """A group for each tensor."""
    return f"{block} {name}"


def blocks(several: int = 1) -> Groups:
    """A group for so many blocks, one for embeddings, one for the final norm; a head of its own is another."""

    def group(name: str, block: int) -> Group:
        if block < 0:
            return {"tokens": "embeddings", "places": "embeddings"}.get(name, name.partition(".")[0])
        return f"block {block // several}"

    return group


def halves(name: str, block: int) -> Group:
    """Attention and MLP of each block apart."""
    return blocks()(name, block) if block < 0 else f"{block} {name.partition('.')[0]}"


@dataclass(frozen=True)
class Rows:
    """The groups of which a value has tangents, of first and second order."""

    first: frozenset[Group] = frozenset()
    second: frozenset[Group] = frozenset()

    def __len__(self) -> int:
        return len(self.first) + len(self.second)


def joined(*parts: Rows) -> Rows:
    """Of a sum.  Where nearly all have second derivatives, all get a row, as the engine does."""
    first = frozenset().union(*(p.first for p in parts))
    second = frozenset().union(*(p.second for p in parts))
    return Rows(first, first if second <= first and len(first) * 3 <= 4 * len(second) else second)


@dataclass
class Count:
    """Multiply-adds of a measurement, by what they are for.

    Args:
        shape: the model and its batch.
        groups: how its tensors are grouped.
        third: whether the third diagonal is measured, too.
    """

    shape: Shape
    groups: Groups
    third: bool
    of: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(self.of.values()))

    def linear(self, x: Rows, name: str, block: int, matrix: int, inputs: int, bias: bool = False) -> Rows:
        """A product with a matrix of so many entries, and a bias perhaps."""
        n, group = self.shape.positions, self.groups(f"{name}.weight", block)
        common = x.first & {group} if self.third else frozenset()
        self.of["loss and adjoints"] += 3 * n * matrix
        self.of["tangents that come in"] += len(x) * n * matrix
        self.of["matrices' own directions"] += (1 + len(common)) * n * matrix
        self.of["adjoints pulled"] += n * matrix
        self.of["pairs of groups"] += len(x.first) * n * inputs
        own = frozenset({group, self.groups(f"{name}.bias", block)} if bias else {group})
        return joined(x, Rows(own, frozenset(common)))

    def curve(self, x: Rows, entries: int) -> Rows:
        """Entry by entry, or a norm, or a softmax."""
        self.of["pairs of groups"] += len(x.first) ** 2 * entries
        return Rows(x.first, x.first if self.third else frozenset())

    def scaled(self, x: Rows, name: str, block: int, bias: bool) -> Rows:
        """A norm's weight, and its bias."""
        group = self.groups(f"{name}.weight", block)
        self.of["pairs of groups"] += len(x.first) * self.shape.positions * self.shape.width
        common = frozenset(x.first & {group} if self.third else ())
        own = frozenset({group, self.groups(f"{name}.bias", block)} if bias else {group})
        return joined(x, Rows(own, common))

    def times(self, x: Rows, y: Rows, entries: int) -> Rows:
        """A product entry by entry."""
        self.of["pairs of groups"] += len(x.first) * len(y.first) * entries
        return joined(x, y, Rows(frozenset(), x.first & y.first if self.third else frozenset()))

    def norm(self, x: Rows, name: str, block: int) -> Rows:
        """Layer norm, or the three curves of an RMS norm as it is written."""
        n, d = self.shape.positions, self.shape.width
        if self.shape.kind == "gpt2":
            x = self.curve(x, n * d)
            self.of["pairs of groups"] += 2 * len(x.first) ** 2 * n
            return self.scaled(x, name, block, bias=True)
        scale = self.curve(self.curve(x, n * d), n)
        right = len(x) < len(scale) if min(len(x), len(scale)) <= 2 else True
        return self.scaled(self.times(x, scale, n if right else n * d), name, block, bias=False)

    def attention(self, q: Rows, k: Rows, v: Rows) -> Rows:
        """Scores, their softmax, and the mean of the values."""
        s = self.shape
        pass_, square = s.positions * s.tokens * s.width, s.heads * s.sequences * s.tokens**2
        self.of["loss and adjoints"] += 8 * pass_
        scores = self._bilinear(q, k, pass_, s.positions * s.width, s.positions * s.width)
        weights = self.curve(scores, square)
        return self._bilinear(weights, v, pass_, square, s.positions * s.width)

    def _bilinear(self, a: Rows, b: Rows, pass_: int, left: int, right: int) -> Rows:
        common = a.first & b.first if self.third else frozenset()
        by_right = len(a) * pass_ + len(a) * len(b) * right < len(b) * pass_ + len(a) * len(b) * left
        pulled, entries = (a, right) if by_right else (b, left)
        self.of["attention"] += (len(a) + len(b) + len(common) + len(pulled)) * pass_
        self.of["pairs of groups"] += len(a.first) * len(b.first) * entries
        return joined(a, b, Rows(frozenset(), frozenset(common)))

    def model(self) -> Count:
        """The whole loss."""
        s, g = self.shape, self.groups
        x = Rows(frozenset({g("tokens", -1), *[g("places", -1)] * (s.kind == "gpt2")}))
        for i in range(s.layers):
            x = self._gpt2(x, i) if s.kind == "gpt2" else self._llama(x, i)
        x = self.norm(x, "norm", -1)
        head = "tokens" if s.tied else "head"
        n, matrix = s.positions, s.vocabulary * s.width
        logits = self.linear(x, head, -1, matrix, s.width) if not s.tied else self._tied(x, matrix)
        self.curve(logits, n * s.vocabulary)
        return self

    def _tied(self, x: Rows, matrix: int) -> Rows:
        group, self.groups = self.groups, lambda name, block: group("tokens", -1)
        try:
            return self.linear(x, "tokens", -1, matrix, self.shape.width)
        finally:
            self.groups = group

    def _gpt2(self, x: Rows, i: int) -> Rows:
        s = self.shape
        n, d, (qkv, project, up, down) = s.positions, s.width, s.block
        y = self.linear(self.norm(x, "attention.norm", i), "attention.qkv", i, qkv, d, bias=True)
        y = self.linear(self.attention(y, y, y), "attention.project", i, project, d, bias=True)
        x = joined(x, y)
        y = self.linear(self.norm(x, "mlp.norm", i), "mlp.up", i, up, d, bias=True)
        z = self.curve(y, n * s.hidden)  # eight operations, and one curve
        y = self.linear(z, "mlp.down", i, down, s.hidden, bias=True)
        return joined(x, y)

    def _llama(self, x: Rows, i: int) -> Rows:
        s = self.shape
        n, d, (query, key, value, out, gate, up, down) = s.positions, s.width, s.block
        y = self.norm(x, "attention.norm", i)
        q, k, v = (
            self.linear(y, f"attention.{name}", i, size, d) for name, size in (("q", query), ("k", key), ("v", value))
        )
        y = self.linear(self.attention(joined(q, q), joined(k, k), v), "attention.out", i, out, d)
        x = joined(x, y)
        y = self.norm(x, "mlp.norm", i)
        a, b = self.linear(y, "mlp.gate", i, gate, d), self.linear(y, "mlp.up", i, up, d)
        z = self.times(self.curve(a, n * s.hidden), b, n * s.hidden)
        return joined(x, self.linear(z, "mlp.down", i, down, s.hidden))


# The counter ----------------------------------------------------------------------------------------------------------


def build(shape: Shape) -> nn.Module:
    """Transformers' model of a shape, with random weights."""
    import transformers

    torch.manual_seed(0)
    if shape.kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.width,
            n_inner=shape.hidden,
            n_head=shape.heads,
            vocab_size=shape.vocabulary,
            n_positions=shape.tokens,
            tie_word_embeddings=shape.tied,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    return transformers.LlamaForCausalLM(config)


PATTERNS = {  # short names of tensors in transformers' own
    "gpt2": {
        "ln_1": "attention.norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.project",
        "ln_2": "mlp.norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
        "transformer.wte": "tokens",
        "transformer.wpe": "places",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    },
    "llama": {
        "input_layernorm": "attention.norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.out",
        "post_attention_layernorm": "mlp.norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        "model.embed_tokens": "tokens",
        "model.norm": "norm",
        "lm_head": "head",
    },
}


def partition_of(model: nn.Module, shape: Shape, groups: Groups) -> ns.Partition:
    """The same groups of a model's tensors."""
    members: dict[Group, list[Tensor]] = {}
    for name, p in model.named_parameters():
        module, _, kind = name.rpartition(".")
        numbers = [part for part in module.split(".") if part.isdigit()]
        block = int(numbers[0]) if numbers else -1
        short = PATTERNS[shape.kind][module.partition(f".{block}.")[2] if numbers else module]
        whole = short if short in ("tokens", "places") else f"{short}.{kind}"
        members.setdefault(groups(whole, block), []).append(p)
    return ns.Partition(members, model)


def loss_fn(model: Any, batch: Any) -> Tensor:
    return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]


def counted(shape: Shape, groups: Groups, order: int) -> tuple[float, float]:
    """Multiply-adds of a gradient, and of a measurement after the first, as they run."""
    model, engine = build(shape), ForwardEngine()
    partition = partition_of(model, shape, groups)
    batch = torch.randint(shape.vocabulary, (shape.sequences, shape.tokens))
    gradient = multiply_adds(lambda: loss_fn(model, batch).backward())
    direction = [p.grad.clone() for p in partition.parameters if p.grad is not None]

    def measure() -> ns.Summary:
        return ns.summarize(
            loss_fn, model, [batch], partition=partition, direction=direction, order=order, engine=engine
        )

    measure()
    return gradient, multiply_adds(measure)


CHECKED: list[tuple[str, Shape, Groups]] = [
    ("blocks", Shape("gpt2", 4, 64, 256, 4, 4, 512, 32), blocks()),
    ("blocks", Shape("gpt2", 8, 64, 256, 4, 4, 512, 32), blocks()),
    ("tensors", Shape("gpt2", 3, 48, 192, 3, 3, 300, 64, 2), tensors),
    ("blocks", Shape("gpt2", 2, 128, 512, 4, 4, 4000, 32, tied=False), blocks()),
    ("blocks", Shape("llama", 4, 64, 176, 4, 2, 512, 32), blocks()),
    ("tensors", Shape("llama", 3, 64, 176, 4, 4, 512, 32, 2, tied=False), tensors),
    ("halves", Shape("llama", 6, 32, 100, 4, 2, 256, 48), halves),
    ("pairs of blocks", Shape("llama", 6, 96, 200, 6, 1, 256, 128), blocks(2)),
]
"""Small decoders on which the formula is held to the counter."""


# What it predicts -----------------------------------------------------------------------------------------------------

MODELS = {
    "1 billion": Shape("llama", 16, 2048, 8192, 32, 8, 128_256, 2048),
    "7 billion": Shape("llama", 32, 4096, 11_008, 32, 32, 32_000, 2048, tied=False),
    "70 billion": Shape("llama", 80, 8192, 28_672, 64, 8, 128_256, 2048, tied=False),
}
"""The sizes of Llama 3.2 1B, Llama 2 7B and Llama 3 70B."""

ACCELERATORS = {"A100": 312e12, "H100": 989e12, "B200": 2250e12}
"""Operations a second that makers state for dense products in bfloat16; a multiply-add is two."""

ACHIEVED = 0.4
"""The share of that which is assumed: what well-tuned training of such models gets."""

BATCHES = ((1, 512), (4, 512), (1, 2048))
"""Sequences and their tokens."""


def memory(shape: Shape, groups: Groups, order: int) -> dict[str, float]:
    """Bytes of a measurement of a llama in bfloat16, by what they are for.

    Tangents are those of the widest place: the MLP (four values of its width) or attention (three of scores).  Values
    and adjoints were fitted to what the engine holds for 24 small models, which they meet to 0.6 %.
    """
    n, d = shape.positions, shape.width
    keys, scores = d // shape.heads * shape.shared, shape.heads * n * shape.tokens
    held = 93.5 * n * d + 16.0 * n * shape.hidden + 10.0 * scores + 15.6 * n * keys
    widest = max(3 * scores + n * (d + keys), n * (4 * shape.hidden + d), 8 * n * d)
    rows = size(shape, groups) * (2 if order == 3 else 1)
    return {
        "weights and direction": 2 * 2.0 * shape.parameters,
        "values and adjoints": shape.layers * held + 16.0 * n * shape.vocabulary + 26.0 * n * d,
        "tangents": 2.0 * rows * widest,
    }


def size(shape: Shape, groups: Groups) -> int:
    """S."""
    block = ["attention.norm.weight", "mlp.norm.weight"]
    block += [f"attention.{name}.weight" for name in ("q", "k", "v", "out")]
    block += [f"mlp.{name}.weight" for name in ("gate", "up", "down")]
    names = [(name, i) for i in range(shape.layers) for name in block] + [("tokens", -1), ("norm.weight", -1)]
    names += [] if shape.tied else [("head.weight", -1)]
    return len({groups(*name) for name in names})


def gradients(shape: Shape, groups: Groups, order: int) -> float:
    """What a measurement costs."""
    return Count(shape, groups, order == 3).model().total / shape.gradient


def page(rows: Sequence[Sequence[object]]) -> str:
    """The results, in Markdown; ``rows`` are those of the comparison with the counter."""
    head = ["model", "layers", "width", "vocabulary", "tokens", "groups", "S", "order", "gradients, counted"]
    head += ["formula / counter"]
    peaks = ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in ACCELERATORS.items())
    text = [
        "# What a measurement costs by the shape of a model",
        "",
        "Written by `python benchmarks/cost.py`, which says where the terms come from. Costs are in gradients (one",
        "forward and backward pass of the same batch), by multiply-adds of matrix products.",
        "",
        "## The formula against the counter",
        "",
        "Small decoders of transformers, measured; the counter sees every product that runs.",
        "",
        *table(head, rows),
        "",
        "## Of what a measurement is made",
        "",
        "Shares of the count. Without all but the first two columns, which is the count that comes to mind, GPT-2 by",
        f"blocks comes out {missing():.0%} low.",
        "",
        *table(["model", "S", "order", "gradients", *PARTS], shares()),
        "",
        "## What it predicts",
        "",
        f"On paper: no accelerator was at hand. Shapes of Llama in bfloat16, a group for each block, at {ACHIEVED:.0%}",
        f"of the peak that makers state for dense products ({peaks} · 10¹²",
        "operations a second; a multiply-add is two). That share is assumed, and operations that are no products are",
        "left out. Seconds: of a gradient, and of a measurement, on one accelerator. Memory: of weights and direction,",
        "of values and adjoints, and of the tangents of all groups at once, which a budget (`memory=`) bounds at the",
        "price of more sweeps. A sharded model's parameters are gathered a block at a time: of n accelerators each",
        "has an n-th of the first figure, and all of the others for samples of its own.",
        "",
        *table(
            ["model", "tokens", "S", "order", "gradients", *[f"{name}, s" for name in ACCELERATORS], "memory, GB"],
            predictions(),
        ),
        "",
    ]
    return "\n".join(text)


PARTS = {
    "loss, adjoints": "loss and adjoints",
    "incoming tangents": "tangents that come in",
    "own directions": "matrices' own directions",
    "pulled adjoints": "adjoints pulled",
    "attention": "attention",
    "pairs": "pairs of groups",
}
GPT2 = Shape("gpt2", 12, 768, 3072, 12, 12, 50_257, 128)


def missing() -> float:
    """What a count of passes and incoming tangents alone leaves out, of GPT-2 by blocks up to H̄."""
    count = Count(GPT2, blocks(), third=False).model()
    return 1 - (count.of["loss and adjoints"] + count.of["tangents that come in"]) / count.total


def shares() -> list[list[object]]:
    """Rows of the second table."""
    rows: list[list[object]] = []
    some = [("GPT-2, 128 tokens", GPT2, 14, blocks()), ("GPT-2, 128 tokens", GPT2, 148, tensors)]
    some += [(f"{name}, 2,048 tokens", s, size(s, blocks()), blocks()) for name, s in MODELS.items()]
    for (name, shape, groups_count, groups), order in itertools.product(some, (2, 3)):
        count = Count(shape, groups, order == 3).model()
        parts = [f"{count.of[part] / count.total:.0%}" for part in PARTS.values()]
        rows.append([name, groups_count, order, f"{count.total / shape.gradient:.1f}", *parts])
    return rows


def predictions() -> list[list[object]]:
    """Rows of the third table."""
    rows: list[list[object]] = []
    for (name, model), (sequences, tokens), order in itertools.product(MODELS.items(), BATCHES, (2, 3)):
        shape = dataclasses.replace(model, sequences=sequences, tokens=tokens)
        cost = gradients(shape, blocks(), order)
        seconds = [2 * shape.gradient / peak / ACHIEVED for peak in ACCELERATORS.values()]
        parts = [f"{value / 1e9:.0f}" for value in memory(shape, blocks(), order).values()]
        times = [f"{readable(s)}, {readable(s * cost)}" for s in seconds]
        rows.append(
            [name, f"{sequences} × {tokens}", size(shape, blocks()), order, f"{cost:.1f}", *times, " + ".join(parts)]
        )
    return rows


def readable(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


# The picture ----------------------------------------------------------------------------------------------------------


def draw(path: Path) -> None:
    """Cost against groups and tokens, what it is made of, and memory."""
    from matplotlib.figure import Figure

    from newton_summary.plots.parts import SERIES

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (by_groups, by_tokens), (made_of, held) = figure.subplots(2, 2)
    lengths = [128, 256, 512, 1024, 2048, 4096, 8192]
    for color, (name, shape) in zip(SERIES, MODELS.items(), strict=False):
        merged = [blocks(k) for k in (16, 8, 4, 2, 1) if k <= shape.layers]
        sizes = [size(shape, g) for g in (*merged, halves, tensors)]
        for order, style in ((2, "-"), (3, "--")):
            costs = [gradients(shape, g, order) for g in (*merged, halves, tensors)]
            label = f"{name}, {'up to H̄' if order == 2 else 'third diagonal'}"
            by_groups.plot(sizes, costs, style, color=color, marker="o", markersize=3, label=label)
            costs = [gradients(dataclasses.replace(shape, tokens=t), blocks(), order) for t in lengths]
            by_tokens.plot(lengths, costs, style, color=color, marker="o", markersize=3)
    by_groups.set(xscale="log", yscale="log", xlabel="S: from 16 blocks in a group to a group for each tensor")
    by_tokens.set(xscale="log", ylim=0, xlabel="tokens of a sequence; a group for each block")
    _ticks(by_groups.xaxis, (3, 10, 30, 100, 300))
    _ticks(by_groups.yaxis, (3, 10, 30, 100, 300))
    _ticks(by_tokens.xaxis, lengths)
    for axes in (by_groups, by_tokens):
        axes.set_ylabel("cost, gradients")
    by_groups.legend(fontsize=7, title="parameters", title_fontsize=7)
    _bars(made_of, SERIES)
    _memory(held, SERIES)
    figure.savefig(path, dpi=120)


def _ticks(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _bars(axes: Any, colors: Sequence[str]) -> None:
    """Of what a measurement is made."""
    rows = [(name, shape, order) for name, shape in MODELS.items() for order in (2, 3)]
    labels = [f"{name}\n{'H̄' if order == 2 else 'third'}" for name, _, order in rows]
    bottom = [0.0] * len(rows)
    counts = [Count(shape, blocks(), order == 3).model() for _, shape, order in rows]
    for color, (label, part) in zip(colors, PARTS.items(), strict=False):
        heights = [c.of[part] / s.gradient for c, (_, s, _) in zip(counts, rows, strict=True)]
        axes.bar(labels, heights, bottom=bottom, color=color, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(ylabel="cost, gradients", xlabel="a group for each block; one sequence of 2,048 tokens")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7)


def _memory(axes: Any, colors: Sequence[str]) -> None:
    """Memory of the 7 billion against tokens."""
    lengths = [128, 256, 512, 1024, 2048, 4096]
    shape = MODELS["7 billion"]
    found = [memory(dataclasses.replace(shape, tokens=t), blocks(), 2) for t in lengths]
    for color, part in zip(colors, found[0], strict=False):
        axes.plot(lengths, [m[part] / 1e9 for m in found], color=color, marker="o", markersize=3, label=part)
    axes.plot(lengths, [sum(m.values()) / 1e9 for m in found], color="black", label="together")
    axes.axhline(80, color="0.6", linestyle=":")
    axes.text(lengths[0], 84, "80 GB", fontsize=7, color="0.4")
    axes.set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="memory, GB: 7 billion, up to H̄")
    _ticks(axes.xaxis, lengths)
    _ticks(axes.yaxis, (1, 10, 100))
    axes.legend(fontsize=7)


def main() -> None:
    rows: list[list[object]] = []
    for (label, shape, groups), order in itertools.product(CHECKED, (2, 3)):
        gradient, measured = counted(shape, groups, order)
        ratio = Count(shape, groups, order == 3).model().total / measured
        s = len(partition_of(build(shape), shape, groups))
        given = [shape.kind, shape.layers, shape.width, shape.vocabulary, f"{shape.sequences} × {shape.tokens}"]
        rows.append([*given, label, s, order, f"{measured / gradient:.2f}", f"{ratio:.4f}"])
        print(rows[-1], flush=True)
    (ROOT / "results" / "cost.md").write_text(page(rows), encoding="utf-8")
    draw(ROOT / "docs" / "images" / "cost.png")


if __name__ == "__main__":
    main()
