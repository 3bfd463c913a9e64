"""Kinds of faults that users of neighbouring tools reported: a measurement is exact or refused by name, and changes
nothing of the user's.  Right values are finite differences in float64, or worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from differences import differences, random_direction
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.measure import Refusal, forward
from newton_summary.measure.along import losses_along

pytestmark = pytest.mark.filterwarnings("ignore:measured by nested differentiation")
ENGINES = ["forward", "nested", "auto"]
each_engine = pytest.mark.parametrize("engine", ENGINES)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def squared_error(model, batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def regression(batches: int = 4, size: int = 8, width: int = 4) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(batches, size, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [(one, one.sum(1, keepdim=True)) for one in x]


def check(loss_fn, model, batch, engine, *, tolerance: float = 1e-5, h: float = 0.004) -> None:
    """Fails where a summary, measured twice, is not what finite differences say; batch: makes one."""
    u = random_direction(model)
    expected = differences(loss_fn, model, batch, u, h)
    for _ in range(2):
        expected.check(ns.summarize(loss_fn, model, [batch()], direction=u, engine=engine), tolerance)


def check_or_refused(loss_fn, model, batch, engine, names: str, **options) -> None:
    """Fails where a summary is neither what finite differences say nor refused with these words."""
    try:
        check(loss_fn, model, batch, engine, **options)
    except Refusal as refusal:
        assert names in str(refusal)  # noqa: PT017  (exact will do as well)


def step_by_hand(loss_fn, model, optimizer, batch) -> float:
    """What a step does to the loss on the batch of its gradient; the model goes back to where it was."""
    state = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    optimizer.zero_grad()
    before = loss_fn(model, batch())
    before.backward()
    optimizer.step()
    result = float((before - loss_fn(model, batch())).detach())
    with torch.no_grad():
        for t, content in zip([*model.parameters(), *model.buffers()], state, strict=True):
            t.copy_(content)
    return result


def monitored_step(loss_fn, model, optimizer, batch) -> ns.watch.record.Record:
    """What a monitor says of the same step, which is then taken."""
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    optimizer.zero_grad()
    loss_fn(model, batch()).backward()
    monitor.step(batch())
    optimizer.step()
    monitor.close()
    return monitor.records[0]


# 1: parameters that the loss holds without the model ------------------------------------------------------------------


def decayed(model: nn.Module):
    parameters = list(model.parameters())
    return lambda m, b: squared_error(m, b) + 3 * sum(p.square().sum() ** 2 for p in parameters)


class TiedByAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(4, 3), nn.Parameter(torch.zeros(4))
        self.shared = [self.encoder.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.shared[0].T, self.bias)


@each_engine
def test_parameters_that_the_loss_captured(engine) -> None:
    model, batch = network(4, 3, 1), regression()[0]
    check(decayed(model), model, lambda: batch, engine)


@each_engine
def test_parameters_tied_through_a_list(engine) -> None:
    torch.manual_seed(0)
    model, x = TiedByAList().double(), normal(6, 4)
    check(lambda m, x: (m(x) - x).square().mean(), model, lambda: x, engine)


def test_the_monitor_predicts_with_captured_parameters() -> None:
    model, batch = network(4, 3, 1), regression()[0]
    loss_fn, optimizer = decayed(model), torch.optim.SGD(model.parameters(), lr=1e-4)
    by_hand = step_by_hand(loss_fn, model, optimizer, lambda: batch)
    record = monitored_step(loss_fn, model, optimizer, lambda: batch)
    assert record.actual_decrease == pytest.approx(by_hand, rel=1e-9)
    assert record.predicted_decrease == pytest.approx(by_hand, rel=1e-3)


# 2: a forward pass that rewrites its table ----------------------------------------------------------------------------


def table(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 1)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def rows(low: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(low)
    return torch.randint(low, low + 5, (8, 3), generator=generator), normal(8, 1)


@each_engine
def test_a_table_that_is_renormalised_stays_as_it_was(engine) -> None:
    model, batch = table(3.0), rows(0)
    before = model[0].weight.detach().clone()
    ns.summarize(squared_error, model, [batch], engine=engine)
    losses_along(squared_error, model, batch, [0.0, 1.0], direction=[torch.ones_like(p) for p in model.parameters()])
    assert torch.equal(model[0].weight, before)


@each_engine
def test_a_table_within_its_norm(engine) -> None:
    model, batch = table(0.1), rows(0)
    check(squared_error, model, lambda: batch, engine)


def test_a_monitor_leaves_rows_alone_that_training_does_not_touch() -> None:
    ends = []
    for watched in (False, True):
        model = table(3.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if watched:
            ns.Monitor(model, squared_error, optimizer=optimizer, every=2).attach([rows(5), rows(5)])
        torch.manual_seed(1)
        batch = rows(0)
        for _ in range(4):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
        ends.append(model[0].weight.detach())
    assert torch.equal(*ends)


# 3 and 4: a loss that takes its batch apart ---------------------------------------------------------------------------


@each_engine
def test_a_batch_that_the_loss_overwrites(engine) -> None:
    model, (x, y) = network(4, 3, 1), regression()[0]
    kept = x.clone()
    check(lambda m, b: (m(b[0].div_(4)) - b[1]).square().mean(), model, lambda: (x.copy_(kept), y), engine)
    ns.summarize(lambda m, b: (m(b[0].div_(4)) - b[1]).square().mean(), model, [(x, y)], engine=engine)
    assert torch.equal(x, kept / 1)


def pops(model, batch) -> Tensor:
    labels = batch.pop("labels")
    return F.cross_entropy(model(batch["x"]), labels)


def labelled() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": (x[:, 0] > 0).long() + (x[:, 1] > 0).long()} for x, _ in regression()]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_loss_that_pops_its_labels(kind) -> None:
    model, batches = network(4, 5, 3), [kind(b) for b in labelled()]
    u = [torch.ones_like(p) for p in model.parameters()]
    for engine in ENGINES:
        check(pops, model, lambda: kind(labelled()[0]), engine)
        ns.summarize(pops, model, batches, engine=engine)
    along = losses_along(pops, model, batches[0], [0.0], direction=u)
    expected = pops(model, kind(labelled()[0])).item()
    assert along.flatten().tolist() == pytest.approx([expected] * 4)
    optimizer = torch.optim.Adam(model.parameters())
    assert ns.suggest_rates(pops, model, batches, optimizer, steps=3).chosen > 0
    for attached in (False, True):
        monitor = ns.Monitor(model, pops, optimizer=optimizer, every=1)
        if attached:
            monitor.attach(batches)
        pops(model, kind(labelled()[0])).backward()
        if not attached:
            monitor.step(batches[0])
        optimizer.step()
        assert monitor.counts["measured"] == 1
        assert np.isfinite(monitor.records[0].actual_decrease)
        monitor.close()
    newton = ns.NewtonSummary(model, pops, curvature_data=batches)
    for b in labelled() * 2:
        newton.zero_grad()
        pops(model, kind(b)).backward()
        newton.step()
    assert newton.counts["failed"] == 0
    assert all(list(b) == ["x", "labels"] for b in batches)


# 5: how many samples a batch has --------------------------------------------------------------------------------------


@dataclass
class Rows:
    x: Tensor


UNEQUAL = {
    "a dataclass": (lambda x: Rows(x), lambda b: b.x),
    "class weights first": (lambda x: {"weights": torch.ones(3), "x": x}, lambda b: b["x"]),
    "time first": (lambda x: (x.T[..., None], torch.zeros(len(x))), lambda b: b[0][..., 0].T),
}


@pytest.mark.parametrize("name", UNEQUAL)
@each_engine
def test_batches_count_by_their_samples(name, engine) -> None:
    make, x_of = UNEQUAL[name]
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.tensor([[0.0, 0.0]] * 9 + [[1.0, 0.0]], dtype=torch.float64)

    def measure(**given) -> ns.Summary:
        batches, u = [make(x[:9]), make(x[9:])], [torch.tensor([[1.0, 0.0]], dtype=torch.float64)]
        loss_fn = lambda m, b: m(x_of(b)).square().mean()  # noqa: E731
        return ns.summarize(loss_fn, model, batches, direction=u, engine=engine, **given)

    try:
        summaries = [measure()]
    except ValueError as error:
        assert "batch_size=" in str(error)  # noqa: PT017  (a clear error is as good as the right number)
        summaries = []
    summaries.append(measure(batch_size=lambda b: len(x_of(b))))
    for summary in summaries:
        assert summary.loss.item() == pytest.approx(0.1)
        assert summary.hessian.item() == pytest.approx(0.2)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.GRU(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][-1])


def masked_attention(m: nn.Linear, batch) -> Tensor:
    x, mask = batch
    return (torch.softmax(m(x) @ x.mT + mask, -1) @ x).mean((1, 2)).square().mean()


@pytest.mark.parametrize("slices", [2, 3])
def test_slices_are_the_whole_or_refused(slices) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    for model, loss_fn, batch in [
        (TimeFirst().double(), squared_error, (normal(8, 5, 3), normal(5, 1))),
        (nn.Linear(4, 4).double(), masked_attention, (normal(6, 6, 4), mask)),
    ]:
        u = random_direction(model)
        with pytest.raises(ValueError, match="smaller batches"):
            ns.summarize(loss_fn, model, [batch], direction=u, slices=slices)
        differences(loss_fn, model, lambda b=batch: b, u).check(
            ns.summarize(loss_fn, model, [batch], direction=u, engine="nested")
        )


# 6: complex parameters ------------------------------------------------------------------------------------------------


class Fourier(nn.Module):
    """A layer that weights the lowest frequencies, as neural operators have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[:, :3] = spectrum[:, :3] * self.weight
        return (torch.fft.irfft(out, n=x.shape[1]) + self.bias).tanh()


