"""Two real processes against one: the same samples, the same steps."""

from __future__ import annotations

import copy
import io
import itertools
import re
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rounding import assert_rounded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import newton_summary as ns
from newton_summary.measure.stream import BatchStream
from newton_summary.parallel.processes import Processes
from newton_summary.solve import Status
from newton_summary.watch.cadence import Affordable

DTYPE = torch.float64
BATCH = 100  # samples of a step, of all processes together


def make_data(count: int = 500):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator, dtype=DTYPE)
    return x, (x @ torch.randn(5, 3, generator=generator, dtype=DTYPE)).argmax(1)


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(DTYPE)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def here() -> tuple[int, int]:
    """This process's number, and how many there are: one in the tests' own process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part(batch):
    """This process's part of the samples."""
    rank, count = here()
    return tuple(t.chunk(count)[rank] for t in batch)


def plain_loader():
    return DataLoader(TensorDataset(*make_data()), batch_size=BATCH, shuffle=True)


def sharded_loader():
    rank, count = here()
    data = TensorDataset(*make_data())
    return DataLoader(data, batch_size=BATCH // count, sampler=DistributedSampler(data, count, rank))


LOADERS = {"plain": plain_loader, "sharded": sharded_loader}
MAKERS = {
    "default": lambda m, data: ns.NewtonSummary(
        m, loss_fn, curvature_data=data, every=3, partition="canonical", direction="nadam"
    ),
    "factors": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data, every=3, direction="soap"),
    "counted factors": lambda m, data: ns.NewtonSummary(m, loss_fn, curvature_data=data, every=3),
    "paper": lambda m, data: ns.NewtonSummary.paper(m, loss_fn, curvature_data=data, every=3, lr=0.1),
    "AdamW's step": lambda m, data: ns.NewtonSummary(
        m, loss_fn, curvature_data=data, every=3, direction=torch.optim.AdamW(m.parameters(), lr=1e-2)
    ),
    "parts of tensors": lambda m, data: ns.NewtonSummary(
        m, loss_fn, curvature_data=data, every=3, partition=split_rows(m), steps=50, direction="nadam"
    ),
}


def split_rows(model) -> ns.Partition:
    rows = {"top": [("0.weight", slice(0, 3))], "rest": [("0.weight", slice(3, 8)), "0.bias", "2.weight", "2.bias"]}
    return ns.Partition(rows, model)


def train(kind: str, loader: str, steps: int, start: int = 0, saved: bytes | None = None, given: str = "bare"):
    """Trains for some steps, from a checkpoint if there is one, and gives the next."""
    model = make_model()
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = MAKERS[kind](parallel if given == "wrapped" else model, LOADERS[loader]())
    if saved is not None:
        optimizer.load_state_dict(state["optimizer"])
    x, y = make_data()
    for t in range(start, start + steps):
        batch = part((x.split(BATCH)[t % 5], y.split(BATCH)[t % 5]))
        optimizer.zero_grad()
        loss_fn(parallel, batch).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def leaves(saved: bytes) -> list:
    state = torch.load(io.BytesIO(saved), weights_only=True)
    flat, structure = torch.utils._pytree.tree_flatten(state)
    return [*flat, str(structure)]


def assert_same(saved: bytes, other: bytes, tolerance: float = 1e-10) -> None:
    """Every number of two checkpoints agrees, and they have the same keys."""
    for a, b in zip(leaves(saved), leaves(other), strict=True):
        if isinstance(a, torch.Tensor | float):
            torch.testing.assert_close(
                torch.as_tensor(a, dtype=DTYPE), torch.as_tensor(b, dtype=DTYPE), rtol=tolerance, atol=tolerance
            )
        else:
            assert a == b


# Two are one ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loader", "given"),
    [
        ("default", "plain", "bare"),
        ("default", "plain", "wrapped"),
        ("default", "sharded", "wrapped"),
        ("paper", "sharded", "bare"),
        ("AdamW's step", "plain", "wrapped"),
        ("parts of tensors", "plain", "wrapped"),
        ("factors", "plain", "wrapped"),
    ],
)
def test_two_with_50_samples_each_are_one_with_100(two, kind, loader, given) -> None:
    one = train(kind, loader, 20)
    first, second = two.run(train, kind, loader, 20, given=given)
    assert_same(first, second, tolerance=0.0)
    # bases of what small batches have not met are 1e-7 off by rounding, and training magnifies that
    assert_same(first, one, tolerance=1e-4 if kind == "factors" else 1e-10)


