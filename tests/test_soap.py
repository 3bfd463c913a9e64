"""SOAP against dense Kronecker products written out, and which of its factors are affordable."""

from __future__ import annotations

import copy
import io
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.optim.directions import SOAP, NAdam, Sides, descends, matrix_shape, resolve
from newton_summary.optim.directions.affordable import SHARE, Work, affordable_sides
from newton_summary.testing import check_direction

BOTH, NONE = Sides(True, True), Sides(False, False)


def groups(direction, held):
    return [{"params": [p], **direction.defaults} for p in held]


def little(factor):
    return 2.0**-26 * factor.trace() / len(factor)


class DenseReference:
    """One matrix: the same algorithm on vec(G) with the whole basis Q_L ⊗ Q_R, which Gram and Schmidt refresh."""

    def __init__(self, shape, sides, betas=(0.9, 0.99), eps=1e-4, beta=0.95, every=10) -> None:
        self.shape, self.sides, self.betas, self.eps, self.beta, self.every = shape, sides, betas, eps, beta, every
        self.factors, self.bases = [None, None], [torch.eye(n, dtype=torch.float64) for n in shape]
        self.m = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        self.v = torch.zeros_like(self.m)
        self.t = 0

    def step(self, gradient):
        self.t += 1
        matrix = gradient.reshape(self.shape)
        for axis, product in enumerate((matrix @ matrix.T, matrix.T @ matrix)):
            if not self.sides[axis]:
                continue
            if self.factors[axis] is None:
                self.factors[axis] = product
                n = len(product)  # and so that rounding does not choose among directions in which there is nothing
                ramp = torch.tensor([(n - 1 - k) / (n - 1) for k in range(n)], dtype=torch.float64)
                values, vectors = torch.linalg.eigh(product + little(product) * torch.diag(ramp))
                self.bases[axis] = vectors[:, torch.arange(len(values) - 1, -1, -1)]
            else:
                self.factors[axis] = self.beta * self.factors[axis] + (1 - self.beta) * product
        whole = torch.kron(*self.bases)
        turned = whole.T @ matrix.reshape(-1)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * turned
        self.v = b2 * self.v + (1 - b2) * turned**2
        ahead = (b1 * self.m + (1 - b1) * turned) / (1 - b1 ** (self.t + 1))
        step = whole @ (ahead / ((self.v / (1 - b2**self.t)).sqrt() + self.eps))
        if self.t % self.every == 0:
            self.refresh(whole)
        return step.reshape(gradient.shape)

    def refresh(self, whole):
        mean = whole @ self.m  # where the parameter is
        squares = self.v.reshape(self.shape)
        for axis in (0, 1):
            if not self.sides[axis]:
                continue
            old = self.bases[axis]
            values = torch.stack([q @ self.factors[axis] @ q for q in old.T])
            order = torch.argsort(values, descending=True)
            columns = []
            for q in old.T[order]:  # Gram and Schmidt, twice
                new = self.factors[axis] @ q + little(self.factors[axis]) * q
                for _ in range(2):
                    for c in columns:
                        new = new - (c @ new) * c
                columns.append(new / new.norm())
            self.bases[axis] = torch.stack(columns, dim=1)
            squares = squares[order] if axis == 0 else squares[:, order]
        self.m, self.v = torch.kron(*self.bases).T @ mean, squares.reshape(-1)


