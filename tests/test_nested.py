"""The nested engine against dense derivatives of φ(η) = L(θ + U I η), written in η and taken another way."""

import gc
import math
import weakref

import pytest
import torch
from cases import (
    CASES,
    OWN_BACKWARD,
    STOCHASTIC,
    Case,
    Reversing,
    assert_close,
    assert_symmetric,
    make,
    masks,
    phi,
    polynomial_summary,
    unchanged,
)
from rounding import assert_rounded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import newton_summary as ns
from newton_summary import Partition
from newton_summary.measure import ForwardEngine, Loss, NestedEngine, taylor
from newton_summary.measure.composed import Composed

BY_FUNCTION = [c for c in CASES if c not in (*OWN_BACKWARD, *STOCHASTIC, "gru", "lstm")]
"""Cases that torch.func can differentiate forward."""


def measure(case, partition=None, direction=None, order=3, third="full", engine=None):
    """One measurement by the engine itself, along a random direction."""
    partition = partition or Partition.canonical(case.model)
    direction = direction or case.direction()
    along = [direction[name] for name in partition.parameter_names]
    return (engine or NestedEngine()).measure(
        Loss(case.loss_fn, case.model), case.batch, partition, along, order, third
    )


def dense(case, partition, order, direction=None):
    """φ and its derivatives at 0 by autograd in η: nothing is shared with the engine but autograd itself."""
    function = phi(case, partition, direction or case.direction())
    eta = torch.zeros(len(partition), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        results = [function(eta)]
    for _ in range(order):
        entries = [
            torch.autograd.grad(entry, eta, create_graph=True, materialize_grads=True)[0]
            if entry.requires_grad
            else torch.zeros_like(eta)
            for entry in results[-1].flatten()
        ]
        results.append(torch.stack(entries).view(*results[-1].shape, -1))
    return [result.detach() for result in results]


# Every order, against dense derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_orders_to_two_against_forward_derivatives(name):
    """torch.func differentiates φ forward, over functional_call: no backward pass is shared."""
    case = make(name)
    partition = Partition.canonical(case.model)
    function = phi(case, partition, case.direction())
    eta = torch.zeros(len(partition), dtype=torch.float64)
    summary = measure(case, order=2)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(summary.loss, case.loss.detach())
        assert_close(summary.gradient, torch.func.jacfwd(function)(eta))
        assert_close(summary.hessian, torch.func.jacfwd(torch.func.jacfwd(function))(eta))
        assert_close(summary.hessian, torch.func.hessian(function)(eta))


@pytest.mark.parametrize("name", ["mlp", "polynomial", "conv", "scalar", "batch norm", "embedding", "normalised"])
def test_order_three_against_forward_derivatives(name):
    case = make(name)
    partition = Partition.by_kind(case.model)
    function = phi(case, partition, case.direction())
    third = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(function)))
    expected = third(torch.zeros(len(partition), dtype=torch.float64))
    assert_close(measure(case, partition, order=3).third, expected)


@pytest.mark.parametrize("name", [c for c in CASES if c not in OWN_BACKWARD])
def test_orders_to_three_in_full(name):
    case = make(name)
    partition = Partition.canonical(case.model)
    summary = measure(case, order=3)
    for order, expected in enumerate(dense(case, partition, 3)):
        assert_close(summary.tensor(order), expected)


@pytest.mark.parametrize("name", [c for c in CASES if c not in OWN_BACKWARD])
def test_each_order_against_differences_of_the_one_below(name):
    """Derivatives of a loss that autograd does not differentiate right would agree with each other, not with these."""
    case = make(name)
    partition = Partition.by_kind(case.model)
    summary = measure(case, partition)
    state = torch.get_rng_state()

    def shifted(group, step):
        twin = make(name)
        columns = masks(partition)[group]
        for key, p in twin.model.named_parameters():
            if key in columns:
                p.data += step * columns[key] * case.direction()[key]
        torch.set_rng_state(state)
        return measure(twin, Partition.by_kind(twin.model), order=2)

    h = 1e-4
    for group in range(len(partition)):
        ahead, behind = shifted(group, h), shifted(group, -h)
        for order in range(3):
            difference = (ahead.tensor(order) - behind.tensor(order)) / (2 * h)
            assert_close(difference, summary.tensor(order + 1)[group], 1e-4)