@each_engine
def test_complex_parameters(engine) -> None:
    torch.manual_seed(0)
    model, x = Fourier(), normal(5, 8)
    check(lambda m, x: (m(x) - x).square().mean(), model, lambda: x, engine)


@each_engine
def test_the_square_of_a_complex_number(engine) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1 + 2j], dtype=torch.complex128))

    u = [torch.tensor([1j], dtype=torch.complex128)]
    loss_fn = lambda m, b: m.w.abs().square().sum()  # noqa: E731
    summary = ns.summarize(loss_fn, One(), [torch.ones(1)], direction=u, engine=engine)
    assert [summary.gradient.item(), summary.hessian.item()] == pytest.approx([4.0, 2.0])


def test_the_optimizer_trains_complex_parameters() -> None:
    torch.manual_seed(0)
    model, data = Fourier(), [normal(5, 8) for _ in range(4)]
    loss_fn = lambda m, x: (m(x) - x.roll(1, 1).tanh()).square().mean()  # noqa: E731
    before = loss_fn(model, data[0]).item()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=data)
    for x in data * 10:
        optimizer.zero_grad()
        loss_fn(model, x).backward()
        optimizer.step()
    assert loss_fn(model, data[0]).item() < before
    assert optimizer.counts["failed"] == 0


# 7: code that asks whether gradients are wanted -----------------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        wanted = self.w.requires_grad and torch.is_grad_enabled()
        return (self.w * x).square().mean() * (1.0 if wanted else 3.0)


