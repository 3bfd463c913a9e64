"""Directions against torch's optimizers, formulas written out, and plain copies that take the step."""

import copy
from collections import defaultdict

import pytest
import torch
from cases import make, unchanged
from rounding import assert_rounded
from torch import nn

from newton_summary.measure.next_step import next_step
from newton_summary.optim.directions import Adam, Gradient, Momentum, NAdam, StepOf, descends, resolve
from newton_summary.testing import check_direction

KEYS = ("gradient", "momentum", "adam")


def parameters(dtype=torch.float64):
    return [nn.Parameter(torch.randn(3, 2, dtype=dtype)), nn.Parameter(torch.randn(2, dtype=dtype))]


def groups(direction, held, **changes):
    return [{"params": [p], **direction.defaults, **changes} for p in held]


def new_gradients(held):
    for p in held:
        p.grad = torch.randn_like(p)


# Gradient and momentum ------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_gradient():
    held = parameters()
    held[0].grad = torch.randn_like(held[0])
    direction = Gradient()
    u = direction.update(groups(direction, held), defaultdict(dict))
    assert list(u) == [held[0]]
    assert u[held[0]] is held[0].grad


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_is_the_weighted_sum_of_past_gradients(momentum):
    """u_t = μ^t g_0 + (1 − μ) Σ_{k=1..t} μ^(t−k) g_k."""
    held = parameters()
    direction, state = Momentum(momentum), defaultdict(dict)
    past = []
    for t in range(20):
        new_gradients(held)
        past.append([p.grad.clone() for p in held])
        u = direction.update(groups(direction, held), state)
        for i, p in enumerate(held):
            expected = momentum**t * past[0][i]
            for k in range(1, t + 1):
                expected = expected + (1 - momentum) * momentum ** (t - k) * past[k][i]
            torch.testing.assert_close(u[p], expected, rtol=1e-12, atol=1e-14)
            assert torch.equal(p.grad, past[-1][i])


# Adam -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3), ((0.0, 0.99), 0.0)])
def test_adam_is_the_step_of_torchs_at_a_rate_of_one(betas, eps):
    """Fifty steps; the second tensor joins after ten, and has no gradient in some."""
    held = parameters()
    twins = [nn.Parameter(p.detach().clone()) for p in held]
    reference = torch.optim.Adam(twins, lr=1.0, betas=betas, eps=eps)
    direction, state = Adam(betas, eps), defaultdict(dict)
    for t in range(50):
        for i, (p, q) in enumerate(zip(held, twins, strict=True)):
            absent = i == 1 and (t < 10 or t % 7 == 0)
            p.grad = None if absent else torch.randn_like(p) * 10.0 ** (t % 5 - 2)
            q.grad = None if absent else p.grad.clone()
        before = [q.detach().clone() for q in twins]
        reference.step()
        u = direction.update(groups(direction, held), state)
        assert set(u) == {p for p in held if p.grad is not None}
        for p, q, b in zip(held, twins, before, strict=True):
            if p in u:
                torch.testing.assert_close(u[p], b - q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Adam, NAdam])
@pytest.mark.parametrize("fused", [True, False])
def test_parameters_of_several_dtypes_move_as_each_by_itself(kind, fused, monkeypatch):
    """On devices where torch's Adam is one kernel and where it is not, up to rounding."""
    if not fused:
        monkeypatch.setattr("newton_summary.optim.directions.adam._FUSED", ())
    held = [*parameters(torch.float32), *parameters(torch.float64)]
    twins = [nn.Parameter(p.detach().double()) for p in held]
    together, apart = kind(), [kind() for _ in held]
    state, states = defaultdict(dict), [defaultdict(dict) for _ in held]
    for _ in range(10):
        new_gradients(held)
        u = together.update(groups(together, held), state)
        for p, q, direction, own in zip(held, twins, apart, states, strict=True):
            q.grad = p.grad.double()
            with monkeypatch.context() as patch:
                patch.setattr("newton_summary.optim.directions.adam._FUSED", ("cpu",))
                expected = direction.update(groups(direction, [q]), own)[q]
            assert u[p].dtype == p.dtype
            torch.testing.assert_close(u[p].double(), expected, rtol=1e-4, atol=100 * torch.finfo(p.dtype).eps)


