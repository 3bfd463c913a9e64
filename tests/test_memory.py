"""A budget of memory: groups swept some at a time, and wide products some positions at a time, change no number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from studies import benchmark
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine, budget, positions, sweep
from newton_summary.measure import arena as arena_module

VOCABULARY, TOKENS = 40, 7
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


class Language(nn.Module):
    """Embeddings, a block with attention, and a head that may share the embeddings' weight."""

    def __init__(self, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.down(F.gelu(self.up(x))))


def plain(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def smoothed(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten(), label_smoothing=0.1)


def ignoring(model: nn.Module, ids: Tensor) -> Tensor:
    labels = ids.masked_fill(ids % 3 == 0, -100).flatten()
    return F.cross_entropy(model(ids).flatten(0, 1), labels, reduction="sum")


def weighted(model: nn.Module, ids: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, VOCABULARY, dtype=torch.float64)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), weight, label_smoothing=0.2)


def shifted(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


def shifted_twice(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, 1:][:, :-2].reshape(-1, VOCABULARY), ids[:, 3:].reshape(-1))


def capped(model: nn.Module, ids: Tensor) -> Tensor:
    logits = 3.0 * torch.tanh(model(ids) / 3.0)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def with_logsumexp(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy with what keeps its normalisation small, as large models are trained with."""
    logits = F.log_softmax(model(ids), -1)
    return -logits.gather(-1, ids.unsqueeze(-1)).mean() + 1e-2 * logits.mean(-1).square().mean()


LOSSES = [plain, smoothed, ignoring, weighted, shifted, shifted_twice, capped, with_logsumexp]


def case(tied: bool = True, bias: bool = False) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Language(tied, bias).double()
    return model, torch.randint(VOCABULARY, (2, TOKENS), generator=generator)


def measure(loss_fn: Any, model: nn.Module, batch: Any, **options: Any) -> ns.Summary:
    engine = ForwardEngine(memory=options.pop("memory", None))
    return ns.summarize(loss_fn, model, [batch], engine=engine, **options)


def assert_same(one: ns.Summary, other: ns.Summary, tolerance: float = 1e-12) -> None:
    pairs = [(one.gradient, other.gradient), (one.hessian, other.hessian), (one.third, other.third)]
    for x, y in pairs:
        assert (x is None) == (y is None)
        if x is not None:
            assert float((x - y).abs().max()) <= tolerance * float(y.abs().max())


# Positions ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every section that is pushed a few positions at a time; all are, with few entries."""
    numbers: list[int] = []
    original: Callable[..., Any] = sweep.push_section

    def counting(*args: Any) -> Any:
        numbers.append(len(args[0].members))
        return original(*args)

    monkeypatch.setattr(sweep, "push_section", counting)
    monkeypatch.setattr(positions, "ENTRIES", 3 * VOCABULARY * 11 * 2)  # three positions of about eleven groups
    return numbers


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)], ids=["tied", "untied"])
def test_a_head_in_blocks_of_positions_gives_the_same(
    loss_fn: Any, tied: bool, bias: bool, pushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = case(tied, bias)
    in_blocks = measure(loss_fn, model, ids)
    assert len(pushed) == 1
    assert pushed[0] >= 3
    monkeypatch.setattr(positions, "ENTRIES", 1 << 40)
    assert_same(in_blocks, measure(loss_fn, model, ids))
    assert len(pushed) == 1
    assert_same(in_blocks, nested(loss_fn, model, ids), 1e-9)


def nested(loss_fn: Any, model: nn.Module, ids: Tensor) -> ns.Summary:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return ns.summarize(loss_fn, model, [ids], engine="nested")


@pytest.mark.parametrize("order", [1, 2])
def test_lower_orders_in_blocks(order: int, pushed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = case()
    in_blocks = measure(plain, model, ids, order=order)
    assert pushed
    monkeypatch.setattr(positions, "ENTRIES", 1 << 40)
    assert_same(in_blocks, measure(plain, model, ids, order=order))


def test_a_frozen_head_in_blocks(pushed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = case(tied=False)
    model.head.requires_grad_(False)
    in_blocks = measure(plain, model, ids)
    assert pushed
    monkeypatch.setattr(positions, "ENTRIES", 1 << 40)
    assert_same(in_blocks, measure(plain, model, ids))


def test_groups_of_rows_of_the_head_in_blocks(pushed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = case()
    counts = torch.bincount(ids.flatten(), minlength=VOCABULARY)
    partition = ns.Partition.by_frequency(model, "embedding.weight", counts, bins=3)
    direction = [torch.randn_like(p, requires_grad=False) for p in partition.parameters]
    in_blocks = measure(plain, model, ids, partition=partition, direction=direction)
    assert pushed
    monkeypatch.setattr(positions, "ENTRIES", 1 << 40)
    assert_same(in_blocks, measure(plain, model, ids, partition=partition, direction=direction))


def only_part(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits that are read by something that is not of a position by itself."""
    logits = model(ids).flatten(0, 1)
    return F.cross_entropy(logits, ids.flatten()) + logits.std()


def other_dimension(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).mT, ids)


@pytest.mark.parametrize("loss_fn", [only_part, other_dimension], ids=lambda f: f.__name__)
def test_what_is_not_of_positions_alone_is_pushed_whole(loss_fn: Any, pushed: list[int]) -> None:
    model, ids = case()
    summary = measure(loss_fn, model, ids)
    assert not pushed
    assert_same(summary, nested(loss_fn, model, ids), 1e-9)


# Groups ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The groups of every sweep of every measurement."""
    all_of_them: list[list[tuple[int, ...]]] = []
    original = budget.together

    def noting(*args: Any) -> Any:
        all_of_them.append(original(*args))
        return all_of_them[-1]

    monkeypatch.setattr(sweep, "together", noting)
    return all_of_them


def least_memory(loss_fn: Any, model: nn.Module, ids: Tensor, **options: Any) -> int:
    """What the error asks for."""
    with pytest.raises(MemoryError, match="memory=1 is 1 bytes: pass memory=") as caught:
        measure(loss_fn, model, ids, memory=1, **options)
    return int(re.findall(r"pass memory=(\d+)", str(caught.value))[0])


@pytest.mark.parametrize("third", ["diagonal", "full"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_groups_swept_some_at_a_time_give_the_same(order: int, third: Any, sweeps: list[Any]) -> None:
    model, ids = case()
    options: dict[str, Any] = {"order": order, "third": third}
    whole = measure(plain, model, ids, **options)
    assert len(sweeps[-1]) == 1
    least = least_memory(plain, model, ids, **options)
    for factor in (1, 1.3, 2):
        assert_same(measure(plain, model, ids, memory=factor * least, **options), whole)
        assert len(sweeps[-1]) > 1 or factor > 1
    assert {len(s) for s in sweeps} >= {1}


def test_parts_of_tensors_swept_some_at_a_time(sweeps: list[Any], pushed: list[int]) -> None:
    model, ids = case()
    counts = torch.bincount(ids.flatten(), minlength=VOCABULARY)
    partition = ns.Partition.by_frequency(model, "embedding.weight", counts, bins=3)
    whole = measure(smoothed, model, ids, partition=partition)
    least = least_memory(smoothed, model, ids, partition=partition)
    assert_same(measure(smoothed, model, ids, partition=partition, memory=least), whole)
    assert len(sweeps[-1]) > 3


def test_the_first_measurement_is_checked_where_groups_are_swept_some_at_a_time(sweeps: list[Any]) -> None:
    model, ids = case()
    least = least_memory(plain, model, ids)
    engine = ForwardEngine(memory=least)
    first = ns.summarize(plain, model, [ids], engine=engine)
    assert_same(ns.summarize(plain, model, [ids], engine=engine), first)
    assert len(sweeps[-1]) > 1


@pytest.mark.parametrize(("size", "fit", "order"), [(10, 4, 2), (7, 2, 2), (9, 5, 3), (8, 3, 3), (5, 1, 1), (3, 9, 2)])
def test_every_entry_has_a_sweep_with_all_its_groups(size: int, fit: int, order: int) -> None:
    sets = budget.unions(size, fit, order)
    assert all(len(groups) == len(set(groups)) <= fit for groups in sets)
    for some in itertools.combinations(range(size), min(order, size)):
        assert any(set(some) <= set(groups) for groups in sets)


def test_tangents_are_within_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arena holds at most is no more than the estimate for the groups of a sweep, and not far below."""
    model, ids = mlp_case()
    held: list[int] = []
    monkeypatch.setattr(arena_module, "_SMALLEST", 0)
    original = arena_module.packed

    def noting(lives: Any) -> Any:
        layout = original(lives)
        held.append(max(size + start for size, start in layout))
        return layout

    monkeypatch.setattr(arena_module, "packed", noting)
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(sweep, "together", lambda *args: counted.append(args[:2]) or budget.together(*args))
    ns.summarize(squares, model, [ids], engine=ForwardEngine())
    (size, one), *_ = counted
    assert 0.25 * size * one <= held[0] <= size * one + 100_000


def mlp_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(*layers), (torch.randn(256, 64), torch.randn(256, 64))


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_memory_is_an_option_of_summarize_and_of_the_monitor(sweeps: list[Any]) -> None:
    model, batch = mlp_case()
    whole = ns.summarize(squares, model.double(), [double(batch)])
    least = least_memory(squares, model, double(batch))
    assert_same(ns.summarize(squares, model, [double(batch)], memory=least), whole)
    assert len(sweeps[-1]) > 1
    monitor = ns.Monitor(
        model,
        squares,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        every=1,
        partition="canonical",
        memory=least,
    )
    squares(model, double(batch)).backward()
    monitor.step(double(batch))
    assert len(sweeps[-1]) > 1
    assert monitor.summary is not None


def double(batch: Any) -> Any:
    return tuple(t.double() for t in batch)


def test_an_engine_without_a_budget_says_so() -> None:
    model, batch = mlp_case()
    with pytest.raises(ValueError, match="memory=1000 is for the engines 'auto' and 'forward', not for NestedEngine"):
        ns.summarize(squares, model, [batch], engine="nested", memory=1000)
    with pytest.raises(ValueError, match="memory must be positive, got -5"):
        ns.summarize(squares, model, [batch], memory=-5)


def test_what_is_free_bounds_tangents_where_no_budget_is_given(
    sweeps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = mlp_case()
    whole = ns.summarize(squares, model.double(), [double(batch)])
    monkeypatch.setattr(budget, "_SMALL", 0)
    monkeypatch.setattr(budget, "free_memory", lambda device: 3e6)
    assert_same(ns.summarize(squares, model, [double(batch)]), whole)
    assert len(sweeps[-1]) > 1
    monkeypatch.setattr(budget, "free_memory", lambda device: 1e5)
    with pytest.raises(MemoryError, match=r"the tangents of a pair of groups take .* [kM]B, and 100\.0 kB are free"):
        ns.summarize(squares, model, [double(batch)])


def test_what_is_free_is_known() -> None:
    assert 1e6 < budget.free_memory(torch.device("cpu")) < 1e15


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_and_budgets_on_a_device(device: str, pushed: list[int], sweeps: list[Any]) -> None:
    model, ids = case()
    expected = nested(shifted, model, ids)
    model, ids = model.to(device), ids.to(device)
    assert 1e6 < budget.free_memory(torch.device(device)) < 1e15
    for memory in (None, least_memory(shifted, model, ids)):
        assert_same(measure(shifted, model, ids, memory=memory).cpu(), expected, 1e-9)
    assert pushed
    assert len(sweeps[-1]) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_the_clock_of_benchmarks_on_a_device(device: str) -> None:
    calls = []
    with benchmark("clock") as clock:
        timer = clock.Clock(device, processor=True)
        assert timer.median(lambda: calls.append(torch.ones(9, device=device).sum()), repeats=4, warm_up=3) >= 0
        assert len(calls) == 7
        assert timer.least(lambda: calls.append(None), repeats=2) >= 0
        assert len(calls) == 10
        assert timer.memory() > 0
        assert timer.peak(size=64) > 0


def test_products_of_a_measurement_are_counted() -> None:
    model, batch = mlp_case()
    engine = ForwardEngine()
    options = {"direction": [torch.ones_like(p) for p in model.parameters()], "engine": engine, "order": 2}
    ns.summarize(squares, model, [batch], **options)
    with benchmark("clock") as clock:
        count = clock.multiply_adds(lambda: ns.summarize(squares, model, [batch], **options))
        gradient = clock.multiply_adds(lambda: squares(model, batch).backward())
    one = 256 * 64 * 64
    assert gradient == 17 * one  # 6 forward, 6 by weights, 5 by values
    tangents = sum(1 + 2 * layer for layer in range(6)) * one  # a weight's own, and two for each layer before
    pairs = sum((2 * layer) ** 2 for layer in (1, 2, 3, 4, 5, 6, 6)) * 256 * 64  # wherever something is curved
    values = (6 + 6 + 5 + 5) * one  # twice, adjoints, and their pulls
    assert 0 <= count - tangents - pairs - values <= 0.02 * tangents


class Tied(nn.Module):
    """A table much larger than all values, used through its transpose and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids)) @ (2.0 * self.table.weight).T[:, :10]


def test_what_is_made_of_one_parameter_counts_for_its_own_groups_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ones: list[int] = []
    monkeypatch.setattr(sweep, "together", lambda *args: ones.append(args[1]) or budget.together(*args))
    model, ids = Tied().double(), torch.arange(6).view(2, 3)
    ns.summarize(lambda model, ids: model(ids).square().mean(), model, [ids], engine="forward")
    assert 0 < ones[0] < model.table.weight.nbytes / 4
