"""The report: what it says is what the runs recorded, and nothing in it comes from elsewhere or can do harm."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from report_runs import EVIL, made_up, trained

from newton_summary import cli
from newton_summary.errors import UsageError
from newton_summary.report import charts, moments, reading, render, text, write
from newton_summary.report.files import write_text
from newton_summary.watch.advice import advise
from newton_summary_experiments import files, snapshots

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Tables, and whether every element is closed in its turn."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open, self.tables, self.elements, self.ids = [], {}, [], []
        self.said, self.items, self.kind = {}, [], None
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [dict(attributes)["id"]] if "id" in dict(attributes) else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "p":
            self.kind = dict(attributes).get("class")
            self.said.setdefault(self.kind, "")
        if tag == "li":
            self.items.append("")
        if tag == "caption":
            self.caption = ""
        if tag == "tr":
            self.tables[self.caption].append([])
        if tag in ("td", "th"):
            self.tables[self.caption][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self.caption = self.caption if self.caption not in self.tables else f"{self.caption} {len(self.tables)}"
            self.tables[self.caption] = []

    def handle_data(self, data):
        if self.open and self.open[-1] == "caption":
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self.caption][-1][-1] += data
        elif "p" in self.open:
            self.said[self.kind] += data
        elif "li" in self.open:
            self.items[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "compare-small")


@pytest.fixture(scope="module")
def page(folder):
    return Page(render(reading.read(folder)))


def test_a_comparison_has_all_its_parts(page, folder):
    wanted = ["trained", "curves", "interactions", "rates", "environment"]
    assert [key for key in page.ids if key in wanted] == wanted
    assert len(page.ids) == len(set(page.ids))
    ended = page.tables["Where each run ended"]
    assert [row[0] for row in ended[1:]] == ["newton-summary, seed 0", "adam, seed 0"]  # as the plan has them
    lines = (folder / "adam-seed0" / files.METRICS).read_text().splitlines()
    last = json.loads(lines[-1])
    assert ended[2][2] == text.number(last["train_loss"])
    assert ended[2][4] == f"{100 * last['validation_accuracy']:.1f} %"
    assert ended[2][-1] == "done"
    assert len(page.tables["Every epoch"]) == 1 + 2 * 7
    (versions,) = page.tables["Versions and settings"][1:]
    assert versions[0] == "all runs"
    assert list(json.loads(lines[0])["environments"][0].values()) == [
        int(cell) if cell.isdecimal() else cell for cell in versions[1:]
    ]


def test_heatmaps_are_of_the_measured_numbers(folder):
    """H̄_ij / √|H̄_ii H̄_jj| of the plain mean over batches of one size, straight from the file."""
    for name in ("adam-seed0", "newton-summary-seed0"):
        content = json.loads((folder / name / snapshots.INTERACTIONS).read_text())
        page = Page(render(reading.read(folder / name)))
        maps = [table for caption, table in page.tables.items() if caption.startswith("Interactions")]
        assert len(maps) == len(content["snapshots"]) == 5
        for shown, snapshot in zip(maps, content["snapshots"], strict=True):
            hessian = np.mean([part["hessian"] for part in snapshot["parts"]], axis=0)
            scale = np.sqrt(np.abs(np.diag(hessian)))
            expected = hessian / np.outer(scale, scale)
            cells = [[float(cell.replace("−", "-")) for cell in row[1:]] for row in shown[1:]]
            np.testing.assert_allclose(cells, expected, atol=0.00501)
            assert shown[0][1:] == list(content["groups"])
            assert set(np.abs(np.diag(cells))) == {1.0}


def test_pairs_are_ranked_and_advice_is_along_the_step(folder):
    run = reading.read(folder / "adam-seed0")[0]
    page = Page(render([run]))
    pairs = page.tables["Strongest interactions"][1:]
    sizes = [abs(float(row[1].replace("−", "-"))) for row in pairs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(pairs) == 6  # of four groups
    advice = advise(run.snapshots[0].summaries())  # Adam moves all groups
    rows = page.tables["Advice: factors on the step of each group"][1:]
    assert [row[1] for row in rows] == [text.times(group.alone) for group in advice.groups]
    assert [row[3] for row in rows] == [text.times(group.joint) for group in advice.groups]


def test_a_group_that_did_not_move_has_interactions_and_no_advice():
    run = made_up(4, 1)
    page = Page(render([run]))
    still = run.snapshots[0].still[0]
    (row,) = (row for row in page.tables["Advice: factors on the step of each group"] if row[0] == still)
    assert row[1:] == ["not moved", "–", "–"]
    cells = page.tables["Interactions: H̄ as correlations"][2][1:]
    assert all(cell != "0.00" for cell in cells)
    along = run.snapshots[0].along_the_step()[0]
    index = along.names.index(still)
    assert along.gradient[index] == 0
    assert not along.hessian[index].any()
    assert along.hessian[0, 0] != 0


def test_a_step_uphill_is_called_one():
    run = made_up(3, 1)
    uphill = dataclasses.replace(run.snapshots[0], actual_decrease=-12.0)
    assert "The step lowered it by 0.1;" in render([run])
    assert "The step raised it by 12;" in render([dataclasses.replace(run, snapshots=[uphill])])


def test_names_cannot_do_harm():
    run = made_up(3, 2, names=[EVIL, "a`b", "c</style>"])
    markup = render([run])
    page = Page(markup)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "<script>alert" not in markup
    assert not [tag for tag, _ in page.elements if tag == "b"]
    assert page.tables["Groups"][1][0] == EVIL
    label = next(attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and "role" in attributes)
    assert "adam" in label


def test_nothing_is_fetched(page, folder):
    markup = render(reading.read(folder))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["']?(?!#)[^"'\s>]""", markup)
    assert "url(" not in markup
    assert "@import" not in markup


