"""Summaries as plain data: their algebra, their forms outside of Python, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from newton_summary import Summary

NAMES = ("a", "b", "c")


def summary(size=3, third="full", higher=1, seed=0, weight=1.0):
    """Symmetric random tensors."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(order):
        value = torch.randn((size,) * order, generator=generator, dtype=torch.float64)
        axes = list(range(order))
        for _ in range(2 * order):  # averages of neighbours' swaps come close enough to symmetry for these tests
            for i in range(order - 1):
                swapped = [*axes]
                swapped[i], swapped[i + 1] = i + 1, i
                value = (value + value.permute(swapped)) / 2
        return value

    full = tensor(3)
    thirds = {"full": full, "diagonal": torch.einsum("sss->s", full), None: None}
    return Summary(
        loss=tensor(0),
        gradient=tensor(1),
        hessian=tensor(2),
        third=thirds[third],
        names=NAMES[:size],
        higher=tuple(tensor(4 + i) for i in range(higher)),
        weight=weight,
    )


def same(a, b, tolerance=1e-12):
    assert a.names == b.names
    assert a.weight == b.weight
    assert a._tensors().keys() == b._tensors().keys()
    for key, value in a._tensors().items():
        assert_close(value, b._tensors()[key], tolerance)


def phi(s, eta):
    """The Taylor polynomial that a full summary stands for: what the algebra has to be about."""
    value, factorial = torch.zeros((), dtype=torch.float64), 1.0
    for order in range(4 + len(s.higher)):
        factorial *= max(order, 1)
        term = s.tensor(order)
        for _ in range(order):
            term = term @ eta
        value = value + term / factorial
    return value


etas = st.lists(st.floats(-2, 2), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))
factors = st.floats(-3, 3)


# Making and reading ---------------------------------------------------------------------------------------------------


def test_made_by_hand_from_plain_numbers():
    made = Summary(loss=1, gradient=[1, 2], hessian=[[1, 0], [0, 1]], third=[3, 4], names=["x", "y"])
    assert made.names == ("x", "y")
    assert len(made) == 2
    for value in (made.loss, made.gradient, made.hessian, made.third):
        assert value.dtype == torch.float64
    assert made.third.tolist() == [3.0, 4.0]
    assert made.weight == 1.0
    assert Summary(loss=0.0, gradient=torch.ones(3, dtype=torch.float32)).names == ("0", "1", "2")


def test_a_summary_carries_no_graph_and_cannot_be_changed():
    made = Summary(loss=torch.ones((), requires_grad=True) * 2, gradient=torch.ones(2, requires_grad=True))
    assert not made.loss.requires_grad
    assert not made.gradient.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.weight = 2.0


@pytest.mark.parametrize("make", [np.zeros, lambda shape: torch.zeros(shape, dtype=torch.float64)])
def test_what_is_written_into_later_is_not_the_summarys(make):
    gradient, hessian = make((2,)), make((2, 2))
    before = Summary(loss=1.0, gradient=gradient, hessian=hessian)
    gradient[0], hessian[0, 0] = 1.0, 1.0
    assert not before.gradient.any()
    assert not before.hessian.any()


def test_tensor_gives_every_order():
    s = summary(higher=2)
    tensors = [s.loss, s.gradient, s.hessian, s.third, *s.higher]
    for order, tensor in enumerate(tensors):
        assert s.tensor(order) is tensor
        assert s.tensor(order).shape == (3,) * order


@pytest.mark.parametrize("order", [-1, 2, 3, 4])
def test_tensor_that_was_not_measured(order):
    with pytest.raises(ValueError, match=f"order {order} was not measured"):
        Summary(loss=1.0, gradient=[1.0]).tensor(order)


def test_tensor_of_a_diagonal_third():
    with pytest.raises(ValueError, match=r"only the diagonal of the third order was measured: summarize.*third='full'"):
        summary(third="diagonal").tensor(3)
    with pytest.raises(ValueError, match="only the diagonal"):
        Summary(loss=1.0, gradient=[1.0], third=[1.0]).tensor(3)


