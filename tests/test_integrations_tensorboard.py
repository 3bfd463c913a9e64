"""TensorBoard's own reader finds what was measured."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from companions import loss_fn, make_loader, make_model, run_example
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import newton_summary as ns
from newton_summary import plots
from newton_summary.integrations.tensorboard import TensorBoard
from newton_summary.optim.cadence import ComparisonCadence

GROUPS = ("0.weight", "0.bias", "2.weight", "2.bias")


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def train(model, optimizer, loader, epochs=1):
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()


def test_a_monitor_is_logged_by_group_with_pictures(tmp_path):
    model, loader = make_model(), make_loader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=5).attach(loader)
    with TensorBoard(tmp_path) as board:
        board.attach(monitor)
        train(model, optimizer, loader)
    train(model, optimizer, loader)  # closed: nothing more
    events = read(tmp_path)
    records = list(monitor.records)[:3]
    assert [record.step for record in records] == [0, 5, 10]
    tags = {f"newton_summary/{key}/{name}" for key in ("alone", "joint") for name in GROUPS}
    tags |= {"newton_summary/predicted_decrease", "newton_summary/actual_decrease"}
    assert set(events.Tags()["scalars"]) == tags
    for number, name in enumerate(GROUPS):
        logged = [(event.step, event.value) for event in events.Scalars(f"newton_summary/alone/{name}")]
        expected = [(r.step, r.alone[number]) for r in records if math.isfinite(r.alone[number])]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    actual = [event.value for event in events.Scalars("newton_summary/actual_decrease")]
    assert actual == pytest.approx([record.actual_decrease for record in records], rel=1e-6)
    assert set(events.Tags()["images"]) == {"newton_summary/hessian", "newton_summary/correlations"}
    assert [event.step for event in events.Images("newton_summary/hessian")] == [0, 5, 10]


def test_the_picture_is_that_of_the_measurement(tmp_path):
    model, loader = make_model(), make_loader()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, every=100)
    with TensorBoard(tmp_path) as board:
        board.attach(optimizer)
        train(model, optimizer, loader)
    (event,) = read(tmp_path).Images("newton_summary/correlations")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    file = io.BytesIO()
    figure = plots.correlations(optimizer.summary).figure
    figure.savefig(file, dpi=figure.dpi)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).mean() < 0.5
    assert picture.std() > 20


def test_the_optimizers_rates_are_logged_in_a_writer_that_stays_open(tmp_path):
    model, loader = make_model(), make_loader()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=loader, every=5, partition="canonical")
    writer = SummaryWriter(str(tmp_path))
    board = TensorBoard(writer, images=False).attach(optimizer)
    rates = []
    for count in (1, 4, 1):  # up to the steps that measure or compare
        train(model, optimizer, list(loader)[:count])
        rates.append(optimizer.rates)
    board.close()
    writer.add_scalar("mine", 1.0, 0)
    writer.close()
    events = read(tmp_path)
    assert events.Tags()["images"] == []
    for name in GROUPS:
        logged = [(event.step, event.value) for event in events.Scalars(f"newton_summary/rate/{name}")]
        found = [pytest.approx(each[name], rel=1e-6) for each in rates]
        assert logged == list(zip((0, 4, 5), found, strict=True))
    assert [event.value for event in events.Scalars("newton_summary/measured")] == [1, 1, 2]
    assert "mine" in events.Tags()["scalars"]


def test_a_measurement_that_failed_is_counted_and_draws_nothing(tmp_path):
    model, loader = make_model(), list(make_loader())
    optimizer = ns.NewtonSummary(model, loss_fn)
    watched = make_model()
    adam = torch.optim.Adam(watched.parameters())
    monitor = ns.Monitor(watched, loss_fn, optimizer=adam, every=1)
    with TensorBoard(tmp_path / "optimizer") as board, TensorBoard(tmp_path / "monitor") as other:
        board.attach(optimizer)
        other.attach(monitor)
        for number, (x, y) in enumerate(loader[:3]):
            measured = (x * math.nan if number else x), y
            optimizer.zero_grad()
            loss_fn(model, (x, y)).backward()
            optimizer.measure(measured)
            optimizer.step()
            adam.zero_grad()
            loss_fn(watched, (x, y)).backward()
            monitor.step(measured)
            adam.step()
    failed = [event.value for event in read(tmp_path / "optimizer").Scalars("newton_summary/failed")]
    assert failed == [0, 1, 2]
    assert [event.step for event in read(tmp_path / "optimizer").Images("newton_summary/hessian")] == [0]
    assert monitor.counts["failed"] == 2
    events = read(tmp_path / "monitor")
    assert [event.step for event in events.Images("newton_summary/hessian")] == [0]
    assert [event.step for event in events.Scalars("newton_summary/predicted_decrease")] == [0]


def test_a_writer_that_fails_ends_no_training(tmp_path):
    class Full(SummaryWriter):
        def add_image(self, *_, **__):
            raise OSError("no space left")

    model, loader = make_model(), list(make_loader())
    optimizer = torch.optim.Adam(model.parameters())
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    board = TensorBoard(Full(str(tmp_path))).attach(monitor)
    monitor.attach(loader)
    with pytest.warns(UserWarning, match="not told all of what was measured, .* OSError: no space left") as caught:
        train(model, optimizer, loader[:3])
    assert len(caught) == 1
    board.close()
    board.writer.close()
    assert len(read(tmp_path).Scalars("newton_summary/predicted_decrease")) == 3
    with pytest.raises(TypeError, match="a Monitor or a NewtonSummary was expected, which measure, got Adam"):
        board.attach(optimizer)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    names = run_example("tensorboard_logging.py", tmp_path, monkeypatch, EPOCHS=12)
    assert "factors on the learning rates" in capsys.readouterr().out
    cadence, compared = ComparisonCadence(20), []
    while cadence.due < 12 * len(names["loader"]):
        compared.append(cadence.due)
        cadence.take(cadence.due)
    assert names["optimizer"].counts["compared"] == len(compared) > 10
    assert read(tmp_path / "logs" / "adam").Tags()["images"]
    rates = read(tmp_path / "logs" / "newton-summary").Scalars("newton_summary/rate/0.weight")
    assert [event.step for event in rates] == compared
    assert len({event.value for event in rates}) > 10