def test_without_scripts_everything_is_there(folder):
    markup = render(reading.read(folder))
    assert 'class="chooser" hidden' in markup
    assert '<section class="moment" data-label=' in markup
    assert not re.search(r'class="moment"[^>]*hidden', markup)


@pytest.mark.slow
def test_a_page_about_four_runs_of_a_hundred_groups_is_small_enough():
    runs = [made_up(100, 12, name) for name in ("adam", "sgd", "newton-summary", "newton-summary-paper")]
    markup = render(runs)
    assert len(markup.encode()) < 5_000_000
    page = Page(markup)
    sliders = [attributes for tag, attributes in page.elements if tag == "input"]
    assert [slider["max"] for slider in sliders] == ["1"] * 4  # the first moment and the last
    assert "2 of 12 moments that were recorded" in markup
    assert "moments that were recorded" not in render([made_up(3, 12)])
    assert len(moments.thinned(runs[0].snapshots, 100, 1)) == 8
    assert moments.thinned(runs[0].snapshots, 10, 4) == runs[0].snapshots
    assert moments.thinned(runs[0].snapshots, 100, 8) == runs[0].snapshots[-1:]
    assert moments.thinned(runs[0].snapshots[:1], 2, 1) == runs[0].snapshots[:1]


def test_runs_that_stopped_failed_or_have_no_interactions_are_told_apart(folder, tmp_path):
    run = made_up(3, 4)
    stopped = reading.Record(run.config, run.data, run.environments, run.rows[:3], {}, [])
    assert stopped.state == "2 of 4 epochs"
    page = render([stopped])
    assert "These runs recorded no interactions" in page
    assert "2 of 4 epochs" in page
    row = dataclasses.replace(run.rows[2], train_loss=None, diverged=True, counts={"measured": 5, "failed": 2})
    diverged = dataclasses.replace(stopped, rows=[*run.rows[:2], row])
    assert "diverged at step 20; 2 of 5 measurements failed" in render([diverged])


def test_what_cannot_be_read_is_named(folder, tmp_path):
    with pytest.raises(UsageError, match="there is no run in"):
        write(tmp_path)
    path = tmp_path / files.METRICS
    good = (folder / "adam-seed0" / files.METRICS).read_text()
    for content in ("", "{}", good.splitlines()[0], good.replace('"epoch"', '"age"'), "\x00"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"metrics\.jsonl is damaged"):
            write(tmp_path)
    path.write_text(good)
    interactions = tmp_path / snapshots.INTERACTIONS
    interactions.write_text("garbage")
    with pytest.raises(UsageError, match=r"interactions\.json is damaged .*: delete it"):
        write(tmp_path)
    interactions.unlink()
    write(tmp_path)  # interactions.json is missing, as in a run that recorded none
    assert "recorded no interactions" in (tmp_path / "report.html").read_text()


