"""What is claimed of an accelerator, held to where there is one; elsewhere these tests are skipped."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import CASES
from torch import nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine, arena

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@contextlib.contextmanager
def no_waiting():
    """A block in which the host never waits for the device: whoever reads a number from it raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def wide(dtype: torch.dtype = torch.float64):
    """A model with tangents of some megabytes, its loss, and a batch."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    batch = torch.randn(256, 64, dtype=dtype), torch.randint(10, (256,))
    return model.to(dtype).cuda(), tuple(t.cuda() for t in batch)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def on_cuda(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return type(value)(map(on_cuda, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("third", ["diagonal", "full"])
@pytest.mark.parametrize("name", ["lenet", "residual_training", "gpt"])
def test_measurements_on_cuda_are_those_on_the_host(name, third) -> None:
    case = CASES[name]()
    twin, batch = copy.deepcopy(case.model).cuda(), on_cuda(case.batch)
    by = "by_module"
    host = ns.summarize(case.loss_fn, case.model, [case.batch], partition=by, third=third, engine=ForwardEngine())
    device = ns.summarize(case.loss_fn, twin, [batch], partition=by, third=third, engine=ForwardEngine()).cpu()
    for found, expected in zip((device.gradient, device.hessian, device.third),
                               (host.gradient, host.hessian, host.third), strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_tangents_are_memory_of_the_caching_allocator(monkeypatch) -> None:
    model, batch = wide()
    monkeypatch.setattr(arena.Arena, "empty", None)  # the arena for hosts
    engine = ForwardEngine()
    ns.summarize(loss_fn, model, [batch], engine=engine)
    torch.cuda.synchronize()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    ns.summarize(loss_fn, model, [batch], engine=engine)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 4096, "all tangents were given back"
    assert torch.cuda.memory_reserved() == reserved, "and a second measurement asked the device for no more"


def test_a_budget_bounds_what_a_measurement_takes_on_cuda() -> None:
    model, batch = wide()
    free = ns.summarize(loss_fn, model, [batch], engine=ForwardEngine())
    torch.cuda.reset_peak_memory_stats()
    ns.summarize(loss_fn, model, [batch], engine=(engine := ForwardEngine()))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ns.summarize(loss_fn, model, [batch], engine=engine)
    unbounded = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    bounded = ns.summarize(loss_fn, model, [batch], engine=engine, memory=0.6 * unbounded)
    assert torch.cuda.max_memory_allocated() - before < 0.8 * unbounded
    torch.testing.assert_close(bounded.hessian, free.hessian, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("direction", ["momentum", "nadam"])  # a refresh of SOAP's bases waits, at its own interval
def test_steps_between_comparisons_do_not_wait_for_the_device(direction) -> None:
    model, batch = wide(torch.float32)
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=[batch], direction=direction, compare_every=20)
    for step in range(50):  # comparisons are before the steps 0, 4, 8, 12, 18, 27 and 40
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        with no_waiting() if step > 41 else contextlib.nullcontext():
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
