"""In Lightning's trainer, training is what it is in a plain loop, and its loggers are told."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from companions import loss_fn, make_loader, make_model, run_example, same
from torch import nn

import newton_summary as ns

pytestmark = [
    pytest.mark.slow,  # importing it takes seconds
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def make_module(make_optimizer, seed=0):
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model(seed)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, number):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return make_optimizer(self)

    return Module()


def make_trainer(folder, callbacks=(), logger=None, **options):
    import pytorch_lightning

    return pytorch_lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=[] if logger is None else logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "log_every_n_steps": 1, **options},
    )


def newton(module):
    return ns.NewtonSummary(module, loss_fn, curvature_data=make_loader(), every=5, partition="canonical")


def plain_loop(make_optimizer, epochs, watch=None):
    """The same training without Lightning, of a model with the same names; ``watch`` is told of every batch."""
    model = nn.ModuleDict({"net": make_model()})
    model.forward = lambda x: model["net"](x)
    optimizer = make_optimizer(model)
    told = watch(model, optimizer) if watch else lambda batch: None
    for batch in list(make_loader()) * epochs:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        told(batch)
        optimizer.step()
    return model, optimizer


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_optimizer_trains_as_in_a_plain_loop_and_its_rates_are_logged(tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    from newton_summary.integrations.lightning import MonitorCallback

    module = make_module(newton)
    make_trainer(tmp_path, [MonitorCallback()], CSVLogger(tmp_path, "x"), max_epochs=2).fit(module, make_loader())
    seen = []
    model, _ = plain_loop(newton, 2, lambda model, optimizer: lambda batch: seen.append(optimizer.rates))
    assert same(module, model)
    rows = read(tmp_path / "x" / "version_0" / "metrics.csv")
    logged = [row for row in rows if row["newton_summary/measured"]]
    assert [int(row["step"]) for row in logged] == [1, 5, 6, 9, 11, 13, 16, 19, 21], "measurements and comparisons"
    for row in logged:
        rates = seen[int(row["step"])]
        assert len(rates) == 4
        assert {name: float(row[f"newton_summary/rate/{name}"]) for name in rates} == pytest.approx(rates)


def test_it_resumes_from_lightnings_checkpoint(tmp_path):
    whole, first, second = (make_module(newton, seed) for seed in (0, 0, 5))
    make_trainer(tmp_path, max_epochs=2).fit(whole, make_loader())
    trainer = make_trainer(tmp_path)
    trainer.fit(first, make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, max_epochs=2).fit(second, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, second)
    assert not same(whole, first)


@pytest.mark.parametrize("own_data", [False, True])
def test_a_resumed_training_is_watched_as_if_it_had_not_stopped(own_data, tmp_path):
    from newton_summary.integrations.lightning import MonitorCallback

    def watched(seed=0):
        data = make_loader() if own_data else None
        return make_module(adam, seed), MonitorCallback(loss_fn, data=data, every=7, window=4)

    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=1e-2)

    (whole, expected), (first, early), (second, callback) = watched(), watched(), watched(5)
    make_trainer(tmp_path, [expected], max_epochs=2).fit(whole, make_loader())
    trainer = make_trainer(tmp_path, [early])
    trainer.fit(first, make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, [callback], max_epochs=2).fit(second, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, second)
    assert len(callback.monitor.records) > len(early.monitor.records)
    assert [r.to_dict() for r in callback.monitor.records] == [r.to_dict() for r in expected.monitor.records]


def test_each_of_several_callbacks_resumes_from_its_own_state(tmp_path):
    from newton_summary.integrations.lightning import MonitorCallback

    def callbacks():
        return [MonitorCallback(loss_fn, every=7), MonitorCallback(loss_fn, every=7, partition="trivial")]

    def train(seed, callbacks, **resumed):
        module = make_module(lambda module: torch.optim.Adam(module.parameters()), seed)
        trainer = make_trainer(tmp_path, callbacks, max_epochs=2 if resumed else 1)
        trainer.fit(module, make_loader(), **resumed)
        return trainer

    before, after = callbacks(), callbacks()
    train(0, before).save_checkpoint(tmp_path / "half.ckpt")
    train(5, after, ckpt_path=tmp_path / "half.ckpt")
    for early, late in zip(before, after, strict=True):
        records = [r.to_dict() for r in early.monitor.records]
        assert [r.to_dict() for r in late.monitor.records][: len(records)] == records


@pytest.mark.parametrize("own_data", [False, True])
def test_a_measurement_that_fails_ends_no_training(own_data, tmp_path):
    from newton_summary.integrations.lightning import MonitorCallback

    def failing(module, batch):
        raise RuntimeError("no loss")

    callback = MonitorCallback(failing, data=make_loader() if own_data else None, every=5, engine="forward")
    module = make_module(lambda module: torch.optim.Adam(module.parameters()))
    trainer = make_trainer(tmp_path, [callback])
    with pytest.warns(UserWarning, match="the Monitor before step 1 failed, training goes on; .*no loss") as caught:
        trainer.fit(module, make_loader())
    assert [warning.filename for warning in caught if "Monitor" in str(warning.message)] == [__file__]
    assert trainer.global_step == len(make_loader())
    assert callback.monitor.counts["disabled"] == 1


@pytest.mark.parametrize("own_data", [False, True])
def test_a_monitor_changes_nothing_and_says_what_it_says_in_a_plain_loop(own_data, tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    from newton_summary.integrations.lightning import MonitorCallback

    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=1e-3)

    data = make_loader() if own_data else None
    callback = MonitorCallback(loss_fn, data=data, every=5, window=4)
    modules = []
    for callbacks, logger in (([callback], CSVLogger(tmp_path, "x")), ([], None)):
        modules.append(make_module(adam))
        make_trainer(tmp_path, callbacks, logger).fit(modules[-1], make_loader())
    assert same(*modules)
    monitors = []

    def watch(model, optimizer):
        monitors.append(ns.Monitor(model, loss_fn, optimizer=optimizer, every=5, window=4))
        if own_data:
            monitors[0].attach(make_loader())
        return (lambda batch: None) if own_data else monitors[0].step

    plain_loop(adam, 1, watch)
    expected, found = list(monitors[0].records), list(callback.monitor.records)
    assert [record.step for record in found] == [0, 5, 10]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.alone == pytest.approx(theirs.alone)
        assert ours.actual_decrease == pytest.approx(theirs.actual_decrease)
        assert ours.names == theirs.names == ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
    rows = read(tmp_path / "x" / "version_0" / "metrics.csv")
    logged = [row for row in rows if row["newton_summary/actual_decrease"]]
    assert [float(row["newton_summary/actual_decrease"]) for row in logged] == pytest.approx(
        [record.actual_decrease for record in found]
    )
    assert [row["newton_summary/advice"] for row in logged] == ["; ".join(record.sentences) for record in found]
    assert logged[-1]["newton_summary/advice"] == callback.monitor.advice.to_dict()["words"]
    finite = [r.alone[0] for r in found if math.isfinite(r.alone[0])]
    shown = [
        float(row["newton_summary/alone/net.0.weight"]) for row in logged if row["newton_summary/alone/net.0.weight"]
    ]
    assert shown == pytest.approx(finite)


def watch_in_several_processes():
    from types import SimpleNamespace

    from newton_summary.integrations.lightning import MonitorCallback

    model, sums = make_model(), []

    def noted(model, batch):
        sums.append(batch[0].sum().item())
        return loss_fn(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    callback = MonitorCallback(noted, data=make_loader(), every=1, samples=1000)
    callback.on_train_start(SimpleNamespace(optimizers=[optimizer]), model)
    optimizer.param_groups[0]["lr"] = 0.1
    loss_fn(model, next(iter(make_loader()))).backward()
    optimizer.step()
    return sums[0], callback.monitor.records[-1].available


def test_several_processes_measure_parts_of_one_batch(two):
    (first, available), (second, _) = two.run(watch_in_several_processes)
    alone, size = watch_in_several_processes()
    assert available == size
    assert first != second
    assert first + second == pytest.approx(alone, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_monitor_measures_the_step_of_gradients_that_the_trainer_has_clipped(by_hand, tmp_path):
    """It warns of no other step, and a decrease is as predicted: also where the module steps by itself."""
    from newton_summary.integrations.lightning import MonitorCallback

    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=0.1)

    def by_itself(batch, number=0):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(100 * loss_fn(module, batch))
        module.clip_gradients(optimizer, gradient_clip_val=0.01)
        optimizer.step()

    module, callback = make_module(sgd), MonitorCallback(loss_fn, every=1)
    if by_hand:
        module.automatic_optimization, module.training_step = False, by_itself
    make_trainer(tmp_path, [callback], **({} if by_hand else {"gradient_clip_val": 0.01})).fit(module, make_loader())
    assert len(callback.monitor.records) == len(make_loader())
    for record in callback.monitor.records:
        assert record.actual_decrease == pytest.approx(record.predicted_decrease, rel=0.05)


def test_tensorboard_gets_pictures(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from newton_summary.integrations.lightning import MonitorCallback

    make_trainer(tmp_path, [MonitorCallback()], TensorBoardLogger(tmp_path, "x")).fit(
        make_module(newton), make_loader()
    )
    events = EventAccumulator(str(tmp_path / "x" / "version_0"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"newton_summary/hessian", "newton_summary/correlations"}
    assert "newton_summary/rate/net.0.weight" in events.Tags()["scalars"]


def test_tensorboard_gets_the_advice_as_text(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from newton_summary.integrations.lightning import MonitorCallback

    callback = MonitorCallback(loss_fn, data=make_loader(), every=5, images=False)
    module = make_module(lambda module: torch.optim.Adam(module.parameters(), lr=1e-3))
    make_trainer(tmp_path, [callback], TensorBoardLogger(tmp_path, "x")).fit(module, make_loader())
    events = EventAccumulator(str(tmp_path / "x" / "version_0"))
    events.Reload()
    logged = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("newton_summary/advice/text_summary")]
    assert logged == ["\n".join(f"- {words}" for words in record.sentences) for record in callback.monitor.records]


def test_a_missing_loss_is_asked_for(tmp_path):
    from newton_summary.integrations.lightning import MonitorCallback

    module = make_module(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"needs loss_fn\(module, batch\)"):
        make_trainer(tmp_path, [MonitorCallback()]).fit(module, make_loader())


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    names = run_example("lightning_training.py", tmp_path, monkeypatch, EPOCHS=2)
    assert "factors on the learning rates" in capsys.readouterr().out
    assert names["trainer"].global_step == 36
    assert (tmp_path / "logs" / "newton-summary" / "version_0" / "metrics.csv").exists()
