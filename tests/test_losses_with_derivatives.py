"""Losses that differentiate by themselves, as physics-informed networks have them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_rounded
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure.along import losses_along


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_fn(model, batch):
    """u'' = −u at random points, from u(0) = 0 and u'(0) = 1."""
    x = torch.cat([batch, batch.new_zeros(1, 1)]).requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + u).square().mean() + u[-1, 0] ** 2 + (slope[-1, 0] - 1) ** 2


def make_batches():
    return list(torch.rand(10, 16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_the_optimizer_trains_with_them() -> None:
    model, batches = make_model(), make_batches()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, every=5)
    before = loss_fn(model, batches[0]).item()
    for _ in range(10):
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    assert loss_fn(model, batches[0]).item() < 0.1 * before
    assert optimizer.counts["measured"] == 20
    assert optimizer.counts["failed"] == 0


def test_the_monitor_knows_what_came_of_a_step() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    before = loss_fn(model, batches[0])
    before.backward()
    monitor.step(batches[0])
    optimizer.step()
    (record,) = monitor.records
    assert record.actual_decrease != 0
    assert_rounded(record.loss, before.item())
    assert_rounded(record.loss - record.actual_decrease, loss_fn(model, batches[0]).item())


def test_the_true_loss_along_groups() -> None:
    model, (batch, *_) = make_model(), make_batches()
    u = [torch.randn_like(p) for p in model.parameters()]
    losses = losses_along(loss_fn, model, batch, [0.1], direction=u)
    for group, p in enumerate(model.parameters()):
        with torch.no_grad():
            p -= 0.1 * u[group]
        torch.testing.assert_close(losses[group, 0], loss_fn(model, batch).detach(), rtol=1e-12, atol=0)
        with torch.no_grad():
            p += 0.1 * u[group]


def test_the_true_loss_along_what_a_summary_takes_as_direction() -> None:
    model, (batch, *_) = make_model(), make_batches()
    loss_fn(model, batch).backward()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=lr) for layer, lr in ((model[0], 0.1), (model[2], 0.2))]
    u = {name: p.grad * (0.1 if name.startswith("0") else 0.2) for name, p in model.named_parameters()}
    expected = losses_along(loss_fn, model, batch, [0.5], direction=list(u.values()))
    assert_rounded(losses_along(loss_fn, model, batch, [0.5], direction=u), expected)
    assert_rounded(losses_along(loss_fn, model, batch, [0.5], direction=optimizers), expected)
    with pytest.raises(ValueError, match=r"direction for '0.weight' has shape \(1,\), the parameter \(8, 1\)"):
        losses_along(loss_fn, model, batch, [0.5], direction=[p.grad.flatten()[:1] for p in model.parameters()])


def penalised(model, batch):
    """A gradient penalty: of a convolution's backward pass only the gradient of its input is asked for."""
    x = batch.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.square().sum((1, 2, 3)) - 1).square().mean()


def adapted(model, batch):
    """A step of gradient descent within the loss, as in meta-learning: and here not that of the first input."""
    parameters = dict(model.named_parameters())
    inner = torch.func.functional_call(model, parameters, (batch[:2],)).square().mean()
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.5 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    return torch.func.functional_call(model, moved, (batch[2:],)).square().mean()


@pytest.mark.parametrize("loss", [penalised, adapted])
def test_gradients_within_the_loss_of_which_some_are_not_asked_for(loss) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(1, 1))
    model, batches = model.double(), [torch.randn(4, 1, 3, 3, dtype=torch.float64)]
    exact = ns.summarize(loss, model, batches, engine="forward", third="full")
    nested = ns.summarize(loss, model, batches, engine="nested", third="full")
    assert_rounded(exact.hessian, nested.hessian)
    assert_rounded(exact.third, nested.third)


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.view(2, -1)  # a leaf, for autograd


STARTS = {
    "a row": lambda h: h.detach().requires_grad_()[:1].expand_as(h),
    "flattened": lambda h: h.detach().requires_grad_().view(-1).view_as(h),
    "transposed twice": lambda h: h.detach().requires_grad_().T.T,
    "without gradients": lambda h: without_gradients(h).view_as(h),
}


def normalised_without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * F.layer_norm(h, (3,))


