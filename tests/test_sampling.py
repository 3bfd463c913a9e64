"""The stream of batches: independent of the user's loop and random states, and resumed exactly."""

import copy
import random

import numpy as np
import pytest
import torch
from cases import unchanged
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import newton_summary as ns
from newton_summary.measure.loss import preserved_randomness
from newton_summary.measure.stream import BatchStream

CPU = torch.device("cpu")
N = 10


class Augmented(Dataset):
    """Sample i with noise from each of the three global random states."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return i + 0.1 * torch.rand(3, dtype=torch.float64) + 0.01 * random.random() + 0.001 * np.random.rand()  # noqa: NPY002


class Manual(Sampler):
    """Draws from generators of its own, of every kind."""

    def __init__(self, generator, batches=False):
        self.generator, self.batches = generator, batches

    def __iter__(self):
        draw = {
            torch.Generator: lambda g: torch.randperm(N, generator=g).tolist(),
            np.random.Generator: lambda g: g.permutation(N).tolist(),
            np.random.RandomState: lambda g: g.permutation(N).tolist(),
            random.Random: lambda g: g.sample(range(N), N),
        }
        order = draw[type(self.generator)](self.generator)
        yield from ([order[:6], order[6:]] if self.batches else order)

    def __len__(self):
        return N


class Legacy(Sampler):
    """Draws from the global states, all at once or one by one."""

    def __init__(self, lazy):
        self.lazy = lazy

    def __iter__(self):
        order = list(range(N))
        if self.lazy:  # each draw depends on those before it
            return (order.pop(np.random.randint(len(order))) for _ in range(N))  # noqa: NPY002
        random.shuffle(order)
        return iter(order)


class Numbers(IterableDataset):
    def __init__(self, shuffled=False):
        self.shuffled = shuffled

    def __iter__(self):
        return iter(torch.randperm(N).tolist() if self.shuffled else range(N))


class Transforming(DataLoader):
    """Transforms its batches with a generator of its own, as well as with the global one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own, self.passes = np.random.default_rng(0), 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            noise = 1e-3 * (float(torch.rand(())) + self.own.random())
            yield [t + 100 + noise for t in batch] if isinstance(batch, list) else batch + 100 + noise


def transforming(loader):
    if isinstance(loader.dataset, IterableDataset):
        return Transforming(loader.dataset, batch_size=loader.batch_size)
    if type(loader.batch_sampler) is BatchSampler:
        return Transforming(loader.dataset, batch_size=loader.batch_size, sampler=loader.sampler)
    if loader.batch_sampler is None:
        return Transforming(loader.dataset, batch_size=None, sampler=loader.sampler)
    return Transforming(loader.dataset, batch_sampler=loader.batch_sampler)


