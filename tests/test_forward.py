"""The forward engine: exact on every kind of model, or a refusal that names the reason."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import warnings
import weakref
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import Reversing
from models import CASES, Case, Custom, cross_entropy, plain_normalisation
from reference import dense_derivatives
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import newton_summary as ns
from newton_summary.measure import (
    AutoEngine,
    ForwardEngine,
    Loss,
    NestedEngine,
    Refusal,
    agreement,
    arena,
    forward,
    pull,
)
from newton_summary.measure.gradient import Gradient
from newton_summary.measure.recorded_line import RecordedLine
from newton_summary.measure.rules import bilinear

GENERAL = {  # operations that no rule of their own takes
    "general_operations": {"hypot.default"},
}
NOT_DENSE = {"pinn_by_autograd", "checkpointed", "gru", "lstm"}  # torch.func does not take them


def direction_of(partition, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in partition.parameters
    ]


def measure(engine, case: Case, partition=None, order=3, third="diagonal", seed=3):
    partition = partition or ns.Partition.canonical(case.model)
    torch.manual_seed(seed)
    loss = Loss(case.loss_fn, case.model)
    return engine.measure(loss, case.batch, partition, direction_of(partition), order, third)


def nested(case, monkeypatch, **kwargs):
    with plain_normalisation(monkeypatch):
        return measure(NestedEngine(), case, **kwargs)


def error(got, expected):
    """The largest error of an entry relative to the geometric mean of the largest ones for each of its groups."""
    if expected.dim() == 1:
        return float(((got - expected).abs() / expected.abs().clamp_min(1e-6 * expected.abs().max())).max())
    size = expected.abs().amax(tuple(range(1, expected.dim())))
    size = size.clamp_min(1e-8 * size.max())
    scale = 1.0
    for axis in range(expected.dim()):
        scale = scale * size.pow(1 / expected.dim()).view(-1, *[1] * (expected.dim() - 1 - axis))
    return float(((got - expected).abs() / scale).max())


def assert_close(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got.loss, expected.loss, rtol=tolerance, atol=0)
    for name in ("gradient", "hessian", "third"):
        wanted = getattr(expected, name)
        if wanted is not None and bool(wanted.any()):
            assert error(getattr(got, name), wanted) < tolerance, name


@pytest.fixture
def no_nested(monkeypatch):
    def refuse(*args):
        raise AssertionError("nested differentiation was called")

    monkeypatch.setattr(NestedEngine, "measure", refuse)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_nested_differentiation(name, monkeypatch):
    case = CASES[name]()
    got = measure(ForwardEngine(), case)
    tolerance = 1e-7 if name == "binary_cross_entropy_of_probabilities" else 1e-9  # torch's backward adds 1e-12 there
    assert_close(got, nested(case, monkeypatch), tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_DENSE])
def test_agrees_with_dense_derivatives_of_phi(name, monkeypatch, no_nested):
    monkeypatch.setattr(arena, "_SMALLEST", 0)  # tangents are overwritten in place, as large ones are
    case = CASES[name]()
    partition = ns.Partition.canonical(case.model)
    got = measure(ForwardEngine(), case)

    def seeded(model, batch):
        torch.manual_seed(3)
        return case.loss_fn(model, batch)

    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # torch.func does not let it count
    with plain_normalisation(monkeypatch), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop")
        _, g, h, third = dense_derivatives(seeded, case.model, case.batch, partition, direction_of(partition), 3)
    third = torch.einsum("sss->s", third)
    expected = ns.Summary(loss=got.loss, gradient=g, hessian=h, third=third, names=partition.names)
    assert_close(got, expected, 1e-7 if name == "binary_cross_entropy_of_probabilities" else 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_operations_take_rules_of_their_own(name, no_nested):
    engine, case = ForwardEngine(), CASES[name]()
    measure(engine, case)
    kinds = engine.kinds(Loss(case.loss_fn, case.model))
    assert {op for op, kind in kinds.items() if kind == "general"} == GENERAL.get(name, set())


def test_kinds_of_rules_of_an_mlp():
    engine, case = ForwardEngine(), CASES["mlp"]()
    measure(engine, case)
    kinds = engine.kinds(Loss(case.loss_fn, case.model))
    assert kinds["addmm.default"] == kinds["mul.Tensor"] == "multilinear"
    assert (kinds["tanh.default"], kinds["_log_softmax.default"]) == ("elementwise", "closed form")
    assert kinds["t.default"] == kinds["gather.default"] == "linear"


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg", "residual_training", "gpt", "lstm", "autoencoder"])
def test_single_precision(name, monkeypatch):
    exact = measure(ForwardEngine(), CASES[name]())
    single = measure(ForwardEngine(), CASES[name](torch.float32))
    if name == "gpt":  # other random numbers for dropout
        exact = nested(CASES[name](torch.float32), monkeypatch)
    for attribute in ("gradient", "hessian", "third"):
        assert torch.linalg.vector_norm(getattr(single, attribute) - getattr(exact, attribute)) < 1e-3 * (
            torch.linalg.vector_norm(getattr(exact, attribute))
        )


@pytest.mark.parametrize("build", ["trivial", "discrete", "by_kind", "chunks"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "shared_weights", "tensor_acrobatics"])
def test_partitions(name, build, monkeypatch):
    case = CASES[name]()
    if build == "discrete" and name in ("lenet", "mlp"):
        case = Case(nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 4)), cross_entropy, CASES["mlp"]().batch)
        case.model.double()
    arguments = (1,) if build == "chunks" else ()
    partition = getattr(ns.Partition, build)(case.model, *arguments)
    assert_close(measure(ForwardEngine(), case, partition), nested(case, monkeypatch, partition=partition))


@pytest.mark.parametrize("joined", [torch.cat, torch.stack])
@pytest.mark.parametrize("curve", [torch.tanh, lambda h: F.layer_norm(h, h.shape[-1:])])
@pytest.mark.parametrize(
    "groups", [{"x": ["0", "2"], "y": ["1"]}, {"x": ["1"], "y": ["2", "0"]}, {"x": ["2", "1"], "y": ["0"]}]
)
def test_tangents_that_bend_before_they_meet_others(joined, curve, groups) -> None:
    """The first piece is straight along its group, so that second derivatives come in another order than first ones."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(3, dtype=torch.float64) for _ in range(3)])
    u, weights = [torch.randn_like(p) for p in model], torch.arange(1.0, 10, dtype=torch.float64)

    def loss_fn(m, _):
        joint = joined([m[0] * 1, m[1].sin(), m[2].sin() * m[0]])
        return (curve(joint).flatten().square() * weights).sum()

    partition = ns.Partition(groups, model)
    got, expected = (
        ns.summarize(loss_fn, model, [1], partition=partition, direction=u, engine=e) for e in ("forward", "nested")
    )
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)