@pytest.mark.parametrize("name", ["mlp", "elu", "scalar", "embedding", "polynomial", "gru"])
def test_order_four(name):
    case = make(name)
    partition = Partition.by_kind(case.model)
    assert_close(measure(case, partition, order=4).tensor(4), dense(case, partition, 4)[4])


@pytest.mark.parametrize("name", CASES)
def test_what_is_tested_is_not_all_zero(name):
    """A comparison of zeros with zeros proves nothing."""
    summary = measure(make(name))
    assert summary.gradient.abs().max() > 1e-4
    assert summary.hessian.abs().max() > 1e-4
    assert summary.hessian.fill_diagonal_(0.0).abs().max() > 1e-5
    assert summary.third.abs().max() > 1e-5


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("build", [Partition.trivial, Partition.canonical, Partition.discrete])
def test_polynomials_in_closed_form(build, order):
    case = make("polynomial")
    partition = build(case.model)
    expected = case.batch.mean() * polynomial_summary(case.model, partition, case.direction(), order)
    assert_close(measure(case, partition, order=4).tensor(order), expected, 1e-12)


def test_order_zero_is_the_loss():
    case = make("mlp")
    summary = measure(case, order=0)
    assert_close(summary.loss, case.loss.detach(), 1e-12)
    assert summary.hessian is None


def test_a_high_order_of_a_function_of_one_number():
    """d^n/dt^n of exp(a t) is a^n exp(a t)."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.3)
    case = make("mlp")
    case.model, case.loss_fn, case.batch = model, lambda m, x: (2 * m.weight).exp().sum(), None
    summary = measure(case, direction={"weight": torch.full((1, 1), 1.5, dtype=torch.float64)}, order=9)
    for order in range(10):
        assert summary.tensor(order).flatten().item() == pytest.approx(3.0**order * math.exp(0.6), 1e-12)


# What autograd makes of the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN_BACKWARD)
def test_own_backwards_and_stopped_gradients_count_as_autograd_has_them(name):
    """On the user's own tensors: the gradient along u, and the gradient of each of its parts along u."""
    case = make(name)
    direction = case.direction()
    names, parameters = zip(*case.model.named_parameters(), strict=True)

    def along(gradients):
        return torch.stack([(g * direction[n]).sum() for n, g in zip(names, gradients, strict=True)])

    reduced = along(torch.autograd.grad(case.loss, parameters, create_graph=True))
    rows = [along(torch.autograd.grad(r, parameters, retain_graph=True, materialize_grads=True)) for r in reduced]
    summary = measure(case, order=2)
    assert_close(summary.gradient, reduced.detach(), 1e-12)
    assert_close(summary.hessian.triu(), torch.stack(rows).triu(), 1e-12)


def test_a_reversed_gradient_is_reversed():
    """L = sin(w) behind a backward that changes the sign."""
    model = nn.Linear(1, 1, bias=False).double()
    w = model.weight.item()
    loss = Loss(lambda m, b: Reversing.apply(m.weight).sin().sum(), model)
    one = [torch.ones(1, 1, dtype=torch.float64)]
    summary = NestedEngine().measure(loss, None, Partition.trivial(model), one, 2, "full")
    assert_close(summary.gradient, [-math.cos(w)])
    assert_close(summary.hessian, [[-math.sin(w)]])


def test_detached_values_are_constants():
    """L = w · stop(w)³: ḡ = u w³, and nothing above, where the true function has derivatives of every order."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    for stop in (lambda w: w.detach() ** 3, _cube_without_grad):
        loss = Loss(lambda m, b, stop=stop: (m.weight * stop(m.weight)).sum(), model)
        summary = NestedEngine().measure(
            loss, None, Partition.canonical(model), [torch.full((1, 1), 3.0).double()], 3, "full"
        )
        assert summary.gradient.tolist() == [24.0]
        assert summary.hessian.tolist() == [[0.0]]
        assert summary.third.tolist() == [[[0.0]]]


def _cube_without_grad(w):
    with torch.no_grad():
        return w**3


def test_groups_do_not_spoil_each_other():
    """One group's derivatives are infinite; the entries of the other are what they are."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.tensor(0.0)), "b": nn.Parameter(torch.tensor(2.0))}).double()
    loss = Loss(lambda m, b: m["a"].sqrt() + m["b"] ** 3, model)
    ones = [torch.ones((), dtype=torch.float64)] * 2
    summary = NestedEngine().measure(loss, None, Partition.canonical(model), ones, 3, "diagonal")
    assert not summary.gradient[0].isfinite()
    assert summary.gradient[1] == 12.0
    assert summary.hessian[1, 1] == 12.0
    assert summary.third[1] == 6.0