def test_third_diagonal():
    full, diagonal = summary(), summary(third="diagonal")
    assert full.third_diagonal.tolist() == [full.third[i, i, i].item() for i in range(3)]
    assert torch.equal(diagonal.third_diagonal, diagonal.third)
    assert summary(third=None, higher=0).third_diagonal is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": [1.0]}, r"loss has shape \(1,\); 2 groups need \(\)"),
        ({"gradient": 1.0}, r"gradient must be a vector with an entry for each group, got shape \(\)"),
        ({"gradient": [[1.0, 2.0]]}, r"gradient must be a vector .* got shape \(1, 2\)"),
        ({"gradient": None}, r"gradient must be a vector .* got None"),
        ({"hessian": [1.0, 2.0]}, r"hessian has shape \(2,\); 2 groups need \(2, 2\)"),
        ({"hessian": [[1.0]]}, r"hessian has shape \(1, 1\)"),
        ({"third": [1.0]}, r"third has shape \(1,\); 2 groups need \(2,\) or \(2, 2, 2\)"),
        ({"third": [[1.0, 2.0], [3.0, 4.0]]}, r"third has shape \(2, 2\)"),
        ({"higher": (torch.ones(2, 2, 2),)}, r"order4 has shape \(2, 2, 2\)"),
        ({"names": ("a",)}, "1 names for 2 groups"),
        ({"names": ("a", "a")}, "two groups have the same name"),
        ({"weight": -1.0}, "weight must not be negative"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Summary(**{"loss": 1.0, "gradient": [1.0, 2.0], **changes})


def test_names_are_text():
    with pytest.raises(TypeError, match=r"the names of groups must be text, got \(0, 'a'\)"):
        Summary(1.0, [1.0, 2.0], names=[0, "a"])


# Algebra --------------------------------------------------------------------------------------------------------------


@given(eta=etas, a=factors, b=factors)
@settings(max_examples=30, deadline=None)
def test_sums_and_multiples_are_those_of_the_losses(eta, a, b):
    left, right = summary(seed=1), summary(seed=2)
    combined = left * a + b * right
    assert phi(combined, eta).item() == pytest.approx((a * phi(left, eta) + b * phi(right, eta)).item(), abs=1e-10)


def test_weights_add_in_sums_and_stay_in_multiples():
    left, right = summary(weight=3.0), summary(seed=1, weight=5.0)
    assert (left + right).weight == 8.0
    assert (left * 2.0).weight == (2.0 * left).weight == 3.0


def test_what_pythons_own_functions_make_of_summaries():
    parts = [summary(seed=i, weight=i + 1.0) for i in range(3)]
    same(sum(parts), parts[0] + parts[1] + parts[2], 0.0)
    same(Summary.mean(part for part in parts), Summary.mean(parts), 0.0)
    same(torch.tensor(2.0) * parts[0], parts[0] * 2.0, 0.0)
    for wrong in (lambda: parts[0] + 1, lambda: sum(parts, 1), lambda: parts[0] * parts[1], lambda: parts[0] * [2.0]):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            wrong()
    with pytest.raises(TypeError):
        parts[0] * torch.ones(3)


@given(eta=etas, weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_mean_counts_by_weight(eta, weights):
    parts = [summary(seed=i, weight=w) for i, w in enumerate(weights)]
    mean = Summary.mean(parts)
    expected = sum(w * phi(p, eta) for w, p in zip(weights, parts, strict=True)) / sum(weights)
    assert mean.weight == sum(weights)
    assert phi(mean, eta).item() == pytest.approx(expected.item(), abs=1e-10)


@given(eta=etas, scales=etas)
@settings(max_examples=30, deadline=None)
def test_scale_changes_the_direction(eta, scales):
    s = summary(higher=2)
    assert phi(s.scale(scales), eta).item() == pytest.approx(phi(s, scales * eta).item(), rel=1e-10, abs=1e-9)
    diagonal = summary(third="diagonal").scale(scales.tolist())
    assert_close(diagonal.third, summary().scale(scales).third_diagonal, 1e-12)


@pytest.mark.parametrize(
    "groups", [{"x": ["a", "c"], "y": ["b"]}, {"y": ["b"], "x": ["c", "a"]}, {"all": NAMES}, {n: [n] for n in "cab"}]
)
@given(values=etas)
@settings(max_examples=10, deadline=None)
def test_merging_gives_one_rate_to_the_merged(groups, values):
    s = summary(higher=2)
    rates = {group: values[i] for i, group in enumerate(groups)}
    spread = torch.stack([next(rates[g] for g, old in groups.items() if name in old) for name in NAMES])
    merged = s.merge(groups)
    assert merged.names == tuple(groups)
    assert phi(merged, torch.stack(list(rates.values()))).item() == pytest.approx(phi(s, spread).item(), abs=1e-9)


def test_merging_knows_a_diagonal_third_only_where_nothing_is_summed():
    s = summary(third="diagonal")
    merged = s.merge({"x": ["a", "c"], "y": ["b"]})
    assert merged.third is None
    assert merged.hessian.shape == (2, 2)
    assert merged.higher[0].shape == (2,) * 4
    assert s.merge({"z": ["c"], "x": ["a"], "y": ["b"]}).third.tolist() == s.third[[2, 0, 1]].tolist()


def test_merging_keeps_weight_and_what_was_not_measured():
    merged = Summary(loss=2.0, gradient=[1.0, 2.0], names=("a", "b"), weight=7.0).merge({"all": ["a", "b"]})
    assert merged.loss.item() == 2.0
    assert merged.gradient.tolist() == [3.0]
    assert merged.hessian is None
    assert merged.third is None
    assert merged.weight == 7.0


def test_merging_does_not_spread_what_is_not_finite():
    s = Summary(loss=1.0, gradient=[1.0, torch.inf], hessian=[[1.0, 0.0], [0.0, torch.nan]], names=("a", "b"))
    merged = s.merge({"x": ["a"], "y": ["b"]})
    assert merged.gradient.tolist() == [1.0, torch.inf]
    assert merged.hessian[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": ["a", "b", "c", "d"]}, "no group is called 'd': the groups are a, b, c"),
        ({"x": ["a", "b"], "y": ["b", "c"]}, "group 'b' is merged twice"),
        ({"x": ["a", "a"], "y": ["b", "c"]}, "group 'a' is merged twice"),
        ({"x": ["a", "b"]}, "group 'c' is in none of the merged groups"),
        ({"x": ["a", "b", "c"], "y": []}, "merged group 'y' is empty"),
    ],
)
def test_merges_that_make_no_partition(groups, message):
    with pytest.raises(ValueError, match=message):
        summary().merge(groups)


def test_a_curvature_that_is_no_number_correlates_with_nothing_that_is_known():
    broken = Summary(loss=1.0, gradient=[1.0] * 3, hessian=[[torch.nan, 1.0, 0.0], [1.0, 4.0, 2.0], [0.0, 2.0, 4.0]])
    correlations = broken.correlations()
    assert correlations[0].isnan().all()
    assert correlations[1:, 1:].tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert "nan)" not in broken._repr_html_(), "no colour"


def test_what_does_not_add():
    with pytest.raises(ValueError, match="different groups do not add"):
        summary() + dataclasses.replace(summary(), names=("a", "b", "d"))
    for other in (summary(third="diagonal"), summary(third=None, higher=0), summary(higher=2)):
        with pytest.raises(ValueError, match="different orders do not add"):
            summary() + other
    with pytest.raises(ValueError, match="the mean of no summaries"):
        Summary.mean([])
    with pytest.raises(ValueError, match="weights are all 0"):
        Summary.mean([summary(weight=0.0)] * 2)
    with pytest.raises(ValueError, match=r"scale takes 3 factors, one for each group, got shape \(2,\)"):
        summary().scale([1.0, 2.0])


# Keeping --------------------------------------------------------------------------------------------------------------

FORMS = [summary(), summary(third="diagonal", higher=0), summary(higher=8, size=2, weight=12.0)]
FORMS += [Summary(loss=0.1, gradient=[1 / 3], names=("é [0, 1]",))]


@pytest.mark.parametrize("original", FORMS)
def test_dictionaries_and_json_give_the_same_numbers_back(original):
    data = original.to_dict()
    same(Summary.from_dict(data), original, 0.0)
    same(Summary.from_dict(json.loads(json.dumps(data))), original, 0.0)


@pytest.mark.parametrize("original", FORMS)
def test_files_give_the_same_numbers_back(original, tmp_path):
    for path in (tmp_path / "summary.pt", str(tmp_path / "other")):
        original.save(path)
        same(Summary.load(path), original, 0.0)


@pytest.mark.parametrize("weight", [np.int64(3), np.float64(3.0), torch.tensor(3)])
def test_weights_of_other_libraries_are_plain_numbers(weight, tmp_path):
    original = Summary(loss=1.0, gradient=[1.0], weight=weight)
    original.save(tmp_path / "s")
    assert Summary.load(tmp_path / "s").weight == json.loads(json.dumps(original.to_dict()))["weight"] == 3.0


def test_not_finite_numbers_are_kept(tmp_path):
    s = Summary(loss=torch.nan, gradient=[torch.inf, 1.0])
    assert not s.is_finite()
    s.save(tmp_path / "s")
    assert Summary.load(tmp_path / "s").gradient.tolist() == [torch.inf, 1.0]
    assert summary().is_finite()
    assert not Summary(loss=1.0, gradient=[1.0], third=[-torch.inf]).is_finite()


def test_on_the_host_it_stays_what_it_is():
    s = summary()
    assert s.cpu() is s


def test_moving_from_a_device_is_one_transfer(monkeypatch):
    """A subclass of tensors plays the device: it counts how often it is moved."""
    s = summary(higher=2)
    moved = []

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

        def cpu(self):
            moved.append(self.numel())
            return self.as_subclass(torch.Tensor)

    elsewhere = s._with({key: value.as_subclass(Elsewhere) for key, value in s._tensors().items()})
    same(elsewhere.cpu(), s, 0.0)
    assert moved == [1 + 3 + 9 + 27 + 81 + 243]


def test_data_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="not a summary of format 1: it has keys"):
        Summary.from_dict({"format": 99, "loss": 1.0})
    with pytest.raises(ValueError, match="not a summary of format 1: it is a list"):
        Summary.from_dict([1.0])
    torch.save(torch.ones(2), tmp_path / "tensor")
    with pytest.raises(ValueError, match="it is a Tensor"):
        Summary.load(tmp_path / "tensor")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is not a summary"):
        Summary.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Summary.load(tmp_path / "nothing")
