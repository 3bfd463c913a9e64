"""In the Trainer of transformers, training is what it is in a plain loop, and its log is told."""

from __future__ import annotations

import pytest
import torch
from companions import run_example, same
from torch.utils.data import DataLoader

import newton_summary as ns

pytestmark = pytest.mark.slow  # importing it takes seconds

SEQUENCES = (torch.arange(96)[:, None] % 13 + torch.arange(8)) % 13
DATA = [{"input_ids": s, "labels": s, "attention_mask": torch.ones_like(s)} for s in SEQUENCES]
GROUPS = {"embeddings": "transformer.w*", "body": "transformer.h.*", "head": "transformer.ln_f*"}


def make_model(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=13,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).double()  # the trainer sums losses in another order


def partition(model):
    return ns.Partition.from_patterns(model, GROUPS)


def newton(model):
    from newton_summary.integrations.transformers import own_loss

    data = DataLoader(DATA, batch_size=8)
    return ns.NewtonSummary(model, own_loss, curvature_data=data, partition=partition(model), every=5)


def make_trainer(folder, model, optimizer, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 12, "save_strategy": "no", **options},
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))


def plain_loop(model, optimizer, steps):
    """The same without the trainer, which divides the loss by the number of all eight tokens, seven being predicted."""
    model.train()
    for batch in list(DataLoader(DATA, batch_size=8))[:steps]:
        optimizer.zero_grad()
        (model(**batch).loss * 7 / 8).backward()
        optimizer.step()


def close(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in pairs)


def test_the_optimizer_trains_as_in_a_plain_loop_and_its_rates_are_logged(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback

    models = [make_model() for _ in range(3)]
    optimizers = [newton(model) for model in models]
    trainer = make_trainer(tmp_path, models[0], optimizers[0])
    trainer.add_callback(MonitorCallback())
    trainer.train()
    plain_loop(models[1], optimizers[1], 12)
    assert close(*models[:2])
    assert optimizers[0].counts["measured"] == 3
    assert not close(models[0], make_model())
    logged = [entry for entry in trainer.state.log_history if "newton_summary/measured" in entry]
    assert [entry["step"] for entry in logged] == [1, 5, 6, 9, 11], "measurements and comparisons"
    plain_loop(models[2], optimizers[2], 11)  # later looks move them
    rates = {name: logged[-1][f"newton_summary/rate/{name}"] for name in GROUPS}
    assert rates == pytest.approx(optimizers[2].rates, rel=1e-6)
    assert optimizers[0].rates == pytest.approx(optimizers[1].rates, rel=1e-6)


def test_it_resumes_from_the_trainers_checkpoint(tmp_path):
    whole, first, second = make_model(), make_model(), make_model(3)
    saving = {"save_strategy": "steps", "save_steps": 7}
    make_trainer(tmp_path / "whole", whole, newton(whole)).train()
    make_trainer(tmp_path / "half", first, newton(first), **saving).train()
    make_trainer(tmp_path / "half", second, newton(second)).train(str(tmp_path / "half" / "checkpoint-7"))
    assert same(whole, first)
    assert same(whole, second)


def test_a_monitor_changes_nothing_and_says_what_it_says_in_a_plain_loop(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback, own_loss

    models = [make_model() for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    make_trainer(tmp_path, models[0], optimizers[0]).train()
    trainer = make_trainer(tmp_path, models[1], optimizers[1])
    told = []
    callback = MonitorCallback(every=5, repeats=2, seed=3, log=told.append, partition=partition(models[1]))
    trainer.add_callback(callback)
    trainer.train()
    assert same(models[0], models[1])
    monitor = ns.Monitor(models[2], own_loss, optimizer=optimizers[2], every=5, partition=partition(models[2]))
    monitor.attach(DataLoader(DATA, batch_size=8), repeats=2, seed=3)
    plain_loop(models[2], optimizers[2], 12)
    assert [record.step for record in callback.monitor.records] == [0, 5, 10]
    for ours, theirs, logged in zip(callback.monitor.records, monitor.records, told, strict=True):
        assert ours.alone == pytest.approx(theirs.alone, rel=1e-6)
        assert ours.actual_decrease == pytest.approx(theirs.actual_decrease, rel=1e-6)
        assert logged == ours.scalars() | {"newton_summary/advice": "; ".join(ours.sentences)}
    assert told[-1]["newton_summary/advice"] == callback.monitor.advice.to_dict()["words"]


def test_a_resumed_training_is_watched_as_if_it_had_not_stopped(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback

    def watched(folder, seed=0, **options):
        model = make_model(seed)
        trainer = make_trainer(tmp_path / folder, model, torch.optim.AdamW(model.parameters(), lr=1e-3), **options)
        callback = MonitorCallback(every=3, window=4, partition=partition(model))
        trainer.add_callback(callback)
        return model, trainer, callback

    whole, trainer, expected = watched("half", save_strategy="steps", save_steps=7)
    trainer.train()
    second, trainer, callback = watched("half", 3)
    trainer.train(str(tmp_path / "half" / "checkpoint-7"))
    assert same(whole, second)
    assert [record.step for record in callback.monitor.records] == [0, 3, 6, 9]
    assert [r.to_dict() for r in callback.monitor.records] == [r.to_dict() for r in expected.monitor.records]


def test_two_monitors_of_one_training_are_resumed_each_by_itself(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback

    def watched(seed=0, **options):
        model = make_model(seed)
        trainer = make_trainer(tmp_path, model, torch.optim.AdamW(model.parameters(), lr=1e-3), **options)
        callbacks = [MonitorCallback(every=3, partition=partition(model)), MonitorCallback(every=4)]
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer, callbacks

    trainer, expected = watched(save_strategy="steps", save_steps=7)
    trainer.train()
    trainer, callbacks = watched(3)
    trainer.train(str(tmp_path / "checkpoint-7"))
    for ours, theirs in zip(callbacks, expected, strict=True):
        assert [r.to_dict() for r in ours.monitor.records] == [r.to_dict() for r in theirs.monitor.records]


def test_a_measurement_that_fails_ends_no_training(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback

    model, batches = make_model(), []

    def failing(model, batch):
        batches.append(batch)
        raise RuntimeError("no loss")

    trainer = make_trainer(tmp_path, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    callback = MonitorCallback(failing, every=5, engine="forward")
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="the Monitor before step 1 failed, training goes on; .*no loss") as caught:
        trainer.train()
    assert [warning.filename for warning in caught if "Monitor" in str(warning.message)] == [__file__]
    assert trainer.state.global_step == 12
    assert callback.monitor.counts["disabled"] == 1
    assert batches


def test_the_trainers_own_log_takes_it(tmp_path):
    from newton_summary.integrations.transformers import MonitorCallback

    model = make_model()
    trainer = make_trainer(tmp_path, model, newton(model))
    trainer.add_callback(MonitorCallback(log=trainer.log))
    trainer.train()
    logged = [entry["newton_summary/measured"] for entry in trainer.state.log_history if "newton_summary/lr" in entry]
    assert logged == [1, 1, 2, 2, 3]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    names = run_example("transformers_training.py", tmp_path, monkeypatch, STEPS=5)
    assert "factors on the learning rates" in capsys.readouterr().out
    assert names["trainer"].state.global_step == 5
    assert names["callback"].monitor.counts["measured"] == 1