# Partitions -----------------------------------------------------------------------------------------------------------

BUILDERS = {
    "trivial": Partition.trivial,
    "canonical": Partition.canonical,
    "by kind": Partition.by_kind,
    "by module": Partition.by_module,
    "chunks": lambda model: Partition.chunks(model, 2),
    "patterns": lambda model: Partition.from_patterns(model, {"first": "0.*"}, rest="rest"),
}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_every_builder(builder, name):
    case = make(name)
    partition = BUILDERS[builder](case.model)
    summary = measure(case, partition)
    assert summary.names == partition.names
    for order, expected in enumerate(dense(case, partition, 3)):
        assert_close(summary.tensor(order), expected)


@pytest.mark.parametrize("name", ["mlp", "tied", "frozen", "unused"])
def test_discrete_partition_is_the_hessian(name):
    """Along ones, H̄ of the discrete partition is the Hessian itself, by torch.func over the flat parameters."""
    case = make(name)
    partition = Partition.discrete(case.model)
    names = partition.parameter_names
    shapes = [p.shape for p in partition.parameters]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        tensors = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(case.model, tensors, (case.batch[0],))
        return (outputs - case.batch[1]).square().mean()

    flat = torch.cat([p.detach().flatten() for p in partition.parameters])
    ones = {name: torch.ones(p.shape, dtype=torch.float64) for name, p in zip(names, partition.parameters, strict=True)}
    summary = measure(case, partition, ones, order=2)
    assert_close(summary.gradient, torch.func.grad(loss)(flat))
    assert_close(summary.hessian, torch.func.hessian(loss)(flat))


def test_parts_of_tensors():
    case = make("mlp")
    first, last = case.model[0], case.model[2]
    groups = {
        "rows": [("0.weight", slice(0, 2)), (last.weight, (slice(None), slice(0, 2)))],
        "others": [(first.weight, slice(2, 4)), ("2.weight", (slice(None), slice(2, 4))), "0.bias"],
        "bias": [("2.bias", 1)],
        "last": [("2.bias", 0)],
    }
    partition = Partition(groups, case.model)
    summary = measure(case, partition)
    for order, expected in enumerate(dense(case, partition, 3)):
        assert_close(summary.tensor(order), expected)


@pytest.mark.parametrize("name", ["mlp", "tied", "lstm"])
def test_merging_groups_sums_entries(name):
    case = make(name)
    fine, coarse = Partition.canonical(case.model), Partition.by_kind(case.model)
    kinds = {
        kind: [fine.names[i] for i in tensors] for kind, tensors in zip(coarse.names, coarse.tensors_of, strict=True)
    }
    merged, expected = measure(case, fine).merge(kinds), measure(case, coarse)
    for order in range(4):
        assert_close(merged.tensor(order), expected.tensor(order), 1e-12)


def test_reversed_order_of_groups_permutes():
    case = make("mlp")
    names = Partition.canonical(case.model).names[::-1]
    summary = measure(case, Partition({name: [name] for name in names}, case.model))
    expected = measure(case)
    for order in range(1, 4):
        assert_close(summary.tensor(order), expected.tensor(order).flip(list(range(order))), 1e-12)


# Properties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_symmetry(name):
    summary = measure(make(name), order=3)
    assert_symmetric(summary.hessian)
    assert_symmetric(summary.third)


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_that_of_the_full_tensor(name):
    diagonal, full = measure(make(name), third="diagonal"), measure(make(name), third="full")
    assert diagonal.third.shape == (len(full),)
    assert_close(diagonal.third, torch.einsum("sss->s", full.third), 1e-12)
    assert_rounded(diagonal.hessian, full.hessian)
    assert_rounded(diagonal.gradient, full.gradient)


