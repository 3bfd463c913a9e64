"""Cutting batches into slices: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import newton_summary as ns
from newton_summary.measure import ForwardEngine, NestedEngine


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.entries = max(self.entries, leaf.numel())
        return out


def make_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    batch = {"x": torch.randn(403, 5).double(), "y": torch.randint(3, (403,)), "scale": torch.tensor([2.0]).double()}
    return model, batch


def loss_fn(model, batch):
    return batch["scale"][0] * nn.functional.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("engine", [ForwardEngine, NestedEngine])
@pytest.mark.parametrize("slices", [2, 5, 1000])
def test_slices_of_uneven_size_give_the_same_summary(engine, slices) -> None:
    model, batch = make_problem()
    if slices == 1000:
        batch = {key: value[:7] for key, value in batch.items()}
    whole = ns.summarize(loss_fn, model, [batch], third="full", engine=engine())
    cut = ns.summarize(loss_fn, model, [batch], third="full", engine=engine(), slices=slices)
    for order in range(4):
        assert torch.allclose(cut.tensor(order), whole.tensor(order), rtol=1e-10, atol=1e-12)
    assert cut.weight == whole.weight


@pytest.mark.parametrize("third", ["diagonal", "full"])
def test_slices_bound_the_memory_of_the_forward_engine(third) -> None:
    largest = []
    for slices in (1, 4):
        model, batch = make_problem()
        with Largest() as mode:
            ns.summarize(loss_fn, model, [batch], third=third, engine=ForwardEngine(), slices=slices)
        largest.append(mode.entries)
    assert largest[0] > 403 * 16, "tangents of several groups are larger than the values"
    assert largest[1] < 0.3 * largest[0]


def test_the_number_of_slices_is_checked() -> None:
    model, batch = make_problem()
    with pytest.raises(ValueError, match="slices must be a whole number from 1 on, got 0"):
        ns.summarize(loss_fn, model, [batch], slices=0)


def small(*between: nn.Module, zeros: bool = False) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    last = nn.Linear(3, 1)
    if zeros:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), *between, last).double()
    return model, (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64))


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def penalised(model, batch):
    x = batch[0].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return squared_error(model, batch) + 0.1 * slope.square().sum(1).mean()


@pytest.mark.parametrize("engine", [ForwardEngine, NestedEngine])
def test_losses_that_differentiate_are_cut_too(engine) -> None:
    model, batch = small()
    whole, cut = (ns.summarize(penalised, model, [batch], third="full", engine=engine(), slices=n) for n in (1, 4))
    for order in range(4):
        assert torch.allclose(cut.tensor(order), whole.tensor(order), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("between", "zeros", "reason"),
    [
        ([nn.BatchNorm1d(3)], True, "mean gradient .* '3.weight', of shape"),  # the loss itself is the same
        ([nn.BatchNorm1d(3), nn.Dropout(0.3)], False, "mean loss"),
    ],
)
def test_statistics_of_the_batch_are_seen(between, zeros, reason) -> None:
    model, batch = small(*between, zeros=zeros)
    with pytest.raises(ValueError, match=f"slices=2: the {reason}.*pass smaller batches"):
        ns.summarize(squared_error, model, [batch], slices=2)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match=r"slices=6: .*\(ValueError: Expected more than 1 value per channel"):
        ns.summarize(squared_error, model, [batch], slices=6)


def test_a_sum_is_seen_behind_dropout() -> None:
    model, batch = small(nn.Dropout(0.3))
    with pytest.raises(ValueError, match="slices=2: the mean loss"):
        ns.summarize(lambda m, b: len(b[0]) * squared_error(m, b), model, [batch], slices=2)


def test_a_small_part_of_the_loss_that_depends_on_the_whole_batch_is_seen() -> None:
    model, batch = small()
    with pytest.raises(ValueError, match=r"slices=2: the mean (loss|gradient)"):
        ns.summarize(lambda m, b: squared_error(m, b) + 0.03 * m(b[0]).mean().square(), model, [batch], slices=2)


def test_half_precision_is_not_taken_for_another_loss() -> None:
    model, batch = small()
    model, batch = model.bfloat16(), tuple(t.bfloat16() for t in batch)
    whole, cut = (ns.summarize(squared_error, model, [batch], slices=n).gradient for n in (1, 3))
    assert torch.allclose(cut, whole, rtol=0.1, atol=0.1 * float(whole.max()))


def sparse_error(model, batch):
    hidden = torch.sparse.mm(batch[0], model[0].weight.t()) + model[0].bias
    return (model[2](hidden.tanh()) - batch[1]).square().mean()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_batches_are_cut_or_refused() -> None:
    model, (x, y) = small()
    whole = ns.summarize(sparse_error, model, [(x.relu().to_sparse(), y)])
    cut = ns.summarize(sparse_error, model, [(x.relu().to_sparse(), y)], slices=4)
    assert torch.allclose(cut.hessian, whole.hessian, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"cannot cut a tensor of layout torch.sparse_csr.*pass smaller batches"):
        ns.summarize(sparse_error, model, [(x.relu().to_sparse_csr(), y)], slices=2)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_batches_are_measured_whole(layout) -> None:
    model, (x, y) = small()
    rows = [x[:3], x[3:5]]

    def loss_fn(model, batch):
        return (torch.stack([model(t).sum(0) for t in batch[0].unbind()]) - batch[1]).square().mean()

    u = [torch.ones_like(p) for p in model.parameters()]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    measured = ns.summarize(loss_fn, model, [(nested, y[:2])], direction=u)
    expected = ns.summarize(
        lambda m, b: (torch.stack([m(t).sum(0) for t in b[0]]) - b[1]).square().mean(),
        model,
        [(rows, y[:2])],
        direction=u,
    )
    assert measured.weight == 2
    assert torch.allclose(measured.hessian, expected.hessian, rtol=1e-10)
    with pytest.raises(ValueError, match=r"cannot cut a nested tensor.*pass smaller batches"):
        ns.summarize(loss_fn, model, [(nested, y[:2])], slices=2)


def test_a_later_batch_is_checked_too() -> None:
    """A mean over tokens is that over slices only where these have as many."""
    _, (x, _) = small()
    head = nn.Sequential(nn.Linear(4, 3)).double()
    full = torch.zeros(6, dtype=torch.long)
    padded = torch.tensor([0, -100, -100, 1, 2, 0])

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    ns.summarize(loss_fn, head, [(x, full)], slices=2)
    with pytest.raises(ValueError, match="slices=2: the mean loss"):
        ns.summarize(loss_fn, head, [(x, full), (x, padded)], slices=2)
