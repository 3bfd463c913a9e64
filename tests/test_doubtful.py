"""Operations whose gradient is that of the loss for some data only: each batch is judged by itself."""

from __future__ import annotations

import pytest
import torch
from differences import differences
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import Refusal, resolve_engine

OK, TWICE = torch.tensor([0, 1]), torch.tensor([2, 2])
each_engine = pytest.mark.parametrize("engine", ["forward", "auto"])


def check(summary: ns.Summary, loss_fn, model: nn.Module, batch: Tensor, u: list[Tensor]) -> None:
    names = [name for name, _ in model.named_parameters()]
    differences(loss_fn, model, lambda: batch, dict(zip(names, u, strict=True)), 0.01).check(summary, 1e-5)


def made(seed: int = 0) -> tuple[nn.Module, Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).double()
    return model, torch.randn(4, 3, dtype=torch.float64), [torch.full_like(p, 0.1) for p in model.parameters()]


def put(z: Tensor, rows: Tensor) -> Tensor:
    return z.index_put((rows, torch.tensor([1])), z[:2, 0].exp())


WRITERS = {
    "assigned": lambda z, rows: z.index_put((rows,), z[:2].exp()),
    "some entries": put,
    "copied": lambda z, rows: z.index_copy(0, rows, z[:2].exp()),
    "filled": lambda z, rows: z.index_fill(0, rows, z[0, 0].exp()),
    "scattered": lambda z, rows: z.scatter(0, rows[:, None].expand(2, 2), z[:2].exp()),
    "put": lambda z, rows: z.put(rows, z[0].exp()),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@each_engine
def test_batches_that_write_an_entry_twice_are_refused_and_others_are_not(write, engine) -> None:
    """Neither what was found for one, nor what was refused for another, is taken for the next."""
    model, x, u = made()
    loss_fn = lambda m, rows: write(m(x), rows).square().sum()  # noqa: E731
    engine = resolve_engine(engine)
    for _ in range(2):
        summary = ns.summarize(loss_fn, model, [OK], direction=u, engine=engine, batch_size=1)
        check(summary, loss_fn, model, OK, u)
        with pytest.raises(Refusal, match=r"written twice|writes an entry twice"):
            ns.summarize(loss_fn, model, [TWICE], direction=u, engine=engine, batch_size=1)


@each_engine
def test_what_is_written_twice_but_does_not_move_is_measured(engine) -> None:
    model, x, u = made()
    loss_fn = lambda m, rows: m(x).exp().index_put((rows,), torch.ones(2, 2).double()).square().sum()  # noqa: E731
    summary = ns.summarize(loss_fn, model, [TWICE], direction=u, engine=engine, batch_size=1)
    check(summary, loss_fn, model, TWICE, u)


@each_engine
def test_what_is_written_twice_is_refused_where_there_is_no_graph(engine) -> None:
    """Behind what only nested passes can differentiate: they have autograd's gradient, which counts both writers."""
    model, x, u = made()

    def loss_fn(m: nn.Module, rows: Tensor) -> Tensor:
        z = m(x).index_put((rows,), m(x)[:2].exp())
        return torch.linalg.eigvals(z[:2] @ z[2:] + 3 * torch.eye(2)).real.sin().sum()

    with pytest.raises(Refusal, match="writes an entry twice"):
        ns.summarize(loss_fn, model, [TWICE], direction=u, engine=engine, batch_size=1)


class Matrix(nn.Module):
    def __init__(self, content: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(content)


FACTORS = {
    "eigenvalues": lambda a: torch.linalg.eigvalsh(a).sin().sum(),
    "Cholesky": lambda a: torch.linalg.cholesky(a).sum(),
    "inverse": lambda a: torch.linalg.pinv(a, hermitian=True).sum(),
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@each_engine
def test_a_direction_that_leaves_the_symmetric_matrices_is_refused_after_one_that_does_not(factor, engine) -> None:
    torch.manual_seed(1)
    content, u = torch.randn(2, 3, 3, dtype=torch.float64)
    model = Matrix(content @ content.T + torch.eye(3))
    loss_fn, batch, engine = (lambda m, _: factor(m.a)), torch.ones(1), resolve_engine(engine)
    try:
        summary = ns.summarize(loss_fn, model, [batch], direction=[u + u.T], engine=engine)
    except Refusal as refusal:
        assert "symmetric" in str(refusal)  # noqa: PT017  (exact will do as well)
    else:
        check(summary, loss_fn, model, batch, [u + u.T])
    with pytest.raises(Refusal, match="symmetric"):
        ns.summarize(loss_fn, model, [batch], direction=[u], engine=engine)


@pytest.mark.parametrize("engine", ["forward", "nested", "auto"])
def test_parameters_that_lie_in_the_same_memory_are_refused(engine) -> None:
    whole = torch.linspace(0.1, 1, 4)
    model = nn.Module()
    model.a, model.b = nn.Parameter(whole[:3]), nn.Parameter(whole[1:])
    with pytest.raises(Refusal, match="'a' and 'b' are different tensors in the same memory"):
        ns.summarize(
            lambda m, _: (m.a * m.b).sum(), model, [torch.ones(1)], direction=[torch.ones(3)] * 2, engine=engine
        )
    model.b = nn.Parameter(whole[3:])
    model.a = nn.Parameter(whole[:3])
    loss_fn, u = (lambda m, _: m.a.prod() * m.b.sum()), [torch.ones(3), torch.ones(1)]
    assert ns.summarize(loss_fn, model, [torch.ones(1)], direction=u, engine=engine).hessian is not None


@each_engine
def test_an_exponent_that_becomes_zero(engine) -> None:
    """There torch takes the derivative by the base for constant: without a word, where the program is known."""
    model = nn.Module()
    model.a, model.p = nn.Parameter(torch.tensor(1.5).double()), nn.Parameter(torch.tensor(0.5).double())
    loss_fn, u = (lambda m, _: m.a**m.p), [torch.tensor(1.0).double()] * 2
    for exponent in (0.5, 0.0, 0.1):
        with torch.no_grad():
            model.p.fill_(exponent)
        summary = ns.summarize(loss_fn, model, [torch.ones(1)], direction=u, engine=engine)
        check(summary, loss_fn, model, torch.ones(1), u)


@each_engine
def test_deviations_that_are_zero(engine) -> None:
    """The square is smooth, and measured; what else bends there is refused, a kink has torch's convention."""
    model, u = nn.Module(), [torch.tensor([1.0, -2.0, 0.5]).double()]
    model.w, batch = nn.Parameter(torch.ones(3).double()), torch.ones(1)
    squared = lambda m, _: m.w.std() ** 2 + m.w.sum()  # noqa: E731
    summary = ns.summarize(squared, model, [batch], direction=u, engine=engine)
    check(summary, squared, model, batch, u)
    with pytest.raises(Refusal, match="exactly zero"):
        ns.summarize(lambda m, _: m.w.std().cosh() + m.w.sum(), model, [batch], direction=u, engine=engine)
    assert ns.summarize(lambda m, _: m.w.std() + m.w.sum(), model, [batch], direction=u, engine=engine).hessian == 0


@each_engine
def test_a_pooled_length_that_is_zero_is_refused(engine) -> None:
    model, u = nn.Module(), [torch.tensor([[1.0, -2.0, 0.5, 1.0]]).double()]
    model.w = nn.Parameter(torch.zeros(1, 4).double())
    loss_fn = lambda m, _: (nn.functional.lp_pool1d(m.w, 2, 2) ** 2).sum() + m.w.sum()  # noqa: E731
    with pytest.raises(Refusal, match="exactly zero"):
        ns.summarize(loss_fn, model, [torch.ones(1)], direction=u, engine=engine)