@pytest.mark.parametrize("name", CASES)
def test_all_of_the_third_order(name, monkeypatch):
    case = CASES[name]()
    if len(list(case.model.parameters())) > 12:  # S²/2 nested passes take long
        partition = ns.Partition.by_module(case.model)
    else:
        partition = ns.Partition.canonical(case.model)
    got = measure(ForwardEngine(), case, partition, third="full")
    expected = nested(case, monkeypatch, partition=partition, third="full")
    assert_close(got, expected, 1e-7 if name == "binary_cross_entropy_of_probabilities" else 1e-9)


def test_the_third_order_in_chunks_of_groups(monkeypatch):
    case = CASES["lenet"]()
    whole = measure(ForwardEngine(), case, third="full")
    monkeypatch.setattr(pull, "_PULLED", 1)
    assert_close(measure(ForwardEngine(), case, third="full"), whole, 1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_lower_orders(order):
    case, engine = CASES["lenet"](), ForwardEngine()
    for _ in range(2):  # a new graph, a known graph
        got, expected = measure(engine, case, order=order), measure(NestedEngine(), case, order=order)
        assert_close(got, expected)
        assert got.third is None
        assert (got.hessian is None) == (order == 1)


def test_a_loss_that_autograd_differentiates_only_once():
    def loss(m, x, hard=F.hardsigmoid):
        return hard(x @ m.a).sin().sum()

    x = torch.randn(5, 4, dtype=torch.float64)
    case = Case(Custom(a=(4, 3)).double(), loss, x)
    got = measure(ForwardEngine(), case)
    twin = Case(case.model, lambda m, x: loss(m, x, lambda z: (z / 6 + 0.5).clamp(0, 1)), x)
    assert_close(got, measure(NestedEngine(), twin))


# What it may not change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual_training", "gpt", "lstm"])
def test_nothing_of_the_users_changes(name):
    case, engine = CASES[name](), ForwardEngine()
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(case.model)
    batch = copy.deepcopy(case.batch)
    for _ in range(2):
        torch.manual_seed(7)
        state = torch.get_rng_state()
        with torch.no_grad():
            engine.measure(
                Loss(case.loss_fn, case.model),
                case.batch,
                partition := ns.Partition.canonical(case.model),
                direction_of(partition),
                3,
                "diagonal",
            )
        assert torch.equal(state, torch.get_rng_state())
    for (key, old), new in zip(before.state_dict().items(), case.model.state_dict().values(), strict=True):
        assert torch.equal(old, new), key
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in case.model.parameters())
    assert all(a.training == b.training for a, b in zip(before.modules(), case.model.modules(), strict=True))
    torch.testing.assert_close(batch, case.batch, rtol=0, atol=0)


