"""Models sharded by ``fully_shard`` block by block: measured as whole ones are, with one block's parameters at a time."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from test_distributed import here
from torch import nn
from torch.distributed.fsdp import fully_shard

import newton_summary as ns
from newton_summary.measure import Loss, resolve_engine
from newton_summary.measure.paging import Pages
from newton_summary.parallel.processes import Processes
from newton_summary.parallel.sharding import measurable, unsharded

DTYPE = torch.float64
WIDTH, HIDDEN, WORDS, BLOCKS = 6, 22, 17, 5


class Block(nn.Module):
    """Attention and a layer that is wider, with a residual around each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.narrow(nn.functional.gelu(self.wide(self.other(x))))


class Decoder(nn.Module):
    """Words to words, with one matrix for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(sharded: bool = True) -> nn.Module:
    model = Decoder().to(DTYPE)
    if sharded and dist.is_initialized():
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def loss_fn(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def own_batch(seed: int = 0):
    ids = torch.randint(WORDS, (4, 9), generator=torch.Generator().manual_seed(seed))
    rank, count = here()
    return ids.chunk(count)[rank]


def direction_of(model):
    """The same random entries, whoever holds which of them."""
    whole = [torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=DTYPE) / 9 for n, p in
             enumerate(make(sharded=False).parameters())]  # fmt: skip
    if not dist.is_initialized():
        return whole
    from newton_summary.parallel.sharding import sharded_like

    return [sharded_like(u, p) for u, p in zip(whole, model.parameters(), strict=True)]


def partition_of(model, groups: str) -> ns.Partition:
    if groups == "blocks":
        return ns.Partition.by_module(model, depth=2)
    if groups == "parts":
        rows = {f"rows {i}": [("blocks.2.wide.weight", slice(i * 11, i * 11 + 11))] for i in (0, 1)}
        rest = [name for name, _ in model.named_parameters() if name != "blocks.2.wide.weight"]
        return ns.Partition(rows | {"rest": rest}, model)
    return ns.Partition.canonical(model)


def measure(engine: str = "forward", third: str = "diagonal", groups: str = "blocks", loss=loss_fn, times: int = 1):
    """The measurement on all processes' samples, as an optimizer takes it."""
    model = make()
    partition, engine = partition_of(model, groups), resolve_engine(engine)
    found = []
    for _ in range(times):
        with torch.no_grad(), measurable(model, partition, direction_of(model)) as (over, along):
            part = engine.measure(Loss(loss, model), own_batch(), over, along, 3, third)
            if third == "diagonal":
                part = Processes(model).average([part], along)[0]
        found.append(part)
    for one in found:
        assert torch.equal(one.hessian, found[0].hessian)
    return found[-1].to_dict()


def assert_same(found, expected) -> None:
    for key in ("loss", "gradient", "hessian", "third"):
        one, other = (torch.tensor(s[key], dtype=DTYPE) for s in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * float(other.abs().max()))


@pytest.mark.parametrize("engine", ["forward", "nested"])
def test_two_processes_measure_as_one(two, engine) -> None:
    expected = measure(engine)
    for found in two.run(measure, engine):
        assert_same(found, expected)


def test_parts_of_tensors_are_groups_of_sharded_models_too(two) -> None:
    expected = measure(groups="parts", times=2)
    for found in two.run(measure, groups="parts", times=2):
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["blocks", "tensors", "parts"])
def test_four_processes_measure_as_one(four, groups) -> None:
    expected = measure(groups=groups)
    for found in four.run(measure, groups=groups):
        assert_same(found, expected)


# What is whole at a time ----------------------------------------------------------------------------------------------


def sizes_of_blocks(model) -> tuple[int, int]:
    """The bytes of the largest block's parameters, and of all."""
    of_each = [sum(p.nbytes for p in block.parameters()) for block in model.blocks]
    return max([*of_each, model.words.weight.nbytes]), sum(of_each) + model.words.weight.nbytes


def whole_bytes(shapes) -> int:
    """The bytes of all memory, of whoever's, that tensors shaped like parameters look at, biases and norms aside."""
    memories = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided and thing.shape in shapes:
            memory = thing.untyped_storage()
            if memory.nbytes() == thing.nbytes:  # not those of a larger tensor
                memories[memory._cdata] = memory.nbytes()
    return sum(memories.values())


def watch(first: bool):
    """The most bytes of matrices, parameters or what is shaped like them, that are there whenever a block comes."""
    model = make()
    small, everything = sizes_of_blocks(make(sharded=False))
    shapes = {p.shape for p in model.parameters() if p.dim() == 2} | {p.shape[::-1] for p in model.parameters()}
    partition, engine, seen = partition_of(model, "blocks"), resolve_engine("forward"), []
    direction, loss = direction_of(model), Loss(loss_fn, model)
    gc.collect()
    serve = Pages._serve

    def serve_and_look(pages, wanted):
        result = serve(pages, wanted)
        seen.append(whole_bytes(shapes))
        return result

    for number in range(2):
        if number == (not first):
            Pages._serve = serve_and_look
        try:
            with torch.no_grad(), measurable(model, partition, direction) as (over, along):
                engine.measure(loss, own_batch(), over, along, 3, "diagonal")
        finally:
            Pages._serve = serve
        if first:
            break
    return max(seen), len(seen), small, everything


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_no_more_than_two_blocks_are_whole_at_a_time(two, first) -> None:
    for most, turns, block, everything in two.run(watch, first):
        assert turns > 3 * BLOCKS
        print(most / block, everything / block, turns)
        assert 0 < most <= 4 * block < everything