def test_adams_memory_is_of_the_parameters_type_and_layout():
    p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    p.grad = torch.randn_like(p)
    direction, state = Adam(), defaultdict(dict)
    u = direction.update(groups(direction, [p]), state)
    for tensor in (u[p], state[p]["exp_avg"], state[p]["exp_avg_sq"]):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.99), 1e-8), ((0.5, 0.9), 1e-3), ((0.0, 0.99), 0.0)])
def test_nadam_is_its_formula(betas, eps):
    """Fifty steps; the second tensor joins after ten, and has no gradient in some."""
    held = parameters()
    means, squares, counts = [0.0, 0.0], [0.0, 0.0], [0, 0]
    direction, state = NAdam(betas, eps), defaultdict(dict)
    for t in range(50):
        for i, p in enumerate(held):
            p.grad = None if i == 1 and (t < 10 or t % 7 == 0) else torch.randn_like(p) * 10.0 ** (t % 5 - 2)
        u = direction.update(groups(direction, held), state)
        for i, p in enumerate(held):
            if p.grad is None:
                assert p not in u
                continue
            counts[i] += 1
            means[i] = betas[0] * means[i] + (1 - betas[0]) * p.grad
            squares[i] = betas[1] * squares[i] + (1 - betas[1]) * p.grad**2
            ahead = (betas[0] * means[i] + (1 - betas[0]) * p.grad) / (1 - betas[0] ** (counts[i] + 1))
            expected = ahead / ((squares[i] / (1 - betas[1] ** counts[i])).sqrt() + eps)
            torch.testing.assert_close(u[p], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [Adam, NAdam])
def test_gradients_may_be_laid_out_otherwise_than_parameters(kind):
    """Fused kernels read memory as it lies."""
    held = [
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 4).t()),
        nn.Parameter(torch.randn(4, 6)[:, ::2]),
    ]
    twins = [nn.Parameter(p.detach().clone().contiguous()) for p in held]
    direction, state = kind(), defaultdict(dict)
    for _ in range(3):
        for p, q in zip(held, twins, strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = q.grad.clone()
        both = direction.update(groups(direction, [*held, *twins]), state)
        for p, q in zip(held, twins, strict=True):
            torch.testing.assert_close(both[p], both[q])


@pytest.mark.parametrize("kind", [Adam, NAdam])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.99), 1e-8), ((0.0, 0.9), 1e-3), ((0.9, 0.99), 0.0)])
def test_a_descent_is_a_subtraction_of_the_direction(kind, betas, eps):
    """In one kernel: for tensors of any layout, sizes and age, with gradients laid out otherwise or missing."""
    held = [*parameters(), nn.Parameter(torch.randn(5, 4).t()), nn.Parameter(torch.randn(4, 6)[:, ::2])]
    twins = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in held]
    sizes = [0.3, 0.3, 0.02, 0.0]
    direction, states = kind(betas, eps), (defaultdict(dict), defaultdict(dict))
    for t in range(9):
        for i, (p, q) in enumerate(zip(held, twins, strict=True)):
            p.grad = None if i == 1 and t in (0, 1, 4) else torch.randn_like(q)
            q.grad = None if p.grad is None else p.grad.clone()
        with torch.no_grad():
            direction.descend(groups(direction, held), states[0], dict(zip(held, sizes, strict=True)))
            u = direction.update(groups(direction, twins), states[1])
            for q, size in zip(twins, sizes, strict=True):
                if q in u:
                    q -= size * u[q]
        for p, q in zip(held, twins, strict=True):
            torch.testing.assert_close(p, q)