def test_dead_models_are_not_kept():
    def capturing(model):
        return lambda m, batch: cross_entropy(m, batch) + 0.0 * len(list(model.children()))

    engine, case = ForwardEngine(), CASES["mlp"]()
    case.loss_fn = capturing(case.model)
    measure(engine, case)
    alive = weakref.ref(case.model)
    del case
    gc.collect()
    assert alive() is None
    assert len(engine) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copied_engine_starts_anew(copied):
    case, engine = CASES["mlp"](), AutoEngine(ForwardEngine(graphs=3))
    expected = measure(engine, case)
    other = copied(engine)
    assert (len(other.forward), other.forward.graphs) == (0, 3)
    assert_close(measure(other, case), expected)


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch):
    """Counts how often recorded operations are lowered."""
    counted = []
    original = forward.lower

    def lower(*args):
        counted.append(args)
        return original(*args)

    monkeypatch.setattr(forward, "lower", lower)
    return counted


def test_graphs_are_kept_by_what_was_recorded(traces):
    case, engine = CASES["gpt"](), ForwardEngine()
    for _ in range(3):
        measure(engine, case)
    assert len(traces) == 1
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(0.9)
    measure(engine, Case(case.model, case.loss_fn, case.batch.clone()), seed=4)
    assert len(traces) == 1
    measure(engine, Case(case.model, case.loss_fn, case.batch[:2]))
    assert len(traces) == 2
    case.model.eval()
    measure(engine, case)
    assert len(traces) == 3
    measure(engine, Case(case.model, lambda m, b: case.loss_fn(m, b), case.batch))
    assert len(traces) == 3


def test_a_lambda_made_anew_is_the_same_function(traces):
    case, engine = CASES["mlp"](), ForwardEngine()
    for factor in (1.0, 1.0, 2.0):
        measure(engine, Case(case.model, lambda m, b, factor=factor: factor * cross_entropy(m, b), case.batch))
    assert len(traces) == 2


def test_the_cache_is_bounded(traces):
    case, engine = CASES["mlp"](), ForwardEngine(graphs=2)
    for size in (3, 4, 5, 3):
        measure(engine, Case(case.model, case.loss_fn, (case.batch[0][:size], case.batch[1][:size])))
    assert len(traces) == 4
    assert len(engine) == 2


def test_a_captured_number_and_a_captured_tensor_may_change(traces):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    captured = {"weight": 0.1, "target": torch.ones(2, dtype=torch.float64)}

    def loss(m, x):
        return (m(x) - captured["target"]).square().mean() + captured["weight"] * m(x).exp().mean()

    case, engine = Case(model, loss, torch.randn(5, 3, dtype=torch.float64)), ForwardEngine()
    for key, value in [("weight", 0.1), ("weight", 0.7), ("target", torch.zeros(2, dtype=torch.float64))]:
        captured[key] = value
        assert_close(measure(engine, case), measure(NestedEngine(), case))
    assert len(traces) == 2  # a tensor is data, a number is part of an operation


def test_shapes_may_depend_on_the_data(traces):
    def loss(m, x):
        h = (x @ m.a).tanh()
        return h[h > 0].square().sum() / len(h[h > 0]) + h[x[:, 0] > 0].view(-1).exp().mean()

    case, engine = Case(Custom(a=(4, 3)).double(), loss, torch.randn(9, 4, dtype=torch.float64)), ForwardEngine()
    for sign in (1, -1):
        case.batch = case.batch * sign + sign
        assert_close(measure(engine, case), measure(NestedEngine(), case))
    assert len(traces) == 2


# Refusals -------------------------------------------------------------------------------------------------------------


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def custom_function(m, x):
    return Rounded.apply((x @ m.a).tanh()).square().sum() + (x @ m.a).sum()


