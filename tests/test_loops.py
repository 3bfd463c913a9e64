"""The loops that users have: accumulated gradients, mixed precision, scaled gradients, compiled models, a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from test_distributed import BATCH, DTYPE, loss_fn, make_data, make_model, plain_loader
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import newton_summary as ns
from newton_summary.solve import Status


def batches(dtype=DTYPE, device="cpu"):
    x, y = make_data()
    return list(zip(x.to(device, dtype).split(BATCH), y.to(device).split(BATCH), strict=True))


def run(model, optimizer, data, steps: int, given=None) -> None:
    for t in range(steps):
        optimizer.zero_grad()
        loss_fn(model if given is None else given, data[t % len(data)]).backward()
        optimizer.step()


def assert_same(model, other, tolerance: float = 1e-6) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# Accumulated gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("direction", ["adam", "momentum", "gradient"])
def test_micro_batches_add_up_to_a_batch(direction, explicit) -> None:
    data = batches()
    model, twin = make_model(), make_model()
    curvature = None if explicit else plain_loader()
    one = ns.NewtonSummary(model, loss_fn, curvature_data=curvature, direction=direction, every=3)
    many = ns.NewtonSummary(twin, loss_fn, curvature_data=curvature, direction=direction, every=3)
    for t in range(8):
        x, y = data[t % 5]
        for m, optimizer, parts in ((model, one, 1), (twin, many, 4)):
            optimizer.zero_grad()
            for micro in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_fn(m, micro) / parts).backward()
            if explicit and t % 3 == 0:
                optimizer.measure(data[(t + 1) % 5])
            optimizer.step()
    assert_same(model, twin, tolerance=1e-10)
    assert many.counts == one.counts


# Profilers and hooks --------------------------------------------------------------------------------------------------


def test_a_profiler_sees_steps_and_gradients_cleared_as_those_of_torchs_optimizers() -> None:
    data, model = batches(), make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader())
    run(model, optimizer, data, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(model, optimizer, data, 3)
    run(model, optimizer, data, 1)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#NewtonSummary.step"] == 3
    assert counts["Optimizer.zero_grad#NewtonSummary.zero_grad"] == 3


def test_hooks_on_steps_are_called_with_every_one_and_while_they_are_there() -> None:
    called: list[str] = []
    data, model = batches(), make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader())
    run(model, optimizer, data, 1)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("before")),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
        register_optimizer_step_pre_hook(lambda *_: called.append("before any")),
        register_optimizer_step_post_hook(lambda *_: called.append("after any")),
    ]
    for number, handle in enumerate(handles):
        called.clear()
        run(model, optimizer, data, 1)
        assert sorted(called) == sorted(["before", "after", "before any", "after any"][number:])
        handle.remove()
    called.clear()
    run(model, optimizer, data, 1)
    assert not called


# Mixed precision ------------------------------------------------------------------------------------------------------


def mixed():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("engine", ["forward", "nested"])
@pytest.mark.parametrize("inside", [False, True])
def test_training_under_autocast_is_measured_in_full_precision(inside, engine) -> None:
    data, model = batches(torch.float32), make_model().float()
    optimizer = ns.NewtonSummary(model, loss_fn, direction="gradient", engine=engine, partition="canonical")
    with mixed():
        loss = loss_fn(model, data[0])
    loss.backward()

    def summarize():
        gradients = [p.grad for p in model.parameters()]
        return ns.summarize(loss_fn, model, [data[1]], direction=gradients, engine="nested")

    expected = summarize()
    with mixed():
        rough = summarize()
    with mixed() if inside else contextlib.nullcontext():
        measured = optimizer.measure(data[1])
    for key in ("loss", "gradient", "hessian", "third"):
        torch.testing.assert_close(getattr(measured, key), getattr(expected, key), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(rough.hessian, expected.hessian, rtol=1e-3), "half precision makes no difference"
    assert optimizer.counts == {"measured": 1, "failed": 0, "compared": 0, "halved": 0}


def test_the_loss_after_a_step_is_computed_in_full_precision_too() -> None:
    data, model, seen = batches(torch.float32), make_model().float(), []

    def watched(model, batch):
        output = model(batch[0])
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, batch[1])

    optimizer = ns.NewtonSummary(model, watched)
    calls = []
    with mixed():
        loss_fn(model, data[0]).backward()
        for backtracks in (True, True, False):  # the first one traces
            if not backtracks:
                optimizer._backtrack = lambda *measured: None
            before = len(seen)
            optimizer.measure(data[1])
            calls.append(len(seen) - before)
    assert calls[1] > calls[2], "the loss after the step was not computed"
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("direction", ["soap", "momentum"])
def test_a_step_within_autocast_is_that_outside(direction, explicit) -> None:
    data, models = batches(torch.float32), (make_model().float(), make_model().float())
    curvature = None if explicit else data
    first, second = (ns.NewtonSummary(m, loss_fn, curvature_data=curvature, direction=direction) for m in models)
    for t in range(25):
        for model, optimizer, around in zip(models, (first, second), (contextlib.nullcontext, mixed), strict=True):
            optimizer.zero_grad()
            loss_fn(model, data[t % 5]).backward()
            with around():
                if explicit and t % 3 == 0:
                    optimizer.measure(data[(t + 1) % 5])
                optimizer.step()
    assert_same(*models, tolerance=0.0)


def test_training_under_autocast_goes_down() -> None:
    data, model = batches(torch.float32), make_model().float()
    before = loss_fn(model, data[0]).item()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=data)
    for t in range(40):
        optimizer.zero_grad()
        with mixed():
            loss = loss_fn(model, data[t % 5])
        loss.backward()
        optimizer.step()
    assert loss_fn(model, data[0]).item() < 0.5 * before
    assert optimizer.counts["failed"] == 0


def test_the_monitor_measures_in_full_precision() -> None:
    data, results = batches(torch.float32), []
    for block in (torch.autocast("cpu", enabled=False), mixed()):
        model = make_model().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, engine="nested")
        loss_fn(model, data[0]).backward()
        with block:
            monitor.step(data[1])
            optimizer.step()
        results.append(monitor.records[-1])
    assert repr(results[0]) == repr(results[1])


# Scaled gradients -----------------------------------------------------------------------------------------------------


def scaled_step(scaler, model, optimizer, batch, explicit=None) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_fn(model, batch)).backward()
    if explicit is not None:
        scaler.unscale_(optimizer)
        optimizer.measure(explicit)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("explicit", [False, True])
def test_a_gradient_scaler_changes_nothing(explicit) -> None:
    data, model, twin = batches(), make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    curvature = None if explicit else plain_loader()
    plain = ns.NewtonSummary(model, loss_fn, curvature_data=curvature, every=1)
    scaled = ns.NewtonSummary(twin, loss_fn, curvature_data=curvature, every=1)
    for t in range(6):
        plain.zero_grad()
        loss_fn(model, data[t % 5]).backward()
        if explicit:
            plain.measure(data[0])
        plain.step()
        scaled_step(scaler, twin, scaled, data[t % 5], data[0] if explicit else None)
    assert_same(model, twin)  # the scale is a power of two


@pytest.mark.parametrize("direction", ["adam", "momentum", "gradient", "AdamW"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_step_that_the_scaler_skips_leaves_the_optimizer_as_it_was(direction, explicit) -> None:
    data, model, twin = batches(), make_model(), make_model()
    poisoned = (torch.full_like(data[0][0], torch.inf), data[0][1])
    optimizers = []
    for m in (model, twin):
        u = torch.optim.AdamW(m.parameters()) if direction == "AdamW" else direction
        optimizers.append(
            ns.NewtonSummary(m, loss_fn, curvature_data=None if explicit else plain_loader(), direction=u, every=1)
        )
    plain, scaled = optimizers
    scaler, shifted = torch.amp.GradScaler("cpu", init_scale=2.0**10), data[1]
    for t, batch in enumerate([data[0], poisoned, data[2], data[3]]):
        if batch is not poisoned:
            plain.zero_grad()
            loss_fn(model, batch).backward()
            if explicit:
                plain.measure(shifted)
            plain.step()
        before = copy.deepcopy(scaled.state_dict())
        scaled_step(scaler, twin, scaled, batch, shifted if explicit else None)
        if batch is poisoned:
            assert scaler.get_scale() == 2.0**9, "nothing was skipped"
            after = scaled.state_dict()
            assert str(after["state"]) == str(before["state"])
            for part in ("rule", "direction"):
                now, then = (state["newton_summary"]["parts"][part] for state in (after, before))
                assert str(now) == str(then)
            assert after["newton_summary"]["taken"] == t
            assert scaled.counts["failed"] == int(explicit)
            assert not explicit or scaled.status is Status.NOT_FINITE
    assert_same(model, twin)
    assert scaled.rates == pytest.approx(plain.rates, rel=1e-5)


def test_a_measured_step_that_was_skipped_is_forgotten() -> None:
    """The direction of skipped gradients is not that of the next ones."""
    data, model, twin = batches(), make_model(), make_model()
    plain = ns.NewtonSummary(model, loss_fn, direction="gradient")
    skipping = ns.NewtonSummary(twin, loss_fn, direction="gradient")
    loss_fn(twin, data[0]).backward()
    skipping.measure(data[1])
    for m, optimizer in ((model, plain), (twin, skipping)):
        optimizer.rule.__init__()
        optimizer.zero_grad()
        loss_fn(m, data[2]).backward()
        optimizer.measure(data[1])
        optimizer.step()
    assert_same(model, twin)


# Compiled models ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """In place, torch compiles no class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, x):
        return self.layers(x)