class StandIn:
    """Says that it is a ``DataLoader``, as the wrappers of some libraries do, and is none."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    @property
    def __class__(self):
        return type(self.loader)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield [t + 100 for t in batch] if isinstance(batch, list) else batch + 100


def prepared(loader, **options):
    """What accelerate makes of a loader, for any trainer built on it."""
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader

    PartialState(cpu=True)
    return prepare_data_loader(loader, **options)


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(5),
    "numpy": lambda: np.random.default_rng(5),
    "legacy numpy": lambda: np.random.RandomState(5),
    "python": lambda: random.Random(5),
}
DATA = TensorDataset(torch.arange(N), torch.arange(N) * 2.0)

LOADERS = {
    "in order": lambda: DataLoader(DATA, batch_size=4),
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(DATA, batch_size=4, shuffle=True, generator=GENERATORS["torch"]()),
    "drop last": lambda: DataLoader(DATA, batch_size=4, drop_last=True),
    "single samples": lambda: DataLoader(DATA, batch_size=None),
    "single samples shuffled": lambda: DataLoader(DATA, batch_size=None, sampler=RandomSampler(DATA)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "subset sampler": lambda: DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([1, 3, 5, 7])),
    "weighted sampler": lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(torch.ones(N), N)),
    "distributed sampler": lambda: DataLoader(DATA, batch_size=2, sampler=DistributedSampler(DATA, 2, 1)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, drop_last=False)),
    "batch sampler in order": lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 5, True)),
    "lazy legacy sampler": lambda: DataLoader(DATA, batch_size=4, sampler=Legacy(lazy=True)),
    "eager legacy sampler": lambda: DataLoader(DATA, batch_size=4, sampler=Legacy(lazy=False)),
    "iterable": lambda: DataLoader(Numbers(), batch_size=4),
    "iterable shuffled": lambda: DataLoader(Numbers(shuffled=True), batch_size=4),
    "iterable by itself": lambda: Numbers(shuffled=True),
    "list": lambda: [torch.tensor([1.0, 2.0]), torch.tensor([3.0])],
    "bare list of indices": lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2], [3, 4, 5]]),
}
LOADERS |= {
    f"transforming, {kind}": lambda kind=kind: transforming(LOADERS[kind]())
    for kind in ("in order", "shuffled", "single samples shuffled", "torch batch sampler", "iterable shuffled")
}
LOADERS |= {
    f"{kind} sampler": lambda make=make: DataLoader(DATA, batch_size=4, sampler=Manual(make()))
    for kind, make in GENERATORS.items()
}
LOADERS |= {
    f"{kind} batch sampler": lambda make=make: DataLoader(DATA, batch_sampler=Manual(make(), batches=True))
    for kind, make in GENERATORS.items()
}
LOADERS |= {
    f"accelerate, {kind}": lambda kind=kind: prepared(LOADERS[kind]())
    for kind in ("in order", "shuffled", "single samples shuffled", "torch batch sampler", "iterable shuffled")
}
LOADERS |= {
    "accelerate, seedable": lambda: prepared(LOADERS["shuffled"](), use_seedable_sampler=True, data_seed=5),
    "accelerate, a share": lambda: prepared(LOADERS["own generator"](), num_processes=2, process_index=1),
    "stand-in": lambda: StandIn(DataLoader(DATA, batch_size=4, shuffle=True)),
}
FIXED_ORDER = ("list", "iterable", "bare list of indices")
everywhere = pytest.mark.parametrize("kind", LOADERS)


def take(stream, count):
    return [stream.next(CPU) for _ in range(count)]


def flat(batches):
    """Batches as plain numbers."""

    def plain(x):
        return [plain(y) for y in x] if isinstance(x, list | tuple) else x.tolist() if torch.is_tensor(x) else x

    return plain(batches)


# Reproducible, and resumed exactly ------------------------------------------------------------------------------------


@everywhere
def test_the_order_is_a_function_of_the_seed(kind):
    first = flat(take(BatchStream(LOADERS[kind](), seed=3), 9))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert flat(take(BatchStream(LOADERS[kind](), seed=3), 9)) == first
    if kind not in FIXED_ORDER:
        assert flat(take(BatchStream(LOADERS[kind](), seed=4), 9)) != first


@everywhere
@pytest.mark.parametrize("read", [0, 1, 3, 8])
def test_resuming_is_exact_at_any_position(kind, read):
    stream = BatchStream(LOADERS[kind](), seed=3)
    take(stream, read)
    state = copy.deepcopy(stream.state_dict())
    expected = flat(take(stream, 7))
    resumed = BatchStream(LOADERS[kind](), seed=0)
    take(resumed, 2)
    torch.rand(5)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert flat(take(resumed, 7)) == expected


@everywhere
def test_the_users_loop_and_the_stream_do_not_touch_each_other(kind):
    alone = flat(take(BatchStream(LOADERS[kind](), seed=3), 8))

    def loop(loader, stream=None):
        """Two epochs of the user's; after each batch a batch of the stream."""
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        seen, between = [], []
        for epoch in range(2):
            if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                loader.sampler.set_epoch(epoch)
            for batch in loader:
                seen.append(flat(batch))
                if stream is not None:
                    between += take(stream, 1)
        return seen, flat(between)

    undisturbed, _ = loop(LOADERS[kind]())
    loader = LOADERS[kind]()
    seen, between = loop(loader, BatchStream(loader, seed=3))
    assert seen == undisturbed
    assert between[:8] == alone[: len(between)]


