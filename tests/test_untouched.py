"""What measuring promises not to change, item by item, on each kind of model, whoever measures."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
import warnings
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CASES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import newton_summary as ns
from newton_summary.measure import Refusal
from newton_summary.measure.along import losses_along
from newton_summary.watch import rehearsed_advice

pytestmark = [
    pytest.mark.filterwarnings("ignore:measured by nested differentiation"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated"),
]


@dataclass
class User:
    """What a user has: a model, a loss with all that it holds, and a batch."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Any
    others: list[nn.Module] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)

    @property
    def modules(self) -> list[nn.Module]:
        return [m for top in (self.model, *self.others) for m in top.modules()]


# The promises: what each looks at, as plain values --------------------------------------------------------------------


def content(t: Tensor) -> Any:
    """Every bit of a tensor."""
    t = t.detach()
    if t.layout is not torch.strided:
        t = t.coalesce()
        return content(t.indices()), content(t.values())
    return str(t.dtype), tuple(t.shape), t.stride(), t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def shallow(value: Any) -> Any:
    """What a value is and holds, with the identities of what is inside."""
    if isinstance(value, Tensor):
        gradient = id(value.grad) if value.is_leaf and value.grad is not None else None
        return id(value), value._version, value.requires_grad, gradient, content(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, list | tuple | set):
        return type(value), id(value), [shallow(v) for v in value]
    if isinstance(value, Mapping):
        return type(value), id(value), [(k, shallow(v)) for k, v in value.items()]
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        return id(value), [(k, shallow(v)) for k, v in vars(value).items()]
    return id(value)


def parameters(user: User) -> Any:
    return [(n, id(p), p.data_ptr(), content(p)) for m in (user.model, *user.others) for n, p in m.named_parameters()]


def versions(user: User) -> Any:
    """How often parameters were written to: graphs that saved one know by that."""
    return [p._version for m in (user.model, *user.others) for p in m.parameters()]


def gradients(user: User) -> Any:
    return [p.grad if p.grad is None else (id(p.grad), content(p.grad)) for p in user.model.parameters()]


def buffers(user: User) -> Any:
    return [
        (n, id(b), b.data_ptr(), b._version, content(b))
        for m in (user.model, *user.others)
        for n, b in m.named_buffers()
    ]


def modes(user: User) -> Any:
    return [m.training for m in user.modules]


def trainable(user: User) -> Any:
    return [(p.requires_grad, p.is_leaf) for m in (user.model, *user.others) for p in m.parameters()]


def random_states(_: User) -> Any:
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numpys), numpys["state"]["key"].tobytes()


def the_batch(user: User) -> Any:
    return shallow(user.batch)


def attributes(user: User) -> Any:
    internal = set(vars(nn.Module())) - {"training"}
    return [{k: shallow(v) for k, v in vars(m).items() if k not in internal} for m in user.modules] + [
        shallow(thing) for thing in user.objects
    ]


def structure(user: User) -> Any:
    keys = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [[(key, [(n, id(v)) for n, v in vars(m)[key].items()]) for key in keys] for m in user.modules]


def own_generators(user: User) -> Any:
    return [
        g.get_state().numpy().tobytes() if isinstance(g, torch.Generator) else repr(g.bit_generator.state)
        for g in user.generators
    ]


def hooks_on_parameters(user: User) -> Any:
    return [list((p._backward_hooks or {}).values()) for p in user.model.parameters()]


