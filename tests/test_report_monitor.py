"""The report of a run that a monitor watched: what its file holds, what is wrong first, what is not telling grey."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from companions import loss_fn, make_loader, make_model
from report_runs import EVIL, watched
from test_report import Page

import newton_summary as ns
from newton_summary import cli
from newton_summary.errors import UsageError
from newton_summary.report import factors, page, write
from newton_summary.report.monitor_log import MonitorLog, read_log
from newton_summary.report.watched import _lines
from newton_summary.watch.record import Record
from newton_summary.watch.words import LEAVE, tells


def monitored(path, steps: int = 25, every: int = 5, lr: float = 1e-3):
    """A monitor that watched a training, whose last layer hardly moves, and wrote to a file."""
    model, loader = make_model(), make_loader()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr / 100}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=every, path=path).attach(loader, repeats=3)
    for batch in (list(loader) * 3)[:steps]:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    monitor.close()
    return monitor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("watched") / "run.jsonl"
    return monitored(path), path


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_gives_back_what_the_monitor_remembers(run) -> None:
    monitor, path = run
    log = read_log(path)
    assert [entry.record for entry in log.entries] == list(monitor.records)
    assert (log.name, log.number, log.runs, log.cut_off) == ("run.jsonl", 1, 1, False)
    hessian = monitor.summary.hessian.numpy()
    scale = np.sqrt(np.abs(np.diag(hessian)))
    np.testing.assert_allclose(log.entries[-1].correlations.hessian, hessian / np.outer(scale, scale), atol=0.0005001)


def test_infinite_and_unknown_factors_come_back() -> None:
    record = Record(
        3, 1.0, 0.1, math.nan, ("a", "b"), (0.1, math.nan), (2.0, math.inf), (1.0, math.inf), (math.inf, math.inf),
        (math.nan, 1.0), ("", "x"), "x", ("x",), 2.0, 4, 0.9,
    )  # fmt: skip
    assert repr(Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))) == repr(record)
    single = dataclasses.replace(record, low=(math.nan, math.nan), high=(math.nan, math.nan), batches=1)
    assert repr(Record.from_dict(single.to_dict())) == repr(single)
    unlimited = dataclasses.replace(record, low=(math.inf, math.inf), batches=3)
    assert repr(Record.from_dict(unlimited.to_dict())) == repr(unlimited), "that is no single batch"


def test_files_of_before_there_were_headlines_are_read(run, tmp_path) -> None:
    later = ("headline", "sentences", "middle", "batches", "level", "correlations")
    lines = [json.loads(line) for line in run[1].read_text().splitlines()]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in later}) + "\n" for line in lines))
    log = read_log(path)
    assert [entry.record.alone for entry in log.entries] == [record.alone for record in run[0].records]
    markup = page.render_log(log)
    assert "The interactions were not written" in markup
    assert "The band" not in markup
    assert "moves" in Page(markup).said["headline"]


def test_several_runs_are_told_apart(run, tmp_path) -> None:
    path = tmp_path / "three.jsonl"
    monitored(path, steps=6)
    monitored(path, steps=11)
    path.write_text(path.read_text() + run[1].read_text())
    assert [len(read_log(path, number).entries) for number in (1, 2, 3)] == [2, 3, 5]
    log = read_log(path)
    assert (log.number, log.runs) == (3, 3)
    assert "has 3 runs" in page.render_log(log)
    assert "this is number 1" in page.render_log(read_log(path, 1))
    for number in (0, 4, -1):
        with pytest.raises(UsageError, match=f"has no run {number}: it has runs 1 to 3"):
            read_log(path, number)
    with pytest.raises(UsageError, match=r"has no run 2: it has 1 run$"):
        read_log(run[1], 2)


def test_other_groups_are_another_run(run, tmp_path) -> None:
    first, second, *_ = run[1].read_text().splitlines()
    path = tmp_path / "groups.jsonl"
    path.write_text(f"{first}\n{second.replace('0.weight', 'renamed')}\n")
    assert read_log(path).runs == 2


def test_a_line_that_is_cut_off_is_left_out(run, tmp_path) -> None:
    content = run[1].read_text()
    path = tmp_path / "cut.jsonl"
    path.write_text(content[: -len(content.splitlines()[-1]) // 2])
    log = read_log(path)
    assert log.cut_off
    assert [entry.record for entry in log.entries] == list(run[0].records)[:-1]
    assert "not whole, and was left out" in page.render_log(log)
    path.write_text(content.rstrip("\n"))  # whole, though no line ends it
    assert [entry.record for entry in read_log(path).entries] == list(run[0].records)


BAD = {
    "empty": (lambda lines: [], "is empty: a Monitor writes a record when"),
    "blank": (lambda lines: ["", "  ", ""], "is empty"),
    "only a beginning": (lambda lines: [lines[0][:80]], "has only the beginning of a record"),
    "foreign": (lambda lines: ['{"loss": 1.0}', "{}"], r"line 1 is not a record of a Monitor, it has no step, pred"),
    "a list": (lambda lines: ["[1, 2]", ""], "line 1 is damaged"),
    "broken inside": (lambda lines: [lines[0], lines[1][:50], lines[2], ""], "line 2 is not JSON .*take the line out"),
    "too many": (lambda lines: [lines[0].replace('"alone": [', '"alone": [1.0, '), ""], "5 entries in 'alone' for 4"),
    "a word": (lambda lines: [lines[0].replace('"step": 0', '"step": "x"'), ""], "a number was expected, not 'x'"),
    "a truth": (lambda lines: [lines[0].replace('"step": 0', '"step": true'), ""], "a number was expected, not True"),
    "no list": (lambda lines: [re.sub(r'"joint": \[.*?\]', '"joint": 3', lines[0]), ""], "a list was expected, not 3"),
    "a nameless": (lambda lines: [lines[0].replace('"0.weight"', "1"), ""], "a text was expected, not 1"),
    "no triangle": (lambda lines: [lines[0].replace('"correlations": [[', '"correlations": [[0, '), ""], "no triangle"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_said_with_its_line_and_the_cure(what, run, tmp_path, capsys) -> None:
    change, message = BAD[what]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(change(run[1].read_text().splitlines())))
    with pytest.raises(UsageError, match=message):
        read_log(path)
    assert cli.main(["report", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"newton-summary: {path}")
    assert not path.with_suffix(".html").exists()


def test_what_is_no_text_and_what_is_no_file(tmp_path, capsys) -> None:
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as text"):
        read_log(path)
    assert cli.main(["report", str(tmp_path), "--number", "1"]) == 2
    assert "a number is that of a run in the file of a Monitor" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nothing.jsonl")]) == 2
    assert "or the file of Monitor(path=…)" in capsys.readouterr().err


# The page -------------------------------------------------------------------------------------------------------------


def test_it_leads_with_what_is_wrong_in_the_words_of_the_advice(run) -> None:
    monitor, path = run
    shown = Page(page.render_log(read_log(path)))
    assert monitor.advice.headline != LEAVE
    headline = monitor.advice.headline
    assert shown.said["headline"].lower() == headline.replace("`", "").lower() + "."
    items = [item.lower() for item in shown.items]
    for words in monitor.advice.sentences():
        if words != headline:
            assert words.replace("`", "").lower() + "." in items
    figures = shown.tables["Factors on the learning rates, for one step"][1:]
    assert [row[0] for row in figures] == list(monitor.partition.names)
    told = shown.tables["What was said first"][1:]
    assert told[-1][1].lower() == headline.replace("`", "").lower()


def test_steps_count_from_1_everywhere_on_the_page(run) -> None:
    steps = [entry.record.step + 1 for entry in read_log(run[1]).entries]
    markup = page.render_log(read_log(run[1]))
    shown = Page(markup)
    assert shown.tables["What was said first"][1][0].split(" ")[0] == f"{steps[0]}" == "1"
    assert [line.points[0][0] for line in _lines(run[0].records)] == [1] * 4
    assert re.findall(r'data-label="(\d+)"', markup) == [f"{step}" for step in steps]


def test_that_nothing_is_wrong_is_said(run) -> None:
    entry = read_log(run[1]).entries[-1]
    calm = dataclasses.replace(
        entry.record, words=("",) * 4, headline=LEAVE, sentences=(LEAVE,), alone=(1.0, 1.2, 0.9, 1.1), middle=1.0
    )
    markup = page.render_log(MonitorLog("a", [dataclasses.replace(entry, record=calm)], 1, 1, False))
    shown = Page(markup)
    assert shown.said["headline"] == LEAVE.capitalize() + "."
    assert "telling" not in [attributes.get("class") for tag, attributes in shown.elements if tag == "g"]
    assert "Coloured" not in markup


def test_grey_is_what_the_advice_does_not_speak_of(run) -> None:
    record = run[0].records[-1]
    groups = re.findall(r'<g class="(\w+)"><title>([^:]*):', factors.picture(record))
    assert [name for _, name in groups] == list(record.names)
    assert [kind for kind, _ in groups] == ["telling" if tells(words) else "quiet" for words in record.words]
    assert {kind for kind, _ in groups} == {"telling", "quiet"}


def test_dots_lie_where_the_factors_are() -> None:
    """Equal factors are equal distances, the band is √19 either way of the middle, and ends are not left."""
    names = ("a", "b", "c", "d")
    record = dataclasses.replace(
        RECORD,
        names=names,
        alone=(0.1, 1.0, 10.0, 0.0),
        low=(0.0,) * 4,
        high=(math.inf,) * 4,
        words=("",) * 4,
        middle=1.0,
    )
    markup = factors.picture(record)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', markup)]
    decade = dots[1] - dots[0]
    assert dots[2] - dots[1] == pytest.approx(decade, abs=0.21)
    left, width = map(float, re.search(r'class="band" x="([\d.]+)" y="\d+" width="([\d.]+)"', markup).groups())
    assert left + width / 2 == pytest.approx(dots[1], abs=0.2)
    assert width == pytest.approx(decade * math.log10(19), abs=0.3)
    (one,) = re.findall(r'class="one" d="M([\d.]+)', markup)
    assert float(one) == dots[1]
    bars = {(float(a), float(b)) for a, b in re.findall(r'interval" d="M([\d.]+) [\d.]+H([\d.]+)', markup)}
    ((first, last),) = bars  # from 0 to infinity is from one end to the other
    assert first == dots[3] < dots[0]
    assert last > dots[2]


RECORD = Record(0, 1.0, 0.1, 0.1, (), (), (), (), (), (), ())


@pytest.mark.parametrize("furthest", [30.0, 1e7, 1e16, 1e200])
def test_numbers_below_the_factors_do_not_run_into_each_other(furthest) -> None:
    names = ("a", "b")
    one = dict.fromkeys(("alone", "low", "high"), (1.0, furthest))
    markup = factors.picture(dataclasses.replace(RECORD, names=names, words=("",) * 2, middle=1.0, **one))
    places = {label: float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="[\d.]+"[^>]*>([^<]*)×</text>', markup)}
    assert 2 <= len(places) <= 8
    assert "1" in places
    steps = np.diff(sorted(places.values()))
    assert steps.min() > 7 * max(map(len, places))


def test_of_very_many_groups_those_are_drawn_that_matter() -> None:
    count = 100
    record = dataclasses.replace(
        RECORD,
        names=tuple(f"g{i}" for i in range(count)),
        alone=tuple(1.0 + i / 1000 for i in range(count)),
        low=(math.nan,) * count,
        high=(math.nan,) * count,
        words=("`g3`: no descent along this step" if i == 3 else "" for i in range(count)),
        middle=1.0,
    )
    record = dataclasses.replace(record, words=tuple(record.words))
    rows = factors.shown(record)
    assert rows == [3, *range(41, 100)]
    assert "The 60 groups that differ most, of 100" in factors.picture(record)


@pytest.mark.slow
def test_many_measurements_and_many_groups_make_a_page_of_a_reasonable_size() -> None:
    markup = page.render_log(watched(groups=100, count=300))
    assert len(markup.encode()) < 5_000_000
    shown = Page(markup)
    assert "8 of 300 measurements" in markup
    assert len([tag for tag, attributes in shown.elements if attributes.get("class") == "moment"]) == 8
    assert len(shown.ids) == len(set(shown.ids))
    assert "60 of 300 measurements" in page.render_log(watched(groups=3, count=300))


def test_names_cannot_do_harm_here_either() -> None:
    markup = page.render_log(watched(groups=3, count=2, names=(EVIL, "b", "c</style>")))
    shown = Page(markup)
    assert [tag for tag, _ in shown.elements].count("script") == 1
    assert not [tag for tag, _ in shown.elements if tag == "b"]
    assert "url(" not in markup
    assert not re.search(r"""(src|href)=["']?(?!#)[^"'\s>]""", markup)


def test_the_command_writes_beside_the_file(run, tmp_path, capsys) -> None:
    path = tmp_path / "my run.jsonl"
    path.write_text(run[1].read_text())
    assert cli.main(["report", str(path)]) == 0
    assert str(tmp_path / "my run.html") in capsys.readouterr().out
    assert (tmp_path / "my run.html").read_text(encoding="utf-8") == page.render_log(read_log(path))
    assert write(path, tmp_path / "other.html", 1) == tmp_path / "other.html"


def test_a_file_of_records_is_not_overwritten_by_its_page(run, tmp_path) -> None:
    path = tmp_path / "run.html"
    path.write_text(run[1].read_text())
    with pytest.raises(UsageError, match=r"would take the place of .*choose another one with --out"):
        write(path)
    assert path.read_text() == run[1].read_text()


# The same words elsewhere ---------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_same_words(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from newton_summary.integrations.tensorboard import TensorBoard

    def text(folder) -> list[tuple[int, str]]:
        events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
        events.Reload()
        found = events.Tensors("newton_summary/advice/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]

    model, loader = make_model(), make_loader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    writer = SummaryWriter(str(tmp_path / "writer"))
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=5, writer=writer).attach(loader, repeats=2)
    with TensorBoard(tmp_path / "board", images=False) as board:
        board.attach(monitor)
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    writer.close()
    expected = [(r.step, "\n".join(f"- {words}" for words in r.sentences)) for r in monitor.records]
    assert len(expected) == 3
    assert monitor.records[-1].sentences == tuple(monitor.advice.sentences())
    assert text(tmp_path / "board") == text(tmp_path / "writer") == expected