@pytest.mark.parametrize("sides", [BOTH, Sides(True, False), Sides(False, True)])
@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (4, 2, 3, 1)])
def test_it_is_the_dense_algorithm(shape, sides) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    vector = nn.Parameter(torch.randn(3, dtype=torch.float64))
    direction, state = SOAP(eps=1e-4, sides={p: sides}), defaultdict(dict)
    plain, plain_state = NAdam(eps=1e-4), defaultdict(dict)
    twin = DenseReference(matrix_shape(p), sides)
    scale = torch.linspace(0.1, 2, p.numel(), dtype=torch.float64).reshape(shape)
    for t in range(45):
        p.grad, vector.grad = scale * torch.randn_like(p) + 0.3, torch.randn_like(vector)
        u = direction.update(groups(direction, [p, vector]), state)
        # columns of a basis have no sign of their own; the step does not depend on it.  Where the first gradient has
        # not been, eigenvalues are 1e-8 of the others apart, and rounding turns the basis by some 1e-7
        torch.testing.assert_close(u[p], twin.step(p.grad), rtol=1e-5, atol=1e-5, msg=f"at step {t}")
        assert torch.equal(u[vector], plain.update(groups(plain, [vector]), plain_state)[vector])


def test_bases_stay_orthogonal_and_come_to_the_eigenvectors() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    direction, state = SOAP(), defaultdict(dict)
    mix = torch.randn(6, 6, dtype=torch.float64) * torch.linspace(0.3, 3, 6, dtype=torch.float64)
    for _ in range(400):
        p.grad = mix @ torch.randn_like(p)
        direction.update(groups(direction, [p]), state)
    basis, factor = state[p]["basis_out"], state[p]["factor_out"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    inside = basis.T @ factor @ basis
    off = inside - torch.diag(inside.diagonal())
    assert off.norm() < 0.5 * (factor - torch.diag(factor.diagonal())).norm(), "no better than the identity"


def test_it_is_the_same_after_a_rotation_of_the_outputs() -> None:
    """What Adam is not: the step turns with the gradients."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    p, q = (nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(2))
    direction, state = SOAP(sides={p: Sides(True, False), q: Sides(True, False)}), defaultdict(dict)
    for _ in range(25):
        p.grad = torch.randn_like(p)
        q.grad = rotation @ p.grad
        u = direction.update(groups(direction, [p, q]), state)
        torch.testing.assert_close(u[q], rotation @ u[p], rtol=1e-6, atol=1e-7)


def test_what_has_no_factors_moves_as_with_nadam() -> None:
    direction = SOAP(largest=8)
    assert direction.sides_of(nn.Parameter(torch.zeros(5))) == NONE
    assert direction.sides_of(nn.Parameter(torch.zeros(0, 3))) == NONE
    assert direction.sides_of(nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))) == NONE
    assert direction.sides_of(nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))) == NONE
    assert direction.sides_of(nn.Parameter(torch.zeros(4, 9))) == Sides(True, False)
    assert direction.sides_of(nn.Parameter(torch.zeros(1, 8))) == Sides(False, True)
    assert direction.sides_of(nn.Parameter(torch.zeros(8, 2, 2, 2))) == BOTH
    assert descends(direction)
    assert type(resolve("soap")) is SOAP


def test_a_step_without_tensors_for_large_parameters_is_the_same_step() -> None:
    """Large ones without a factor and with one, small ones with and without, each at a rate of its own."""
    torch.manual_seed(0)
    shapes = ((300, 200), (2, 40_000), (8, 4), (7,))
    sides = (NONE, Sides(True, False), BOTH, NONE)
    here = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    there = [nn.Parameter(p.detach().clone()) for p in here]
    sizes = (0.1, 0.02, 0.3, 0.3)
    first = SOAP(sides=dict(zip(here, sides, strict=True)))
    second = SOAP(sides=dict(zip(there, sides, strict=True)))
    states = defaultdict(dict), defaultdict(dict)
    for _ in range(12):
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with torch.no_grad():
            first.descend(groups(first, here), states[0], dict(zip(here, sizes, strict=True)))
            for size, (q, u) in zip(sizes, second.update(groups(second, there), states[1]).items(), strict=True):
                q.sub_(u, alpha=size)
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments", [{"factor_beta": 1.0}, {"refresh_every": 0}, {"largest": 0}, {"betas": (1.0, 0.9)}]
)
def test_misuse_raises(arguments) -> None:
    with pytest.raises(ValueError, match="must"):
        SOAP(**arguments)


def test_it_is_a_direction() -> None:
    check_direction(lambda parameters: SOAP())


# In the optimizer -----------------------------------------------------------------------------------------------------


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def images(dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(80, 2, 8, 8, dtype=dtype)
    return TensorDataset(x, (x.mean((2, 3)) @ torch.randn(2, 3, dtype=dtype)).argmax(1))


def convnet(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)


def make(dtype=torch.float32, **options):
    model, loader = convnet(dtype), DataLoader(images(dtype), 20, shuffle=True)
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=loader, **options)


def train(model, optimizer, steps, start=0, layout=torch.contiguous_format):
    dtype = next(model.parameters()).dtype
    batches = list(DataLoader(images(dtype), 20))
    for t in range(start, start + steps):
        x, y = batches[t % 4]
        optimizer.zero_grad()
        loss_fn(model, (x.contiguous(memory_format=layout), y)).backward()
        optimizer.step()


@pytest.mark.parametrize("direction", ["soap", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 3, 23])
def test_resuming_and_copies_are_exact_to_the_bit(direction, dtype, at) -> None:
    model, optimizer = make(dtype, direction=direction)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin, resumed = make(dtype, direction=direction)
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, resumed), (copied_model, copied)):
        train(m, o, 25, at)
        for p, q in zip(m.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert resumed.direction.sides is None or list(resumed.direction.sides.values()) == list(
        optimizer.direction.sides.values()
    )


def test_parameters_that_are_not_contiguous_take_the_same_steps() -> None:
    (model, optimizer), (other, laid_out) = (
        make(torch.float64, direction=SOAP(largest=8))
        for _ in range(2)  # in a null space a basis is a matter of rounding
    )
    other.to(memory_format=torch.channels_last)
    assert not other[0].weight.is_contiguous()
    train(model, optimizer, 25)
    train(other, laid_out, 25, layout=torch.channels_last)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_what_a_dead_unit_has_left_fades_to_zero_and_not_to_subnormal_numbers() -> None:
    """Products with subnormal numbers take a processor many times as long, and dead units are common."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 6))
    direction, state = SOAP(), defaultdict(dict)
    alive = torch.ones(8, 6)
    for step in range(2500):
        alive[5:] = alive[:, 4:] = float(step < 20)
        weight.grad = torch.randn(8, 6, generator=generator) * alive
        direction.update(groups(direction, [weight]), state)
        held = [state[weight][key] for key in state[weight] if key.startswith(("factor", "basis"))]
        smallest = [m.abs().masked_fill(m == 0, 1.0).min() for m in [*held, state[weight]["exp_avg"]]]
        assert len(held) == 4
        assert min(smallest) >= torch.finfo(torch.float32).tiny


def test_a_gradient_of_zero_or_no_number_at_first_does_no_harm() -> None:
    for value in (0.0, float("nan")):
        model, optimizer = make(direction="soap")
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
        train(model, optimizer, 40)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


# What is affordable ---------------------------------------------------------------------------------------------------


def test_products_and_convolutions_are_counted_to_the_last_operation() -> None:
    with Work([]) as linear:
        torch.randn(5, 7) @ torch.randn(7, 11)
    assert linear.operations == 2 * 5 * 7 * 11
    with Work([]) as convolution:
        functional.conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
    assert convolution.operations == 2 * 2 * 4 * 6 * 6 * 3 * 9
    with Work([]) as nothing:
        torch.ones(3).add_(1).tanh()
    assert nothing.operations == 0
    assert nothing.calls == 3


def test_rows_are_what_a_layer_applies_its_matrix_to() -> None:
    layers = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Conv1d(4, 3, 2), nn.Linear(4, 9)
    parameters = [layer.weight for layer in layers]
    x = torch.randint(7, (10, 4))
    with Work(parameters) as work:
        y = layers[1](layers[0](x))  # (10, 4, 5)
        layers[2](y)
    assert dict(work.rows) == {0: 10 * 4 * 6 / 7, 1: 40, 2: 10 * 4}
    assert work.operations == 2 * 40 * 5 * 6 + 2 * 10 * 4 * 3 * 4 * 2


def test_a_fused_recurrent_layer_is_counted() -> None:
    layer = nn.LSTM(6, 8, batch_first=True)
    parameters = list(layer.parameters())
    with Work(parameters) as work:
        layer(torch.randn(10, 5, 6))
    assert work.rows[0] >= 10 * 5 / 4
    assert work.operations > 0


def chosen(model, loss):
    parameters = list(model.parameters())
    allowed = [SOAP().sides_of(p) for p in parameters]
    return affordable_sides(allowed, parameters, loss, 10)


def test_convolutions_have_factors_and_wide_layers_on_few_samples_have_none() -> None:
    conv = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    x = torch.randn(50, 16, 32, 32)
    assert chosen(conv, lambda: conv(x)) == [BOTH, NONE, BOTH, NONE]
    dense = nn.Sequential(nn.Linear(1000, 900), nn.ReLU(), nn.Linear(900, 800))
    assert chosen(dense, lambda: dense(torch.randn(20, 1000))) == [NONE] * 4
    assert chosen(dense, lambda: dense(torch.randn(20_000, 1000)))[0] == BOTH
    tiny = nn.Linear(4, 3)
    assert chosen(tiny, lambda: tiny(torch.randn(8, 4))) == [NONE, NONE], "its time goes into calls"
    assert 0 < SHARE < 0.25


def test_rounding_chooses_no_basis_where_the_gradient_has_not_been() -> None:
    p, direction = nn.Parameter(torch.zeros(9, 2, dtype=torch.float64)), SOAP()
    q, state = nn.Parameter(torch.zeros(2, 9, dtype=torch.float64).T), defaultdict(dict)
    for _ in range(25):
        p.grad = torch.randn_like(p)  # two of nine directions at a time
        q.grad = torch.empty_like(q).copy_(p.grad * (1 + 1e-15 * torch.randn_like(p)))
        u = direction.update(groups(direction, [p, q]), state)
        torch.testing.assert_close(u[p], u[q], rtol=1e-5, atol=1e-5)


def test_eigenvectors_that_single_precision_does_not_find_come_from_double(monkeypatch) -> None:
    eigh, asked = torch.linalg.eigh, []

    def failing(matrix):
        asked.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("too many repeated eigenvalues")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    embedding = nn.Embedding(50, 4)  # of whose rows few have gradients
    direction = SOAP()
    groups, state = [{"params": [embedding.weight], **direction.defaults}], defaultdict(dict)
    embedding(torch.tensor([1, 2])).square().sum().backward()
    with torch.no_grad():
        step = direction.update(groups, state)[embedding.weight]
    assert asked.count(torch.float64) == asked.count(torch.float32) == 2
    assert step.dtype == torch.float32
    assert bool(step.isfinite().all())
    basis = state[embedding.weight]["basis_out"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(50), atol=1e-5, rtol=0)


def test_the_default_counts_once_and_keeps_its_choice() -> None:
    model, optimizer = make()
    assert optimizer.direction.sides is None
    train(model, optimizer, 1)
    sides = optimizer.direction.sides
    train(model, optimizer, 20, 1)
    assert optimizer.direction.sides is sides
    assert set(sides) == set(model.parameters())


def test_measuring_by_hand_before_the_first_step_chooses_too() -> None:
    model, optimizer = make()
    batch = next(iter(DataLoader(images(), 20)))
    loss_fn(model, batch).backward()
    optimizer.measure(batch)
    assert optimizer.direction.sides is not None
    optimizer.step()


def test_without_data_to_compare_on_the_direction_is_nadams() -> None:
    optimizer = ns.NewtonSummary(convnet(), loss_fn)
    assert type(optimizer.direction) is NAdam
    _, optimizer = make(compare_every=0)
    assert type(optimizer.direction) is NAdam