def torch_settings(_: User) -> Any:
    cuda = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        [(b.enabled, getattr(b, "deterministic", None)) for b in (torch.backends.mkldnn, torch.backends.cudnn)],
        torch.backends.cudnn.benchmark,
        (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


def torch_functions(_: User) -> Any:
    """What might be patched for a while."""
    checkpoints = torch.utils.checkpoint
    names = ["batch_norm", "layer_norm", "group_norm", "instance_norm", "scaled_dot_product_attention", "embedding"]
    return [id(getattr(F, name)) for name in names] + [
        id(checkpoints._checkpoint_without_reentrant_generator),
        "apply" in vars(checkpoints.CheckpointFunction),
    ]


def the_pytree_registry(_: User) -> Any:
    return set(pytree.SUPPORTED_NODES)


def python_settings(_: User) -> Any:
    return list(warnings.filters), id(warnings.showwarning), sys.getrecursionlimit(), np.geterr()


PROMISES = [
    parameters,
    versions,
    gradients,
    buffers,
    modes,
    trainable,
    random_states,
    the_batch,
    attributes,
    structure,
    own_generators,
    hooks_on_parameters,
    torch_settings,
    torch_functions,
    the_pytree_registry,
    python_settings,
]


def broken(user: User, block: Callable[[], None]) -> list[str]:
    """The promises that a block breaks."""
    before = {promise.__name__: promise(user) for promise in PROMISES}
    block()
    return [promise.__name__ for promise in PROMISES if before[promise.__name__] != promise(user)]


# The kinds of models --------------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squared_error(model, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def data() -> tuple[Tensor, Tensor]:
    return normal(6, 4), normal(6, 1)


def perceptron(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), *between, nn.Tanh(), nn.Linear(3, 1)).double()


def counters() -> User:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls, self.log, self.last = perceptron(), 0, [], {}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(x.mean())
            self.last["x"] = self.hidden = self.inner(x)
            return self.hidden * (1 + 0.01 * self.calls)

    return User(Counting(), squared_error, data())


def a_metric() -> User:
    class Metric:
        def __init__(self) -> None:
            self.total, self.seen = torch.zeros(()), 0

    metric = Metric()

    def loss_fn(model, batch) -> Tensor:
        out = model(batch[0])
        metric.total, metric.seen = metric.total + out.detach().sum(), metric.seen + len(out)
        return (out - batch[1]).square().mean()

    return User(perceptron(), loss_fn, data(), objects=[metric])


def generators_of_the_loss() -> User:
    torchs, numpys = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def loss_fn(model, batch) -> Tensor:
        noise = torch.randn(6, 4, dtype=torch.float64, generator=torchs) + torch.from_numpy(numpys.normal(size=(6, 4)))
        return squared_error(model, (batch[0] + noise, batch[1]))

    return User(perceptron(), loss_fn, data(), generators=[torchs, numpys])


def a_generator_of_the_model() -> User:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.generator = perceptron(), torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + torch.randn(6, 4, dtype=torch.float64, generator=self.generator))

    model = Noisy()
    return User(model, squared_error, data(), generators=[model.generator])


def global_draws() -> User:
    def loss_fn(model, batch) -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return squared_error(model, (batch[0] * (1 + 0.1 * noise), batch[1]))

    return User(perceptron(nn.Dropout(0.2)), loss_fn, data())


def a_table_that_is_renormalised() -> User:
    model = nn.Sequential(nn.Embedding(9, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 1)).double()
    return User(model, squared_error, (torch.randint(9, (6, 2)), normal(6, 1)))


def batch_statistics() -> User:
    return User(perceptron(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)), squared_error, data())


def spectral_norm() -> User:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 1)).double()
    return User(model, squared_error, data())


def old_weight_norm() -> User:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 1)).double()
    return User(model, squared_error, data())


def a_teacher() -> User:
    teacher = perceptron(nn.BatchNorm1d(3))

    def loss_fn(model, batch) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0])
        return squared_error(model, (batch[0], target))

    return User(perceptron(), loss_fn, data(), others=[teacher])


def a_teacher_that_follows() -> User:
    """The loss itself pulls it after the model."""
    teacher = perceptron()

    def loss_fn(model, batch) -> Tensor:
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.1)
        return squared_error(model, (batch[0], teacher(batch[0]).detach()))

    return User(perceptron(), loss_fn, data(), others=[teacher])


def a_loss_that_is_a_module() -> User:
    """With a parameter of its own, a statistic and a counter."""

    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.ones((), dtype=torch.float64)), 0
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, model, batch) -> Tensor:
            loss = squared_error(model, batch) * self.scale.exp()
            self.mean.lerp_(loss.detach(), 0.1)
            self.calls += 1
            return loss

    criterion = Criterion()
    return User(perceptron(), criterion, data(), others=[criterion])


def modes_switched_by_the_loss() -> User:
    def loss_fn(model, batch) -> Tensor:
        model.eval()
        with torch.no_grad():
            target = model(batch[0])
        model.train()
        model[1].eval()
        return squared_error(model, (batch[0], batch[1] + 0.1 * target))

    return User(perceptron(nn.Dropout(0.5)), loss_fn, data())


