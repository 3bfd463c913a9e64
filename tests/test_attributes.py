"""What a loss changes besides tensors is put back: wherever it keeps it."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure.along import losses_along
from newton_summary.measure.attributes import Attributes, owners

X, Y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def error(model, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Meter:
    """A class of somebody's own, without a base."""

    def __init__(self) -> None:
        self.count, self.values = 0, []

    def update(self, value: float) -> None:
        self.count += 1
        self.values.append(value)


class Keeps(nn.Module):
    """Keeps what it saw in containers of all kinds, in containers, and in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.meter = network(), Meter()
        self.stats: dict[str, Any] = defaultdict(list, loss=[])
        self.nested, self.pair = {"a": [[]]}, ([], set())
        self.recent, self.seen, self.order = deque([1, 2], maxlen=2), Counter(a=1), OrderedDict(b=1, a=2)

    def forward(self, x: Tensor) -> Tensor:
        self.meter.update(float(x.sum()))
        self.stats["loss"].append(1)
        self.stats["new"].append(1)
        self.nested["a"][0].append(1)
        self.pair[0].append(1)
        self.pair[1].add(1)
        self.recent.append(3)
        self.seen["a"] += 1
        self.order.move_to_end("b")
        return self.inner(x)

    def told(self) -> Any:
        return repr((self.stats, self.nested, self.pair, self.recent, self.seen, self.order, vars(self.meter)))


STEP = 0


def with_globals(model, batch) -> Tensor:
    global STEP
    STEP += 1
    return error(model, batch) * (1 + 0.1 * STEP)


def with_cells() -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    step, meter = 0, Meter()

    def loss_fn(model, batch) -> Tensor:
        nonlocal step
        step += 1
        meter.update(step)
        return error(model, batch) * (1 + 0.1 * step)

    return loss_fn, lambda: (step, repr(vars(meter)))


class Trainer:
    """A loss that is a method, of an object with a loop's worth of things."""

    def __init__(self) -> None:
        self.model, self.step, self.metrics, self.meter = network(), 0, {"loss": []}, Meter()
        self.generators = [np.random.default_rng(0), torch.Generator().manual_seed(0)]

    def __call__(self, model, batch) -> Tensor:
        self.step += 1
        loss = error(model, batch) * (1 + 0.1 * self.step)
        self.metrics["loss"].append(loss.item())
        self.meter.update(loss.item())
        noise = float(self.generators[0].normal()) + torch.rand((), generator=self.generators[1])
        return loss * (1 + 0.1 * noise)

    def told(self) -> Any:
        numpys, torchs = self.generators
        drawn = repr(numpys.bit_generator.state), torchs.get_state().tolist()
        return self.step, repr(self.metrics), repr(vars(self.meter)), drawn


def kept() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    model = Keeps()
    return model, error, model.told


def globals_() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    return network(), with_globals, lambda: STEP


def cells() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    return network(), *with_cells()


def an_object() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    trainer = Trainer()
    return trainer.model, trainer, trainer.told


def a_method() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    trainer = Trainer()
    return trainer.model, trainer.__call__, trainer.told


def hung_on_tensors() -> tuple[nn.Module, Callable[..., Tensor], Callable[[], Any]]:
    """Attributes of parameters and buffers, as binary networks keep the weights that they round."""
    model = nn.Sequential(network(), nn.BatchNorm1d(1).double())
    weight, mean = model[0][0].weight, model[1].running_mean
    weight.calls = []

    def loss_fn(model, batch) -> Tensor:
        weight.calls.append(1)
        weight.original = weight.detach().clone()
        mean.calls = getattr(mean, "calls", 0) + 1
        return error(model, batch) * (1 + 0.1 * len(weight.calls) + 0.1 * mean.calls)

    return model, loss_fn, lambda: (list(weight.calls), sorted(vars(weight)), getattr(mean, "calls", 0))


@pytest.mark.parametrize("engine", ["forward", "nested"])
@pytest.mark.parametrize("build", [kept, globals_, cells, an_object, a_method, hung_on_tensors])
def test_what_a_loss_keeps_is_as_it_was(build, engine) -> None:
    """A measurement evaluates it more than once, each time from the same state: its value is that of one call."""
    model, loss_fn, told = build()
    before = told()
    u = [torch.ones_like(p) for p in model.parameters()]
    summary = ns.summarize(loss_fn, model, [(X, Y)], direction=u, engine=engine)
    assert told() == before
    along = losses_along(loss_fn, model, (X, Y), [0.0, 0.0], direction=u, partition="trivial")
    assert told() == before
    value = loss_fn(model, (X, Y)).item()
    assert told() != before
    assert summary.loss.item() == pytest.approx(value, rel=1e-12)
    assert along.flatten().tolist() == pytest.approx([value] * 2, rel=1e-12)