def test_processes_count_the_same_factors(two) -> None:
    """Which may be others than those of one process, whose layers see all rows."""
    first, second = two.run(train, "counted factors", "plain", 20)
    assert_same(first, second, tolerance=0.0)
    assert any("basis_out" in key for key in str(leaves(first)[-1]).split("'"))


@pytest.mark.parametrize(("kind", "loader"), [("default", "plain"), ("paper", "sharded"), ("AdamW's step", "plain")])
def test_a_run_of_two_resumes_as_one_and_the_reverse(two, kind, loader) -> None:
    whole = train(kind, loader, 20)
    of_two = two.run(train, kind, loader, 10)[0]
    assert_same(train(kind, loader, 10, start=10, saved=of_two), whole)
    of_one = train(kind, loader, 10)
    assert_same(two.run(train, kind, loader, 10, start=10, saved=of_one)[1], whole)


def measure_uneven(sizes):
    """One explicit measurement, and what went over the wire."""
    rank, count = here()
    model, sent = make_model(), []
    optimizer = ns.NewtonSummary(model, loss_fn, partition="canonical")
    x, y = make_data(sum(sizes))
    loss_fn(model, (x, y)).backward()
    own = (x.split(sizes)[rank], y.split(sizes)[rank]) if count > 1 else (x, y)
    optimizer._backtrack = lambda *measured: None
    all_reduce = dist.all_reduce
    try:
        dist.all_reduce = lambda tensor, **options: (sent.append(tensor.numel()), all_reduce(tensor, **options))
        summary = optimizer.measure(own)
    finally:
        dist.all_reduce = all_reduce
    return summary.to_dict(), optimizer.rates, sent


def test_parts_count_by_their_samples_in_one_all_reduce(two) -> None:
    (expected, rates, _), results = measure_uneven([70, 30]), two.run(measure_uneven, [70, 30])
    for summary, own_rates, sent in results:
        assert sent == [4**2 + 2 * 4 + 3]
        assert summary.pop("names") == expected["names"]
        for key in ("loss", "gradient", "hessian", "third", "weight"):
            torch.testing.assert_close(torch.tensor(summary[key]), torch.tensor(expected[key]), rtol=1e-12, atol=1e-14)
        assert own_rates == pytest.approx(rates, rel=1e-10)


def halve(walls):
    """A loss with a wall near the starting point, at another place for every sample."""
    model = nn.ParameterDict({"w": torch.tensor([1.0], dtype=DTYPE)})

    def loss(model, batch):
        w = model["w"][0]
        return (0.5 * w**2 + 1e3 * torch.relu(batch - w) ** 2).mean()

    optimizer = ns.NewtonSummary(model, loss, direction="gradient", lr=1.0)
    loss(model, torch.tensor(walls, dtype=DTYPE)).backward()
    optimizer.measure(part((torch.tensor(walls, dtype=DTYPE),))[0])
    return optimizer.counts["halved"], list(optimizer.rates.values())


def test_all_halve_where_the_loss_of_one_leaves_its_model(two) -> None:
    count, rates = halve([-10.0, 0.9])
    assert count > 0
    for own_count, own_rates in two.run(halve, [-10.0, 0.9]):
        assert own_count == count
        assert own_rates == pytest.approx(rates, rel=1e-12)


def poison(value: float):
    rank, _ = here()
    model, (x, y) = make_model(), make_data(100)
    bad = x.clone()
    bad[rank * 50] = value if rank == 1 else x[0]
    optimizer = ns.NewtonSummary(model, loss_fn)
    seen = []
    for features in (x, bad, x):
        optimizer.zero_grad()
        loss_fn(model, (x, y)).backward()
        optimizer.measure(part((features, y)))
        optimizer.step()
        seen.append((optimizer.status, optimizer.rates))
    return seen, dict(optimizer.counts), [p.tolist() for p in model.parameters()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_for_one_has_failed_for_all(two, value) -> None:
    results = two.run(poison, value)
    assert results[0] == results[1]
    (first, failed, last), counts, _ = results[0]
    assert [first[0], failed[0], last[0]] == [Status.SOLVED, Status.NOT_FINITE, Status.SOLVED]
    assert failed[1] == first[1] != last[1]
    assert counts == {"measured": 3, "failed": 1, "compared": 0, "halved": counts["halved"]}


def count_hooks():
    """How often gradients are averaged, and whether a measurement touches them."""
    model, (x, y) = make_model(), make_data(100)
    parallel, buckets = DistributedDataParallel(model), []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])

    parallel.register_comm_hook(None, hook)
    optimizer = ns.NewtonSummary(parallel, loss_fn)
    counts = []
    for engine in ("forward", "nested", "forward"):
        optimizer.engine = ns.measure.resolve_engine(engine)
        optimizer.zero_grad()
        loss_fn(parallel, part((x, y))).backward()
        before = [p.grad.clone() for p in parallel.parameters()]
        optimizer.measure(part((x, y)))
        counts.append(len(buckets))
        assert all(torch.equal(p.grad, g) for p, g in zip(parallel.parameters(), before, strict=True))
        optimizer.step()
    return counts