@everywhere
def test_global_random_states_stay(kind):
    stream = BatchStream(LOADERS[kind](), seed=3)
    for _ in range(9):
        with unchanged(nn.Linear(1, 1)):
            stream.next(CPU)


@everywhere
def test_deepcopies_go_on_alike_and_apart(kind):
    stream = BatchStream(LOADERS[kind](), seed=3)
    take(stream, 2)
    twin = copy.deepcopy(stream)
    assert twin.data is stream.data
    ahead = flat(take(twin, 5))
    assert flat(take(stream, 5)) == ahead


@pytest.mark.parametrize("kind", [k for k in LOADERS if k not in FIXED_ORDER])
def test_passes_differ(kind):
    stream = BatchStream(LOADERS[kind](), seed=3)
    passes = {}
    while stream.epoch < 5:
        batch = stream.next(CPU)
        passes.setdefault(stream.epoch, []).append(flat(batch))
    del passes[stream.epoch]
    assert len({str(p) for p in passes.values()}) > 1


def test_every_batch_has_random_numbers_of_its_own():
    batches = take(BatchStream(LOADERS["augmented"]()), 6)
    noise = [tuple((batch[0] - batch[0].floor()).round(decimals=9).tolist()) for batch in batches]
    assert len(set(noise)) == 6


# What a pass is made of -----------------------------------------------------------------------------------------------