def encoder() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    return model, (normal(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]]))


def padded(m: nn.Module, batch) -> Tensor:
    x, padding = batch
    return m(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0).sin().exp().mean()


@pytest.mark.parametrize("kind", ["a branch", "an encoder in evaluation"])
def test_the_path_that_training_takes(kind) -> None:
    if kind == "a branch":
        model, loss_fn, batch = Asks(), lambda m, x: m(x), torch.ones(4, dtype=torch.float64)
    else:
        (model, batch), loss_fn = encoder(), padded
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    by_hand = step_by_hand(loss_fn, model, optimizer, lambda: batch)
    record = monitored_step(loss_fn, model, optimizer, lambda: batch)
    assert record.actual_decrease == pytest.approx(by_hand, rel=1e-9)
    u = [torch.ones_like(p) for p in model.parameters()]
    along = losses_along(loss_fn, model, batch, [0.0], direction=u, partition="trivial")
    assert along.item() == pytest.approx(loss_fn(model, batch).item(), rel=1e-12)


@each_engine
def test_an_encoder_with_padding_in_evaluation(engine) -> None:
    model, batch = encoder()
    inputs = random_direction(model)
    few = {name: u for name, u in inputs.items() if "layers.0.linear" in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in few)
    expected = differences(padded, model, lambda: batch, few)
    for _ in range(2):
        expected.check(ns.summarize(padded, model, [batch], direction=few, engine=engine))


# 8: a loss that differentiates by parameters --------------------------------------------------------------------------


def penalised(m: nn.Module, batch) -> Tensor:
    loss = squared_error(m, batch)
    gradients = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in gradients)


def adapted(m: nn.Module, batch) -> Tensor:
    """The loss after one step of the inner loop, as meta learning has it."""
    names, parameters = zip(*m.named_parameters(), strict=True)
    gradients = torch.autograd.grad(squared_error(m, batch), parameters, create_graph=True)
    moved = {n: p - 0.1 * g for n, p, g in zip(names, parameters, gradients, strict=True)}
    return (torch.func.functional_call(m, moved, (batch[0].flip(1),)) - batch[1]).square().mean()


@pytest.mark.parametrize("loss_fn", [penalised, adapted])
@each_engine
def test_losses_that_differentiate_by_parameters(loss_fn, engine) -> None:
    model, batch = network(4, 3, 1), regression()[0]
    check(loss_fn, model, lambda: batch, engine)


@pytest.mark.parametrize("loss_fn", [penalised, adapted])
def test_training_on_losses_that_differentiate_by_parameters(loss_fn) -> None:
    model, batches = network(4, 3, 1), regression()
    record = monitored_step(loss_fn, model, torch.optim.SGD(model.parameters(), lr=1e-3), lambda: batches[0])
    assert record.predicted_decrease == pytest.approx(record.actual_decrease, rel=0.05)
    optimizer = torch.optim.Adam(model.parameters())
    assert ns.suggest_rates(loss_fn, model, batches, optimizer, steps=3).chosen > 0
    newton = ns.NewtonSummary(model, loss_fn, curvature_data=batches)
    for b in batches * 3:
        newton.zero_grad()
        loss_fn(model, b).backward()
        newton.step()
    assert newton.counts["failed"] == 0


# 9: randomness and counters of the loss's own -------------------------------------------------------------------------


def noise_of(kind: str):
    if kind == "torch":
        torchs = torch.Generator().manual_seed(7)
        return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=torchs)
    numpys = np.random.default_rng(7)
    return lambda x: torch.from_numpy(numpys.standard_normal(tuple(x.shape)))


