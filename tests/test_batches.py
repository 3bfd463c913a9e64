"""Batches of any make: looked into, rebuilt, counted; never changed."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

import newton_summary as ns
from newton_summary.measure.batches import BatchSizes, batch_size, fresh, map_tensors, tensors_of, to_device

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    more: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    name: str = "a"


class Graph:
    """Attributes and no more, as graph libraries have it."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.names = x, ["a"]


class Encoding(UserDict):
    pass


def ones() -> Tensor:
    return torch.ones(3, 2)


BATCHES = {
    "a tensor": ones,
    "a tuple": lambda: (ones(), 1, "a"),
    "a named tuple": lambda: Pair(ones(), ones()),
    "a list": lambda: [ones(), [ones(), None]],
    "a dictionary": lambda: {"x": ones(), "n": [1, 2]},
    "an ordered dictionary": lambda: OrderedDict(x=ones()),
    "a mapping": lambda: Encoding(x=ones(), more=Encoding(y=ones())),
    "a dataclass": lambda: Sample(ones(), {"y": ones()}),
    "a frozen dataclass": lambda: Frozen(ones()),
    "an object": lambda: Graph(ones()),
    "packed sequences": lambda: pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_tensors_are_found_and_replaced(name) -> None:
    batch = BATCHES[name]()
    before = [t.clone() for _, t in tensors_of(batch)]
    doubled = map_tensors(batch, lambda t: 2 * t)
    assert type(doubled) is type(batch)
    assert before
    for (path, old), (same, new), was in zip(tensors_of(batch), tensors_of(doubled), before, strict=True):
        assert path == same
        assert torch.equal(old, was)
        assert torch.equal(new, 2 * was)


@pytest.mark.parametrize("name", BATCHES)
def test_a_fresh_batch_has_the_same_tensors(name) -> None:
    batch = BATCHES[name]()
    assert [id(t) for _, t in tensors_of(fresh(batch))] == [id(t) for _, t in tensors_of(batch)]
    assert [p for p, _ in tensors_of(to_device(batch, torch.device("cpu")))] == [p for p, _ in tensors_of(batch)]


def test_containers_are_the_losss_own() -> None:
    batch = {"x": ones(), "more": [1], "deep": Sample(ones(), {"y": ones()}), "mapping": Encoding(z=ones())}
    mine = fresh(batch)
    mine.pop("x")
    mine["more"].append(2)
    mine["deep"].more.clear()
    mine["deep"].x = None
    mine["mapping"].pop("z")
    assert set(batch) == {"x", "more", "deep", "mapping"}
    assert batch["more"] == [1]
    assert list(batch["deep"].more) == ["y"]
    assert isinstance(batch["deep"].x, Tensor)
    assert list(batch["mapping"]) == ["z"]


def test_a_circle_ends() -> None:
    batch = {"x": ones()}
    batch["self"] = batch
    assert len(tensors_of(batch)) == 1
    assert fresh(batch)["x"] is batch["x"]


def test_nothing_is_registered_for_good() -> None:
    model = nn.Linear(2, 1)
    ns.summarize(lambda m, b: m(b["x"]).square().mean(), model, [Encoding(x=ones())])
    assert Encoding not in pytree.SUPPORTED_NODES


def test_tensors_of_inference_mode_are_made_ordinary() -> None:
    with torch.inference_mode():
        batch = {"x": ones()}
    assert not fresh(batch)["x"].is_inference()


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(4, 9), 4),
        ({"weights": torch.ones(3), "x": torch.ones(9, 2), "y": torch.ones(9)}, 9),
        ({"scale": torch.ones(1), "x": torch.ones(9, 2)}, 9),
        (Sample(torch.ones(7, 1)), 7),
        ({"name": ["a", "b", "c"]}, 3),
        (5, 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_the_size_of_a_batch(batch, size) -> None:
    assert batch_size(batch) == size
    assert batch_size(batch, 12) == 12
    assert batch_size(batch, lambda b: 13) == 13


def summarized(batches, loss_fn, **options):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    u = [torch.ones(1, 1, dtype=torch.float64)]
    summary = ns.summarize(loss_fn, model, batches, direction=u, **options)
    return summary.loss.item(), summary.hessian.item()


X = torch.cat([torch.zeros(9, 1), torch.ones(1, 1)]).double()


def attribute(model, batch):
    return model(batch.x).square().mean()


def entry(model, batch):
    return model(batch["x"]).square().mean()


@pytest.mark.parametrize("make", [Sample, Frozen, Graph])
def test_the_mean_is_over_samples(make) -> None:
    assert summarized([make(X[:9]), make(X[9:])], attribute) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize("order", [1, -1])
def test_class_weights_in_a_batch_are_not_counted(order) -> None:
    batches = [{"weights": torch.ones(3), "x": X[:9]}, {"weights": torch.ones(3), "x": X[9:]}][::order]
    with pytest.raises(ValueError, match=r"batch\['weights'\] from 3 to 3|batch\['weights'\] goes from 3 to 3"):
        summarized(batches, entry)
    assert summarized(batches, entry, batch_size=lambda b: len(b["x"])) == pytest.approx((0.1, 0.2))


def test_one_row_beside_many_is_nobodys_sample() -> None:
    batches = [{"scale": torch.ones(1), "x": x} for x in (X[:9], X[9:])]
    assert summarized(batches, entry) == pytest.approx((0.1, 0.2))
    assert summarized(batches[::-1], entry) == pytest.approx((0.1, 0.2))


def test_different_contents_need_a_size() -> None:
    lists = [[*X[:9].unsqueeze(1)], [X[9:]]]

    def loss_fn(model, batch):
        return torch.stack([model(x).square().mean() for x in batch]).mean()

    with pytest.raises(ValueError, match="different contents"):
        summarized(lists, loss_fn)
    assert summarized(lists, loss_fn, batch_size=len) == pytest.approx((0.1, 0.2))


def test_sizes_of_batches() -> None:
    sizes = BatchSizes()
    assert [sizes((torch.ones(n, 3), torch.ones(2 * n))) for n in (4, 2, 6)] == [4, 2, 6]
    with pytest.raises(ValueError, match="must be positive"):
        BatchSizes(0)(X)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.out = nn.GRU(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x)[0][-1])