def one_pass(loader, seed=0):
    stream = BatchStream(loader, seed)
    batches = []
    while True:
        batch = stream.next(CPU)
        if stream.epoch:
            return batches
        batches.append(batch)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("in order", [4, 4, 2]),
        ("shuffled", [4, 4, 2]),
        ("own generator", [4, 4, 2]),
        ("batch sampler", [5, 5]),
        ("batch sampler in order", [5, 5]),
        ("torch sampler", [4, 4, 2]),
        ("python batch sampler", [6, 4]),
        ("bare list of indices", [2, 1, 3]),
    ],
)
def test_a_pass_has_every_sample_once_in_batches_of_the_loaders_sizes(kind, sizes):
    batches = one_pass(LOADERS[kind]())
    assert [len(x) for x, _ in batches] == sizes
    samples = torch.cat([x for x, _ in batches])
    assert sorted(samples.tolist()) == list(range(sum(sizes)))
    assert torch.equal(torch.cat([y for _, y in batches]), samples * 2.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_iterates_its_own_way_is_iterated_so(workers):
    loader = Transforming(DATA, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    batches = one_pass(loader)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert [len(part) for part, _ in batches] == [4, 4, 2]
    assert sorted(x.floor().tolist()) == [100.0 + i for i in range(N)]
    assert torch.allclose(y - 100, 2 * (x - 100).floor() + x - x.floor(), atol=1e-4), "one noise for both"
    assert x.floor().tolist() != sorted(x.floor().tolist()), "an order of its own"
    assert (loader.passes, loader._iterator) == (0, None)
    assert loader.own.random() == np.random.default_rng(0).random()


def test_what_stands_for_a_loader_is_iterated_in_its_own_way():
    x, y = (torch.cat(parts) for parts in zip(*one_pass(StandIn(DataLoader(DATA, 4))), strict=True))
    assert (x.tolist(), y.tolist()) == ([100 + i for i in range(N)], [100 + 2.0 * i for i in range(N)])


@pytest.mark.parametrize("kind", ["in order", "own generator", "torch batch sampler", "augmented", "iterable"])
def test_what_accelerate_makes_of_a_loader_is_read_as_that_loader_is(kind):
    """It counts for the training loop that it is in, and gives itself out as a loader without being one."""
    from accelerate.state import GradientState

    loader = prepared(LOADERS[kind]())
    assert flat(take(BatchStream(loader, seed=3), 7)) == flat(take(BatchStream(LOADERS[kind](), seed=3), 7))
    assert (loader.iteration, GradientState().active_dataloader) == (0, None)


def test_iterators_of_a_class_are_used():
    """As libraries of graphs do: batches are made of what the samplers drew."""

    class Doubling(DataLoader):
        def _get_iterator(self):
            return ([2 * t for t in batch] for batch in super()._get_iterator())

    assert sorted(torch.cat([x for x, _ in one_pass(Doubling(DATA, 4, shuffle=True))]).tolist()) == list(
        range(0, 20, 2)
    )


def test_the_optimizer_measures_on_what_its_loader_gives():
    model, seen = torch.nn.Linear(1, 1), set()
    loader = Transforming(torch.zeros(8, 1), batch_size=4)

    def loss_fn(model, x):
        seen.add(x[0].round().item())
        return model(x).square().mean()

    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader)
    loss_fn(model, torch.full((4, 1), 100.0)).backward()
    optimizer.step()
    assert seen == {100.0}


def test_drop_last_drops_the_last():
    assert [len(x) for x, _ in one_pass(LOADERS["drop last"]())] == [4, 4]


def test_single_samples_are_not_collated():
    samples = one_pass(LOADERS["single samples"]())
    assert all(x.dim() == 0 for x, _ in samples)
    assert sorted(int(x) for x, _ in samples) == list(range(N))


def test_a_sequential_order_is_replaced_by_a_random_one():
    for kind in ("in order", "batch sampler in order", "single samples"):
        batches = one_pass(LOADERS[kind]())
        samples = torch.cat([x.view(-1) for x, _ in batches]).tolist()
        assert samples != sorted(samples)


def test_a_sequential_sampler_of_some_samples_stays_with_them():
    loader = DataLoader(DATA, batch_size=2, sampler=SequentialSampler(Subset(DATA, range(6))))
    assert sorted(torch.cat([x for x, _ in one_pass(loader)]).tolist()) == list(range(6))


def test_samplers_choose_the_samples():
    samples = torch.cat([x for x, _ in one_pass(LOADERS["subset sampler"]())])
    assert sorted(samples.tolist()) == [1, 3, 5, 7]
    half = torch.cat([x for x, _ in one_pass(LOADERS["distributed sampler"]())])
    assert len(half) == 5
    weights = torch.tensor([0.0] * 9 + [1.0])
    weighted = DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler(weights, N), 5, False))
    assert all((x == 9).all() for x, _ in one_pass(weighted))


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_samplers_are_not_advanced(kind):
    generator = GENERATORS[kind]()
    fresh = Manual(GENERATORS[kind]())
    for loader in (
        DataLoader(DATA, batch_size=4, sampler=Manual(generator)),
        DataLoader(DATA, batch_sampler=Manual(generator, batches=True)),
        DataLoader(DATA, batch_sampler=BatchSampler(Manual(generator), 4, False)),
    ):
        take(BatchStream(loader), 7)
    assert list(Manual(generator)) == list(fresh)


@pytest.mark.parametrize("kind", ["own generator", "iterable"])
def test_generators_of_loaders_are_not_advanced(kind):
    generator = torch.Generator().manual_seed(5)
    loader = LOADERS[kind]()
    loader = DataLoader(loader.dataset, batch_size=4, generator=generator, shuffle=kind != "iterable" or None)
    before = generator.get_state()
    take(BatchStream(loader), 7)
    assert torch.equal(generator.get_state(), before)


def test_collate_functions_are_used():
    loader = DataLoader(range(N), batch_size=5, collate_fn=lambda items: {"sum": sum(items), "x": torch.tensor(items)})
    batches = one_pass(loader)
    assert sum(b["sum"] for b in batches) == 45
    iterable = DataLoader(Numbers(), batch_size=5, collate_fn=sum)
    assert one_pass(iterable) == [10, 35]
    single = DataLoader(range(N), batch_size=None, collate_fn=lambda item: item + 100)
    assert sorted(one_pass(single)) == list(range(100, 110))


