"""Pictures of what a monitor sees: what is drawn where."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

import newton_summary as ns
from newton_summary import Summary, plots
from newton_summary.measure.along import losses_along
from newton_summary.watch.lr_finder import SuggestedRates
from newton_summary.watch.record import Record


def summary_of(hessian, gradient=None, third=None, names=None):
    size = len(hessian)
    names = names or [f"layer{i}" for i in range(size)]
    return Summary(1.0, gradient or [1.0] * size, hessian, third or [0.0] * size, names)


def random_summary(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return summary_of((root @ root.T).tolist())


def record(step, predicted, actual):
    return Record(step, 1.0, predicted, actual, *([()] * 7))


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


EVERY = {
    "correlations": lambda ax: plots.correlations(random_summary(4), ax),
    "inverse": lambda ax: plots.inverse(random_summary(4), ax),
    "strongest": lambda ax: plots.strongest(random_summary(4), ax),
    "decreases": lambda ax: plots.decreases([record(0, 0.1, 0.2)], ax),
    "loss_along": lambda ax: plots.loss_along(random_summary(4), "layer1", [0.0, 1.0], [1.0, 0.5], ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_takes_axes_and_returns_them(name):
    ax = Figure().subplots()
    assert EVERY[name](ax) is ax
    own = EVERY[name](None)
    assert own is not ax
    own.figure.draw_without_rendering()


@pytest.mark.parametrize("size", [4, 40, 200])
def test_labels_do_not_overlap_at_any_size(size):
    summary = random_summary(size)
    for ax in (plots.correlations(summary), plots.strongest(summary)):
        ax.figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        tops = sorted(((box.y0, box.y1) for box in boxes), reverse=True)
        overlaps = [above[0] - below[1] for above, below in pairwise(tops)]
        assert min(overlaps, default=0.0) > -0.35 * max(box.height for box in boxes)
        inside = ax.figure.get_window_extent()
        assert all(box.x0 >= inside.x0 - 1 for box in boxes)


def test_correlations_and_the_inverse_are_what_is_drawn():
    summary = summary_of([[4.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(drawn(plots.correlations(summary)), [[1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(drawn(plots.inverse(summary)), np.linalg.inv([[4.0, 1.0], [1.0, 1.0]]))
    singular = plots.inverse(summary_of([[1.0, 1.0], [1.0, 1.0]]))
    assert not singular.images
    assert "no inverse" in singular.texts[0].get_text()


def test_the_strongest_interactions_are_ranked_and_signed():
    hessian = [[1.0, 0.2, -0.9], [0.2, 1.0, 0.5], [-0.9, 0.5, 1.0]]
    ax = plots.strongest(summary_of(hessian, names=["a", "b", "c"]), count=2)
    assert [bar.get_width() for bar in ax.patches] == [-0.9, 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a × c", "b × c"]
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == ["#D55E00", "#0072B2"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the strongest is at the top
    apart = plots.strongest(summary_of([[1.0, 0.0], [0.0, math.nan]]))
    assert [bar.get_width() for bar in apart.patches] == [0.0]
    assert apart.get_xlim() == pytest.approx((0.0, 1.05))
    with pytest.raises(ValueError, match="one group"):
        plots.strongest(summary_of([[1.0]]))


def test_decreases_are_points_against_the_line_of_agreement():
    records = [record(0, 1.0, 0.5), record(5, 0.001, -0.002), record(9, 0.1, math.nan)]
    ax = plots.decreases(records)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[1.0, 0.5], [0.001, -0.002]])
    np.testing.assert_array_equal(ax.collections[0].get_array(), [0, 5])
    line = ax.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xscale() == ax.get_yscale() == "symlog"
    assert plots.decreases([record(0, 1.0, 0.5)]).get_xscale() == "linear"
    with pytest.raises(ValueError, match="no record"):
        plots.decreases(records[2:])


def test_the_models_are_drawn_over_the_curve():
    summary = summary_of([[2.0]], gradient=[3.0], third=[6.0])
    x = np.linspace(-1, 2, 13)
    ax = plots.loss_along(summary, "layer0", x, np.cos(x))
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["loss"].get_ydata(), np.cos(x))
    dense = np.asarray(lines["second order"].get_xdata())
    np.testing.assert_allclose(lines["second order"].get_ydata(), 1 - 3 * dense + dense**2)
    np.testing.assert_allclose(lines["third order"].get_ydata(), 1 - 3 * dense + dense**2 - dense**3)
    advised = (-2 + math.sqrt(4 + 4 * 3 * 3)) / 6  # 3 = 2 η + 3 η²
    assert lines["advised"].get_xdata()[0] == pytest.approx(advised)
    assert lines["advised"].get_ydata()[0] == pytest.approx(math.cos(advised), abs=0.02)
    assert plots.loss_along(summary, "layer0", x, 0 * x).get_ylim() == pytest.approx((-0.35, 0.35))
    with pytest.raises(ValueError, match="no group is called 'x'"):
        plots.loss_along(summary, "x", x, x)
    with pytest.raises(ValueError, match="give as many"):
        plots.loss_along(summary, "layer0", x, x[:2])


def test_losses_along_are_the_losses_after_each_groups_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    batch = torch.randn(8, 3, dtype=torch.float64)

    def loss_fn(model, batch):
        return model(batch).square().mean()

    torch.manual_seed(3)
    loss_fn(model, batch).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    partition = ns.Partition.by_module(model)
    torch.manual_seed(3)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    losses = losses_along(loss_fn, model, batch, [-1.0, 0.0, 2.0], direction=optimizer, partition=partition)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses.shape == (2, 3)
    for row, layer in enumerate((model[0], model[3])):
        for column, eta in enumerate((-1.0, 0.0, 2.0)):
            with torch.no_grad():
                for p in layer.parameters():
                    p -= eta * 0.1 * p.grad
                torch.manual_seed(3)
                assert losses[row, column].item() == pytest.approx(loss_fn(model, batch).item(), rel=1e-12)
                for p, old in zip(model.parameters(), before, strict=True):
                    p.copy_(old)


def suggested_rates(count, trials, chosen, dead=()):
    rates = {f"layer{i}.weight": 1e-3 * 4.0 ** (i % 8) for i in range(count)}
    return SuggestedRates(rates, dict.fromkeys(rates, 1e-4), [], trials, chosen, 1000, 10, [], dead=dead)


def test_a_suggestion_shows_losses_over_rates_and_the_rates_of_groups():
    """Of rates 1, 4 and 16 × 1e-3 the mean is 4e-3, a half of those of the trial that was chosen."""
    figure = plots.suggestion(suggested_rates(3, {1.0: 0.5, 2.0: 0.25, 4.0: 0.3, 8.0: math.inf}, 2.0))
    above, below = figure.axes
    curve, diverged, chosen, line = above.lines
    assert curve.get_xdata() == pytest.approx([4e-3, 8e-3, 16e-3])
    assert list(curve.get_ydata()) == [0.5, 0.25, 0.3]
    assert list(diverged.get_xdata()) == pytest.approx([32e-3])
    assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == (pytest.approx(8e-3), 0.25)
    assert line.get_xdata()[0] == pytest.approx(4e-3)
    before, now = below.lines
    assert list(now.get_xdata()) == pytest.approx([1e-3, 4e-3, 16e-3])
    assert set(before.get_xdata()) == {1e-4}
    assert [label.get_text() for label in below.get_yticklabels()] == [
        "layer0.weight",
        "layer1.weight",
        "layer2.weight",
    ]
    assert above.get_xscale() == below.get_xscale() == "log"
    figure.draw_without_rendering()


def test_a_suggestion_shows_where_tensors_stop_learning():
    suggested = suggested_rates(3, {1.0: 0.5, 2.0: 0.25, 4.0: 0.1, 8.0: 0.2}, 2.0, dead=(4.0, 8.0))
    above = plots.suggestion(suggested).axes[0]
    _, dead, chosen, _ = above.lines
    assert list(dead.get_xdata()) == pytest.approx([16e-3, 32e-3])
    assert list(dead.get_ydata()) == [0.1, 0.2]
    assert (dead.get_markerfacecolor(), chosen.get_ydata()[0]) == ("white", 0.25)
    assert "stopped learning" in above.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(("losses", "scale"), [((20.0, 1.0), "log"), ((1.5, 1.0), "linear"), ((20.0, -1.0), "linear")])
def test_losses_that_differ_much_are_on_a_logarithmic_scale(losses, scale):
    figure = plots.suggestion(suggested_rates(130, dict(zip((1.0, 2.0), losses, strict=True)), 2.0))
    assert figure.axes[0].get_yscale() == scale
    assert len(figure.axes[1].get_yticklabels()) <= 60
    figure.draw_without_rendering()


def test_the_numbers_below_decreases_do_not_run_into_each_other():
    ax = plots.decreases([record(t, 0.001 + 0.0008 * t, 0.001 + 0.0007 * t) for t in range(20)])
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert all(a.x1 + 3 < b.x0 for a, b in pairwise(sorted(boxes, key=lambda box: box.x0)))
    ax.set_xscale("log")
    plots.decreases([record(0, 0.1, 0.2)], ax)  # axes of one's own may have any scale
