"""Models sharded by ``fully_shard`` against one process that has them whole."""

from __future__ import annotations

import copy
import gc
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from test_distributed import BATCH, DTYPE, MAKERS, here, loss_fn, make_data, make_model, part, plain_loader, split_rows
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import newton_summary as ns
from newton_summary.measure.along import losses_along
from newton_summary.parallel.sharding import is_sharded, unsharded


def shard(model, **options):
    """Layer by layer, where there are several processes; 8 × 5 entries do not split evenly everywhere."""
    if dist.is_initialized():
        fully_shard(model[0], **options)
        fully_shard(model, **options)
    return model


def step(model, optimizer, t: int) -> None:
    x, y = make_data()
    optimizer.zero_grad()
    loss_fn(model, part((x.split(BATCH)[t % 5], y.split(BATCH)[t % 5]))).backward()
    optimizer.step()


def whole(model) -> list[torch.Tensor]:
    return [unsharded(p.detach()).clone() for p in model.parameters()]


def train(kind: str, steps: int):
    model = shard(make_model())
    optimizer = MAKERS[kind](model, plain_loader())
    for t in range(steps):
        step(model, optimizer, t)
    return whole(model), optimizer.rates, dict(optimizer.counts)


WITHOUT_FACTORS = [kind for kind in MAKERS if "factors" not in kind]
"""Parameters that are sharded have none."""


@pytest.mark.parametrize("kind", WITHOUT_FACTORS)
def test_sharded_training_is_that_of_one_process(two, kind) -> None:
    parameters, rates, counts = train(kind, 20)
    for own, own_rates, own_counts in two.run(train, kind, 20):
        for p, q in zip(own, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        assert own_rates == pytest.approx(rates, rel=1e-8)
        assert own_counts == counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITHOUT_FACTORS)
def test_sharded_training_in_four_processes_is_that_of_one(four, kind) -> None:
    parameters, rates, counts = train(kind, 20)
    for own, own_rates, own_counts in four.run(train, kind, 20):
        for p, q in zip(own, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        assert own_rates == pytest.approx(rates, rel=1e-8)
        assert own_counts == counts


def leap(steps: int):
    """Weights that are thrown far between two comparisons."""
    model = shard(make_model())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), direction="nadam", compare_every=4)
    for t in range(steps):
        if t == steps - 1:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1e6)
        step(model, optimizer, t)
    return whole(model), optimizer._comparison.adaptation.cuts


def test_sharded_weights_that_diverge_go_back_to_their_average(two) -> None:
    parameters, cuts = leap(25)
    assert cuts == 1
    assert max(p.abs().max().item() for p in parameters) < 1e3
    for own, own_cuts in two.run(leap, 25):
        assert own_cuts == cuts
        for p, q in zip(own, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def odd():
    """Frozen, tied and buffered: what else a model has."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)).to(DTYPE)
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    if dist.is_initialized():
        fully_shard(model)
    model.eval()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), every=2, direction="nadam")
    for t in range(6):
        step(model, optimizer, t)
    return whole(model)


def test_frozen_and_tied_parameters(two) -> None:
    expected = odd()
    for own in two.run(odd):
        for p, q in zip(own, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def held() -> int:
    """How many whole parameters, and tensors of their kind, hold memory."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not is_sharded(o) and o.shape == (8, 5)]
    return sum(t.untyped_storage().size() > 0 for t in tensors)


def look_around():
    """What a measurement leaves behind."""
    model = shard(make_model())
    optimizer = ns.NewtonSummary(model, loss_fn, direction="gradient")
    x, y = make_data(100)
    loss_fn(model, part((x, y))).backward()
    before = list(model.named_parameters()), [dict(m._forward_pre_hooks) for m in model.modules()]
    local = [p.to_local().clone() for p in model.parameters()]
    memory = held()
    optimizer.measure(part((x, y)))
    assert held() == memory
    after = list(model.named_parameters()), [dict(m._forward_pre_hooks) for m in model.modules()]
    assert all(m == n and p is q for (m, p), (n, q) in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert any(before[1])
    assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), local, strict=True))


def test_a_measurement_leaves_shards_and_hooks_as_they_were(two) -> None:
    two.run(look_around)