def test_measuring_leaves_the_hooks_and_buckets_of_ddp_alone(two) -> None:
    for first, second, third in two.run(count_hooks):
        assert (second, third) == (2 * first, 3 * first)


def each_alone(explicit: bool):
    rank, _ = here()
    groups = [dist.new_group([r]) for r in range(2)]
    optimizer = ns.NewtonSummary(make_model(), loss_fn, process_group=groups[rank] if explicit else None)
    batch = tuple(t[rank * 50 : rank * 50 + 50] for t in make_data(100))
    loss_fn(optimizer._samples.loss.model, batch if explicit else make_data(100)).backward()
    return optimizer.measure(batch).loss.item(), loss_fn(optimizer._samples.loss.model, batch).item()


def of_wrapper(compiled: bool) -> int:
    """How many measure together with a wrapper that has a group of its own."""
    rank, _ = here()
    parallel = DistributedDataParallel(make_model(), process_group=[dist.new_group([r]) for r in range(2)][rank])
    return Processes(torch.compile(parallel, backend="eager") if compiled else parallel).count


def test_a_process_group_says_who_measures_together(two) -> None:
    for measured, own in two.run(each_alone, True):
        assert measured == pytest.approx(own, rel=1e-12)
    for compiled in (False, True):
        assert two.run(of_wrapper, compiled) == [1, 1]
    results = two.run(each_alone, False)
    assert results[0][0] == results[1][0] == pytest.approx((results[0][1] + results[1][1]) / 2, rel=1e-12)


