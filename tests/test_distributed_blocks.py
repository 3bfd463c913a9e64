"""Models sharded by ``fully_shard`` block by block: measured as whole ones are, with one block there at a time."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from test_distributed import here
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import newton_summary as ns
from newton_summary.measure import Loss, resolve_engine
from newton_summary.parallel.paging import Pages
from newton_summary.parallel.processes import Processes
from newton_summary.parallel.sharding import measurable, sharded_like, unsharded

DTYPE = torch.float64
WIDTH, HIDDEN, WORDS, BLOCKS = 6, 22, 17, 4


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


def make(sharded: bool = True, **options) -> nn.Module:
    model = Decoder().to(DTYPE)
    if sharded and dist.is_initialized():
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
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
    return [sharded_like(u, p) for u, p in zip(whole, model.parameters(), strict=True)]


def partition_of(model, groups: str) -> ns.Partition:
    if groups == "blocks":
        return ns.Partition.by_module(model, depth=2)
    if groups == "parts":
        rows = {f"rows {i}": [("blocks.2.wide.weight", slice(i * 11, i * 11 + 11))] for i in (0, 1)}
        rest = [name for name, _ in model.named_parameters() if name != "blocks.2.wide.weight"]
        return ns.Partition(rows | {"rest": rest}, model)
    return ns.Partition.canonical(model)


def measure(engine: str = "forward", groups: str = "blocks", times: int = 1, mesh: tuple[int, ...] = ()):
    """The measurement on all processes' samples, as an optimizer takes it."""
    model = make(mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards"))) if mesh else make()
    partition, engine = partition_of(model, groups), resolve_engine(engine)
    found = []
    for _ in range(times):
        with torch.no_grad(), measurable(model, partition, direction_of(model)) as (over, along):
            part = engine.measure(Loss(loss_fn, model), own_batch(), over, along, 3, "diagonal")
            found.append(Processes(model).average([part], along)[0])
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


@pytest.mark.slow
def test_parts_of_tensors_are_groups_of_sharded_models_too(two) -> None:
    expected = measure(groups="parts", times=2)
    for found in two.run(measure, groups="parts", times=2):
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["tensors", "parts"])
def test_four_processes_measure_as_one(four, groups) -> None:
    expected = measure(groups=groups)
    for found in four.run(measure, groups=groups):
        assert_same(found, expected)


@pytest.mark.slow
def test_copies_of_shards_measure_as_one(four) -> None:
    expected = measure()
    for found in four.run(measure, mesh=(2, 2)):
        assert_same(found, expected)


def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "parts"))
    model = make(sharded=False)
    for block in model.blocks:
        parallelize_module(block, mesh["parts"], {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})
        fully_shard(block, mesh=mesh["shards"])
    partition = partition_of(model, "blocks")
    u = [torch.zeros_like(p) for p in partition.parameters]
    message = r"module 'blocks\.0\.wide' computes on parts of tensors .*fully_shard alone"
    with pytest.raises(ValueError, match=message), measurable(model, partition, u):
        pass


@pytest.mark.slow
def test_tensor_parallelism_within_shards_is_refused(four) -> None:
    four.run(tensor_parallel)


def often(model, ids):
    """A loss that goes through a block once more in one process only, and begins with another one there."""
    x = model.words(ids[:, :-1])
    twice = dist.is_initialized() and here()[0] == 1
    for block in [*model.blocks, *(list(model.blocks)[1:3] if twice else [])]:
        x = block(x)
    return nn.functional.cross_entropy(model.head(x).flatten(0, 1), ids[:, 1:].flatten())


class Doubled(torch.autograd.Function):
    """Twice a value, with a gradient of another function: forward refuses it, and nested passes do not."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def doubled(model, ids):
    x = model.words(ids[:, :-1])
    for number, block in enumerate(model.blocks):
        x = Doubled.apply(block(x)) if number == 2 and dist.is_initialized() and here()[0] == 1 else block(x)
    return nn.functional.cross_entropy(model.head(x).flatten(0, 1), ids[:, 1:].flatten())


LOSSES = {"often": often, "doubled": doubled}


def each_alone(kind: str):
    """This process's own measurement, of the sharded model and of a whole one that nobody shares."""
    import warnings

    warnings.filterwarnings("ignore", "measured by nested differentiation")
    found = []
    for model in (make(), make(sharded=False)):
        partition, direction = partition_of(model, "blocks"), direction_of(model)
        for _ in range(2):
            with torch.no_grad(), measurable(model, partition, direction) as (over, along):
                found.append(
                    resolve_engine("auto").measure(Loss(LOSSES[kind], model), own_batch(), over, along, 3, "diagonal")
                )
    return [one.to_dict() for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["often", "doubled"])