def gradients_switched_by_the_loss() -> User:
    """As adversaries do with each other."""

    def loss_fn(model, batch) -> Tensor:
        model[0].requires_grad_(False)
        penalty = model(batch[0]).square().mean()
        model[0].requires_grad_(True)
        loss = squared_error(model, batch) + penalty
        model[2].bias.requires_grad_(False)
        return loss

    return User(perceptron(), loss_fn, data())


def buffers_bound_anew() -> User:
    class Rebinding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()
            self.register_buffer("step", torch.zeros((), dtype=torch.float64))
            self.register_buffer("seen", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.step, self.seen = self.step + 1, x.detach() * 2
            return self.inner(x) * (1 + 0.01 * self.step)

    return User(Rebinding(), squared_error, data())


def a_batch_taken_apart() -> User:
    def loss_fn(model, batch) -> Tensor:
        y = batch.pop("y")
        batch["extra"].append(1)
        batch["more"]["z"] = y
        return squared_error(model, (batch["x"].mul_(0.5), y.clamp_(-1, 1)))

    x, y = data()
    return User(perceptron(), loss_fn, {"x": x, "y": y, "extra": ["a"], "more": UserDict(n=3)})


def a_batch_that_gets_gradients() -> User:
    """As losses with a penalty on gradients by their input have it; one is kept by the batch itself."""

    def loss_fn(model, batch) -> Tensor:
        x, z = (t.requires_grad_(True) for t in (batch[0], batch[2]))
        (model(z).square().mean()).backward()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return squared_error(model, batch) + slope.square().mean() + model(z.detach() + 0.1 * z.grad).mean()

    return User(perceptron(), loss_fn, (*data(), normal(6, 4)))


def a_batch_of_arrays() -> User:
    """It is written to by numpy, by torch, and holds a generator."""
    generator = torch.Generator().manual_seed(1)

    def loss_fn(model, batch) -> Tensor:
        x, y, own = batch
        x *= 0.9
        seen = torch.from_numpy(y).mul_(0.5)
        noise = torch.randn(6, 4, dtype=torch.float64, generator=own)
        return squared_error(model, (torch.from_numpy(x.copy()) + noise, seen.clone()))

    return User(perceptron(), loss_fn, (*(t.numpy() for t in data()), generator), generators=[generator])


def a_loss_of_gradients() -> User:
    def loss_fn(model, batch) -> Tensor:
        loss = squared_error(model, batch)
        return loss + sum(
            g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        )

    return User(perceptron(), loss_fn, data())


def frozen_and_evaluating_parts() -> User:
    model = perceptron(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    return User(model, squared_error, data())


def complex_parameters() -> User:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 1, dtype=torch.complex128)), nn.Parameter(normal(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.w).abs().tanh() + self.b

    return User(Complex(), squared_error, data())


def recurrence() -> User:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.LSTM(4, 3, dropout=0.2, num_layers=2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0])

    return User(Recurrent().double(), squared_error, data())


def no_engine() -> User:
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(np.sin(x.detach().numpy()))

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    def loss_fn(model, batch) -> Tensor:
        return (Sine.apply(model(batch[0])) - batch[1]).square().mean()

    return User(perceptron(nn.BatchNorm1d(3), nn.Dropout(0.5)), loss_fn, data())


def of_case(name: str) -> Callable[[], User]:
    def build() -> User:
        case = CASES[name]()
        return User(case.model, case.loss_fn, case.batch)

    return build


OWN = [
    counters,
    a_metric,
    generators_of_the_loss,
    a_generator_of_the_model,
    global_draws,
    a_table_that_is_renormalised,
    batch_statistics,
    spectral_norm,
    old_weight_norm,
    a_teacher,
    a_teacher_that_follows,
    a_loss_that_is_a_module,
    modes_switched_by_the_loss,
    gradients_switched_by_the_loss,
    buffers_bound_anew,
    a_batch_taken_apart,
    a_batch_that_gets_gradients,
    a_batch_of_arrays,
    a_loss_of_gradients,
    frozen_and_evaluating_parts,
    complex_parameters,
    recurrence,
    no_engine,
]
KINDS: dict[str, Callable[[], User]] = {build.__name__: build for build in OWN}
KINDS |= {name: of_case(name) for name in CASES}