class Counting(nn.Module):
    """Counts its calls, and weighs a term by them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.log = network(4, 3, 1), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        return self.inner(x) * (1 + 0.01 * self.calls)


class Metric:
    """Keeps its states as torchmetrics does: in plain attributes."""

    def __init__(self) -> None:
        self.total, self.seen = torch.zeros(()), 0

    def update(self, x: Tensor) -> None:
        self.total, self.seen = self.total + x.detach().sum(), self.seen + len(x)


@pytest.mark.parametrize("kind", ["torch", "numpy", "a counter", "a metric"])
@pytest.mark.parametrize("beside", ["monitor", "summarize", "losses_along"])
def test_what_the_loss_owns_is_as_if_nothing_was_measured(kind, beside) -> None:
    def run(watched: bool):
        model, batches = Counting() if kind == "a counter" else network(4, 3, 1), regression()
        noise, metric = noise_of(kind) if kind in ("torch", "numpy") else torch.zeros_like, Metric()

        def loss_fn(m, batch) -> Tensor:
            out = m(batch[0] + noise(batch[0]))
            if kind == "a metric":
                metric.update(out)
            return (out - batch[1]).square().mean()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if watched and beside == "monitor":
            ns.Monitor(model, loss_fn, optimizer=optimizer, every=2).attach(batches)
        for batch in batches * 2:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            if watched and beside == "summarize":
                ns.summarize(loss_fn, model, [batch])
            if watched and beside == "losses_along":
                losses_along(loss_fn, model, batch, [1.0], direction=[torch.ones_like(p) for p in model.parameters()])
            optimizer.step()
        own = (metric.total, metric.seen, getattr(model, "calls", 0), getattr(model, "log", []))
        return [p.detach() for p in model.parameters()], own

    (alone, owned), (beside_it, theirs) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside_it, strict=True))
    assert owned == theirs


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_actual_decrease_meets_the_same_draws(kind) -> None:
    model, batch, noise = network(4, 3, 1), regression()[0], noise_of(kind)
    loss_fn = lambda m, b: (m(b[0] + noise(b[0])) - b[1]).square().mean()  # noqa: E731
    record = monitored_step(loss_fn, model, torch.optim.SGD(model.parameters(), lr=1e-4), lambda: batch)
    assert record.predicted_decrease == pytest.approx(record.actual_decrease, rel=0.01)


# 13: what torch differentiates once only ------------------------------------------------------------------------------


def once_only() -> dict:
    torch.manual_seed(0)
    x, target, bag = normal(6, 4), torch.tensor([1, 2]), nn.EmbeddingBag(9, 4).double()
    ctc = lambda m, x: F.ctc_loss(m(x).log_softmax(-1), target, torch.tensor(6), torch.tensor(2))  # noqa: E731
    return {
        "EmbeddingBag": (
            nn.Sequential(bag, nn.Tanh(), nn.Linear(4, 1)).double(),
            lambda m, b: m(b).square().mean(),
            torch.randint(9, (6, 3)),
            "bag",
        ),
        "cdist": (network(4, 3), lambda m, x: torch.cdist(m(x), m(x.flip(1)) + 2).exp().mean(), x, "cdist"),
        "CTC": (network(4, 3), ctc, x, "ctc"),
    }


@pytest.mark.parametrize("name", ["EmbeddingBag", "cdist", "CTC"])
@each_engine
def test_operations_without_a_second_derivative_in_torch(name, engine) -> None:
    model, loss_fn, batch, word = once_only()[name]
    check_or_refused(loss_fn, model, lambda: batch, engine, word)


# 14: an attribute that changes between measurements -------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(normal(2, 4)), nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * x @ self.a.T @ self.b.T


@each_engine
def test_an_attribute_that_changes_nothing_but_the_curvature(engine) -> None:
    torch.manual_seed(0)
    model, batch = Adapter(), regression()[0]
    for model.scaling in (1.0, 16.0, 1.0):
        check(squared_error, model, lambda: batch, engine)


# 17 and 18: batches of all makes --------------------------------------------------------------------------------------


def test_names_in_a_batch_make_no_new_graph(monkeypatch) -> None:
    made, lower = [], forward.lower
    monkeypatch.setattr(forward, "lower", lambda *args: made.append(1) or lower(*args))
    model, engine = network(4, 3, 1), ns.measure.ForwardEngine()
    for i, (x, y) in enumerate(regression()):
        batch = {"x": x, "y": y, "files": [f"{i}-{j}.png" for j in range(len(x))], "epoch": i, "id": f"batch {i}"}
        ns.summarize(lambda m, b: squared_error(m, (b["x"], b["y"])), model, [batch], engine=engine)
    assert len(made) == 1


def test_a_users_own_pytree_registration_comes_after_ours() -> None:
    class Own(UserDict):
        pass

    model, (x, y) = network(4, 3, 1), regression()[0]
    ns.summarize(lambda m, b: squared_error(m, (b["x"], b["y"])), model, [Own(x=x, y=y)])
    assert pytree.tree_leaves(Own(x=x)) != [x]  # it is a leaf, as before
    pytree.register_pytree_node(Own, lambda d: (list(d.values()), list(d)), lambda v, k: Own(zip(k, v, strict=True)))
    pytree._deregister_pytree_node(Own)


# 21 and 22: functions with a backward of their own --------------------------------------------------------------------


class HandWritten(torch.autograd.Function):
    """SiLU, as kernels written by hand come."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