def accumulate():
    """Two micro-batches a step: gradients are averaged with the last one."""
    model, (x, y) = make_model(), make_data(100)
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = ns.NewtonSummary(parallel, loss_fn, curvature_data=plain_loader(), every=3, direction="nadam")
    for _ in range(10):
        optimizer.zero_grad()
        first, second = (tuple(t.chunk(2)[i] for t in part((x, y))) for i in range(2))
        if dist.is_initialized():
            with parallel.no_sync():
                (loss_fn(parallel, first) / 2).backward()
        else:
            (loss_fn(parallel, first) / 2).backward()
        (loss_fn(parallel, second) / 2).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_accumulated_gradients(two) -> None:
    one, results = accumulate(), two.run(accumulate)
    for other in results:
        for p, q in zip(one, other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def compiled(order: str):
    model = make_model()
    parallel = {
        "compiled inside": lambda: DistributedDataParallel(torch.compile(model, backend="eager")),
        "compiled outside": lambda: torch.compile(DistributedDataParallel(model), backend="eager"),
    }[order]()
    optimizer = MAKERS["default"](parallel, plain_loader())
    assert optimizer.partition.names[0] == "0.weight"
    x, y = make_data(100)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(parallel, part((x, y))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_compiled_and_parallel_in_either_order(two) -> None:
    results = [*two.run(compiled, "compiled inside"), *two.run(compiled, "compiled outside")]
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# The monitor ----------------------------------------------------------------------------------------------------------


def watch(folder: str, repeats: int):
    rank, _ = here()
    model = make_model()
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-3)
    monitor = ns.Monitor(parallel, loss_fn, optimizer=optimizer, every=2, path=f"{folder}/{rank}.jsonl")
    monitor.attach(plain_loader(), repeats=repeats)
    x, y = make_data(100)
    for _ in range(7):
        optimizer.zero_grad()
        loss_fn(parallel, part((x, y))).backward()
        optimizer.step()
    monitor.close()
    return list(map(asdict, monitor.records)), [p.tolist() for p in model.parameters()]


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_monitors_of_two_give_the_advice_of_one_and_the_first_writes(two, tmp_path, repeats) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    expected, parameters = watch(str(tmp_path / "one"), repeats)
    results = two.run(watch, str(tmp_path / "two"), repeats)
    assert str(results[0]) == str(results[1])
    records, own_parameters = results[0]
    for p, q in zip(parameters, own_parameters, strict=True):
        torch.testing.assert_close(torch.tensor(p), torch.tensor(q), rtol=1e-9, atol=1e-12)
    assert len(records) == len(expected) == 4
    for record, other in zip(records, expected, strict=True):
        assert (record["step"], record["names"], record["words"]) == (other["step"], other["names"], other["words"])
        for key in ("loss", "predicted_decrease", "actual_decrease", "alone", "low", "high", "joint"):
            mine, theirs = (torch.tensor(r[key], dtype=DTYPE) for r in (record, other))
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert len((tmp_path / "two" / "0.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "two" / "1.jsonl").exists()


def watch_parts_of_other_sizes():
    x, y = make_data(100)
    batch = (x[:30], y[:30]) if here() == (0, 2) else (x[30:], y[30:]) if here() == (1, 2) else (x, y)
    model = make_model()
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    monitor = ns.Monitor(parallel, loss_fn, optimizer=optimizer, every=1)
    (loss_fn(parallel, batch) * len(batch[0]) * here()[1] / 100).backward()
    monitor.step(batch)
    optimizer.step()
    record = monitor.records[-1]
    return torch.tensor([record.loss, record.actual_decrease, record.predicted_decrease, *record.joint], dtype=DTYPE)


def test_parts_of_other_sizes_count_by_their_samples_in_a_monitor_too(two) -> None:
    expected = watch_parts_of_other_sizes()
    for own in two.run(watch_parts_of_other_sizes):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def watch_by_time():
    model = make_model()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-3)
    monitor = ns.Monitor(parallel, loss_fn, optimizer=optimizer).attach(plain_loader())
    readings, rank = itertools.count(), here()[0]  # to each process, reading the clock takes another time
    with mock.patch("newton_summary.watch.cadence.SHORTEST", 5):
        monitor.cadence = Affordable(0.25, 8, clock=lambda: (1.0 + rank) * next(readings))
        x, y = make_data(100)
        for _ in range(40):
            optimizer.zero_grad()
            loss_fn(parallel, part((x, y))).backward()
            optimizer.step()
    return [asdict(record) for record in monitor.records]


def test_monitors_that_go_by_the_time_measure_together_each_on_samples_of_its_own(two) -> None:
    first, second = two.run(watch_by_time)
    assert str(first) == str(second)
    assert [record["step"] for record in first] == [0, 16, 24, 32]  # 2 and 4 seconds, for steps of 1 and 2
    assert {record["samples"] for record in first} == {16}
    assert all(record["available"] > 16 for record in first)


# Whose samples --------------------------------------------------------------------------------------------------------


def rows(stream: BatchStream, batches: int) -> list[list[int]]:
    return [stream.next(torch.device("cpu")).tolist() for _ in range(batches)]


@pytest.mark.parametrize(("size", "count"), [(10, 2), (10, 3), (7, 4)])
def test_every_sample_of_a_batch_is_measured_by_one_process(size, count) -> None:
    loader = DataLoader(torch.arange(43), batch_size=size)
    whole = rows(BatchStream(loader, seed=3), 9)
    parts = [rows(BatchStream(loader, seed=3, rank=rank, count=count), 9) for rank in range(count)]
    for batch, *own in zip(whole, *parts, strict=True):
        if len(batch) >= count:
            assert list(itertools.chain(*own)) == batch
            assert max(map(len, own)) - min(map(len, own)) <= 1
        else:
            assert own == [batch] * count
    assert any(len(batch) < count for batch in whole) == (43 % size < count)


def test_a_copy_of_a_stream_keeps_its_part() -> None:
    stream = BatchStream(DataLoader(torch.arange(43), batch_size=10), rank=1, count=2)
    rows(stream, 2)
    assert rows(copy.deepcopy(stream), 3) == rows(stream, 3)


class _Counting(IterableDataset):
    def __iter__(self):
        return iter(range(8))


@pytest.mark.parametrize(
    "data",
    [
        [torch.arange(4), torch.arange(4, 8)],
        DataLoader(_Counting(), batch_size=4),
        DataLoader(torch.arange(8), batch_size=4, sampler=DistributedSampler(torch.arange(8), 2, 0, shuffle=False)),
    ],
    ids=["list", "iterable", "sharded"],
)
def test_batches_that_are_a_process_own_stay_whole(data) -> None:
    assert rows(BatchStream(data, rank=1, count=2), 4) == rows(BatchStream(data), 4)


# Misuse ---------------------------------------------------------------------------------------------------------------


def refuse_sync_batch_norm():
    model = nn.Sequential(nn.Linear(5, 3), nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match=r"module '1' is a SyncBatchNorm, .*: use a BatchNorm"):
        ns.NewtonSummary(model, loss_fn)


def forget_to_average(what: str):
    model, batch = make_model(), part(make_data(100))
    loss_fn(model, batch).backward()
    reason = "steps in another direction than the others: train through a Distrib"
    if what == "monitor":
        monitor = ns.Monitor(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.warns(UserWarning, match=f"failed, training goes on; .*{reason}"):
            monitor.step(batch)
        return
    if what == "default":  # measures nothing, and compares the weights with their average
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader())
        for _ in range(4):
            optimizer.step()
        with pytest.raises(RuntimeError, match=reason):
            optimizer.step()
        return
    with pytest.raises(RuntimeError, match=reason):
        ns.NewtonSummary(model, loss_fn, direction=what).measure(batch)


@pytest.mark.parametrize("what", ["default", "gradient", "adam", "monitor"])
def test_gradients_that_were_not_averaged_are_an_error_or_end_the_measurements(two, what) -> None:
    two.run(forget_to_average, what)


def refuse_anothers_group():
    rank, _ = here()
    groups = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(ValueError, match="this process is not in process_group"):
        ns.NewtonSummary(make_model(), loss_fn, process_group=groups[1 - rank])


def test_the_group_of_others_is_refused(two) -> None:
    two.run(refuse_anothers_group)


def test_synchronised_statistics_are_refused(two) -> None:
    two.run(refuse_sync_batch_norm)


def train_within_join():
    model = make_model()
    parallel = DistributedDataParallel(model)
    batch = part(make_data(100))
    refused = r"within DistributedDataParallel's join\(\) .* give every process as many batches"
    optimizer = ns.NewtonSummary(parallel, loss_fn)
    with parallel.join():
        loss_fn(parallel, batch).backward()
        with pytest.raises(RuntimeError, match=refused):
            optimizer.measure(batch)
        sgd = torch.optim.SGD(parallel.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match=refused):
            ns.Monitor(parallel, loss_fn, optimizer=sgd, every=1).step(batch)


def test_processes_that_stop_at_different_steps_are_refused(two) -> None:
    """What the wrapper answers for those that have stopped would pass for their measurements."""
    two.run(train_within_join)


def watch_steps_of_parts():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    parallel, batch = DistributedDataParallel(model), part(make_data(100))
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.Adam, lr=1e-3)
    monitor = ns.Monitor(parallel, loss_fn, optimizer=optimizer)
    loss_fn(parallel, batch).backward()
    with pytest.raises(TypeError, match=r"step of ZeroRedundancyOptimizer .* attribute '.*' cannot be .*fully_shard"):
        monitor.measure([batch])


def test_an_optimizer_that_cannot_be_copied_is_named_with_what_hinders(two) -> None:
    two.run(watch_steps_of_parts)


def test_parallel_in_one_process_is_measured_bare() -> None:
    model = make_model()
    assert ns.Partition.canonical(nn.DataParallel(model)).parameters[0] is model[0].weight
    parallel, bare = (ns.summarize(loss_fn, m, [make_data(20)]) for m in (nn.DataParallel(model), model))
    assert_rounded(parallel.hessian, bare.hessian)


def test_in_a_plain_script_nothing_is_exchanged(monkeypatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", None)
    optimizer = MAKERS["default"](make_model(), plain_loader())
    assert (optimizer._samples.processes.rank, optimizer._samples.processes.count) == (0, 1)
    assert_same(train("default", "plain", 4), train("default", "plain", 4), tolerance=0.0)


def copies():
    processes = Processes(make_model())
    twin = copy.deepcopy(processes)
    torch.save(processes, file := io.BytesIO())
    file.seek(0)
    again = torch.load(file, weights_only=False)
    return [(p.rank, p.count, p.mean([float(p.rank)], [1.0], torch.device("cpu"))) for p in (twin, again)]


def test_copies_belong_to_the_same_processes(two) -> None:
    for rank, result in enumerate(two.run(copies)):
        assert result == [(rank, 2, [0.5])] * 2


# The page -------------------------------------------------------------------------------------------------------------


def run_page(path: str):
    names: dict = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", Path(path).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, path, "exec"), names)
    return names["optimizer"].counts["measured"], names["optimizer"].rates


def test_the_page_runs(two) -> None:
    first, second = two.run(run_page, str(Path(__file__).parent.parent / "docs" / "distributed.md"))
    assert first == second
    assert first[0] == 4
