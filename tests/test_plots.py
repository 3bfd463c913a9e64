"""Pictures: what is drawn where, on which scale, and that nothing global changes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from newton_summary import Summary, plots


def summary_of(hessian, names=None):
    hessian = torch.as_tensor(hessian, dtype=torch.float64)
    names = names or tuple(f"layer{i}" for i in range(len(hessian)))
    return Summary(loss=1.0, gradient=torch.ones(len(hessian)), hessian=hessian, names=names)


def positive_definite(size, decades=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = 10 ** torch.linspace(0, decades / 2, size, dtype=torch.float64)
    return (root @ root.T / size + torch.eye(size)) * scale * scale[:, None]


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


def test_a_heatmap_shows_the_hessian_with_names_on_a_symmetric_scale():
    hessian = [[2.0, -0.5], [-0.5, 1.0]]
    ax = plots.heatmap(summary_of(hessian, ("body", "head")))
    np.testing.assert_array_equal(drawn(ax), hessian)
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["body", "head"]
    norm = ax.images[0].norm
    assert (norm.vmin, norm.vmax) == (-2.0, 2.0)
    assert norm(0.0) == 0.5
    assert ax.figure.axes[1].get_ylabel() == "units of the loss"


def test_summary_plot_draws_on_the_given_axes():
    ax = Figure().subplots()
    assert summary_of([[1.0]]).plot(ax) is ax
    np.testing.assert_array_equal(drawn(ax), [[1.0]])


def test_entries_over_decades_get_a_logarithmic_scale_that_says_so():
    ax = plots.heatmap(summary_of(positive_definite(10, decades=6)))
    norm = ax.images[0].norm
    assert isinstance(norm, SymLogNorm)
    assert norm.vmin == -norm.vmax
    assert float(norm(0.0)) == pytest.approx(0.5)
    assert "symmetric logarithmic" in ax.figure.axes[1].get_ylabel()


@pytest.mark.parametrize("special", [0.0, float("nan")])
def test_zeros_and_non_finite_entries_are_drawn(special):
    ax = plots.heatmap(summary_of([[special, 1.0], [1.0, special]]))
    ax.figure.canvas.draw()
    plots.heatmap(summary_of([[special]])).figure.canvas.draw()


@pytest.mark.parametrize("size", [1, 4, 40, 200])
def test_labels_do_not_crowd(size):
    ax = plots.heatmap(summary_of(positive_definite(size)))
    labels = ax.get_yticklabels()
    assert 1 <= len(labels) <= 40
    if size > 1:
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in labels]
        gap = abs(boxes[1].y0 - boxes[0].y0)
        assert max(box.height for box in boxes) < 1.3 * gap


@pytest.mark.parametrize("draw", [plots.heatmap, plots.interactions])
def test_a_summary_without_hessian_is_refused(draw):
    with pytest.raises(ValueError, match="order 2 was not measured"):
        draw(Summary(loss=1.0, gradient=[1.0]))


def test_interactions_sort_groups_into_blocks():
    names = ("a.weight", "a.bias", "b.weight", "b.bias", "scale")
    hessian = positive_definite(5)
    figure = plots.interactions(summary_of(hessian, names), "title")
    order = [0, 2, 4, 1, 3]
    left, right = figure.axes[0], figure.axes[1]
    np.testing.assert_allclose(drawn(left), hessian.numpy()[np.ix_(order, order)])
    np.testing.assert_allclose(drawn(right), np.linalg.inv(hessian.numpy())[np.ix_(order, order)], rtol=1e-10)
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "scale", "a", "b"]
    for ax in (left, right):
        assert [line.get_xdata()[0] for line in ax.lines[1::2]] == [2.5]
    assert [left.get_title(), right.get_title()] == ["H̄", "H̄⁻¹"]
    assert "1 / units of the loss" in figure.axes[3].get_ylabel()
    assert "1 /" not in figure.axes[2].get_ylabel()


def test_interactions_without_biases_have_one_block():
    figure = plots.interactions(summary_of(positive_definite(3)))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["layer0", "layer1", "layer2"]
    assert not figure.axes[0].lines


@pytest.mark.parametrize("hessian", [torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), torch.nan)])
def test_a_hessian_without_an_inverse_is_said_to_have_none(hessian):
    figure = plots.interactions(summary_of(hessian))
    assert "no inverse" in figure.axes[1].texts[0].get_text()
    figure.canvas.draw()


def test_a_badly_scaled_hessian_is_inverted_all_the_same():
    hessian = torch.diag(torch.tensor([1e-12, 1e12], dtype=torch.float64))
    figure = plots.interactions(summary_of(hessian))
    np.testing.assert_allclose(np.diag(drawn(figure.axes[1])), [1e12, 1e-12])


def test_rates_are_drawn_with_kind_and_depth_and_honest_zeros():
    history = {"a.weight": [1e-3, 0.0, 1e-2], "a.bias": [1e-2, 1e-2, 1e-2], "b.weight": [1.0, 2.0, 3.0]}
    ax = plots.rates(history, steps=[10, 20, 30])
    lines = {line.get_label(): line for line in ax.lines}
    assert ax.get_yscale() == "log"
    assert lines["a.weight"].get_linestyle() == "-"
    assert lines["a.bias"].get_linestyle() == "--"
    assert lines["a.weight"].get_color() == lines["a.bias"].get_color() != lines["b.weight"].get_color()
    assert list(lines["b.weight"].get_ydata()) == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(lines["a.weight"].get_ydata(), [1e-3, np.nan, 1e-2])
    assert (lines["a.weight"].get_marker(), lines["a.weight"].get_markevery()) == (".", [0, 2])
    assert lines["a.bias"].get_marker() == "None", "dashes can be seen"
    zeros = [line for line in ax.lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in zeros] == [[20]]
    assert zeros[0].get_color() == lines["a.weight"].get_color()
    assert ax.get_ylim()[0] < zeros[0].get_ydata()[0] < 1e-3
    assert min(ax.get_yticks()) >= 1e-3
    assert any(text.get_text().strip() == "rate 0" for text in ax.texts)


def test_rates_without_zeros_have_no_band_for_them():
    ax = plots.rates({"a.weight": [1.0, 2.0], "a.bias": [3.0, 4.0]})
    assert not ax.texts
    assert len(ax.lines) == 2


def test_rates_that_are_all_zero_or_one_point_are_drawn():
    plots.rates({"a": [0.0, 0.0]}).figure.canvas.draw()
    plots.rates({"a": [1.0]}).figure.canvas.draw()
    plots.rates({f"layer{i}.weight": [1.0, 2.0] for i in range(60)}).figure.canvas.draw()


@pytest.mark.parametrize("history", [{}, {"a": []}, {"a": [1.0], "b": [1.0, 2.0]}])
def test_rates_need_as_many_values_for_each_group(history):
    with pytest.raises(ValueError, match="equally many"):
        plots.rates(history)


def test_curves_show_every_run_against_epochs_and_seconds():
    def rows(losses, diverged=False):
        made = [{"epoch": i, "seconds": i / 10, "train_loss": loss} for i, loss in enumerate(losses)]
        made[-1]["diverged"] = diverged
        return made

    figure = plots.curves({"adam": [rows([2.0, 1.0]), rows([3.0, 2.0])], "sgd": [rows([2.0, 9.0, None], True)]}, "task")
    by_epoch, by_time = figure.axes
    assert [list(line.get_ydata()) for line in by_epoch.lines] == [[2.0, 1.0], [3.0, 2.0], [2.0, 9.0], [9.0]]
    assert list(by_time.lines[0].get_xdata()) == [0.0, 0.1]
    assert by_epoch.lines[3].get_marker() == "x"
    assert by_epoch.lines[0].get_color() == by_epoch.lines[1].get_color() != by_epoch.lines[2].get_color()
    assert [text.get_text() for text in by_epoch.get_legend().get_texts()] == ["adam", "sgd"]
    figure.canvas.draw()


def test_importing_plots_leaves_pyplot_and_the_backend_alone():
    code = "import sys; from newton_summary import plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_names_the_cure():
    code = "import sys; sys.modules['matplotlib'] = None; import newton_summary; import newton_summary.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ImportError: plots need matplotlib: pip install 'newton-summary[plots]'")