def fourier(m, x):
    return torch.fft.fft((x @ m.a).tanh()).atan().abs().square().sum()


def incomplete_gamma(m, x):
    return torch.special.gammainc(torch.tensor(2.0, dtype=x.dtype), (x @ m.a).exp()).sum()


REFUSED = {
    custom_function: "another gradient for 'a'",
    fourier: "complex",
    incomplete_gamma: "igamma",
}


def test_nested_tensors_are_refused_with_what_to_use_in_their_place():
    def loss_fn(m, x):
        rows = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
        return (rows @ m.a).to_padded_tensor(0.0).square().sum()

    case = Case(Custom(a=(4, 3)).double(), loss_fn, torch.randn(5, 4, dtype=torch.float64))
    with pytest.raises(Refusal, match=r"nested|jagged") as refused:
        measure(ForwardEngine(), case)
    assert "use a dense one" in str(refused.value)
    with pytest.raises(Refusal, match="no engine can") as refused:  # and nothing was measured, slower or not
        measure(AutoEngine(ForwardEngine()), case)
    assert "engine='forward'" not in str(refused.value)  # which has refused


def test_a_loss_that_fails_was_not_measured_by_nested_differentiation():
    case = Case(Custom(a=(4, 3)).double(), lambda m, x: (x @ m.a).sum((0, 1))[7], torch.ones(5, 4, dtype=torch.float64))
    with pytest.raises(IndexError):  # and no warning
        measure(AutoEngine(ForwardEngine()), case)


def test_the_first_order_alone_takes_one_gradient():
    class NotAsked(ForwardEngine):
        def measure(self, *_):
            raise AssertionError("the forward engine was asked")

    case = CASES["mlp"]()
    direction = [torch.randn_like(p) for p in case.model.parameters()]
    summary = ns.summarize(
        case.loss_fn, case.model, [case.batch], order=1, direction=direction, engine=AutoEngine(NotAsked())
    )
    gradients = torch.autograd.grad(case.loss_fn(case.model, case.batch), list(case.model.parameters()))
    expected = torch.stack([(g * u).sum() for g, u in zip(gradients, direction, strict=True)])
    torch.testing.assert_close(summary.gradient, expected.double())
    assert summary.hessian is None


@pytest.mark.parametrize("loss_fn", REFUSED, ids=lambda f: f.__name__)
def test_refusals(loss_fn):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = Case(Custom(a=(4, 3)).double(), loss_fn, torch.randn(5, 4, dtype=torch.float64))
    engine = AutoEngine(ForwardEngine())
    for _ in range(2):  # a refusal is remembered
        with pytest.raises(Refusal, match=REFUSED[loss_fn]):
            measure(engine.forward, case)
    with pytest.warns(UserWarning, match=REFUSED[loss_fn]):
        got = measure(engine, case)
    assert_close(got, measure(NestedEngine(), case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(engine, case)  # no second warning


def number_in_python(m, x):
    scale = (x @ m.a).mean().item()
    return scale * (x @ m.a).tanh().sum()


def decided_by_values(m, x):
    h = (x @ m.a).tanh()
    for _ in range(3):
        h = h.sin() if h.sum() > 0 else (h * h + h).exp()
    return h.square().mean()


@pytest.mark.parametrize("loss_fn", [number_in_python, decided_by_values])
def test_values_may_be_read(loss_fn):
    torch.manual_seed(0)
    case, engine = Case(Custom(a=(4, 3)).double(), loss_fn, torch.randn(5, 4, dtype=torch.float64)), ForwardEngine()
    for _ in range(6):
        case.batch = torch.randn(5, 4, dtype=torch.float64)
        assert_close(measure(engine, case), measure(NestedEngine(), case))


def test_batch_norm_with_a_cumulative_average():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None)).double()
    case = Case(model, lambda m, x: m(x).sin().exp().mean(), torch.randn(5, 3, dtype=torch.float64))
    assert_close(measure(ForwardEngine(), case), measure(NestedEngine(), case))
    assert model[1].num_batches_tracked == 0


def target_error(m, batch):
    return (m(batch[0]) - batch[1]).square().mean()


def weight_norm():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), target_error, (torch.randn(6, 4), torch.randn(6, 3))