def test_datasets_that_fetch_many_at_once():
    class Many(Dataset):
        def __len__(self):
            return N

        def __getitems__(self, indices):
            return [100 + i for i in indices]

    assert sorted(torch.cat(one_pass(DataLoader(Many(), batch_size=4))).tolist()) == list(range(100, 110))


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_tensors_are_indexed_once_for_a_batch_and_give_what_collating_gives(is_part, count, monkeypatch):
    whole = TensorDataset(*(torch.randn(20, 3), torch.arange(20))[:count])
    data = Subset(Subset(whole, range(3, 20)), [9, 0, 5, 3]) if is_part else whole
    streams = [
        BatchStream(DataLoader(data, 3, collate_fn=collate))
        for collate in (lambda samples: default_collate(samples), default_collate)
    ]
    expected = [streams[0].next(CPU) for _ in range(5)]
    monkeypatch.delattr(TensorDataset, "__getitem__")  # which takes a large batch longer than a training step
    for batch, right in zip((streams[1].next(CPU) for _ in range(5)), expected, strict=True):
        assert type(batch) is type(right)
        assert len(batch) == count
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, right, strict=True))


def test_skipped_samples_are_not_loaded():
    loaded = []

    class Recording(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            loaded.append(i)
            return i

    stream = BatchStream(DataLoader(Recording(), batch_size=2))
    stream.load_state_dict({"seed": 0, "epoch": 7, "position": 3})
    stream.next(CPU)
    assert len(loaded) == 2


def test_workers_of_the_user_are_left_alone():
    """The stream reads in this process: a loader with persistent workers has one iterator, which is the user's."""
    loader = DataLoader(Numbers(), batch_size=4, num_workers=1, persistent_workers=True)
    take(BatchStream(loader), 5)
    assert loader._iterator is None


def test_batches_move_to_the_device():
    class Graph:
        """A batch of a class of its own, as of graph libraries."""

        def __init__(self):
            self.device = CPU

        def to(self, device):
            self.device = device
            return self

    batch = {"x": torch.ones(2), "nested": [(torch.ones(1),)], "graph": Graph(), "name": "text", "none": None, "n": 3}
    meta = torch.device("meta")
    moved = BatchStream([batch]).next(meta)
    assert moved["x"].device == moved["nested"][0][0].device == moved["graph"].device == meta
    assert (moved["name"], moved["none"], moved["n"]) == ("text", None, 3)
    assert batch["x"].device == CPU


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[], (), DataLoader([], batch_size=2), DataLoader(Subset(DATA, []), batch_size=2)])
def test_no_data(data):
    with pytest.raises(ValueError, match="curvature_data is empty"):
        BatchStream(data)


class Once:
    """Not an iterator, but one that can be gone through only once."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_data_that_turns_out_empty():
    for data in (DataLoader(Subset(DATA, range(3)), batch_size=4, drop_last=True), Once([])):
        with pytest.raises(ValueError, match="curvature_data is empty: a pass over it gave no batch"):
            BatchStream(data).next(CPU)


def test_data_that_can_be_read_only_once():
    for data, name in ((iter([1]), "list_iterator"), ((x for x in [1]), "generator"), (map(abs, [1]), "map")):
        with pytest.raises(ValueError, match=f"curvature_data is a one-shot {name}: pass a DataLoader or a list"):
            BatchStream(data)
    stream = BatchStream(Once([1, 2]))
    assert take(stream, 2) == [1, 2]
    with pytest.raises(ValueError, match="curvature_data is empty again: it can be read only once"):
        stream.next(CPU)


def test_data_that_is_no_iterable():
    for data in (3, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="curvature_data must be an iterable of batches, got"):
            BatchStream(data)


def test_a_negative_seed():
    with pytest.raises(ValueError, match="seed must be a whole number from 0 on, got -1"):
        BatchStream([1], seed=-1)


# Random states --------------------------------------------------------------------------------------------------------


def _draw() -> list[float]:
    uniform, normal = np.random.rand(2), np.random.normal(size=3)  # noqa: NPY002  (the user's global generator)
    return [random.random(), float(torch.rand(())), *uniform, *normal]


@pytest.mark.parametrize("spare", [False, True], ids=["", "a variate is kept"])
@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_random_states_are_rewound_and_restored(kind, spare):
    """A normal variate is kept for the next call, beside the generator's memory, after an odd number of them."""
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(kind(3))
        if spare:
            np.random.normal()  # noqa: NPY002
        state = np.random.get_state(legacy=False)  # noqa: NPY002
        with preserved_randomness() as rewind:
            first = _draw()
            rewind()
            assert _draw() == first
            rewind()
            rewind()
            kept = float(np.random.normal())  # noqa: NPY002
            rewind()
            assert float(np.random.normal()) == kept  # noqa: NPY002
        after = np.random.get_state(legacy=False)  # noqa: NPY002
        assert repr(after) == repr(state)
        assert _draw() == first
    finally:
        np.random.set_bit_generator(usual)


