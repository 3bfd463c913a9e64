"""summarize(): every form of its arguments, what it leaves alone, and what it refuses."""

import collections
import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, assert_close, make, unchanged
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import newton_summary as ns
from newton_summary import Partition, Summary


def summarize(case, batches=None, **options):
    options = {"engine": "nested", **options}
    return ns.summarize(case.loss_fn, case.model, [case.batch] if batches is None else batches, **options)


def same(a, b, tolerance=1e-12):
    assert a.names == b.names
    for order in range(3):
        assert_close(a.tensor(order), b.tensor(order), tolerance)
    assert_close(a.third, b.third, tolerance)


def mean_gradient(case):
    """The gradient by a plain backward pass on a copy."""
    twin = copy.deepcopy(case)
    twin.model.zero_grad()
    twin.loss.backward()
    return {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None}


# The direction --------------------------------------------------------------------------------------------------------


def test_lists_and_dictionaries_are_the_same_direction():
    case = make("mlp")
    u = case.direction()
    partition = Partition.canonical(case.model)
    expected = summarize(case, direction=u)
    same(summarize(case, direction=[u[name] for name in partition.parameter_names]), expected)
    same(summarize(case, direction=tuple(u.values())), expected)
    same(summarize(case, direction=dict(reversed(u.items()))), expected)
    same(summarize(case, direction={n: t.float().double() for n, t in u.items()}), expected, 1e-6)
    same(summarize(case, direction={n: nn.Parameter(t) for n, t in u.items()}), expected)


def test_a_direction_of_another_type_is_cast():
    case = make("mlp", torch.float32)
    u = case.direction()
    same(summarize(case, direction={n: t.double() for n, t in u.items()}), summarize(case, direction=u), 1e-5)


@pytest.mark.parametrize("name", [c for c in CASES if c not in ("unused", "dropout")])
def test_the_default_direction_is_the_gradient(name):
    case = make(name)
    gradient = mean_gradient(case)
    summary = summarize(case, direction=None)
    same(summary, summarize(case, direction=gradient), 1e-12)
    squares = torch.stack([gradient[n].square().sum() for n in summary.names])
    assert_close(summary.gradient, squares, 1e-12)