def reentrant_checkpoint():
    def loss(m, batch):
        hidden = torch.utils.checkpoint.checkpoint(m[1], m[0](batch[0]), use_reentrant=True)
        return (m[2](hidden) - batch[1]).square().mean()

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, loss, (torch.randn(6, 4), torch.randn(6, 3))


def encoder_layer_with_dropout():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    return model, target_error, (torch.randn(3, 5, 8), torch.randn(3, 5, 8))


def encoder_layer_in_eval_mode():
    model, loss, batch = encoder_layer_with_dropout()
    return model.eval(), loss, batch


class Encoding(UserDict):
    """A mapping that torch's tree functions do not know, as tokenizers give it."""


def mapping_of_its_own():
    data = {"x": torch.randn(6, 4), "more": {"y": torch.randn(6, 3)}}
    loss = lambda m, b: (m(b["x"]) - b["more"]["y"]).square().mean() * len(type(b).__name__)  # noqa: E731
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), loss, Encoding(data)


MORE = [weight_norm, reentrant_checkpoint, encoder_layer_with_dropout, encoder_layer_in_eval_mode, mapping_of_its_own]


def double(leaf):
    return leaf.double() if isinstance(leaf, torch.Tensor) else leaf


@pytest.mark.parametrize("build", MORE, ids=lambda f: f.__name__)
def test_more_models(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss, batch = build()
    if isinstance(batch, Encoding):
        batch = Encoding({"x": batch["x"].double(), "more": {"y": batch["more"]["y"].double()}})
    else:
        batch = tuple(double(t) for t in batch)
    case, engine = Case(model.double(), loss, batch), ForwardEngine()
    expected = measure(NestedEngine(), case)
    for _ in range(2):  # a new graph, a known graph
        assert_close(measure(engine, case), expected)
    assert measure(engine, case).weight == len(batch["x"] if isinstance(batch, Encoding) else batch[0])


def test_graphs_keep_no_batch_alive():
    model, loss, batch = mapping_of_its_own()
    engine = ForwardEngine()
    measure(engine, Case(model, loss, batch))
    tensor = weakref.ref(batch["x"])
    del batch
    gc.collect()
    assert tensor() is None
    assert len(engine) == 1


def test_a_batch_of_unknown_objects():
    class Batch:
        x = torch.randn(5, 3)

    case = Case(nn.Linear(3, 2), lambda m, b: m(b.x).exp().mean(), Batch())
    assert_close(measure(ForwardEngine(), case), measure(NestedEngine(), case), 1e-5)


def test_a_loss_that_ignores_the_model_is_misuse():
    case = Case(nn.Linear(3, 2), lambda m, x: x.square().mean(), torch.randn(5, 3))
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        measure(ForwardEngine(), case)


def test_a_loss_that_is_not_finite_is_reported(traces):
    case, engine = CASES["mlp"](), ForwardEngine()
    x, y = case.batch
    assert not measure(engine, Case(case.model, case.loss_fn, (x * torch.nan, y))).is_finite()
    assert_close(measure(engine, case), measure(NestedEngine(), case))
    assert len(traces) == 1


def test_overflow_of_the_third_order_is_reported():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(13)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e3)
    case = Case(model, lambda m, x: m(x).square().mean(), torch.randn(5, 8))
    assert not measure(ForwardEngine(), case).is_finite()