@pytest.mark.parametrize("name", [c for c in CASES if c not in OWN_BACKWARD])
def test_taylor_terms_are_sums_of_entries(name):
    case = make(name)
    partition = Partition.canonical(case.model)
    summary = measure(case, partition, order=4 if name == "polynomial" else 3)
    along = [case.direction()[n] for n in partition.parameter_names]
    terms = taylor(Loss(case.loss_fn, case.model), case.batch, partition, along, 4)
    for order in range(5 if name == "polynomial" else 4):
        assert_close(terms[order], summary.tensor(order).sum(), 1e-11)


@pytest.mark.parametrize("name", ["mlp", "elu", "tied", "attention"])
def test_taylor_terms_predict_the_loss(name):
    """The remainder of the series to order 4 falls as t⁵."""
    case = make(name)
    partition = Partition.canonical(case.model)
    along = [case.direction()[n] for n in partition.parameter_names]
    terms = taylor(Loss(case.loss_fn, case.model), case.batch, partition, along, 4)
    function = phi(case, Partition.trivial(case.model), case.direction())

    def remainder(t):
        series = terms[0] + t * terms[1] + t**2 * terms[2] / 2 + t**3 * terms[3] / 6 + t**4 * terms[4] / 24
        return abs(function(torch.tensor([t], dtype=torch.float64)).item() - series)

    small, large = remainder(0.01), remainder(0.02)
    assert small < 1e-6
    assert 25 < large / small < 40