def backward_inside(model, batch) -> Tensor:
    loss = error(model, batch)
    loss.backward(retain_graph=True)
    return loss


def freezing(model, batch) -> Tensor:
    loss = error(model, batch)
    model[0].requires_grad_(False)
    return loss


def assigning(model, batch) -> Tensor:
    model[0].weight.data = model[0].weight.data / model[0].weight.data.norm()
    return error(model, batch)


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("loss_fn", [backward_inside, freezing, assigning])
def test_parameters_keep_their_gradients_their_memory_and_what_they_are_asked(loss_fn, has_gradients) -> None:
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if has_gradients else None
    told = lambda: [  # noqa: E731
        (p.requires_grad, p.data_ptr(), p.tolist(), id(p.grad), None if p.grad is None else p.grad.tolist())
        for p in model.parameters()
    ]
    before, u = told(), [torch.ones_like(p) for p in model.parameters()]
    ns.summarize(loss_fn, model, [(X, Y)], direction=u, engine="nested")
    losses_along(loss_fn, model, (X, Y), [1.0], direction=u)
    assert told() == before


def test_modules_that_only_a_list_holds_are_among_the_owners() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.branches = network(), [nn.BatchNorm1d(4).double()]

    model = Branches()
    assert model.branches[0] in owners(model, error)[0]


def test_large_containers_are_data() -> None:
    model = network()
    model.data, model.log = list(range(20_000)), []
    attributes = Attributes(*owners(model, error))
    model.data.append(1)
    model.log.append(1)
    attributes.restore()
    assert len(model.data) == 20_001
    assert model.log == []


def test_a_container_that_a_function_captured_tells_what_it_was_called_with() -> None:
    seen = []

    def loss_fn(model, batch) -> Tensor:
        seen.append(len(batch[0]))
        return error(model, batch)

    ns.summarize(loss_fn, network(), [(X, Y)], engine="nested")
    assert set(seen) == {6}


class Slotted:
    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls = 0


def test_what_a_loss_keeps_in_slots_and_in_attributes_of_functions_comes_back() -> None:
    model, kept = nn.Linear(2, 1), Slotted()

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        kept.calls += 1
        kept.last = m(x).sum().item()
        loss_fn.calls = getattr(loss_fn, "calls", 0) + 1
        return m(x).square().mean()

    ns.summarize(loss_fn, model, [torch.ones(3, 2)])
    assert kept.calls == 0
    assert not hasattr(kept, "last")
    assert not hasattr(loss_fn, "calls")
    loss_fn(model, torch.ones(3, 2))
    ns.summarize(loss_fn, model, [torch.ones(3, 2)])
    assert (kept.calls, loss_fn.calls) == (1, 1)


def makes_a_global(model, batch) -> Tensor:
    global MADE
    MADE = model(batch[0])
    return (MADE - batch[1]).square().mean()


def test_a_variable_that_the_loss_makes_is_gone_again() -> None:
    ns.summarize(makes_a_global, network(), [(X, Y)])
    assert "MADE" not in globals()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("engine", ["forward", "nested"])
def test_a_network_that_the_loss_trains_beside_the_model(engine, steps) -> None:
    """Its step is a constant of the loss, as for autograd; network and optimizer are as they were afterwards."""
    torch.manual_seed(0)
    critic, model = nn.Linear(2, 1).double(), nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    inner, x = torch.optim.SGD(critic.parameters(), 0.5, momentum=0.9), torch.randn(4, 3, dtype=torch.float64)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        inner.zero_grad()
        critic(y.detach()).square().mean().backward()
        inner.step()
        return critic(y).cos().mean()

    for _ in range(steps):
        loss_fn(model, x)
    before, memories = copy.deepcopy(critic.state_dict()), {p: dict(m) for p, m in inner.state.items()}
    u = [torch.full_like(p, 0.1) for p in model.parameters()]
    summary = ns.summarize(loss_fn, model, [x], direction=u, engine=engine)
    assert all(torch.equal(critic.state_dict()[name], value) for name, value in before.items())
    assert {p: dict(m) for p, m in inner.state.items()} == memories
    loss_fn(model, x)  # the critic's step, once, for real
    expected = ns.summarize(lambda m, x: critic(m(x)).cos().mean(), model, [x], direction=u, engine="nested")
    torch.testing.assert_close(summary.hessian, expected.hessian)