def test_autocast_inside_the_loss():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def loss(m, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = m(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    case = Case(model, loss, (torch.randn(9, 6), torch.randint(4, (9,))))
    got, expected = measure(ForwardEngine(), case), measure(NestedEngine(), case)
    assert torch.linalg.matrix_norm(got.hessian - expected.hessian) < 0.05 * torch.linalg.matrix_norm(expected.hessian)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, 9)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(torch.tanh(x + F.scaled_dot_product_attention(q, k, v))).flatten(0, 1)


@pytest.mark.parametrize("third", ["diagonal", "full"])
@pytest.mark.parametrize("size", [0.1, 1e-5])  # that of a step of training
@pytest.mark.parametrize("inside", [True, False])
def test_float16_has_numbers_for_tangents_along_any_direction(inside, size, third):
    torch.manual_seed(0)
    model = Attending() if inside else Attending().half()
    batch = torch.randn(4, 5, 6).to(model.out.weight.dtype), torch.randint(9, (20,))
    exact = copy.deepcopy(model).double()
    direction = [size * torch.randn_like(p) for p in model.parameters()]

    def mixed(model, batch):
        with torch.autocast("cpu", dtype=torch.float16, enabled=inside):
            return cross_entropy(model, batch)

    got = ns.summarize(mixed, model, [batch], third=third, order=3, direction=direction, engine="forward")
    wide = [u.double() for u in direction]
    batch = batch[0].double(), batch[1]
    expected = ns.summarize(cross_entropy, exact, [batch], third=third, order=3, direction=wide, engine="forward")
    for one, other in ((got.gradient, expected.gradient), (got.hessian, expected.hessian), (got.third, expected.third)):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_autocast_around_a_normalisation():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))

    def loss(m, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = m(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    case = Case(model, loss, (torch.randn(9, 6), torch.randint(4, (9,))))
    got, expected = measure(ForwardEngine(), case), measure(NestedEngine(), case)
    assert torch.linalg.matrix_norm(got.hessian - expected.hessian) < 0.05 * torch.linalg.matrix_norm(expected.hessian)


def test_parameters_of_half_precision():
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 30)).bfloat16()
    batch = torch.randn(64, 40, dtype=torch.bfloat16), torch.randint(30, (64,))
    case = Case(model, lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), batch)
    got, expected = measure(ForwardEngine(), case), measure(NestedEngine(), case)
    for name in ("gradient", "hessian", "third"):
        x, y = getattr(got, name), getattr(expected, name)
        assert torch.linalg.vector_norm(x - y) < 0.03 * torch.linalg.vector_norm(y), name


@pytest.mark.parametrize(
    ("dtype", "operations", "deviation", "agree"),
    [
        (torch.bfloat16, 100, 0.02, True),
        (torch.bfloat16, 100, 0.06, False),
        (torch.bfloat16, 2500, 0.06, True),  # some 24 layers of a transformer: rounding alone makes as much
        (torch.bfloat16, 2500, 0.15, False),
        (torch.float16, 2500, 0.06, False),
        (torch.float32, 2500, 0.06, False),
    ],
)
def test_gradients_in_half_precision_may_differ_by_the_rounding_of_so_many_operations(
    dtype, operations, deviation, agree, monkeypatch
) -> None:
    monkeypatch.setattr(agreement, "_rounding", lambda *_: [0.0])
    graph = SimpleNamespace(coarsest=dtype, kinked=False, instructions=[SimpleNamespace(op=None)] * operations)
    gradient, noise = torch.randn(2, 1000, dtype=torch.float64).unbind()
    noise *= deviation * gradient.norm() / noise.norm()
    tape = SimpleNamespace(graph=graph, gradient=Gradient([gradient + noise]))
    with contextlib.nullcontext() if agree else pytest.raises(Refusal, match="another gradient for 'weight'"):
        agreement.check_gradient(tape, [], SimpleNamespace(parameter_names=["weight"]), Gradient([gradient]))


@pytest.mark.parametrize("seed", range(4))
def test_what_remains_of_a_gradient_that_cancels_is_rounding_and_is_measured(seed) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    batch = torch.randn(64, 8) + 1000, torch.randint(3, (64,))  # most of each gradient of the first layer cancels

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    got = ns.summarize(loss_fn, model, [batch], engine=ForwardEngine())
    exact = copy.deepcopy(model).double()
    wanted = ns.summarize(loss_fn, exact, [(batch[0].double(), batch[1])], engine=ForwardEngine())
    behind = slice(4, None)  # the last layer, which nothing cancels in
    torch.testing.assert_close(got.gradient[behind], wanted.gradient[behind], rtol=1e-2, atol=1e-6)


def test_a_wrong_gradient_is_no_rounding_where_others_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    batch = torch.randn(64, 8) + 1000, torch.randint(3, (64,))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model[3](Reversing.apply(model[:3](batch[0]))), batch[1])

    with pytest.raises(Refusal, match=r"another gradient for '[01]\."):
        ns.summarize(loss_fn, model, [batch], engine=ForwardEngine())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_two_runs_tell_that_a_gradient_is_one_where_a_step_along_it_goes_far(dtype, scale, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 50)).to(dtype)
    batch = scale * torch.randn(20, 64, dtype=dtype), torch.randint(50, (20,))
    runs, values = [], RecordedLine.values
    monkeypatch.setattr(RecordedLine, "values", lambda self, *a, **k: runs.append(self) or values(self, *a, **k))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(4 * model(batch[0]), batch[1])

    ns.summarize(loss_fn, model, [batch], order=2, engine=ForwardEngine())
    assert len(runs) == 2


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("third", ["diagonal", "full"])
@pytest.mark.parametrize("name", ["lenet", "residual_training", "gpt", "tensor_acrobatics"])
def test_tangents_in_memory_that_is_used_again(name, third, monkeypatch):
    case = CASES[name]()
    partition = ns.Partition.by_module(case.model) if third == "full" else ns.Partition.canonical(case.model)
    expected = measure(ForwardEngine(), case, partition, third=third)
    monkeypatch.setattr(arena, "_SMALLEST", 0)
    engine = ForwardEngine()
    for _ in range(2):
        assert_close(measure(engine, case, partition, third=third), expected, 1e-12)