def test_a_direction_of_ones_own_is_not_taken_for_adams():
    class Halved(Adam):
        def update(self, groups, state):
            return {p: u / 2 for p, u in super().update(groups, state).items()}

    assert not descends(Halved())
    assert descends(NAdam())
    assert not descends(Momentum())


def test_adam_without_eps_is_scale_free_and_does_not_move_what_has_no_gradient():
    p = nn.Parameter(torch.zeros(4))
    direction, state = Adam(eps=0.0), defaultdict(dict)
    p.grad = torch.tensor([3.0, -1e-10, 0.0, 1e-30])  # the square of the last underflows
    u = direction.update(groups(direction, [p]), state)[p]
    torch.testing.assert_close(u, torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_adam_without_eps_hides_no_gradient_that_is_not_finite():
    p = nn.Parameter(torch.zeros(2))
    direction, state = Adam(eps=0.0), defaultdict(dict)
    p.grad = torch.tensor([torch.nan, torch.inf])
    assert not direction.update(groups(direction, [p]), state)[p].isfinite().any()


# Hyperparameters live in groups ---------------------------------------------------------------------------------------


def test_hyperparameters_are_read_from_the_groups():
    held = parameters()
    direction = Momentum(0.9)
    assert direction.defaults == {"momentum": 0.9}
    apart = groups(direction, held)
    apart[1]["momentum"] = 0.0
    state = defaultdict(dict)
    for _ in range(3):
        new_gradients(held)
        u = direction.update(apart, state)
    assert_rounded(u[held[1]], held[1].grad)
    assert not torch.allclose(u[held[0]], held[0].grad)


def test_adams_hyperparameters_are_read_from_the_groups():
    held = parameters()
    direction = Adam((0.9, 0.999), 1e-8)
    assert direction.defaults == {"betas": (0.9, 0.999), "eps": 1e-8}
    apart = groups(direction, held)
    apart[1] |= {"betas": [0.5, 0.9], "eps": 1e-2}  # a list, as JSON gives back
    twins = [nn.Parameter(p.detach().clone()) for p in held]
    reference = torch.optim.Adam(
        [{"params": twins[:1]}, {"params": twins[1:], "betas": (0.5, 0.9), "eps": 1e-2}], lr=1.0
    )
    state = defaultdict(dict)
    for _ in range(5):
        new_gradients(held)
        for p, q in zip(held, twins, strict=True):
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in twins]
        reference.step()
        u = direction.update(apart, state)
        for p, q, b in zip(held, twins, before, strict=True):
            torch.testing.assert_close(u[p], b - q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KEYS)
def test_every_direction_by_name_keeps_the_contract(kind):
    check_direction(lambda parameters: kind)
    assert resolve(kind).unit(parameters()[0]) == 1.0


# The step of another optimizer ----------------------------------------------------------------------------------------

INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