def test_the_default_direction_is_the_gradient_over_all_batches():
    case = make("mlp")
    x, y = case.batch
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    same(summarize(case, parts), summarize(case), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_direction_over_many_batches_of_half_precision(dtype):
    """In which a sum of so many gradients no longer grows, or is no number."""
    model = nn.Linear(3, 1, dtype=dtype)
    batch = torch.randn(8, 3, dtype=dtype), torch.randn(8, 1, dtype=dtype)

    def loss_fn(model, batch):
        return 10 * (model(batch[0]) - batch[1]).square().mean()

    one, many = (ns.summarize(loss_fn, model, [batch] * count, order=1) for count in (1, 400))
    assert_close(many.gradient, one.gradient, 1e-2)


def test_the_default_direction_is_zero_on_unused_parameters():
    summary = summarize(make("unused"))
    spare = summary.names.index("spare")
    assert summary.gradient[spare] == 0.0
    assert not summary.hessian[spare].any()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adam with one loop": lambda p: torch.optim.Adam(p, lr=0.02, foreach=False),
    "adam with a tensor for a rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizers_next_step_is_the_direction(kind):
    """Against the step that a deep copy of model and optimizer takes."""
    case = make("mlp")
    optimizer = OPTIMIZERS[kind](list(case.model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        case.loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    case.loss.backward()

    twin = copy.deepcopy(case.model)
    stepped = OPTIMIZERS[kind](list(twin.parameters()))
    stepped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(case.model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    stepped.step()
    steps = [(p - q).detach() for p, q in zip(case.model.parameters(), twin.parameters(), strict=True)]

    state = copy.deepcopy(optimizer.state_dict())
    with unchanged(case.model):
        same(summarize(case, direction=optimizer), summarize(case, direction=steps))
    assert_same_state(optimizer.state_dict(), state)
    assert max(step.abs().max() for step in steps) > 1e-4


def assert_same_state(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same_state(value, b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def test_hooks_and_schedulers_of_the_optimizer_notice_nothing():
    case = make("mlp")
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    fired = []
    optimizer.register_step_pre_hook(lambda *args: fired.append("before"))
    optimizer.register_step_post_hook(lambda *args: fired.append("after"))
    handle = register_optimizer_step_pre_hook(lambda *args: fired.append("every"))
    try:
        case.loss.backward()
        before = dict(scheduler.state_dict())
        counted = optimizer.step
        first = summarize(case, direction=optimizer)
        assert optimizer.step is counted
        assert not optimizer.state
        assert dict(scheduler.state_dict()) == before
        assert not fired
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()  # it would not warn had the measurement counted as a step
        assert optimizer.param_groups[0]["lr"] == 0.05
        same(summarize(case, direction=optimizer).scale([2.0] * 4), first, 1e-12)
    finally:
        handle.remove()
    optimizer.step()
    assert fired == ["before", "after"]


def test_an_optimizer_around_another_leaves_that_one_alone():
    class Slowed(torch.optim.Optimizer):
        """Takes half of the step of an optimizer of its own."""

        def __init__(self, params):
            params = list(params)
            super().__init__(params, {})
            self.inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
            self.taken = []

        def step(self):
            held = self.param_groups[0]["params"]
            before = [p.detach().clone() for p in held]
            self.inner.step()
            self.taken.append(1)
            with torch.no_grad():
                for p, b in zip(held, before, strict=True):
                    p.lerp_(b, 0.5)

    case = make("mlp")
    optimizer = Slowed(case.model.parameters())
    case.loss.backward()
    with unchanged(case.model):
        summary = summarize(case, direction=optimizer)
    assert not optimizer.inner.state
    assert not optimizer.taken
    same(summary, summarize(case, direction={n: 0.05 * g for n, g in mean_gradient(case).items()}), 1e-12)


def test_an_optimizer_may_hold_some_of_the_parameters():
    case = make("mlp")
    case.loss.backward()
    summary = summarize(case, direction=torch.optim.SGD(case.model[0].parameters(), lr=1.0))
    expected = {n: g if n.startswith("0.") else 0 * g for n, g in mean_gradient(case).items()}
    same(summary, summarize(case, direction=expected), 1e-12)


# Other arguments ------------------------------------------------------------------------------------------------------


def test_orders_and_thirds():
    case = make("mlp")
    first = summarize(case, order=1)
    assert first.hessian is None
    second = summarize(case, order=2)
    assert second.third is None
    assert summarize(case).third.shape == (4,)
    full = summarize(case, third="full")
    assert full.third.shape == (4, 4, 4)
    fourth = summarize(case, order=4, partition=Partition.by_kind(case.model))
    assert fourth.tensor(4).shape == (2,) * 4
    assert fourth.tensor(3).shape == (2,) * 3
    assert_close(
        fourth.hessian, full.merge(dict(zip(("w", "b"), (full.names[::2], full.names[1::2]), strict=True))).hessian
    )


def test_an_engine_of_ones_own():
    class Constant:
        def measure(self, loss, batch, partition, direction, order, third):
            return Summary(loss=1.0, gradient=torch.ones(len(partition)), names=partition.names, weight=2.0)

    assert summarize(make("mlp"), engine=Constant(), order=1).gradient.tolist() == [1.0] * 4


def test_the_default_engine_agrees_with_the_nested_one():
    case = make("mlp")
    same(summarize(case, engine="auto"), summarize(case), 1e-10)


def test_progress_is_shown_on_demand(capsys):
    case = make("mlp")
    summarize(case, [case.batch] * 3)
    assert capsys.readouterr().err == ""
    summarize(case, [case.batch] * 3, progress=True)
    shown = capsys.readouterr().err
    assert "gradient" in shown
    assert "summary" in shown
    assert "/3" in shown


def test_batches_may_be_dictionaries_or_anything_else():
    case = make("mlp")
    x, y = case.batch
    expected = summarize(case)

    class Custom:
        pass

    custom = Custom()
    custom.x, custom.y = x, y
    forms = [
        ({"x": x, "y": y}, lambda m, b: case.loss_fn(m, (b["x"], b["y"]))),
        ([x, y], case.loss_fn),
        (((x,), {"y": y}), lambda m, b: case.loss_fn(m, (b[0][0], b[1]["y"]))),
        (custom, lambda m, b: case.loss_fn(m, (b.x, b.y))),
        (None, lambda m, b: case.loss_fn(m, (x, y))),
    ]
    for batch, loss_fn in forms:
        summary = ns.summarize(loss_fn, case.model, [batch], engine="nested")
        same(summary, expected, 1e-12)
        assert summary.weight == (1.0 if batch is None else 5.0)


def test_a_one_shot_iterable_goes_with_a_given_direction():
    case = make("mlp")
    u = case.direction()
    batches = (batch for batch in [case.batch] * 2)
    same(summarize(case, batches, direction=u), summarize(case, direction=u), 1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_models_and_parts_are_measured_uncompiled():
    case = make("mlp")
    expected = summarize(case)
    compiled = torch.compile(case.model)
    same(ns.summarize(case.loss_fn, compiled, [case.batch], engine="nested"), expected)
    same(ns.summarize(torch.compile(case.loss_fn), case.model, [case.batch], engine="nested"), expected)
    model = nn.Sequential(torch.compile(case.model[:2]), case.model[2])
    inside = ns.summarize(case.loss_fn, model, [case.batch], engine="nested")
    assert_close(inside.hessian, expected.hessian, 1e-12)
    case.model.compile()
    same(summarize(case), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["mlp", "batch norm", "embedding", "lstm"])
def test_it_works_in_any_grad_mode(name, mode):
    """Also where batches and directions were made in inference mode."""
    case = make(name)
    expected = summarize(case)
    u = case.direction()
    along = summarize(case, direction=u)
    with mode(), unchanged(case.model):
        case.batch = tuple(t.clone() for t in case.batch)
        same(summarize(case), expected)
        same(summarize(case, direction={n: t.clone() for n, t in u.items()}), along)
        measured = summarize(case, DataLoader(TensorDataset(*case.batch), batch_size=5))
    same(measured, expected)
    assert not measured.hessian.is_inference()


# Nothing of the user's is changed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch norm", "dropout", "tied", "lstm"])
def test_nothing_of_the_users_is_changed(name):
    case = make(name)
    case.loss.backward()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    for direction in (None, case.direction(), optimizer):
        with unchanged(case.model):
            summarize(case, [case.batch] * 2, direction=direction)


class Noisy(Dataset):
    """Draws from all three global random states, as augmentations do."""

    def __init__(self, n=7):
        self.x, self.y = torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.randn(3) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[i] + 0.1 * noise, self.y[i]


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_that_draws_random_numbers_leaves_states_as_they_were(own):
    case = make("mlp")
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator)
    before = generator.get_state() if own else None
    for direction in (None, case.direction()):
        with unchanged(case.model):
            summarize(case, loader, direction=direction)
        assert not own or torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("own", [False, True])
def test_gradient_and_summary_see_the_same_batches(own):
    """Along the gradient g of the same loss, ḡ is |g|² for each group, whatever is shuffled, dropped and drawn."""
    case = make("dropout")
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(Noisy(), batch_size=3, shuffle=True, drop_last=True, generator=generator)
    seen = []

    def loss_fn(model, batch):
        seen.append(batch[0])
        return case.loss_fn(model, batch)

    summary = ns.summarize(loss_fn, case.model, loader, order=1, engine="nested")
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert (summary.gradient > 0).all()
    assert summary.weight == 6.0


def test_states_are_restored_when_measuring_fails():
    case = make("dropout")

    def failing(model, batch):
        torch.rand(1)
        raise RuntimeError("the user's own error")

    loader = DataLoader(Noisy(), batch_size=3, shuffle=True)
    with unchanged(case.model), pytest.raises(RuntimeError, match="the user's own error"):
        ns.summarize(failing, case.model, loader, engine="nested")


def test_loaders_over_iterable_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(zip(*case.batch, strict=True)))

    case = make("mlp")
    same(summarize(case, DataLoader(Stream(), batch_size=2)), summarize(case), 1e-12)


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(message, case=None, batches=None, error=ValueError, **options):
    case = case or make("mlp")
    case.model.zero_grad()
    with unchanged(case.model), pytest.raises(error, match=message):
        summarize(case, batches, **options)


def changed(**changes):
    return {**make("mlp").direction(), **changes}


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (changed(**{"0.bias": torch.ones(3)}), r"direction for '0.bias' has shape \(3,\), the parameter \(4,\)"),
        (
            changed(**{"0.bias": torch.ones(4, device="meta")}),
            "'0.bias' is on meta, the parameter on cpu",
        ),
        (
            changed(**{"0.bias": torch.tensor([1.0, torch.nan, 0.0, 0.0])}),
            r"direction for '0.bias', of shape \(4,\), has entries that are not finite",
        ),
        (changed(**{"0.bias": torch.full((4,), torch.inf)}), "not finite"),
        (changed(**{"9.bias": torch.ones(4)}), "the partition has no parameter '9.bias'"),
        ({"0.bias": torch.ones(4)}, "the partition needs a direction for '0.weight'"),
        ([torch.ones(4, 3)], "direction has 1 tensors, the partition 4 parameters"),
        ([], "direction has 0 tensors"),
        ({}, "the partition needs a direction for '0.weight'"),
        (
            {nn.Parameter(torch.ones(4)): torch.ones(4)},
            "keys must be names of parameters, such as '0.weight'; one is a Pa",
        ),
        (torch.ones(26), "direction has 1 tensors, the partition 4 parameters"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    refused(message, direction=direction)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (1.0, "direction must be tensors or an optimizer, got float"),
        (torch.optim.SGD, "direction must be tensors or an optimizer, got the class SGD"),
        (np.ones((4, 3)), "direction for '0.weight' must be a tensor, got ndarray"),
        (changed(**{"0.bias": None}), "direction for '0.bias' must be a tensor, got NoneType"),
        (changed(**{"0.bias": np.ones(4)}), "direction for '0.bias' must be a tensor, got ndarray"),
    ],
)
def test_directions_of_another_kind(direction, message):
    refused(message, direction=direction, error=TypeError)


def test_a_complex_direction_of_real_parameters():
    refused("direction for '0.bias' is complex", direction=changed(**{"0.bias": torch.ones(4) * 1j}))


def test_a_sparse_direction_is_measured():
    case = make("mlp")
    sparse = {name: u.to_sparse() for name, u in case.direction().items()}
    same(summarize(case, direction=sparse), summarize(case, direction=case.direction()))


def test_a_direction_that_the_parameters_type_cannot_hold():
    case = make("mlp", torch.float16)
    for size, message in ((1e6, "not finite in float16"), (1e-9, "all 0 in float16")):
        u = {name: torch.full_like(p, size, dtype=torch.float64) for name, p in case.model.named_parameters()}
        refused(message, case, direction=u)


def test_an_optimizer_without_gradients():
    case = make("mlp")
    refused("have no gradients: call backward", case, direction=torch.optim.SGD(case.model.parameters(), lr=1.0))


def test_an_optimizer_whose_step_is_not_finite():
    case = make("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)
    case.loss.backward()
    case.model[0].bias.grad[0] = torch.nan
    with pytest.raises(ValueError, match=r"direction for '0.bias'.* not finite"):
        summarize(case, direction=optimizer)


def test_a_gradient_that_is_not_finite():
    case = make("mlp")
    case.loss_fn = lambda m, b: (m[0].bias - m[0].bias.detach()).square().sum().sqrt()
    refused("direction for '0.bias'.* not finite", case)


def test_losses_that_are_no_scalar():
    case = make("mlp")
    case.loss_fn = lambda m, b: m(b[0])
    for direction in (None, case.direction()):
        refused(
            r"the loss must be a scalar tensor, got a tensor of shape \(5, 2\): reduce it", case, direction=direction
        )
    case.loss_fn = lambda m, b: m(b[0]).mean().item()
    refused("the loss must be a scalar tensor, got float", case)
    case.loss_fn = lambda m, b: None
    refused("got NoneType: return the tensor itself", case)
    for several in (lambda loss: (loss, 1), lambda loss: {"loss": loss}, lambda loss: SimpleNamespace(loss=loss)):
        case.loss_fn = lambda m, b, several=several: several(m(b[0]).mean())
        refused("the loss must be a scalar tensor, got .*: return the loss out of it", case)


def test_parameters_that_hold_nothing():
    case = make("mlp")
    case.model.to("meta")
    refused("parameter '0.weight' is on meta, where it holds nothing", case, direction=None)


def test_a_loss_of_one_entry_will_do():
    case = make("mlp")
    expected, whole = summarize(case), case.loss_fn
    case.loss_fn = lambda m, b: whole(m, b).view(1, 1)
    same(summarize(case), expected)


def test_losses_that_do_not_depend_on_the_parameters():
    other = make("mlp")
    losses = {
        "constant": lambda m, b: torch.ones(()),
        "detached": lambda m, b: m(b[0]).mean().detach(),
        "of another model": lambda m, b: other.loss,
        "of the batch": lambda m, b: b[0].clone().requires_grad_().sum(),
    }
    for loss_fn in losses.values():
        case = make("mlp")
        case.loss_fn = loss_fn
        for direction in (None, case.direction()):
            refused("the loss does not depend on the parameters: compute it with the model", case, direction=direction)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_are_not_finite(value):
    case = make("mlp")
    case.batch = case.batch[0], torch.full((5, 2), value, dtype=torch.float64)
    for direction in (None, case.direction()):
        refused(f"the loss is {value}: look for it in the data", case, direction=direction)


def test_arguments_out_of_range():
    for order in (0, -1):
        refused(f"order must be a whole number from 1 on, got {order}", order=order)
    for order in (2.5, math.nan):
        refused(f"order must be a whole number from 1 on, got {order}", order=order)
    refused("third must be 'diagonal' or 'full', got 'all'", third="all")
    refused("batch_size must be a whole number", slices=2, batch_size=2.5)
    refused("batch_size must be positive", batch_size=-1)
    refused("unknown engine 'magic': choose one of auto,", engine="magic")


def test_a_bare_batch():
    case = make("mlp")
    refused(r"batches must be an iterable of batches, got one tuple: pass \[batch\]", case, case.batch)
    refused(r"got one Tensor: pass \[batch\]", case, case.batch[0])
    refused(r"got one dict: pass \[batch\]", case, {"x": case.batch[0]})


def test_a_data_set_of_single_samples():
    case = make("mlp")
    with pytest.raises(TypeError, match=r"^batches must be .* got TensorDataset: pass .* of a data set a DataLoader"):
        ns.summarize(case.loss_fn, case.model, TensorDataset(case.batch[0]))


@pytest.mark.parametrize("batches", [[], (), DataLoader([], batch_size=2)])
def test_no_batches(batches):
    for direction in (None, make("mlp").direction()):
        refused("there are no batches to measure on", batches=batches, direction=direction)


def test_a_one_shot_iterable_that_is_needed_twice():
    batches = (batch for batch in [make("mlp").batch])
    refused("batches is a one-shot generator, and is gone through twice", batches=batches)
    assert len(list(batches)) == 1
    refused("one-shot list_iterator", batches=iter([make("mlp").batch]))


def test_parameters_on_two_devices():
    case = make("mlp")
    case.model[2].to("meta")
    refused("parameter '2.weight' is on meta, '0.weight' on cpu: move the model to one device", case)


def test_partitions_of_other_models():
    case = make("mlp")
    refused("'0.weight' of the partition is not in this model", case, partition=Partition.canonical(make("mlp").model))
    inner = Partition.canonical(case.model)
    case.model = nn.Sequential(case.model, nn.Linear(2, 2).double())
    refused(
        "parameter '0.weight' of the partition is not in this model: make the partition from it", case, partition=inner
    )


def test_models_without_trainable_parameters():
    case = make("mlp")
    case.model.requires_grad_(False)
    refused("Sequential has no trainable parameters", case)


def test_a_direction_by_name_is_refused():
    model = torch.nn.Linear(2, 1)
    batch = torch.randn(3, 2)
    with pytest.raises(ValueError, match="direction must be tensors or an optimizer, got 'adam'"):
        ns.summarize(lambda m, b: m(b).square().mean(), model, [batch], direction="adam")


def test_batches_that_are_mappings_of_their_own_kind_count_by_their_size():
    model = torch.nn.Linear(2, 1)
    batches = [collections.UserDict(x=torch.randn(n, 2)) for n in (3, 5)]
    summary = ns.summarize(lambda m, b: m(b["x"]).square().mean(), model, batches, engine="nested")
    assert summary.weight == 8