@pytest.mark.parametrize("name", ["mlp", "tied", "frozen"])
def test_additivity_over_batches_of_unequal_sizes(name):
    case = make(name)
    x, y = case.batch
    parts = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]
    whole = ns.summarize(
        case.loss_fn, case.model, [case.batch], direction=case.direction(), third="full", engine="nested"
    )
    sums = ns.summarize(case.loss_fn, case.model, parts, direction=case.direction(), third="full", engine="nested")
    assert sums.weight == whole.weight == 5.0
    for order in range(4):
        assert_close(sums.tensor(order), whole.tensor(order), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_close_to_float64(name):
    exact, rough = make(name), make(name, torch.float32)
    rough_summary, summary = measure(rough), measure(exact)
    assert rough_summary.hessian.dtype == torch.float64
    if name in STOCHASTIC:
        return  # the two types draw other masks
    for order in range(4):
        assert_close(rough_summary.tensor(order), summary.tensor(order), 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured(dtype):
    summary = measure(make("mlp", dtype))
    assert summary.is_finite()
    assert_close(summary.hessian, measure(make("mlp")).hessian, 0.1)


def test_weight_is_the_size_of_the_batch():
    assert measure(make("mlp")).weight == 5.0
    assert measure(make("embedding")).weight == 5.0


# What it costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "third", "passes"),
    [
        (1, "full", lambda s: 1),
        (2, "full", lambda s: 1 + s),
        (3, "diagonal", lambda s: 1 + 2 * s),
        (3, "full", lambda s: 1 + s + s * (s + 1) // 2),
        (4, "full", lambda s: 1 + s + s * (s + 1) // 2 + s * (s + 1) * (s + 2) // 6),
    ],
)
def test_number_of_backward_passes(monkeypatch, order, third, passes):
    case = make("elu")
    count = 0
    grad = torch.autograd.grad

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    engine = NestedEngine()
    for is_new in (True, False):
        count = 0
        measure(case, order=order, third=third, engine=engine)
        assert count == passes(4) + (is_new and order > 1)  # whether what is new is symmetric


def test_no_memory_is_left_behind():
    case = make("mlp")
    loss = Loss(case.loss_fn, case.model)
    partition = Partition.canonical(case.model)
    along = list(case.direction().values())

    def live():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def measured():
        return NestedEngine().measure(loss, case.batch, partition, along, 3, "diagonal")

    measured()
    before = live()
    for _ in range(50):
        measured()
    assert live() == before


def test_graphs_go_without_the_garbage_collector():
    """A cycle would keep each measurement's graph until some later collection."""
    case = make("mlp")
    kept = []

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # the tensor itself would make a cycle
            kept.append(weakref.ref(self))

    def loss_fn(model, batch):
        with torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor):
            return (model(batch[0]) - batch[1]).square().mean()

    case.loss_fn = loss_fn
    gc.collect()
    gc.disable()
    try:
        measure(case)
        assert len(kept) == 5
        assert all(holder() is None for holder in kept)
    finally:
        gc.enable()


# Nothing of the user's is changed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_users_is_changed(name, training):
    case = make(name)
    case.model.train(training)
    case.loss.backward()
    with unchanged(case.model):
        measure(case, third="diagonal")


@pytest.mark.parametrize("name", ["batch norm", "lstm", "attention"])
def test_nothing_is_changed_where_it_fails(name):
    case = make(name)
    case.loss.backward()
    whole = case.loss_fn
    case.loss_fn = lambda model, batch: whole(model, batch) * torch.rand(3)
    with unchanged(case.model), pytest.raises(ValueError, match=r"scalar tensor, got a tensor of shape \(3,\)"):
        measure(case)


def test_user_settings_hold_and_stay():
    case = make("lstm")
    expected = measure(case)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False
    try:
        with unchanged(case.model):
            assert_rounded(measure(case).third, expected.third)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.mkldnn.enabled = True


def test_recurrent_layers_are_measured_without_their_fused_kernels():
    """Those of cuDNN have no second derivatives, those of oneDNN no forward ones."""
    for name, enabled in (("lstm", False), ("gru", False), ("mlp", True)):
        case = make(name)
        seen = []

        def loss_fn(model, batch, whole=case.loss_fn, seen=seen):
            seen.append((torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled))
            return whole(model, batch)

        case.loss_fn = loss_fn
        measure(case, order=1)
        assert seen == [(enabled, enabled)]


@pytest.mark.parametrize("engine", [NestedEngine(), ForwardEngine()])
def test_switches_that_are_locked_do_not_matter(engine, monkeypatch) -> None:
    """As ``torch.backends.disable_global_flags()`` leaves them."""
    case = make("lstm")
    expected = measure(case)
    flags = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError, match="not allowed"):
        torch.backends.mkldnn.enabled = False
    found = measure(case, engine=engine)
    assert_rounded(found.hessian, expected.hessian)
    assert torch.backends.mkldnn.enabled


def test_autocast_is_the_users():
    """Under autocast the loss is measured as autocast computes it."""
    case = make("mlp", torch.float32)
    exact = measure(case)
    with torch.autocast("cpu", dtype=torch.bfloat16), unchanged(case.model):
        rough = measure(case)
    assert not torch.equal(rough.loss, exact.loss)
    assert_close(rough.hessian, exact.hessian, 0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp", "batch norm", "lstm"])
def test_grad_mode_does_not_matter(name, mode):
    case = make(name)
    direction = case.direction()
    expected = measure(case, direction=direction)
    with mode(), unchanged(case.model):
        summary = measure(case, direction=direction)
    assert_rounded(summary.third, expected.third)


def test_random_numbers_in_the_loss_are_drawn_from_the_users_state():
    """The same state gives the same masks, and another one others."""
    case = make("dropout")
    first, again = measure(case), measure(case)
    assert_rounded(again.third, first.third)
    torch.manual_seed(7)
    assert not torch.equal(measure(case).hessian, first.hessian)


def test_a_loss_that_is_a_module_keeps_its_buffers():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, model, batch):
            value = (model(batch[0]) - batch[1]).square().mean()
            self.mean.add_(value.detach())
            return value + self.mean

    case = make("mlp")
    case.loss_fn = Running()
    summary = measure(case)
    assert case.loss_fn.mean.item() == 0.0
    assert_close(summary.hessian, measure(make("mlp")).hessian, 1e-12)


def test_a_loss_that_is_a_module_around_the_model():
    class Wrapping(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.wrapped = model

        def forward(self, model, batch):
            return (self.wrapped(batch[0]) - batch[1]).square().mean()

    case = make("batch norm")
    expected = measure(case)
    case.loss_fn = Wrapping(case.model)
    with unchanged(case.model):
        torch.testing.assert_close(measure(case).third, expected.third, rtol=1e-10, atol=0)
    assert Loss(case.loss_fn, case.model).value(case.batch) == pytest.approx(float(expected.loss), rel=1e-12)


# What stands for torch's normalisations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_compositions_have_the_values_types_and_gradients_of_torchs_own(training, dtype):
    def build():
        torch.manual_seed(0)
        layers = [nn.BatchNorm2d(2), nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.LayerNorm([3, 4])]
        model = nn.ModuleList([*layers, nn.BatchNorm2d(2, affine=False), nn.InstanceNorm2d(2)])
        model.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1), dim=None))
        model.extend([nn.GroupNorm(2, 2), nn.GroupNorm(1, 2, affine=False)])
        for p in model.parameters():
            p.data += torch.rand_like(p)
        return model.to(dtype).train(training)

    x = torch.randn(5, 2, 3, 4).to(dtype)
    plain, composed = build(), build()
    for own, twin in zip(plain, composed, strict=True):
        expected = own(x)
        with Composed():
            actual = twin(x)
        assert actual.dtype == expected.dtype == dtype
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        for a, b in zip(own.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        if held := list(own.parameters()):
            gradients = torch.autograd.grad(expected.sin().sum(), held)
            others = torch.autograd.grad(actual.sin().sum(), list(twin.parameters()))
            torch.testing.assert_close(others, gradients, rtol=tolerance, atol=50 * tolerance)


def test_compositions_of_half_precision_do_not_overflow():
    x = 300 * torch.randn(4, 8).half()  # a variance beyond the largest number of this type
    with Composed():
        composed = nn.functional.layer_norm(x, (8,))
    torch.testing.assert_close(composed, nn.functional.layer_norm(x, (8,)), rtol=1e-2, atol=1e-2)
    assert composed.abs().max() > 1


def graph(tensor):
    """The names of the operations that a tensor came from."""
    names, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    return names


def test_torchs_inner_functions_are_composed_too():
    x, weight, bias = make("conv").batch[0].flatten(2), torch.ones(1).double() * 2, torch.ones(1).double()
    mean, var = torch.zeros(1).double(), torch.ones(1).double()
    calls = [
        lambda: torch.batch_norm(x, weight, bias, mean.clone(), var.clone(), True, 0.1, 1e-5, False),
        lambda: torch.batch_norm(x, weight, bias, mean.clone(), var.clone(), False, 0.1, 1e-5, False),
        lambda: torch.instance_norm(x, weight, bias, None, None, True, 0.1, 1e-5, False),
        lambda: torch.layer_norm(x, (36,), None, None),
        lambda: torch.group_norm(x, 1, None, None),
    ]
    x.requires_grad_()
    for call in calls:
        expected = call()
        with Composed():
            actual = call()
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert any("Norm" in name for name in graph(expected))
        if call is not calls[1]:  # running statistics are constants, and torch's own derivatives are right
            assert not any("Norm" in name for name in graph(actual))


def test_third_derivatives_of_a_group_norm_of_channels_that_lie_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    plain = Case(model, lambda model, x: model(x).square().mean(), x)
    expected = measure(plain)  # torch's own would end the process on the next line
    last = measure(Case(model, plain.loss_fn, x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(last.third, expected.third, rtol=1e-10, atol=1e-12)


def test_compositions_refuse_what_torch_refuses():
    case = make("batch norm")
    case.batch = tuple(t[:1] for t in case.batch)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        measure(case)


@pytest.mark.parametrize("options", [{}, {"rtol": 0.3}, {"atol": 0.5}, {"hermitian": True}])
def test_complex_pseudoinverses_are_those_that_nobody_watches(options) -> None:
    torch.manual_seed(0)
    model, w = nn.Module(), torch.randn(3, 3, dtype=torch.complex128)
    model.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def loss_fn(m, _):
        x = m.weight + m.weight.mH if options.get("hermitian") else m.weight
        inverse = torch.linalg.pinv(x, **options)
        return (inverse * w).real.sum() + inverse.abs().square().sum()

    u = [0.1 * torch.randn(3, 3, dtype=torch.complex128)]
    got = ns.summarize(loss_fn, model, [torch.zeros(1)], direction=u, engine="nested", order=2)
    assert float(got.loss) == pytest.approx(loss_fn(model, None).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss_fn(model, None), [model.weight])
    assert float(got.gradient) == pytest.approx((gradient.conj() * u[0]).real.sum().item(), rel=1e-10)