def test_rows_pulled_some_at_a_time(monkeypatch):
    case = CASES["gpt"]()
    expected = measure(ForwardEngine(), case)
    monkeypatch.setattr(bilinear, "_PULLED", 1)
    assert_close(measure(ForwardEngine(), case), expected, 1e-12)


def test_the_direction_is_not_overwritten(monkeypatch):
    monkeypatch.setattr(arena, "_SMALLEST", 0)
    case = Case(Custom(a=(4, 3)).double(), lambda m, x: (m.a.exp().sin() + m.a.tanh()).sum(), torch.randn(5, 4))
    partition = ns.Partition.canonical(case.model)
    direction = direction_of(partition)
    before = [u.clone() for u in direction]
    ForwardEngine().measure(Loss(case.loss_fn, case.model), case.batch, partition, direction, 3, "diagonal")
    assert all(torch.equal(u, v) for u, v in zip(direction, before, strict=True))


def test_curves_overwrite_what_nobody_else_reads(monkeypatch):
    monkeypatch.setattr(arena, "_SMALLEST", 0)
    ends = []
    take = arena.Arena._take
    monkeypatch.setattr(
        arena.Arena, "_take", lambda self, size: (place := take(self, size), ends.append(place[1] + size))[0]
    )

    def loss(m, x):
        h = x @ m.w
        for curve in (torch.tanh, torch.sin, torch.exp, torch.sin, torch.tanh):
            h = curve(F.leaky_relu(h))  # else all would be one curve
        return h.square().mean()

    x = torch.randn(500, 4, dtype=torch.float64)
    case, engine = Case(Custom(w=(4, 30)).double(), loss, x), ForwardEngine()
    measure(engine, case)
    ends.clear()
    measure(engine, case)
    both = 2 * 500 * 30 * 8  # bytes of the first and second derivative of a value
    assert both < max(ends) < 1.6 * both, "the first curve makes them of one of their size, and all others in place"


def test_an_arena_gives_freed_memory_out_again():
    store, like = arena.Arena(), torch.float64
    a, b, c = (store.empty((1000,), like) for _ in range(3))
    places = [t.data_ptr() for t in (a, b, c)]
    assert places == sorted(places)
    a.fill_(1), b.fill_(2), c.fill_(3)
    view = b[500:]
    del a, b
    d = store.empty((1500,), like)  # only the first place is free: a view of the second is alive
    d.fill_(4)
    assert bool((view == 2).all())
    assert bool((c == 3).all())
    del view
    e = store.empty((1200,), like)  # fits where both have been
    assert e.data_ptr() == places[0]
    del c, d, e
    assert [sum(size for _, size in free) for free in store._free] == [len(s) for s in store._segments]