@each_engine
def test_a_function_that_is_differentiated_once(engine) -> None:
    model, batch = network(4, 3, 1), regression()[0]
    loss_fn = lambda m, b: (HandWritten.apply(m(b[0])) - b[1]).square().mean()  # noqa: E731
    check_or_refused(loss_fn, model, lambda: batch, engine, "HandWritten")


def test_nested_passes_alone_recommend_the_other_engine() -> None:
    model, batch = network(4, 3, 1), regression()[0]
    loss_fn = lambda m, b: (HandWritten.apply(m(b[0])) - b[1]).square().mean()  # noqa: E731
    with pytest.raises(Refusal, match="differentiated twice, or try engine='forward'"):
        ns.summarize(loss_fn, model, [batch], engine="nested")


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-2, 2)

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_straight_through_clamp_on_later_data() -> None:
    model = network(3, 8, 1)
    loss_fn = lambda m, b: (StraightThrough.apply(3 * m(b[0])) - b[1]).square().mean()  # noqa: E731
    x, y, u = normal(50, 3), normal(50, 1), random_direction(model)
    u = {name: 0.1 * v for name, v in u.items()}
    engine, fast = ns.measure.AutoEngine(), ns.measure.ForwardEngine()
    for batch in [(0.02 * x, y), (5 * x, y)]:
        for p in model.parameters():
            p.grad = None
        loss_fn(model, batch).backward()  # what training sees
        slopes = torch.stack([(p.grad * u[name]).sum() for name, p in model.named_parameters()])
        torch.testing.assert_close(ns.summarize(loss_fn, model, [batch], direction=u, engine=engine).gradient, slopes)
        try:
            summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=fast)
        except Refusal as refusal:
            assert "another gradient for '0.weight'" in str(refusal)  # noqa: PT017
        else:
            torch.testing.assert_close(summary.gradient, slopes)
    assert bool((3 * model(5 * x)).abs().gt(2).any())


# 24: a teacher with statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_teachers_statistics_stay(engine) -> None:
    torch.manual_seed(0)
    model, teacher = network(4, 3, 1), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    before = [b.clone() for b in teacher.buffers()]
    x, u = regression()[0][0], random_direction(model)

    def distilled(m, x) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return (m(x) - target).square().mean()

    ns.summarize(distilled, model, [x], engine=engine)
    losses_along(distilled, model, x, [1.0], direction=list(u.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    (m := model(x).square().mean()).backward()
    assert m > 0
    monitor = ns.Monitor(model, distilled, optimizer=optimizer, every=1)
    monitor.step(x)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.buffers(), strict=True))
    check(distilled, model, lambda: x, engine)


# 25 and 26: what torch's own errors end -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 1))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@each_engine
def test_checkpoints_around_a_normalisation(reentrant, engine) -> None:
    torch.manual_seed(0)
    model, batch = Checkpointed(reentrant).double(), regression()[0]
    check(squared_error, model, lambda: batch, engine)


def assigned(m: nn.Module, batch) -> Tensor:
    z = torch.zeros(8, 3, dtype=torch.float64)
    z[:, 1:2] = m(batch[0])
    return (z.tanh() * batch[0][:, :3] - batch[1]).square().mean()


@each_engine
def test_slices_that_are_assigned_to(engine) -> None:
    model, batch = network(4, 3, 1), regression()[0]
    check(assigned, model, lambda: batch, engine)


