"""What the default optimizer is made of, each part alone."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from newton_summary import Summary
from newton_summary.measure.along import LossAlongStep
from newton_summary.optim.backtracking import halvings_to_agreement
from newton_summary.optim.cadence import ComparisonCadence
from newton_summary.optim.relative_rates import RelativeRates
from newton_summary.optim.state import packed, unpack
from newton_summary.optim.weight_average import WeightAverage, go_towards

DTYPE = torch.float64


# The loss along a step ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=8))
def test_the_loss_along_a_step_is_that_at_the_moved_weights(sizes) -> None:
    weights, step = [torch.tensor([1.0, -2.0], dtype=DTYPE)], [torch.tensor([0.5, 0.25], dtype=DTYPE)]
    losses = LossAlongStep(weights, step, lambda: float((weights[0] ** 2).sum()))
    for size in sizes:
        expected = (1 - 0.5 * size) ** 2 + (-2 - 0.25 * size) ** 2
        assert losses(size) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert losses(0.0) == pytest.approx(5.0)


# Backtracking ---------------------------------------------------------------------------------------------------------


@given(st.floats(-1e4, 1e4), st.floats(0.0, 10.0), st.floats(0.1, 10.0))
def test_backtracking_stops_at_the_first_length_at_which_loss_and_model_agree(cubic, curvature, slope) -> None:
    """The loss is 1 − slope η + ½ curvature η² + cubic η³: the last term is what the model does not know."""
    summary = Summary(loss=1.0, gradient=[slope], hessian=[[curvature]])

    def loss_after(eta: torch.Tensor) -> float:
        (x,) = eta.tolist()
        return 1 - slope * x + curvature * x**2 / 2 + cubic * x**3

    found = halvings_to_agreement(summary, torch.ones(1, dtype=DTYPE), loss_after, precision=0.0)

    def agrees(x: float) -> bool:
        return abs(cubic) * x**3 <= 0.5 * (slope * x + curvature * x**2 / 2)

    expected = next(k for k in range(40) if agrees(0.5**k))
    assert found == expected or not agrees(0.5**expected * (1 + 1e-9)), "up to rounding at the border"


def test_a_loss_that_is_noise_agrees_at_no_length() -> None:
    summary = Summary(loss=1.0, gradient=[1e-3], hessian=[[1.0]])
    assert halvings_to_agreement(summary, torch.ones(1, dtype=DTYPE), lambda eta: 3.0, precision=1e-7) is None
    assert halvings_to_agreement(summary, torch.ones(1, dtype=DTYPE), lambda eta: 3.0, precision=1.0) == 0, "rounding"


# Relative rates -------------------------------------------------------------------------------------------------------


def test_relative_rates_take_ratios_and_keep_the_curvature() -> None:
    relative, hessian = RelativeRates(), torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=DTYPE)
    relative.update(torch.zeros(2, dtype=DTYPE), hessian)
    assert relative.value is None, "there is no ratio of nothing"
    first, second = torch.tensor([1.0, 2.0], dtype=DTYPE), torch.tensor([30.0, 10.0], dtype=DTYPE)
    relative.update(first, hessian)
    assert torch.equal(relative.value, first), "the first ones have a size of their own"
    relative.update(second, hessian)
    assert float(relative.value @ hessian @ relative.value) == pytest.approx(float(first @ hessian @ first), rel=1e-14)
    assert (relative.value / second).tolist() == pytest.approx([float(relative.value[0] / 30)] * 2)
    before = relative.value.clone()
    relative.update(second, -hessian)
    assert torch.equal(relative.value, before), "a curvature that is not positive tells no size"
    twin = RelativeRates()
    twin.load_state_dict(copy.deepcopy(relative.state_dict()))
    assert torch.equal(twin.value, relative.value)


# The average of the weights -------------------------------------------------------------------------------------------


def test_the_average_of_the_weights_follows_them_and_changes_places() -> None:
    parameters, state = [nn.Parameter(torch.tensor([1.0, 2.0], dtype=DTYPE))], defaultdict(dict)
    average = WeightAverage(parameters)
    (values,) = average.values(state)
    assert torch.equal(values, parameters[0])
    by_hand = values.clone()
    with torch.no_grad():
        for share, weights in ((0.15, [3.0, 0.0]), (0.6, [-1.0, 1.0]), (0.25, [7.0, 7.0])):
            parameters[0].copy_(torch.tensor(weights))
            average.follow(state, share)
            by_hand += share * (torch.tensor(weights, dtype=DTYPE) - by_hand)
            assert torch.allclose(average.values(state)[0], by_hand, rtol=1e-14)
        average.keep(state)
        kept = average.before(state)[0].clone()
        assert torch.equal(kept, average.values(state)[0])
        parameters[0].copy_(torch.tensor([5.0, 9.0]))
        average.follow(state, 0.5)
        now = average.values(state)[0].clone()
        average.exchange(state)
        assert average.is_in_place
        assert torch.equal(parameters[0], now)
        average.exchange(state)
        assert not average.is_in_place
        assert parameters[0].tolist() == [5.0, 9.0]
        assert torch.equal(average.before(state)[0], kept), "what came since is not in it"
        average.restore(state)
        assert torch.equal(parameters[0], kept)
        average.exchange(state)
        assert torch.equal(parameters[0], kept), "what has diverged is not evaluated"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_weights_in_half_precision_has_digits_for_small_shares(dtype) -> None:
    weight, state = nn.Parameter(torch.ones(3, dtype=dtype)), defaultdict(dict)
    average, share = WeightAverage([weight]), 1e-4
    average.values(state)
    with torch.no_grad():
        weight.fill_(2.0)
        for _ in range(2000):
            average.follow(state, share)
        expected = 2 - (1 - share) ** 2000  # 1.18
        torch.testing.assert_close(average.values(state)[0], torch.full((3,), expected), rtol=1e-4, atol=0)
        digits = average.values(state)[0].clone()
        average.exchange(state)
        assert torch.equal(weight, digits.to(dtype))
        average.exchange(state)
        assert torch.equal(weight, torch.full((3,), 2.0, dtype=dtype))
        assert torch.equal(average.values(state)[0], digits), "to be looked at costs it nothing"
        average.keep(state)
        average.restore(state)
        assert torch.equal(weight, digits.to(dtype))
        way = [weight.clone().fill_(2.0)]
        go_towards(way, average.values(state), 0.5)
    torch.testing.assert_close(way[0], torch.full((3,), (2 + expected) / 2, dtype=dtype), rtol=1e-2, atol=0)


def take_in(average, state, share) -> None:
    average.follow(state, share)
    average.keep(state)


def test_running_statistics_are_averaged_with_the_weights_and_go_where_they_go() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    norm, state = model[1], defaultdict(dict)
    average = WeightAverage(list(model.parameters()), model)
    with torch.no_grad():
        norm.running_mean.fill_(1.0)
        take_in(average, state, 0.5)  # the first that are seen are all that there is
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(5.0)
        take_in(average, state, 0.25)
        average.exchange(state)
        assert norm.running_mean.tolist() == [1.5, 1.5]
        assert norm.running_var.tolist() == [2.0, 2.0]
        copied_model, copied = copy.deepcopy((model, average))
        pairs = zip(copied.parameters, average.parameters, strict=True)
        copied.exchange(defaultdict(dict, {p: copy.deepcopy(state[q]) for p, q in pairs}))
        assert copied_model[1].running_mean.tolist() == [3.0, 3.0]
        assert norm.running_mean.tolist() == [1.5, 1.5], "a copy is of its own model"
        average.exchange(state)
        assert norm.running_mean.tolist() == [3.0, 3.0]
        assert norm.running_var.tolist() == [5.0, 5.0]
        again = WeightAverage(list(model.parameters()), model)
        again.load_state_dict(average.state_dict())
        take_in(average, state, 0.5)  # of which what was loaded knows nothing
        norm.running_mean.fill_(torch.nan)
        again.restore(state)
        assert norm.running_mean.tolist() == [1.5, 1.5]


def test_running_statistics_outlive_a_bad_batch_another_norm_and_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, state = WeightAverage(list(model[0].parameters()), model), defaultdict(dict)
    with torch.no_grad():
        take_in(average, state, 0.5)
        model[1].running_mean.fill_(torch.nan)
        take_in(average, state, 0.5)
        model[1].running_mean.fill_(4.0)  # as after reset_running_stats()
        take_in(average, state, 0.5)
        average.exchange(state)
        assert model[1].running_mean.tolist() == [4.0, 4.0]
        average.exchange(state)
        model[1] = nn.BatchNorm1d(3)
        take_in(average, state, 0.5)
        model[1] = nn.BatchNorm1d(3)
        model[1].running_mean.fill_(7.0)
        average.exchange(state)
        assert model[1].running_mean.tolist() == [0.0, 0.0, 0.0], "one that has just come has the average, too"
        average.exchange(state)
        with torch.inference_mode():
            model[1].double()
            average.exchange(state)
            average.exchange(state)
        take_in(average, state, 0.5)
    assert [s.shape for s in average.state_dict()["statistics"]["average"]] == [(3,), (3,)]


# When to compare ------------------------------------------------------------------------------------------------------


def test_a_comparison_is_brought_forward_but_not_over_and_over() -> None:
    cadence = ComparisonCadence(every=20)
    cadence.hasten(0)
    assert cadence.due == 0
    while cadence.due < 200:
        last = cadence.due
        cadence.take(last)
    cadence.hasten(last + 1)
    assert cadence.due == last + 4
    cadence.hasten(last + 10)
    assert cadence.due == last + 4
    cadence.take(last + 4)
    cadence.hasten(last + 15)
    assert cadence.due == last + 15
    cadence.hasten(last + 50)
    assert cadence.due == last + 15


def test_a_cadence_goes_on_from_its_state() -> None:
    cadence = ComparisonCadence(every=8)
    gaps = [cadence.take(cadence.due) for _ in range(6)]
    assert gaps[0] == 0
    assert max(gaps) == 8, "never rarer than asked for"
    twin = ComparisonCadence(every=None)
    twin.load_state_dict(cadence.state_dict())
    assert twin == cadence


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_parts_are_packed_by_name_and_a_part_that_one_side_lacks_is_left_out() -> None:
    full, value = RelativeRates(), torch.tensor([1.0, 2.0], dtype=DTYPE)
    full.value = value
    saved = packed({"a": full, "b": None})
    assert saved == {"a": {"value": [1.0, 2.0]}, "b": None}
    empty, other = RelativeRates(), RelativeRates()
    unpack({"a": empty, "b": other}, saved)
    assert torch.equal(empty.value, value)
    assert other.value is None
    unpack({"a": None, "b": None}, saved)