def test_an_arena_grows():
    store = arena.Arena()
    tensors = [store.empty((arena._SEGMENT // 4 + 1,), torch.float32) for _ in range(2)]
    assert len(store._segments) == 2
    del tensors
    assert [free == [(0, len(s))] for free, s in zip(store._free, store._segments, strict=True)] == [True, True]


def lives_of(steps):
    """What an arena notes of pieces that are taken (sizes) and freed (negative: which one)."""
    store, held = arena.Arena(), {}
    for step in steps:
        if step < 0:
            del held[-step]
        else:
            held[len(store.lives)] = store.empty((step,), torch.uint8)
    return store.lives


def test_places_close_together():
    lives = lives_of([640, 1280, -1, 1920, -2, 1280, 640, -3, 3200])
    layout = arena.packed(lives)
    assert [size for size, _ in layout] == [640, 1280, 1920, 1280, 640, 3200]
    for (x, (m, a)), (y, (n, b)) in itertools.combinations(zip(lives, layout, strict=True), 2):
        apart = a + m <= b or b + n <= a
        assert apart or x.died < y.born or y.died < x.born
    assert max(map(sum, layout)) == 1280 + 640 + 3200  # as much as is held at one time
    assert arena.packed([]) == []


def test_an_arena_follows_a_layout_where_it_can():
    layout = [(640, 1920), (1280, 640), (640, 0), (640, 640)]
    store = arena.Arena(layout)
    a, b, c = (store.empty((size,), torch.uint8) for size in (640, 1280, 640))
    assert [t.data_ptr() - c.data_ptr() for t in (a, b, c)] == [1920, 640, 0]
    assert not store.strayed
    d = store.empty((640,), torch.uint8)  # its place is not free
    assert store.strayed
    assert d.data_ptr() - c.data_ptr() == 2560
    store = arena.Arena(layout)
    other = store.empty((64,), torch.uint8)  # another size
    assert store.strayed
    assert other.data_ptr() == store._segments[0].ctypes.data


def test_later_measurements_need_less_memory(monkeypatch):
    monkeypatch.setattr(arena, "_SMALLEST", 0)
    ends, take = [], arena.Arena._take
    monkeypatch.setattr(
        arena.Arena, "_take", lambda self, size: (place := take(self, size), ends.append(place[1] + size))[0]
    )
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(30, 30), nn.Tanh()))).double()
    case = Case(model, lambda m, x: m(x).square().mean(), torch.randn(200, 30).double())
    engine, highest = ForwardEngine(), []
    for _ in range(3):
        ends.clear()
        result = measure(engine, case)
        highest.append(max(ends))
    assert highest[1] == highest[2] < 0.9 * highest[0]
    assert_close(result, measure(NestedEngine(), case), 1e-10)


def test_summarize_uses_it(no_nested):
    case = CASES["mlp"]()
    ns.summarize(case.loss_fn, case.model, [case.batch], engine="forward")
    ns.summarize(case.loss_fn, case.model, [case.batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_softmax_is_no_reason_to_refuse(dtype) -> None:
    """Its curvature is next to nothing, and in the model's own type nothing but rounding."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).to(dtype)
    x = 10 * torch.eye(6, dtype=dtype)[:4]
    with torch.no_grad():
        model.weight.zero_()[:, :4] = 3 * torch.eye(4, dtype=dtype)
    batch = x, torch.tensor([1, 2, 3, 0])

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    summary = ns.summarize(loss_fn, model, [batch], engine="forward")
    exact = ns.summarize(loss_fn, model.double(), [(x.double(), batch[1])], engine="nested")
    scale = float(exact.gradient.square().max() / exact.loss)
    assert exact.hessian.abs().max() < 1e-6 * scale
    assert (summary.hessian - exact.hessian).abs().max() < 1e-6 * scale


def test_an_embedding_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = torch.randint(10, (8, 3)), torch.randint(3, (8,))
    forward, nested = (ns.summarize(cross_entropy, model, [batch], engine=e) for e in ("forward", "nested"))
    assert torch.allclose(forward.hessian, nested.hessian, rtol=1e-10)
    assert torch.allclose(forward.third, nested.third, rtol=1e-9)


class Hooking(nn.Module):
    """Adds a hook when it is first used, and notes that in an attribute."""

    def __init__(self):
        super().__init__()
        self.layer, self.is_hooked = nn.Linear(3, 2), False

    def forward(self, x):
        if not self.is_hooked:
            self.layer.register_forward_hook(lambda module, args, out: 2 * out)
            self.is_hooked = True
        return self.layer(x)


def test_hooks_that_the_first_use_adds_are_added_once():
    model, x = Hooking().double(), torch.randn(5, 3, dtype=torch.float64)
    summaries = [ns.summarize(lambda m, x: m(x).square().mean(), model, [x], engine="forward") for _ in range(2)]
    assert summaries[0].loss == summaries[1].loss == model(x).square().mean()
    assert len(model.layer._forward_hooks) == 1


def test_complex_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
            self.b = nn.Parameter(torch.randn(2, dtype=torch.float64))

        def forward(self, x):
            return ((x.to(self.w.dtype) @ self.w) * (1 + 2j)).abs().sin() + self.b

    model, x = Model(), torch.randn(5, 3, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in model.parameters()]
    got, expected = (
        ns.summarize(lambda m, x: m(x).square().mean(), model, [x], direction=direction, engine=engine)
        for engine in ("forward", "nested")
    )
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)
    assert got.third[0] != 0
