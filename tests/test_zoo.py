"""Every architecture of the zoo: derivatives against first differences, the optimizer and the monitor at work."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from zoo_models import ZOO, doubled, make, variants
from zoo_reference import by_differences, direction_of, error, seeded

import newton_summary as ns
from newton_summary.measure import Refusal

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

QUICK = (
    "GPT-2", "Llama", "BERT", "T5", "ViT", "ConvNeXt", "CLIP", "Mamba", "U-Net", "GCN", "GAT", "torch's encoder",
    "packed LSTM", "checkpoints", "weight norm", "EmbeddingBag", "group norm, channels last", "compiled module",
)  # fmt: skip
"""Of which ``make test`` takes the usual variant, in a few groups."""

REFUSED: dict[str, str] = {}
"""What the forward engine refuses, and why nobody here can lift it."""


def named(cases):
    return [pytest.param(*case, id=" ".join(str(part) for part in case)) for case in cases]


def needed(name: str) -> None:
    if not ZOO[name].is_here:
        pytest.skip(f"needs {', '.join(ZOO[name].needs)}: pip install 'newton-summary[zoo]'")


def some_groups(model: torch.nn.Module, most: int) -> ns.Partition:
    """One group for each tensor, or fewer where that were too many."""
    partition = ns.Partition.canonical(model)
    chunks = most // 2
    while len(partition) > most:
        with contextlib.suppress(ValueError):  # not so many layers
            partition = ns.Partition.chunks(model, chunks)
        chunks -= 1
    return partition


def check_exact(name: str, most: int, **options: object) -> None:
    """Holds the forward engine to the reference: H̄, the third order's diagonal, and all of it."""
    model, loss_fn, batch = make(name, **options)
    partition = some_groups(model, most)
    direction = direction_of(partition)
    entry = ZOO[name]

    def loss(model, batch):
        return seeded(doubled(loss_fn), model, batch)

    def measured(engine, third="diagonal", of=loss):
        return ns.summarize(of, model, [batch], partition=partition, direction=direction, engine=engine, third=third)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    got = measured("forward")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if entry.kinked:
        expected = measured("nested")
    else:
        expected, total = by_differences(doubled(loss_fn), model, batch, partition, direction)
        if len(partition) <= 12:
            full = measured("forward", "full").third
            assert error(torch.einsum("sss->s", full), got.third) < 1e-9
            assert abs(float(full.sum()) - float(total)) < entry.tolerance[1] * float(full.abs().sum())
    assert error(got.loss, expected.loss) < 1e-12
    assert error(got.gradient, expected.gradient) < 1e-10
    assert error(got.hessian, expected.hessian) < entry.tolerance[0]
    assert error(got.third, expected.third) < entry.tolerance[1]
    again = measured("forward")
    assert error(again.hessian, got.hessian) < 1e-10
    plain = measured("forward", of=lambda model, batch: seeded(loss_fn, model, batch))  # with its own casts
    assert error(plain.hessian, got.hessian) < 1e-3


def check_training(name: str) -> None:
    """Twenty steps of the optimizer, and twenty of Adam beside a monitor."""
    model, loss_fn, batch = make(name)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=[batch], engine="forward")
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    model, loss_fn, batch = make(name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=5, engine="forward")
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    assert len(monitor.records) == 4


@pytest.mark.parametrize("name", QUICK)
def test_the_usual_ones_are_exact(name):
    needed(name)
    check_exact(name, 6)


CASES = [(name, *options.values()) for name in ZOO if name not in REFUSED for options in variants(name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_every_variant_is_exact(name):
    needed(name)
    for number, options in enumerate(variants(name)):
        check_exact(name, 24 if number == 0 else 6, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_the_optimizer_and_the_monitor_run(name):
    needed(name)
    check_training(name)


def test_refusals_say_why():
    for name, reason in REFUSED.items():
        needed(name)
        model, loss_fn, batch = make(name)
        with pytest.raises(Refusal, match=reason):
            ns.summarize(loss_fn, model, [batch], engine="forward")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Mamba", "ConvNeXt", "LoRA on Llama"])
def test_the_table_has_what_is_counted(name):
    from zoo_table import Priced, counts, row_of

    needed(name)
    row, found = row_of(name, "Prices"), counts(Priced(name))
    assert [row[5], row[8]] == [f"{found[order][0]:.1f}" for order in (2, 3)]


def test_the_table_knows_every_architecture():
    table = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text()
    assert [name for name in ZOO if f"| {name} |" not in table] == []
