"""What the scripts of benchmarks/ share: records of runs, timers, and a device that is asked for."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studies import benchmark
from torch import nn

import newton_summary as ns
from newton_summary.measure import forward
from newton_summary_experiments.data import digits
from newton_summary_experiments.models import mlp
from newton_summary_experiments.suite import PROBLEMS
from newton_summary_experiments.tasks import cross_entropy

UNTIMED = {"bounded", "cost", "digits_rates", "kernels"}  # on the host; counts; searches rates; chooses kernels
SCRIPTS = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")
    if "def main" in path.read_text(encoding="utf-8") and path.stem not in UNTIMED
)
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(scope="module")
def load():
    """Gives benchmarks/NAME.py as a module."""
    with ExitStack() as stack:
        modules = {}

        def loaded(name: str):
            if name not in modules:
                modules[name] = stack.enter_context(benchmark(name))
            return modules[name]

        yield loaded


def test_rows_are_added_to_a_file_with_the_digits_asked_for(load, tmp_path) -> None:
    jsonl, path = load("jsonl"), tmp_path / "new" / "runs.jsonl"
    assert jsonl.read(path) == []
    row = {"name": "größer", "loss": 0.123456789, "curve": [1.0, 2 / 3], "seed": 123456789, "failed": None}
    jsonl.append(path, row)
    jsonl.append(path, row, digits=3)
    exact, short = jsonl.read(path)
    assert exact == row
    assert short == row | {"loss": 0.123, "curve": [1.0, 0.667]}, "whole numbers keep their digits"
    assert "größer" in path.read_text(encoding="utf-8")


# Timers ---------------------------------------------------------------------------------------------------------------


def test_a_host_is_timed_by_the_clock_or_by_its_processor(load, monkeypatch) -> None:
    clock = load("clock")
    monkeypatch.setattr(clock.time, "perf_counter", iter([1.0, 4.0, 10.0]).__next__)
    monkeypatch.setattr(clock.time, "process_time", iter([20.0, 20.5]).__next__)
    calls: list[int] = []
    wall, processor = clock.Clock(), clock.Clock(processor=True)
    assert wall.once(lambda: calls.append(1)) == 3.0
    assert wall.now() == 10.0
    assert processor.once(lambda: calls.append(1)) == 0.5
    assert len(calls) == 2
    assert wall.name == "cpu"
    assert wall.memory() > 1e7, "a process with torch in it has more than ten megabytes"


def test_calls_that_warm_up_do_not_count(load, monkeypatch) -> None:
    clock = load("clock")
    calls: list[int] = []
    monkeypatch.setattr(clock.Clock, "once", lambda self, function: (function(), float(len(calls)))[1])
    assert clock.Clock().median(lambda: calls.append(1), repeats=3, warm_up=2) == 4.0, "of the calls 3 to 5"
    assert clock.Clock().least(lambda: calls.append(1), repeats=2, warm_up=3) == 9.0, "of the calls 9 and 10"


def test_an_accelerator_is_timed_by_events_between_which_only_the_work_is(load, monkeypatch) -> None:
    clock, log = load("clock"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 8.0)
    timer = clock.Clock("cuda", processor=True)
    assert timer.once(lambda: log.append("work")) == 2.5
    assert log == ["reset", "wait", "event", "work", "event", "wait"]
    assert timer.now() == 8.0, "the processor's time says nothing of an accelerator"
    assert log[-1] == "wait"
    assert timer.memory() == 7e9
    with clock.Peak("cuda") as peak:
        log.append("work")
    assert log[-2:] == ["reset", "work"]
    assert peak.largest == pytest.approx(4000.0), "what was there before is no part of it"


@pytest.mark.parametrize("device", DEVICES)
def test_times_memory_and_products_of_a_device(load, device) -> None:
    clock = load("clock")
    timer = clock.Clock(device)
    a, b = torch.randn(64, 32, device=device), torch.randn(32, 16, device=device)
    assert clock.multiply_adds(lambda: a @ b) == 64 * 32 * 16
    assert clock.multiply_adds(lambda: torch.zeros(64, 16, device=device).addmm_(a, b)) == 64 * 32 * 16
    with clock.Peak(device):
        pass  # gives back what was freed before
    with clock.Peak(device) as peak:
        held = torch.ones(4_000_000, device=device)
    assert float(held.sum()) == 4e6
    assert timer.once(lambda: a @ b) > 0
    assert 0 < peak.largest < timer.memory() / 1e6
    assert timer.peak(size=64) > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_that_times_takes_a_device_that_is_there(load, name, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "torch sees no CUDA device"), ("abacus", "neither cpu nor cuda")):
        monkeypatch.setattr(sys, "argv", [name, *["judge"] * (name == "untuned"), "--device", device])
        with pytest.raises(SystemExit):
            load(name).main()
        assert message in capsys.readouterr().err


def test_results_of_an_accelerator_are_kept_beside_those_of_the_host(load) -> None:
    of = load("clock").results_of
    assert of(Path("results/engines.json"), "cpu") == Path("results/engines.json")
    assert of(Path("results/engines.json"), "cuda") == Path("results/engines-cuda.json")


# Scripts, briefly -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_engines_in_gradients(load, device, monkeypatch) -> None:
    engines = load("engines")
    monkeypatch.setitem(
        engines.MODELS, "tiny", lambda: (mlp([8, 16, 16, 3]), (torch.randn(20, 8), torch.arange(20) % 3))
    )
    monkeypatch.setattr(engines.Clock, "peak", lambda self: 1e9)
    found = engines.forward(engines.Problem("tiny", engines.Clock(device, processor=True)))
    assert found["groups"] == 6
    assert 1 < found["counted hessian"] < found["counted third"] < 4
    assert min(found["third"], found["hessian"], found["of peak"]) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_every_optimizer_is_timed(load, device, monkeypatch) -> None:
    untuned = load("untuned")
    for name, value in (("ROUNDS", (2, 2)), ("BLOCK", 2), ("UNTUNED", {})):
        monkeypatch.setattr(untuned, name, value)
    problem = untuned.on_device(PROBLEMS["digits"], device)
    assert next(problem.make_model(0).parameters()).device.type == device
    seconds = untuned.step_times(problem, untuned.Clock(device, processor=True))
    assert set(seconds) == {*untuned.TUNED, untuned.FUSED, "ours"}
    assert min(seconds.values()) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_suggestion_is_timed_against_its_training(load, device) -> None:
    suggestion = load("suggestion")
    problem = suggestion.on_device(replace(PROBLEMS["digits"], steps=16), device)
    found = suggestion.case(problem, 0, suggestion.Clock(device, processor=True))
    assert found["share"] > 0
    assert 0 < found["loss"] < 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_monitored_step_is_timed(load, device) -> None:
    monitor = load("monitor")
    row = monitor.cost_of(monitor.digits(), 20, monitor.Clock(device, processor=True))
    assert row.startswith("| digits MLP | 8 | ")
    assert "| 1 | 100 of 100 |" in row


@pytest.mark.parametrize("device", DEVICES)
def test_fine_tuning_is_timed_against_its_suggestion(load, device, monkeypatch) -> None:
    finetuning = load("finetuning")
    for name, value in (("BEFORE", 4), ("STEPS", 10), ("HEAD_RATES", (1e-3,)), ("DECAYS", (0.5,))):
        monkeypatch.setattr(finetuning, name, value)
    x, y = digits().train
    samples = x.flatten(1), y
    make = lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))  # noqa: E731
    task = finetuning.Task("digits", make, samples, samples, samples, cross_entropy, 10)
    timer = finetuning.Clock(device, processor=True)
    found = dict(finetuning.runs_of(task.on(timer.device), 0, lambda name: False, timer))
    assert set(found) == {"suggested", "suggested, one rate", "0.001, 0.5"}
    assert all(found[name]["share"] > found["0.001, 0.5"]["share"] for name in finetuning.SUGGESTED)


@pytest.mark.parametrize("device", DEVICES)
def test_solvers_write_a_page(load, device, monkeypatch, tmp_path) -> None:
    solvers = load("solvers")
    for name, value in (("SIZES", (3,)), ("PROBLEMS", 2), ("RESULTS", tmp_path / "solvers.md")):
        monkeypatch.setattr(solvers, name, value)
    monkeypatch.setattr(sys, "argv", ["solvers", "--device", device])
    solvers.main()
    page = load("clock").results_of(tmp_path / "solvers.md", device).read_text(encoding="utf-8")
    assert page.count("\n| ") == 1 + len(solvers.SOLVERS) * len(solvers.CASES)


def test_bounded_solves_are_compared(load, monkeypatch, tmp_path) -> None:
    bounded = load("bounded")
    for name, value in (("SIZES", (3,)), ("PROBLEMS", 2), ("RESULTS", tmp_path / "bounded.md")):
        monkeypatch.setattr(bounded, name, value)
    bounded.main()
    rows = (tmp_path / "bounded.md").read_text(encoding="utf-8").split("\n| 3 | ")[1:]
    assert len(rows) == len(bounded.SOLVERS) * len(bounded.CASES)
    definite = {cells[1]: cells[2:4] for cells in (row.split(" | ") for row in rows[:3])}
    assert all(lost == "0" for lost, _ in definite.values()), "a convex model has one minimum"
    assert definite["this package"][1] == "0"


# What it costs by shape -----------------------------------------------------------------------------------------------


def test_attention_is_counted_forward_and_backward(load) -> None:
    q, pass_ = torch.randn(2, 3, 8, 16, requires_grad=True), 2 * 3 * 8 * 8 * 16
    attention = lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)  # noqa: E731
    assert load("clock").multiply_adds(attention) == 2 * pass_
    assert load("clock").multiply_adds(lambda: attention().sum().backward()) == (2 + 5) * pass_


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("number", [0, 2, 4, 6, 7])
def test_the_count_by_shape_is_what_the_counter_sees(load, number, order) -> None:
    cost = load("cost")
    _, shape, groups = cost.CHECKED[number]
    gradient, measured = cost.counted(shape, groups, order)
    assert shape.gradient == gradient
    assert cost.Count(shape, groups, order == 3).model().total == pytest.approx(measured, rel=1e-4)


def test_the_rule_of_thumb_for_whole_blocks(load) -> None:
    cost = load("cost")
    shape = cost.Shape("llama", 40, 4096, 11_008, 32, 32, 1000, 128)
    size = cost.size(shape, cost.blocks())
    assert size == 42
    assert cost.gradients(shape, cost.blocks(), 2) == pytest.approx((size + 11) / 6, rel=0.03)
    assert cost.gradients(shape, cost.blocks(), 3) == pytest.approx((size + 7) / 3, rel=0.03)


def test_memory_by_shape_is_what_the_engine_holds(load, monkeypatch) -> None:
    cost, found = load("cost"), {}
    shape = cost.Shape("llama", 3, 64, 224, 4, 2, 500, 96, 2)
    model = cost.build(shape).to(torch.bfloat16)
    partition = cost.partition_of(model, shape, cost.blocks())
    sweep = forward.sweep

    def watched(tape, *given):
        held = tape.held()
        summary = sweep(tape, *given)
        found.update(held=held, tangents=tape.graph.tangents[False])
        return summary

    monkeypatch.setattr(forward, "sweep", watched)
    batch = torch.randint(500, (2, 96))
    ns.summarize(cost.loss_fn, model, [batch], partition=partition, order=2, engine="forward")
    predicted = cost.memory(shape, cost.blocks(), 2)
    assert len(partition) == cost.size(shape, cost.blocks()) == 5
    assert predicted["values and adjoints"] == pytest.approx(found["held"], rel=0.02)
    assert predicted["tangents"] == pytest.approx(5 * found["tangents"], rel=0.02)
    assert predicted["weights and direction"] == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)


# Kernels --------------------------------------------------------------------------------------------------------------


def test_the_files_that_run_under_other_kernels_are_there(load) -> None:
    folder = Path(__file__).parent
    assert [name for name in load("kernels").FILES if not (folder / f"test_{name}.py").is_file()] == []