def test_processes_that_compute_differently_wait_for_each_other(two, kind) -> None:
    results = two.run(each_alone, kind)
    for sharded, again, *expected in results:
        assert_same(sharded, expected[0])
        assert_same(again, expected[1])
    assert results[0][0]["loss"] != pytest.approx(results[1][0]["loss"], rel=1e-6)


def train(kind: str, steps: int = 4):
    """Some steps of an optimizer that measures, evaluates further along, or compares; and the weights."""
    model = make()
    optimizer = ns.NewtonSummary(
        model, loss_fn, curvature_data=None if kind == "measure" else [own_batch(seed) for seed in (1, 2, 3)],
        direction="momentum", compare_every=2,
    )  # fmt: skip
    for seed in range(steps):
        optimizer.zero_grad()
        loss_fn(model, own_batch(seed)).backward()
        if kind == "measure" and seed % 2 == 0:
            optimizer.measure(own_batch(seed))
        optimizer.step()
    return [unsharded(p.detach()).clone() for p in model.parameters()], dict(optimizer.counts)


@pytest.mark.parametrize("kind", [pytest.param("measure", marks=pytest.mark.slow), "compare"])
def test_two_processes_train_as_one(two, kind) -> None:
    parameters, counts = train(kind)
    for own, own_counts in two.run(train, kind):
        assert own_counts == counts
        for p, q in zip(own, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert counts["measured" if kind == "measure" else "compared"] > 1


# What is whole at a time ----------------------------------------------------------------------------------------------


def matrices(model) -> set[torch.Size]:
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    return shapes | {torch.Size(shape[::-1]) for shape in shapes}


def sizes_of_blocks() -> tuple[int, int, int]:
    """The bytes of the largest matrix, of the largest block's parameters, and of all."""
    model = make(sharded=False)
    of_each = [sum(p.nbytes for p in block.parameters()) for block in model.blocks]
    return max(p.nbytes for p in model.parameters()), max(of_each), sum(of_each) + model.words.weight.nbytes


class Watch:
    """The most bytes of matrices shaped like parameters that there are whenever a block has come, whoever made them.

    Those are whole parameters, directions, gradients and copies of them.
    """

    def __init__(self, model) -> None:
        self.shapes, self.seen = matrices(model), []
        gc.collect()
        gc.freeze()  # what there is already is left out

    def __enter__(self):
        self.serve = Pages._serve

        def serve_and_look(pages, wanted):
            result = self.serve(pages, wanted)
            self.seen.append(self.bytes())
            return result

        Pages._serve = serve_and_look
        return self

    def __exit__(self, *error) -> None:
        Pages._serve = self.serve
        gc.unfreeze()

    def bytes(self) -> int:
        memories = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided:
                memory = thing.untyped_storage()
                if thing.shape in self.shapes and memory.nbytes() == thing.nbytes:  # no view of a larger one
                    memories[memory._cdata] = thing.nbytes
        return sum(memories.values())


def watch(what: str):
    """What is whole at a time in a measurement, or in the evaluations after it."""
    model = make()
    partition, engine = partition_of(model, "blocks"), resolve_engine("forward")
    direction, loss = direction_of(model), Loss(loss_fn, model)
    if what == "later":
        with torch.no_grad(), measurable(model, partition, direction) as (over, along):
            engine.measure(loss, own_batch(), over, along, 3, "diagonal")
    with Watch(model) as found, torch.no_grad(), measurable(model, partition, direction) as (over, along):
        if what == "moved":
            with loss.movable(own_batch(), over) as (weights, here):
                torch._foreach_lerp_(weights, along, 0.5)
                here()
        else:
            engine.measure(loss, own_batch(), over, along, 3, "diagonal")
    return max(found.seen), len(found.seen)


@pytest.mark.parametrize("what", ["first", "later", "moved"])
def test_one_block_is_whole_at_a_time_with_its_direction(two, what) -> None:
    matrix, block, everything = sizes_of_blocks()
    for most, turns in two.run(watch, what):
        assert turns > 2 * BLOCKS
        assert 0.8 * block < most <= 2 * block + (matrix if what == "first" else 0) < everything