@pytest.mark.parametrize("kind", INNER)
def test_repeating_the_steps_of_an_optimizer_gives_its_own_trajectory(kind):
    held = parameters()
    twins = [nn.Parameter(p.detach().clone()) for p in held]
    direction, reference = StepOf(INNER[kind](held)), INNER[kind](twins)
    for t in range(30):
        for p, q in zip(held, twins, strict=True):
            p.grad = None if t < 5 and p is held[1] else p.detach().sin() + 0.1 * torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        before = [p.detach().clone() for p in held]
        u = direction.update([], defaultdict(dict))
        assert all(torch.equal(p, b) for p, b in zip(held, before, strict=True))
        with torch.no_grad():
            for p, step in u.items():
                p -= step
        reference.step()
        for p, q in zip(held, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", INNER)
def test_the_step_of_every_optimizer_keeps_the_contract(kind):
    check_direction(INNER[kind])


def test_without_gradients_there_is_no_step():
    assert StepOf(INNER["sgd"](parameters())).update([], defaultdict(dict)) == {}


def test_a_step_is_in_units_of_that_optimizers_rates():
    held = parameters()
    inner = torch.optim.SGD([{"params": held[:1], "lr": 0.5}, {"params": held[1:]}], lr=0.1)
    direction = StepOf(inner)
    assert [direction.unit(p) for p in held] == [0.5, 0.1]
    inner.param_groups[1]["lr"] = 0.025
    assert direction.unit(held[1]) == 0.025
    assert direction.unit(nn.Parameter(torch.ones(1))) == 1.0
    new_gradients(held)
    u = direction.update([], defaultdict(dict))
    torch.testing.assert_close(u[held[0]], 0.5 * held[0].grad)
    torch.testing.assert_close(u[held[1]], 0.025 * held[1].grad)


def test_a_steps_state_is_that_of_the_optimizer():
    held = parameters()
    direction = StepOf(INNER["adamw"](held))
    for _ in range(3):
        new_gradients(held)
        direction.update([], defaultdict(dict))
    successor = StepOf(INNER["adamw"](held))
    successor.load_state_dict(copy.deepcopy(direction.state_dict()))
    new_gradients(held)
    first, second = (d.update([], defaultdict(dict)) for d in (direction, successor))
    assert all(torch.equal(first[p], second[p]) for p in held)


# The next step, not taken ---------------------------------------------------------------------------------------------


def trained(optimizer_of):
    case = make("mlp")
    optimizer = optimizer_of(list(case.model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        case.loss.backward()
        optimizer.step()
    return case, optimizer


@pytest.mark.parametrize("kind", INNER)
def test_the_next_step_is_told_and_everything_stays_bit_by_bit(kind):
    case, optimizer = trained(INNER[kind])
    case.model[0].weight.flag = "kept"
    state = copy.deepcopy(optimizer.state_dict())
    identities = {id(t) for s in optimizer.state.values() for t in s.values()}
    with unchanged(case.model):
        told = next_step(optimizer, list(case.model.parameters()))
        again = next_step(optimizer, list(case.model.parameters()))
    for a, b in zip(told, again, strict=True):
        assert_rounded(a, b)
    assert {id(t) for s in optimizer.state.values() for t in s.values()} == identities
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    before = [p.detach().clone() for p in case.model.parameters()]
    optimizer.step()
    for step, b, p in zip(told, before, case.model.parameters(), strict=True):
        assert_rounded(b - step, p.detach(), 10)
        assert not step.requires_grad


def test_the_next_step_of_an_optimizer_that_writes_to_gradients_and_reads_attributes():
    class Clipping(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-0.01, 0.01)
                    p -= p.factor * p.grad

    case = make("mlp")
    for p in case.model.parameters():
        p.factor = 3.0
    case.loss.backward()
    with unchanged(case.model):
        told = next_step(Clipping(case.model.parameters()), list(case.model.parameters()))
    for step, p in zip(told, case.model.parameters(), strict=True):
        torch.testing.assert_close(step, 3.0 * p.grad.clamp(-0.01, 0.01), rtol=0, atol=1e-15)


def test_hooks_are_not_even_copied():
    class Trainer:
        def hook(self, *args):
            raise AssertionError("fired")

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    case, optimizer = trained(INNER["sgd"])
    optimizer.register_step_pre_hook(Trainer().hook)
    optimizer.register_state_dict_post_hook(Trainer().hook)
    assert len(next_step(optimizer, list(case.model.parameters()))) == 4


def test_an_optimizer_whose_steps_are_differentiated_has_the_same_next_step():
    """Its state may have a graph, as where a learning rate is learnt through it."""
    case = make("mlp")
    held = list(case.model.parameters())
    for differentiable in (True, False):
        optimizer = torch.optim.Adam(held, lr=0.1, differentiable=differentiable)
        case.loss.backward(retain_graph=True)
        for moment in ("exp_avg", "exp_avg_sq"):
            for p in held:
                value = p.square() if differentiable else p.detach().square()
                optimizer.state[p] |= {"step": torch.tensor(1.0), moment: value}
        told = next_step(optimizer, held)
        if differentiable:
            expected = told
            assert optimizer.defaults["differentiable"]
            assert optimizer.param_groups[0]["differentiable"]
        for p in held:
            p.grad = None
    for step, other in zip(told, expected, strict=True):
        assert not other.requires_grad
        torch.testing.assert_close(step, other, rtol=0, atol=0)


def test_an_optimizer_of_parameters_of_a_class_of_ones_own_has_a_next_step():
    """Torch does not copy tensors of such a class deeply, of which the state of Adam is made."""

    class Marked(torch.Tensor):
        pass

    weight = nn.Parameter(torch.randn(3, 2).as_subclass(Marked))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    (step,), before = next_step(optimizer, [weight]), weight.detach().clone()
    optimizer.step()
    assert_rounded((before - step).as_subclass(torch.Tensor), weight.detach().as_subclass(torch.Tensor), 10)


def test_parameters_that_the_optimizer_does_not_hold_get_zeros():
    case = make("mlp")
    case.loss.backward()
    held = list(case.model.parameters())
    told = next_step(torch.optim.SGD(held[:1], lr=1.0), held)
    torch.testing.assert_close(told[0], held[0].grad, rtol=1e-12, atol=1e-14)
    assert not any(step.any() for step in told[1:])


def test_sparse_gradients_have_a_next_step():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    (step,) = next_step(torch.optim.SGD(embedding.parameters(), lr=0.5), list(embedding.parameters()))
    torch.testing.assert_close(step, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_the_next_step_needs_gradients():
    case = make("mlp")
    with pytest.raises(ValueError, match="no gradients: call backward"):
        next_step(torch.optim.SGD(case.model.parameters(), lr=1.0), [])


# Names and bad input --------------------------------------------------------------------------------------------------


def test_directions_by_name():
    assert isinstance(resolve("gradient"), Gradient)
    assert isinstance(resolve("momentum"), Momentum)
    assert type(resolve("adam")) is Adam
    assert type(resolve("nadam")) is NAdam
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    assert resolve(optimizer).optimizers == (optimizer,)
    own = Momentum(0.3)
    assert resolve(own) is own
    with pytest.raises(
        ValueError, match="unknown direction 'newton': choose one of gradient, momentum, adam, nadam, soap, or pass"
    ):
        resolve("newton")


@pytest.mark.parametrize("something", [None, 5, [torch.ones(2)]])
def test_something_that_is_no_direction(something):
    with pytest.raises(TypeError, match=f"a Direction, got {type(something).__name__}"):
        resolve(something)


def test_an_optimizer_that_needs_a_closure_gives_no_direction():
    with pytest.raises(ValueError, match="LBFGS evaluates the loss in its step, so it gives no direction"):
        resolve(torch.optim.LBFGS(parameters()))


@pytest.mark.parametrize(
    ("make_direction", "message"),
    [
        (lambda: Momentum(1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: Momentum(-0.1), r"momentum must be in \[0, 1\), got -0.1"),
        (lambda: Adam(betas=(0.9, 1.0)), r"each of betas must be in \[0, 1\), got 1.0"),
        (lambda: Adam(eps=-1e-8), "eps must not be negative, got -1e-08"),
    ],
)
def test_hyperparameters_out_of_range(make_direction, message):
    with pytest.raises(ValueError, match=message):
        make_direction()


@pytest.mark.parametrize("kind", [Momentum, Adam])
def test_sparse_gradients_are_refused_with_a_cure(kind):
    held = [nn.Embedding(4, 3, sparse=True).weight]
    held[0].grad = torch.eye(4, 3).to_sparse()
    direction = kind()
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) has sparse gradients.*SparseAdam"):
        direction.update(groups(direction, held), defaultdict(dict))