def resume(kind: str):
    """Every process keeps its own file."""
    model = shard(make_model())
    optimizer = MAKERS[kind](model, plain_loader())
    for t in range(10):
        step(model, optimizer, t)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = shard(make_model())
    again.load_state_dict(saved["model"])
    resumed = MAKERS[kind](again, plain_loader())
    resumed.load_state_dict(saved["optimizer"])
    for t in range(10, 20):
        step(model, optimizer, t)
        step(again, resumed, t)
    return all(torch.equal(p, q) for p, q in zip(whole(model), whole(again), strict=True))


@pytest.mark.parametrize("kind", ["default", "AdamW's step"])
def test_a_sharded_run_resumes_to_the_bit(two, kind) -> None:
    assert two.run(resume, kind) == [True, True]


def load_other_states():
    rank, _ = here()
    model = shard(make_model())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), direction="nadam")
    step(model, optimizer, 0)
    for there, words in (
        ({"part": [1 - rank], "of": [2]}, rf"is of part \[{1 - rank}\] of \[2\] .* has part \[{rank}\] of \[2\]"),
        ({"part": [rank], "of": [4]}, rf"is of part \[{rank}\] of \[4\] .* has part \[{rank}\] of \[2\]"),
        (None, r"is of a whole model, and this process has part .* save one in each process"),
    ):
        state = optimizer.state_dict()
        state["newton_summary"]["place"] = there
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(state)


def test_the_state_of_another_part_is_refused(two) -> None:
    two.run(load_other_states)


def place_among_copies(shape):
    from torch.distributed.device_mesh import init_device_mesh

    from newton_summary.parallel.sharding import place_of

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return place_of(fully_shard(make_model(), mesh=mesh).parameters())


def test_copies_of_a_shard_have_one_state(two) -> None:
    """So one may load what another has saved."""
    assert two.run(place_among_copies, (2, 1)) == [{"part": [0], "of": [2, 1]}] * 2
    assert two.run(place_among_copies, (1, 2)) == [{"part": [part], "of": [1, 2]} for part in (0, 1)]


def load_by_torchs_checkpoint(path: str):
    from torch.distributed import checkpoint

    def optimizer_after(steps):
        model = shard(make_model())
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), direction="nadam")
        for t in range(steps):
            step(model, optimizer, t)
        return optimizer

    checkpoint.save({"optimizer": optimizer_after(3).state_dict()}, checkpoint_id=path)
    again = optimizer_after(1)
    state = {"optimizer": again.state_dict()}
    checkpoint.load(state, checkpoint_id=path)
    with pytest.raises(ValueError, match=r"torch.distributed.checkpoint has loaded only a part .* torch.save"):
        again.load_state_dict(state["optimizer"])


def test_a_state_that_torchs_checkpoint_has_loaded_in_part_is_refused(two, tmp_path) -> None:
    """It gives tensors back, and writes the numbers of steps beside them under other keys."""
    two.run(load_by_torchs_checkpoint, str(tmp_path))


def warnings_of_a_measurement():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = shard(make_model())
        step(model, ns.NewtonSummary(model, loss_fn, curvature_data=plain_loader(), direction="nadam"), 0)


def test_measuring_warns_of_nothing(two) -> None:
    two.run(warnings_of_a_measurement)


def shard_in_part():
    model = make_model()
    fully_shard(model, ignored_params={model[0].bias})
    with pytest.raises(ValueError, match=r"'2.bias' is sharded, and '0.bias' is not: apply fully_shard to the whole"):
        ns.NewtonSummary(model, loss_fn)


def test_a_model_that_is_sharded_in_part_is_refused(two) -> None:
    two.run(shard_in_part)