class Unmeasurable(torch.autograd.Function):
    """Sines, out of torch's sight, and with a backward that is differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.numpy()))


def test_a_monitor_ends_no_training() -> None:
    def train(watched: bool) -> list[Tensor]:
        model, batches = network(4, 3, 1), regression()
        loss_fn = lambda m, b: (Unmeasurable.apply(m(b[0])) - b[1]).square().mean()  # noqa: E731
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if watched:
            monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1).attach(batches)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches:
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
        if watched:
            messages = [str(w.message) for w in caught if "Monitor" in str(w.message)]
            assert len(messages) == 1
            assert "Unmeasurable" in messages[0]
            assert monitor.counts["disabled"] == 1
            assert monitor.counts["measured"] == 0
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


# The optimizer: what is gone is forgotten, and what it does not do is said -------------------------------------------


def train(optimizer, model, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()


def test_a_step_without_gradients_goes_nowhere_after_a_measurement() -> None:
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(model, squared_error)
    squared_error(model, batches[0]).backward()
    optimizer.measure(batches[0])
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nothing_is_measured_at_averaged_weights() -> None:
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(model, squared_error, curvature_data=batches)
    train(optimizer, model, batches)
    optimizer._comparison.adaptation.advantage = 1.0
    optimizer.eval()
    squared_error(model, batches[0]).backward()
    for call in (optimizer.step, lambda: optimizer.measure(batches[0])):
        with pytest.raises(RuntimeError, match=r"call the optimizer's train\(\) before its"):
            call()
    optimizer.train()
    optimizer.measure(batches[0])


def test_steps_beyond_the_last_say_so() -> None:
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(model, squared_error, curvature_data=batches, steps=4)
    train(optimizer, model, batches)
    with pytest.warns(UserWarning, match="the 4 steps of steps= were taken, .* the run is over, .* a larger steps="):
        train(optimizer, model, batches[:1])
    assert set(optimizer.rates.values()) == {0.0}
    train(optimizer, model, batches)  # no second warning


# 10: loaders that transform what they load ----------------------------------------------------------------------------


class Doubling(DataLoader):
    def __iter__(self):
        return ([2 * x for x in batch] for batch in super().__iter__())


@pytest.mark.parametrize("beside", ["the optimizer", "the monitor", "suggest_rates", "summarize"])
def test_a_loader_that_transforms_its_batches(beside) -> None:
    """A line through the origin, of slope 2: what its loader doubles is 2 or 4, and nothing else may be measured on."""
    model, seen = nn.Linear(1, 1, bias=False).double(), set()
    x = torch.tensor([[1.0], [2.0]] * 4, dtype=torch.float64)
    loader = Doubling(TensorDataset(x, 2 * x), batch_size=2)

    def loss_fn(m, b):
        seen.update(b[0].flatten().tolist())
        return squared_error(m, b)

    if beside == "summarize":
        assert ns.summarize(loss_fn, model, loader, direction=[torch.ones(1, 1)]).hessian.item() == pytest.approx(20.0)
    elif beside == "suggest_rates":
        ns.suggest_rates(loss_fn, model, loader, torch.optim.SGD(model.parameters(), lr=0.01), steps=3)
    else:
        theirs = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader) if beside == "the optimizer" else theirs
        if beside == "the monitor":
            ns.Monitor(model, loss_fn, optimizer=theirs, every=1).attach(loader)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert seen == {2.0, 4.0}


# 11: models that deepcopy refuses, optimizers that pickling cuts ------------------------------------------------------


class Keeping(nn.Module):
    """Keeps a tensor with a graph, and has the old kind of weight normalisation: no deep copy of either."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a = nn.utils.weight_norm(nn.Linear(4, 8))
        self.b = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.a(x).tanh()
        return self.b(self.hidden)


def test_rates_are_suggested_without_a_copy_of_the_model() -> None:
    model, batches = Keeping().double(), regression()
    squared_error(model, batches[0]).backward()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    suggested = ns.suggest_rates(squared_error, model, batches, torch.optim.Adam(model.parameters(), lr=1e-4), steps=30)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    start = sum(float(squared_error(model, b).detach()) for b in batches)
    optimizer = torch.optim.Adam(suggested.param_groups)
    for batch in batches * 8:
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()
    assert sum(float(squared_error(model, b).detach()) for b in batches) < 0.3 * start


class Signed(torch.optim.SGD):
    """Takes signs, unless what it was made with is lost: torch's ``__getstate__`` leaves its attributes out."""

    sign, seen = False, set()

    def __init__(self, parameters, lr=1e-3) -> None:
        super().__init__(parameters, lr)
        self.sign = True

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.seen.add(self.sign)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad.sign() if self.sign else p.grad) * group["lr"])


def test_rates_are_suggested_for_the_optimizer_that_it_is() -> None:
    model = network(4, 3, 1)
    ns.suggest_rates(squared_error, model, regression(), Signed(model.parameters()), steps=4)
    assert Signed.seen == {True}


# 12: optimizers whose rate is not a number, which need a closure, or run no hooks -------------------------------------


class Around(torch.optim.Optimizer):
    """An optimizer around another whose ``__init__`` does not call torch's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure=None):
        return self.optimizer.step(closure)


class RelativeSteps(torch.optim.SGD):
    """Sets its rates itself, as Adafactor does."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, 0.1)
        for group in self.param_groups:
            group["lr"] = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * p.grad)