@pytest.mark.parametrize("engine", ["forward", "auto"])
def test_what_is_normalised_without_gradients_is_constant(engine) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(4, 3, dtype=torch.float64)
    loss_fn = lambda m, x: (F.layer_norm(m(x), (3,)) * normalised_without_gradients(m(x)).sin()).square().mean()  # noqa: E731
    got, expected = (ns.summarize(loss_fn, model, [x], engine=chosen) for chosen in (engine, "nested"))
    torch.testing.assert_close(got.hessian, expected.hessian)


def test_a_deviation_that_a_loss_reads_as_a_number_is_one() -> None:
    """As for a log.  It had ended the loss, by an error of this package's."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    seen = []

    def reading(model, x):
        normal, _, deviation = torch.native_layer_norm(model(x), [3], None, None, 1e-5)
        seen.append(deviation.mean().item())
        return normal.pow(3).sum()

    plain = lambda model, x: F.layer_norm(model(x), [3]).pow(3).sum()  # noqa: E731
    read, expected = (ns.summarize(f, model, [x], engine="forward") for f in (reading, plain))
    assert seen[0] > 0
    assert torch.allclose(read.hessian, expected.hessian)


@pytest.mark.parametrize("engine", ["forward", "auto"])
@pytest.mark.parametrize("start", STARTS)
def test_a_view_of_values_that_a_loss_starts_anew_from_is_constant(start, engine) -> None:
    """As where a penalty on a critic's slope at generated samples begins by flattening these."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(4, 3, dtype=torch.float64)

    def loss_fn(model, x):
        h = model(x)
        z = STARTS[start](h)
        (slope,) = torch.autograd.grad(model(z).square().sum(), z, create_graph=True)
        return (h * slope + z.sin() * h).square().mean()

    got, expected = (ns.summarize(loss_fn, model, [x], engine=chosen) for chosen in (engine, "nested"))
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)


def standardised(h: Tensor, shape: tuple[int, ...], dim: int = -1) -> Tensor:
    rows = h.reshape(shape)
    centred = rows - rows.mean(dim, keepdim=True)
    return (centred / (centred.square().mean(dim, keepdim=True) + 1e-5).sqrt()).view_as(h)


NORMS = {
    "layer": (lambda h: F.layer_norm(h, (4,)), lambda h: standardised(h, (3, 4))),
    "batch": (lambda h: F.batch_norm(h, None, None, training=True), lambda h: standardised(h, (3, 4), 0)),
    "instance": (lambda h: F.instance_norm(h.view(3, 2, 2)).flatten(1), lambda h: standardised(h, (3, 2, 2))),
    "group": (lambda h: F.group_norm(h, 2), lambda h: standardised(h, (3, 2, 2))),
}


class Normalised(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.first, self.last = norm, nn.Linear(2, 4), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last((1.3 * self.norm(self.first(x).tanh() * self.first.bias)).tanh())


def slope_of_inputs(model, batch):
    x = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return x, slope


def bounded_slope(model, batch):
    return (slope_of_inputs(model, batch)[1].square().sum(-1) - 1).square().mean()


def bent(model, batch):
    x, slope = slope_of_inputs(model, batch)
    return (torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0].square().sum(-1) - 1).square().mean()


@pytest.mark.parametrize("loss", [bounded_slope, bent])
@pytest.mark.parametrize("norm", NORMS)
def test_a_normalisation_within_what_a_loss_differentiates(norm, loss) -> None:
    """Its backward pass reads the mean and the deviation that the forward pass has found: they move, too."""
    torch.manual_seed(0)
    x, models = torch.randn(3, 2, dtype=torch.float64), [Normalised(one) for one in NORMS[norm]]
    direction = [torch.randn_like(p) for p in models[0].parameters()]  # autograd's third derivative of some is wrong
    exact, expected = (
        ns.summarize(loss, model, [x], direction=direction, engine=engine)
        for model, engine in zip(models, ("forward", "nested"), strict=True)
    )
    assert_rounded(exact.loss, expected.loss)
    for got, right in [(exact.hessian, expected.hessian), (exact.third, expected.third)]:
        assert float((got - right).abs().max()) < 1e-8 * float(right.abs().max())
