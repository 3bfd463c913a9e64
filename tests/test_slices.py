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