class Noisy(Dataset):
    """Sample i with noise from generators of its own, of every kind, some of them further inside."""

    def __init__(self):
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.transforms = [Scaling(), Scaling()]

    @property
    def generators(self):
        return [self.torch, self.numpy, *(one.random for one in self.transforms)]

    def __len__(self):
        return N

    def __getitem__(self, i):
        x = i + 0.1 * torch.rand(3, dtype=torch.float64, generator=self.torch) + 0.01 * self.numpy.normal()
        for transform in self.transforms:
            x = transform(x)
        return x


class Scaling:
    def __init__(self):
        self.random = random.Random(1)

    def __call__(self, x):
        return x * (1 + 0.1 * self.random.random())


class NoisyIterable(IterableDataset):
    def __init__(self):
        self.samples = Noisy()

    def __iter__(self):
        return (self.samples[i] for i in range(N))


class Shuffled:
    """No loader of torch's."""

    def __init__(self):
        self.samples = Noisy()

    def __iter__(self):
        order = self.samples.numpy.permutation(N)
        return (torch.stack([self.samples[i] for i in order[k : k + 2]]) for k in range(0, N, 2))


def collating(samples):
    return lambda items: samples.transforms[0](torch.stack(items))


OWN_GENERATORS = {
    "a data set": lambda samples: DataLoader(samples, batch_size=2, shuffle=True),
    "a subset of it": lambda samples: DataLoader(
        Subset(torch.utils.data.ConcatDataset([samples, samples]), range(N)), batch_size=2
    ),
    "the function that collates": lambda samples: DataLoader(
        torch.arange(float(N), dtype=torch.float64)[:, None] * torch.ones(3),
        batch_size=2,
        collate_fn=collating(samples),
    ),
    "an iterable data set": lambda samples: DataLoader(_over(NoisyIterable(), samples), batch_size=2),
    "an iterable": lambda samples: _over(Shuffled(), samples),
}


def _over(data, samples):
    data.samples = samples
    return data


def _states(generators):
    return [
        g.get_state().tolist()
        if isinstance(g, torch.Generator)
        else g.getstate()
        if isinstance(g, random.Random)
        else repr(g.bit_generator.state)
        for g in generators
    ]


@pytest.mark.parametrize("name", OWN_GENERATORS)
def test_generators_that_the_data_owns_stay_where_they_are(name) -> None:
    samples = Noisy()
    data = OWN_GENERATORS[name](samples)
    before = _states(samples.generators)
    stream, twin = BatchStream(data, seed=3), BatchStream(data, seed=3)
    read = [stream.next(CPU) for _ in range(8)]
    assert _states(samples.generators) == before
    list(data)  # the loop that trains
    between = _states(samples.generators)
    assert between != before
    twin.load_state_dict({"seed": 3, "epoch": 0, "position": 3})
    again = [twin.next(CPU) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(read[3:], again, strict=False))
    assert not torch.equal(read[0], read[1])
    model = nn.Linear(3, 1).double()
    ns.summarize(lambda m, x: m(x).square().mean(), model, data)
    assert _states(samples.generators) == between


def test_both_passes_over_data_with_generators_of_its_own_see_the_same() -> None:
    torch.manual_seed(0)
    samples, model, seen = Noisy(), nn.Linear(3, 1).double(), []

    def loss_fn(m, x):
        seen.append(x.clone())
        return m(x).square().mean()

    ns.summarize(loss_fn, model, DataLoader(samples, batch_size=N), engine="nested")
    assert len(seen) > 1
    assert all(torch.equal(x, seen[0]) for x in seen)
