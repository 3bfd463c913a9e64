"""The average of measurements, against weights in closed form."""

from __future__ import annotations

import numpy as np
import pytest

import newton_summary as ns
from newton_summary.optim.summary_average import SummaryAverage


def measurement(loss: float, slope: float, third: float = 1.0) -> ns.Summary:
    return ns.Summary(loss=loss, gradient=[slope, 2 * slope], hessian=[[1.0, 0.5], [0.5, 2.0]], third=[third, -third])


def averaged(measurements, momentum: float = 0.9) -> ns.Summary:
    average = SummaryAverage(momentum)
    for each in measurements:
        average.update(each)
    return average.value


def test_the_recent_third_counts_until_the_momentum_takes_over() -> None:
    slopes = np.random.default_rng(0).normal(size=60)
    weights = np.zeros(60)
    for n in range(60):
        share = max(3 / (n + 3), 0.1)
        weights[:n] *= 1 - share
        weights[n] = share
    closed = np.arange(1, 29) * np.arange(2, 30)
    assert np.allclose(weights[:28] / weights[27], closed / closed[-1])
    value = averaged([measurement(1.0, s) for s in slopes])
    assert value.gradient[0].item() == pytest.approx(weights @ slopes, rel=1e-12)


def test_the_first_measurement_is_soon_forgotten() -> None:
    value = averaged([measurement(1.0, 1000.0), *(measurement(1.0, 1.0) for _ in range(9))])
    assert value.gradient[0].item() == pytest.approx(1 + 999 * 6 / (10 * 11 * 12))


def test_a_loss_that_falls_by_decades_weighs_the_same_all_along() -> None:
    steady = averaged([measurement(1.0, s) for s in range(5)])
    falling = averaged([measurement(1.0, s) * 0.6**s for s in range(5)])
    assert np.allclose(falling.hessian, steady.hessian, rtol=1e-12)
    assert np.allclose(falling.gradient, steady.gradient, rtol=1e-12)


@pytest.mark.parametrize("last", [0.0, -1e-9, 1e-9])
def test_a_loss_that_passes_through_zero_takes_over_no_average(last) -> None:
    value = averaged([measurement(1.0, 1.0), measurement(last, 1.0)])
    assert value.gradient[0].item() == pytest.approx(1.75)  # a quarter of 1 and three quarters of 1 / ½


def test_a_loss_of_zero_from_the_start_is_no_error() -> None:
    assert averaged([measurement(0.0, 1.0)]).gradient[0].item() == 1.0


def test_signs_of_the_third_order_do_not_cancel() -> None:
    value = averaged([measurement(1.0, 1.0, third=2.0), measurement(1.0, 1.0, third=-2.0)])
    assert value.third.tolist() == [2.0, 2.0]


def test_goes_on_from_its_state() -> None:
    average, twin = SummaryAverage(0.5), SummaryAverage(0.5)
    for loss in (1.0, 0.3):
        average.update(measurement(loss, 1.0))
    twin.load_state_dict(average.state_dict())
    new = measurement(1e-3, 2.0)
    assert twin.update(new).gradient.tolist() == average.update(new).gradient.tolist()