def measure_under_mixed_precision():
    model = shard(make_model().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = ns.NewtonSummary(model, floating_loss)
    x, y = make_data(100)
    floating_loss(model, part((x.float(), y))).backward()
    with torch.no_grad():  # the same direction everywhere, whatever the gradients' precision
        for p in model.parameters():
            p.grad.copy_(torch.ones_like(p.grad))
    return optimizer.measure(part((x.float(), y))).hessian


def floating_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def test_mixed_precision_is_measured_in_full_precision(two) -> None:
    expected = measure_under_mixed_precision()
    for own in two.run(measure_under_mixed_precision):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def watch():
    model = shard(make_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2).attach(plain_loader())
    for t in range(5):
        step(model, optimizer, t)
    return [[r.loss, r.actual_decrease, r.predicted_decrease, *r.joint] for r in monitor.records]


def test_the_monitor_of_a_sharded_model(two) -> None:
    expected = torch.tensor(watch())
    assert len(expected) == 3
    for own in two.run(watch):
        torch.testing.assert_close(torch.tensor(own), expected, rtol=1e-9, atol=1e-12)


def train_in_half(steps: int):
    """What is evaluated, and the weights of a copy that goes on from a checkpoint."""
    batches = [(x.bfloat16(), y) for x, y in plain_loader()]

    def make():
        model = shard(make_model().bfloat16())
        return model, ns.NewtonSummary(model, floating_loss, curvature_data=batches, compare_every=4)

    def run(model, optimizer):
        for t in range(steps):
            optimizer.zero_grad()
            floating_loss(model, part(batches[t % len(batches)])).backward()
            optimizer.step()

    (model, optimizer), (again, other) = make(), make()
    run(model, optimizer)
    optimizer._comparison.adaptation.advantage = 1.0  # so that the average is shown
    optimizer.eval()
    shown = whole(model)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for one in (optimizer, other):
        one.train()
    run(model, optimizer)
    run(again, other)
    averages = [[unsharded(memory["average"]) for memory in one.state.values()] for one in (optimizer, other)]
    return shown, averages, [whole(model), whole(again)]


def test_weights_in_half_precision_are_averaged_in_single(two) -> None:
    for shown, averages, weights in two.run(train_in_half, 12):
        assert all(x.dtype == torch.float32 for x in averages[0])
        assert all(map(torch.equal, *averages)), "a checkpoint has all digits"
        assert all(map(torch.equal, *weights))
        assert {x.dtype for x in shown} == {torch.bfloat16}


def refuse_shards():
    model, batches = shard(make_model()), [part(make_data(20))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = r"parameter '0.weight' is sharded, and {}\(\) needs it whole in this process: {}"
    with pytest.raises(ValueError, match=refused.format("summarize", r"measure by Monitor\(")):
        ns.summarize(loss_fn, model, batches)
    with pytest.raises(ValueError, match=refused.format("suggest_rates", "load its weights")):
        ns.suggest_rates(loss_fn, model, batches, optimizer)
    with pytest.raises(ValueError, match=refused.format("losses_along", "load its weights")):
        losses_along(loss_fn, model, batches[0], [0.1], direction=[p.detach() for p in model.parameters()])
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    monitor._processes.count = 1  # as where one process has all shards
    with pytest.raises(ValueError, match=refused.format("rehearse", "load its weights")):
        monitor.rehearse(batches * 9)


def test_what_needs_whole_parameters_refuses_shards(two) -> None:
    two.run(refuse_shards)


def poison():
    rank, _ = here()
    model = shard(make_model())
    optimizer = ns.NewtonSummary(model, loss_fn, direction="momentum")
    x, y = make_data(100)
    for value in (0.0, float("inf")):
        optimizer.zero_grad()
        loss_fn(model, part((x, y))).backward()
        if rank == 1:
            model[0].weight.grad.to_local()[0, 0] += value
        optimizer.measure(part((x, y)))
        if not value:
            optimizer.step()
    remembered = [s["momentum"].to_local().isfinite().all().item() for s in optimizer.state.values()]
    return optimizer.counts["failed"], all(remembered)


def test_a_gradient_that_is_not_finite_in_one_shard_is_so_for_all(two) -> None:
    assert two.run(poison) == [(1, True), (1, True)]


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = parallelize_module(
        make_model(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    optimizer = ns.NewtonSummary(model, loss_fn)
    x, y = make_data(100)
    loss_fn(model, (x, y)).backward()
    with pytest.raises(ValueError, match=r"module '0' computes on parts of tensors .*fully_shard alone"):
        optimizer.measure((x, y))


def test_tensor_parallelism_is_refused(two) -> None:
    two.run(tensor_parallel)


def old_fsdp():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"hides a model.s parameters: use torch\.distributed\.fsdp\.fully_shard"):
        ns.NewtonSummary(model, loss_fn)


def test_the_old_wrapper_is_refused(two) -> None:
    two.run(old_fsdp)


def test_parts_of_tensors_are_cut_as_parameters_are(two) -> None:
    assert two.run(cut) == [True, True]


def cut():
    from newton_summary.parallel.sharding import sharded_like

    model = shard(make_model())
    values = torch.arange(40, dtype=DTYPE).view(8, 5)
    own = sharded_like(values, model[0].weight)
    assert split_rows(model).sizes == (15, 25 + 8 + 24 + 3)
    return bool((unsharded(own) == values).all()) and own.to_local().shape == model[0].weight.to_local().shape