class _Backend:
    """Runs graphs as they are, and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, module, inputs):
        def run(*arguments):
            self.runs += 1
            return module(*arguments)

        return run


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "bare", "a part"])
def test_compiled_models_train_compiled_and_are_measured_uncompiled(how) -> None:
    torch.compiler.reset()
    data, model, twin, backend = batches(), Net(), Net(), _Backend()
    if how == "module.compile":
        model.compile(backend=backend)
        compiled = model
    elif how == "a part":
        model.layers = torch.compile(model.layers, backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = ns.NewtonSummary(
        model if how == "bare" else compiled, loss_fn, curvature_data=plain_loader(), every=2, partition="canonical"
    )
    assert optimizer.partition.names[0] == f"layers.{'_orig_mod.' if how == 'a part' else ''}0.weight"
    run(model, optimizer, data, 6, given=compiled)
    assert backend.runs == 6
    assert optimizer.counts["measured"] == 3
    run(twin, ns.NewtonSummary(twin, loss_fn, curvature_data=plain_loader(), every=2, partition="canonical"), data, 6)
    assert_same(model, twin, tolerance=1e-12)
    torch.compiler.reset()
    gc.collect()


@pytest.mark.parametrize("what", ["optimizer", "monitor", "attached"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_steps_that_are_compiled_as_a_whole_are_those_that_are_not(what) -> None:
    torch.compiler.reset()
    data, model, twin, backend = batches(), Net(), Net(), _Backend()

    def stepper(model):
        if what == "optimizer":
            optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), every=2, partition="canonical")
            source = optimizer
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            source = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2)
            if what == "attached":
                source.attach(plain_loader())

        def step(batch):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            if what == "monitor":
                source.step(batch)
            optimizer.step()

        return step, source

    (step, source), (plain, expected) = stepper(model), stepper(twin)
    step = torch.compile(step, backend=backend)
    for t in range(6):
        step(data[t % len(data)])
        plain(data[t % len(data)])
    assert backend.runs > 0
    assert source.counts["measured"] == expected.counts["measured"] == 3
    assert source.counts["errors"] == 0
    assert_same(model, twin, tolerance=1e-12)
    torch.compiler.reset()
    gc.collect()


# A GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda_is_that_on_the_host() -> None:
    model, twin = make_model(), make_model().cuda()
    run(model, ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), every=3), batches(), 12)
    run(twin, ns.NewtonSummary(twin, loss_fn, curvature_data=plain_loader(), every=3), batches(device="cuda"), 12)
    assert_same(model, twin.cpu(), tolerance=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_with_a_scaler_on_cuda() -> None:
    data, model = batches(torch.float32, "cuda"), make_model().float().cuda()
    before = loss_fn(model, data[0]).item()
    optimizer, scaler = ns.NewtonSummary(model, loss_fn, curvature_data=data, every=5), torch.amp.GradScaler("cuda")
    for t in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_fn(model, data[t % 5])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss_fn(model, data[0]).item() < 0.3 * before
    assert optimizer.counts["failed"] == 0