def test_the_command_writes_where_it_says(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render(reading.read(folder))
    assert cli.main(["report", str(folder / "adam-seed0")]) == 0
    assert (folder / "adam-seed0" / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "name a folder that newton-summary train or compare wrote" in capsys.readouterr().err


# Charts and text ------------------------------------------------------------------------------------------------------


def path_of(markup: str) -> list[tuple[float, float]]:
    (data,) = re.findall(r'<path d="([^"]*)" class="line"', markup)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", data)]


def test_lines_are_where_the_numbers_are():
    """Equal factors are equal distances, and the ticks say the same as the line."""
    line = charts.Line("a", [(0, 1.0), (5, 10.0), (10, 1000.0)], "red")
    markup = charts.chart("title", "x", "y", [line])
    (x0, y0), (x1, y1), (x2, y2) = path_of(markup)
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.11)
    assert (y1 - y2) == pytest.approx(2 * (y0 - y1), abs=0.21)
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', markup))
    heights = {float(label.replace(",", "")): float(y) - 4 for y, label in ticks.items()}
    assert heights[1] == pytest.approx(y0, abs=0.11)
    assert heights[1000] == pytest.approx(y2, abs=0.11)


def test_gaps_dots_and_ends():
    points = [(0, 1.0), (1, None), (2, 2.0), (3, 0.0), (4, math.inf), (5, 3.0)]
    markup = charts.chart("t", "x", "y", [charts.Line("a", points, "red", ends_in_cross=True)])
    nothing, dots = re.findall(r'<path d="([^"]*)" class="line"', markup)
    assert not nothing
    assert dots.count("M") == dots.count("h0") == 3
    assert float(re.search(r"stroke-width:(\d+)", markup)[1]) > 5  # to be seen: a line is 1.8
    assert "l8 8" in markup
    assert "Nothing to draw" in charts.chart("t", "x", "y", [charts.Line("a", [(0, None)], "red")])
    many = [(i, 1.0 + i) for i in range(10_001)]
    drawn = path_of(charts.chart("t", "x", "y", [charts.Line("a", many, "red")]))
    assert len(drawn) <= 402
    assert drawn[-1][0] == pytest.approx(340, abs=0.1)


def test_what_may_be_negative_is_drawn_to_a_linear_scale():
    """Losses of densities cross 0; on a logarithmic axis, all that follows would be missing."""
    line = charts.Line("a", [(0, 3.0), (5, 0.0), (10, -6.0), (11, math.nan)], "red")
    markup = charts.chart("title", "x", "loss", [line], signed=True)
    (_, y0), (_, y1), (_, y2) = path_of(markup)
    assert y2 - y1 == pytest.approx(2 * (y1 - y0), abs=0.21)
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', markup))
    heights = {label: float(y) - 4 for y, label in ticks.items()}
    assert heights["0"] == pytest.approx(y1, abs=0.11)
    assert heights["−6"] == pytest.approx(y2, abs=0.11)
    flat = charts.chart("t", "x", "y", [charts.Line("a", [(0, -5.0), (1, -5.000001)], "red")], signed=True)
    labels = re.findall(r'text-anchor="end">([^<]*)<', flat)
    assert len(labels) == len(set(labels)) > 2
    positive = [charts.Line("a", [(0, 1.0), (1, 100.0)], "red")]
    assert charts.chart("t", "x", "y", positive, signed=True) == charts.chart("t", "x", "y", positive)


@pytest.mark.parametrize("high", [1e-6, 0.03, 1, 3, 7.5, 75, 1199, 2e6])
def test_ticks_are_round_and_inside(high):
    ticks, x = charts._linear([0, high], 360)
    assert 3 <= len(ticks) <= 7
    assert ticks[-1] <= high * (1 + 1e-9)
    assert all(64 <= x(tick) <= 340.01 for tick in ticks)
    for low in (high / 1e9, high / 50, high / 9, high / 1.5, high / 1.01, high):
        ticks, y = charts._logarithmic([low, high])
        assert 2 <= len(ticks) <= 7
        assert all(8 <= y(tick) <= 198 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (450.0, "450"), (999.9, "1,000"), (99999.0, "100,000"), (-3e-12, "−3×10⁻¹²"), (math.nan, "–")],
)
def test_numbers(value, shown):
    assert text.number(value) == shown


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path, exists) -> None:
    link, target = tmp_path / "link.html", tmp_path / "elsewhere" / "page.html"
    if exists:
        target.parent.mkdir()
        target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_pipe_is_written_into_and_stays(tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "new")
    reader.join(10.0)
    assert got == ["new"]
    assert pipe.is_fifo()