def test_slices_of_sequences_with_time_in_front_are_refused() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    batch = torch.randn(8, 5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)

    def loss_fn(m, b):
        return (m(b[0]) - b[1]).square().mean()

    with pytest.raises((ValueError, ns.measure.Refusal)):
        ns.summarize(loss_fn, model, [batch], slices=2)


def test_slices_through_a_mask_of_as_many_tokens_as_samples_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).double()
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)

    def loss_fn(m, batch):
        x, mask = batch
        return (torch.softmax(m(x) @ x.mT + mask, -1) @ x).square().mean()

    with pytest.raises(ValueError, match=r"slices=3: .*pass smaller batches"):
        ns.summarize(loss_fn, model, [(x, mask)], slices=3)


def test_slices_of_a_random_loss_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    ns.summarize(lambda m, x: m(x).square().mean(), model, [torch.randn(8, 4, dtype=torch.float64)], slices=2)


def test_attributes_of_tensors_in_a_batch_are_as_they_were() -> None:
    x = torch.ones(3, 2)
    x.lengths = [2, 2, 1]

    def loss_fn(model, batch):
        batch["x"].lengths, batch["x"].seen = [1], True
        return model(batch["x"]).mean()

    ns.summarize(loss_fn, nn.Linear(2, 1), [{"x": x}])
    assert vars(x) == {"lengths": [2, 2, 1]}


def test_a_loss_may_take_its_batch_apart() -> None:
    def loss_fn(model, batch):
        y = batch.pop("y")
        return (model(batch.pop("x")) - y).square().mean()

    batch = {"x": X, "y": X}
    before = copy.copy(batch)
    model = nn.Linear(1, 1).double()
    for engine in ("forward", "nested"):
        ns.summarize(loss_fn, model, [batch], engine=engine)
    assert batch.keys() == before.keys()
    assert all(batch[key] is before[key] for key in batch)


def test_objects_that_lead_back_to_themselves_are_moved() -> None:
    class Node:
        def __init__(self) -> None:
            self.x, self.owner = torch.ones(2), self

    moved = to_device(Node(), torch.device("meta"))
    assert moved.x.device.type == "meta"