class AroundWithHooks(Around):
    """Which can be registered, and never run."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


def test_optimizers_without_a_rate_are_refused_where_a_rate_is_asked_for() -> None:
    model, batches = network(4, 3, 1), regression()
    with pytest.raises(ValueError, match=r"is None: the optimizer sets it by itself; give it one, lr="):
        ns.Monitor(model, squared_error, optimizer=RelativeSteps(model.parameters()))
    with pytest.raises(ValueError, match=r"is None: the optimizer sets it by itself; give it one, lr="):
        ns.suggest_rates(squared_error, model, batches, RelativeSteps(model.parameters()))


def test_the_step_of_an_optimizer_without_a_rate_is_a_direction() -> None:
    """A rate of 1 repeats its step, as far as these rates are from 1."""
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(
        model, squared_error, curvature_data=batches, direction=RelativeSteps(model.parameters()), compare_every=0
    )
    before = [p.detach().clone() for p in model.parameters()]
    squared_error(model, batches[0]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - optimizer.rates["all"] * 0.01 * g)


def test_optimizers_that_evaluate_the_loss_are_refused() -> None:
    model, batches = network(4, 3, 1), regression()
    lbfgs = torch.optim.LBFGS(model.parameters())
    squared_error(model, batches[0]).backward()
    for use in (
        lambda: ns.Monitor(model, squared_error, optimizer=lbfgs),
        lambda: ns.suggest_rates(squared_error, model, batches, lbfgs),
        lambda: ns.summarize(squared_error, model, batches, direction=lbfgs),
        lambda: ns.NewtonSummary(model, squared_error, direction=lbfgs),
    ):
        with pytest.raises(ValueError, match="LBFGS evaluates the loss in its step"):
            use()


@pytest.mark.parametrize("kind", [Around, AroundWithHooks])
def test_optimizers_that_run_no_hooks_are_refused_by_the_monitor(kind) -> None:
    model = network(4, 3, 1)
    with pytest.raises(TypeError, match=f"{kind.__name__} runs no hooks.*watch the Adam inside it"):
        ns.Monitor(model, squared_error, optimizer=kind(torch.optim.Adam(model.parameters())))


@pytest.mark.parametrize("kind", [Around, AroundWithHooks])
def test_rates_are_suggested_for_optimizers_that_run_no_hooks(kind) -> None:
    model, batches = network(4, 3, 1), regression()
    inner = torch.optim.Adam(model.parameters(), lr=1e-3)
    alone = ns.suggest_rates(squared_error, model, batches, inner, steps=6)
    assert ns.suggest_rates(squared_error, model, batches, kind(inner), steps=6).rates == pytest.approx(alone.rates)


# 15: parameters unfrozen later ----------------------------------------------------------------------------------------


def test_a_parameter_unfrozen_in_between_is_named() -> None:
    model, batches = network(4, 3, 1), regression()
    model[0].weight.requires_grad_(False)
    optimizer = ns.NewtonSummary(model, squared_error, curvature_data=batches)
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = ns.Monitor(model, squared_error, optimizer=other, every=1)

    def step() -> None:
        optimizer.zero_grad()
        squared_error(model, batches[0]).backward()
        monitor.measure([batches[0]])
        optimizer.step()

    step()
    model[0].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'0.weight', of shape \(3, 4\), is not .* by this") as caught:
        step()
    found = {str(w.message).split(" is not ")[1].split(":")[0] for w in caught}
    assert found == {"measured by this Monitor", "trained by this optimizer"}
    step()  # once is enough


def test_a_parameter_that_comes_later_is_named() -> None:
    """A head that is replaced, pruning, adapters."""
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(model, squared_error, curvature_data=batches)
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = ns.Monitor(model, squared_error, optimizer=other, every=1)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            squared_error(model, batches[0]).backward()
            monitor.measure([batches[0]])
            optimizer.step()

    steps(1)
    model[0].extra = nn.Linear(2, 2).double().requires_grad_(False)
    model[0].bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.warns(
        UserWarning, match="'0.bias'.*it was not in the model when that was made; make a new one"
    ) as caught:
        steps(10)
    found = {str(w.message).split(" is not ")[1].split(":")[0] for w in caught}
    assert found == {"measured by this Monitor", "trained by this optimizer"}
    assert len(caught) == 2
    steps(10)  # once is enough
    model[0].extra.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="'0.extra.weight'.*: it was frozen when that was made") as caught:
        steps(1)
    assert len(caught) == 2
    model[0].more = nn.ParameterList(torch.zeros(2, dtype=torch.float64) for _ in range(3))
    with pytest.warns(UserWarning, match=r"'0.more.0'.* and 2 more are not .*: they were not in the model") as caught:
        steps(10)
    assert len(caught) == 2  # and not one for each
    twin_model, twin = copy.deepcopy((model, optimizer))
    twin.zero_grad()
    squared_error(twin_model, batches[0]).backward()
    twin.step()  # a copy knows the same parameters, those of the copy


# 16: losses that are shifted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [100.0, -100.0, -0.5])
def test_what_is_added_to_a_loss_changes_no_suggestion(shift) -> None:
    def suggested(add: float):
        model = network(4, 8, 1)
        loss_fn = lambda m, b: squared_error(m, b) + add  # noqa: E731
        return ns.suggest_rates(loss_fn, model, regression(8, 32), torch.optim.Adam(model.parameters()), steps=40)

    plain, shifted = suggested(0.0), suggested(shift)
    assert shifted.chosen == plain.chosen
    assert shifted.rates == pytest.approx(plain.rates, rel=1e-9)


# 19: gradients that are cleared by others -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["set to none", "zeroed", "replaced", "changed"])
def test_no_step_is_along_gradients_that_are_gone(how) -> None:
    """Along the gradient itself: after a skipped step the weights move along the new one, or not at all."""
    model, batches = network(4, 3, 1), regression()
    optimizer = ns.NewtonSummary(model, squared_error, direction="gradient", lr=0.1)
    squared_error(model, batches[0]).backward()
    optimizer.measure(batches[1])
    if how == "replaced":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    elif how == "changed":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:  # the step is skipped
        model.zero_grad(set_to_none=how == "set to none")
        squared_error(model, batches[2]).backward()
    before, gradients = [p.detach().clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    (rate,) = optimizer.rates.values()
    assert rate > 0
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - rate * g, rtol=1e-9, atol=1e-12)


# 20: a state that was saved with batches to measure on ----------------------------------------------------------------


def test_a_state_with_comparisons_is_not_loaded_without() -> None:
    model, batches = network(4, 3, 1), regression()
    make = lambda **options: ns.NewtonSummary(model, squared_error, direction="nadam", **options)  # noqa: E731
    searching, explicit = make(curvature_data=batches), make()
    for batch in batches:
        searching.zero_grad()
        squared_error(model, batch).backward()
        searching.step()
    explicit.measure(batches[0])
    rates = explicit.rates
    with pytest.raises(ValueError, match=r"the state has a 'comparison', this optimizer has none.*curvature_data"):
        explicit.load_state_dict(searching.state_dict())
    with pytest.raises(ValueError, match=r"this optimizer has a 'comparison', the state has none.*curvature_data"):
        searching.load_state_dict(explicit.state_dict())
    assert explicit.rates == rates
    again = make(curvature_data=batches)
    again.load_state_dict(searching.state_dict())
    assert again.rates == searching.rates
    measuring, other = make(curvature_data=batches, compare_every=0), make()
    measuring.step()
    other.load_state_dict(measuring.state_dict())
    assert other.rates == measuring.rates != {}


# 23: third derivatives through a group normalisation of channels-last data --------------------------------------------


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.n, self.m = nn.GroupNorm(2, 4), nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(F.silu(self.n(self.a(x)))))


@each_engine
def test_group_normalisation_of_channels_last_data(engine) -> None:
    model = Grouped().double().to(memory_format=torch.channels_last)
    x, y = normal(2, 2, 4, 4).contiguous(memory_format=torch.channels_last), normal(2, 2, 4, 4)
    check(squared_error, model, lambda: (x, y), engine)


# Small and sharp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, 0, 1.5, math.inf])
@pytest.mark.parametrize("what", ["every", "window", "history"])
def test_a_monitor_counts_in_whole_numbers(what, value) -> None:
    model = network(4, 3, 1)
    with pytest.raises(ValueError, match=f"{what} must be a whole number from 1 on"):
        ns.Monitor(model, squared_error, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **{what: value})


@pytest.mark.parametrize("warm_up", ["a scheduler", "by hand", None])
@pytest.mark.parametrize("search", [None, 0])
def test_the_first_step_is_held_to_the_loss_at_the_rate_after_a_warm_up(warm_up, search) -> None:
    """A loss that turns up steeply outside of a narrow bowl, so that the model's step must be halved."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(1, dtype=torch.float64))})

    def loss_fn(m, batch):  # at 1 its slope is 1.8 and its curvature 0.2: Newton's step is to −8
        d = m["w"] - 1
        return (1.8 * d + 0.1 * d**2 + d**4).sum()

    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=[None], direction="gradient", compare_every=search)
    if warm_up == "a scheduler":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 100)
    elif warm_up == "by hand":
        optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.param_groups[0]["lr"] == (1.0 if warm_up is None else 0.0)
    loss_fn(model, None).backward()
    optimizer._comparison = None if search == 0 else optimizer._comparison
    optimizer.step()
    assert optimizer.counts["halved"] == 4


# What is computed without gradients into a buffer ---------------------------------------------------------------------


@each_engine
def test_the_power_iteration_of_spectral_norms(engine) -> None:
    """Its vectors count as constants: those that an evaluation by hand has left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 1)).double()
    batch, u = regression()[0], random_direction(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    summary = ns.summarize(squared_error, model, [batch], direction=u, engine=engine)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    squared_error(model, batch)  # iterates once
    state = model[0].parametrizations.weight[0]
    left, right = state._u.clone(), state._v.clone()
    values = dict(model.named_parameters())

    def phi(eta: Tensor) -> Tensor:
        moved = {name: p.detach() + e * u[name] for (name, p), e in zip(values.items(), eta, strict=True)}
        weight = moved["0.parametrizations.weight.original"]
        hidden = F.linear(batch[0], weight / (left @ weight @ right), moved["0.bias"]).tanh()
        return (F.linear(hidden, moved["2.weight"], moved["2.bias"]) - batch[1]).square().mean()

    eta = torch.zeros(len(values), dtype=torch.float64)
    torch.testing.assert_close(summary.gradient, torch.func.grad(phi)(eta))
    torch.testing.assert_close(summary.hessian, torch.func.hessian(phi)(eta))