@pytest.fixture(autouse=True, scope="module")
def _imports_of_others() -> None:
    """What is imported on first use: torch's compiler registers containers; it and scipy filter warnings."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    importlib.import_module("scipy.optimize")


def make(name: str) -> User:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    user = KINDS[name]()
    for p in user.model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    return user


# Who measures ---------------------------------------------------------------------------------------------------------


def direction_of(user: User) -> list[Tensor]:
    return [p.grad for p in user.model.parameters() if p.requires_grad]


def summarize_forward(user: User) -> None:
    ns.summarize(user.loss_fn, user.model, [user.batch], engine=ns.measure.ForwardEngine())


def summarize_nested(user: User) -> None:
    ns.summarize(
        user.loss_fn, user.model, [user.batch], direction=direction_of(user), engine="nested", partition="trivial"
    )


def line(user: User) -> None:
    losses_along(user.loss_fn, user.model, user.batch, [0.0, 1e-3], direction=direction_of(user), partition="trivial")


def the_optimizer_measures(user: User) -> None:
    ns.NewtonSummary(user.model, user.loss_fn).measure(user.batch)


def the_monitor_measures(user: User) -> None:
    optimizer = torch.optim.SGD(user.model.parameters(), lr=1e-3)
    monitor = ns.Monitor(user.model, user.loss_fn, optimizer=optimizer, every=1)
    monitor.measure([user.batch])
    monitor._end_of_step()
    monitor.close()


def rates_are_suggested(user: User) -> None:
    """By trainings, after each of which everything is put back."""
    optimizer = torch.optim.SGD(user.model.parameters(), lr=1e-3, momentum=0.9)
    with contextlib.suppress(ValueError):  # where the loss does not change along a step
        ns.suggest_rates(user.loss_fn, user.model, [user.batch], optimizer, steps=2, partition="trivial")


def advice_is_rehearsed(user: User) -> None:
    """Likewise, by the monitor."""
    optimizer = torch.optim.SGD(user.model.parameters(), lr=1e-3, momentum=0.9)
    monitor = ns.Monitor(user.model, user.loss_fn, optimizer=optimizer, partition="trivial")
    with mock.patch.object(rehearsed_advice, "HELD_OUT", 2):  # which saves time
        monitor.rehearse([user.batch] * 9, steps=8)
    monitor.close()


TRAININGS = [rates_are_suggested, advice_is_rehearsed]

WAYS = [summarize_forward, summarize_nested, line, the_optimizer_measures, the_monitor_measures]


def measured(user: User, way: Callable[[User], None]) -> Callable[[], None]:
    def block() -> None:
        with contextlib.suppress(Refusal):  # which must change nothing either
            way(user)

    return block


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_changes(name: str, way) -> None:
    user = make(name)
    assert broken(user, measured(user, way)) == []
    assert broken(user, measured(user, way)) == []  # where the graph is known


@pytest.mark.parametrize("way", TRAININGS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", [build.__name__ for build in OWN])
def test_nothing_changes_where_trainings_are_rehearsed(name: str, way) -> None:
    user = make(name)
    assert broken(user, measured(user, way)) == []


@pytest.mark.parametrize("name", [build.__name__ for build in OWN])
def test_a_step_of_no_length_changes_nothing(name: str) -> None:
    """The optimizer measures, searches along the step, and compares with the average, within its ``step()``."""
    user = make(name)
    options = {"curvature_data": [user.batch] * 2, "lr": 0.0, "every": 3}
    optimizer = ns.NewtonSummary(user.model, user.loss_fn, **options)
    if name == "no_engine":
        with pytest.raises(Refusal):
            optimizer.step()
        return
    stepped = {"versions", *(["attributes"] if name == "recurrence" else [])}  # torch keeps parameters in one there
    for _ in range(5):
        assert set(broken(user, optimizer.step)) <= stepped
    assert optimizer.counts["measured"] == 2
    assert optimizer.counts["compared"] == 2


@pytest.mark.parametrize("way", [*WAYS, *TRAININGS], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", [build.__name__ for build in OWN])
def test_a_graph_from_before_is_as_good_as_ever(name: str, way) -> None:
    found = []
    for measures in (False, True):
        user = make(name)
        if name == "a_batch_taken_apart":
            loss = squared_error(user.model, (user.batch["x"], user.batch["y"]))
        else:
            loss = user.loss_fn(user.model, user.batch)
        if measures:
            measured(user, way)()
        user.model.zero_grad()
        loss.backward()
        found.append([content(p.grad) for p in user.model.parameters() if p.grad is not None])
    assert found[0] == found[1]


@pytest.mark.parametrize("context", ["no_grad", "autocast", "deterministic", "default dtype"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_settings_hold_and_stay(way, context) -> None:
    user = make("batch_statistics")
    block = measured(user, way)
    if context == "no_grad":
        with torch.no_grad():
            assert broken(user, block) == []
    elif context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert broken(user, block) == []
    elif context == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            assert broken(user, block) == []
        finally:
            torch.use_deterministic_algorithms(False)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            assert broken(user, block) == []
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", [*WAYS, *TRAININGS], ids=lambda way: way.__name__)
def test_nothing_changes_where_the_loss_raises(way) -> None:
    user, inner = make("batch_statistics"), squared_error
    user.model.calls = 0

    def fails(model, batch) -> Tensor:
        model.calls += 1
        batch[0].mul_(2)
        inner(model, batch)
        raise KeyError("of the user's own")

    user.loss_fn = fails

    def block() -> None:
        with pytest.raises(KeyError, match="of the user's own"):
            way(user)

    assert broken(user, block) == []


@pytest.mark.parametrize("name", ["batch_statistics", "a_loss_of_gradients"])
def test_hooks_on_parameters_do_not_fire(name: str) -> None:
    user, fired = make(name), []
    for p in user.model.parameters():
        p.register_hook(lambda g: fired.append(1))
        p.register_post_accumulate_grad_hook(lambda p: fired.append(1))
    for way in [*WAYS, *TRAININGS]:
        measured(user, way)()
    assert not fired


# Each promise can be broken -------------------------------------------------------------------------------------------


SABOTAGE: dict[str, Callable[[User], Any]] = {
    "parameters": lambda user: user.model.w.data.add_(1e-300),
    "versions": lambda user: user.model.w.detach().add_(0),
    "gradients": lambda user: user.model.w.grad.neg_(),
    "buffers": lambda user: user.model.statistics.add_(1),
    "modes": lambda user: user.model.eval(),
    "trainable": lambda user: user.model.w.requires_grad_(False),
    "random_states": lambda _: torch.rand(()),
    "the_batch": lambda user: user.batch["more"].pop(),
    "attributes": lambda user: user.model.log.append(1),
    "structure": lambda user: user.model.register_forward_hook(print),
    "own_generators": lambda user: torch.rand((), generator=user.generators[0]),
    "hooks_on_parameters": lambda user: user.model.w.register_hook(print),
    "torch_settings": lambda _: torch.use_deterministic_algorithms(True),
    "torch_functions": lambda _: setattr(F, "embedding", lambda *_: None),
    "the_pytree_registry": lambda _: pytree.register_pytree_node(User, lambda u: ([], u), lambda _, u: u),
    "python_settings": lambda _: warnings.simplefilter("ignore"),
}


def test_each_promise_is_one_that_can_be_broken(monkeypatch) -> None:
    assert list(SABOTAGE) == [promise.__name__ for promise in PROMISES]
    monkeypatch.setattr(F, "embedding", F.embedding)  # goes back at the end, as do the others
    for name, sabotage in SABOTAGE.items():
        model = nn.Module()
        model.w, model.log = nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
        model.w.grad = torch.ones(2, dtype=torch.float64)
        model.register_buffer("statistics", torch.zeros(2))
        user = User(model, squared_error, {"x": torch.ones(2), "more": [1]}, generators=[torch.Generator()])
        with warnings.catch_warnings():
            found = broken(user, lambda user=user, sabotage=sabotage: sabotage(user))
        torch.use_deterministic_algorithms(False)
        assert name in found
    pytree._deregister_pytree_node(User)
