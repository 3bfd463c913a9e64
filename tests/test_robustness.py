"""What loops do that nobody thought of, and what their authors are told."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from companions import loss_fn, same
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import newton_summary as ns
from newton_summary.measure.batches import described


def make_model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))


def train(model, optimizer, steps: int, start: int = 0, scheduler=None) -> None:
    """A loop of this file's own, for warnings to name."""
    batches = make_batches()
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batches[t % len(batches)]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3', of type str"),
        ({"lr": None}, "lr must be a number, got None, of type NoneType"),
        ({"steps": "100"}, "steps must be a number, got '100', of type str"),
        ({"every": "5"}, "every must be a number"),
        ({"compare_every": "5"}, "compare_every must be a number"),
        ({"regularization": "1"}, "regularization must be a number"),
        ({"shrinkage": None}, "shrinkage must be a number"),
        ({"averaging": "0.9"}, "averaging must be a number"),
        ({"seed": "0"}, "seed must be a number"),
        ({"engine": None}, "engine must be 'auto', 'forward', 'nested' or an Engine, got NoneType"),
        ({"direction": torch.optim.Adam}, "or a Direction, got the class Adam"),
        ({"direction": [torch.optim.Adam]}, "or a Direction, got list of the class Adam"),
        ({"direction": []}, "or a Direction, got list of nothing"),
        ({"loss_fn": None}, "loss_fn must be a function of the model and a batch, got NoneType"),
        (
            {"loss_fn": lambda batch: 0.0},
            r"loss_fn must be a function of the model and a batch, got \(batch\): too many",
        ),
        ({"loss_fn": nn.CrossEntropyLoss()}, r"got CrossEntropyLoss, one of outputs .*: criterion\(model\(batch\[0"),
        ({"loss_fn": nn.MSELoss}, "got MSELoss, one of outputs and targets: pass lambda model, batch:"),
        ({"loss_fn": nn.functional.mse_loss}, "got mse_loss, one of outputs and targets"),
        ({"model": list(make_model().parameters())}, "got list: pass the model itself, not its parameters"),
    ],
)
def test_arguments_of_other_types_are_named_at_once(arguments, message) -> None:
    given = {"model": make_model(), "loss_fn": loss_fn, "curvature_data": make_batches(), **arguments}
    with pytest.raises(TypeError, match=message):
        ns.NewtonSummary(given.pop("model"), given.pop("loss_fn"), **given)


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 on, got 1\.5"):
        ns.NewtonSummary(make_model(), loss_fn, curvature_data=make_batches(), seed=1.5)


def test_a_parameter_beside_the_model_does_not_stand_still_in_silence() -> None:
    model, temperature = make_model(), nn.Parameter(torch.ones(()))
    direction = torch.optim.Adam([*model.parameters(), temperature])
    with pytest.raises(ValueError, match=r"a parameter of shape \(\) that is not the model's, and would not move"):
        ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=direction)
    model[0].requires_grad_(False)  # what is frozen may be held
    ns.NewtonSummary(model, loss_fn, direction=torch.optim.Adam(model.parameters()))


def test_a_parameter_that_an_optimizer_cannot_have_goes_to_another() -> None:
    model = make_model()
    direction = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    with pytest.raises(
        ValueError, match=r"does not hold parameter '0\.bias', .*: .* pass a list with another optimizer"
    ):
        ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), direction=direction)


def test_data_that_is_to_come_is_asked_for() -> None:
    with pytest.raises(ValueError, match="curvature_data is empty: it must have batches from the beginning"):
        ns.NewtonSummary(make_model(), loss_fn, curvature_data=deque())


# Warnings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedules", [False, True])
def test_warnings_are_of_the_users_line(schedules) -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), steps=20, lr=0.01)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0) if schedules else None
        train(model, optimizer, 5, scheduler=scheduler)
        model[0].bias.requires_grad_(True)
        train(model, optimizer, 1, 5, scheduler)
        model[1] = nn.Linear(8, 8)
        train(model, optimizer, 15, 6, scheduler)
    said = ["leave it out", *["not trained by this optimizer"] * 2, "the run is over"]
    assert all(words in str(warning.message) for words, warning in zip(said, caught, strict=True))
    assert [warning.filename for warning in caught] == [__file__] * 4


def by_hand(optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 6e-4


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=20), "lr=0.001 makes every step 1000 times"),
        (by_hand, "lr=0.0006 makes every step 1667 times shorter .* let a schedule go up to 1"),
        (lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=20), ""),
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 100), ""),
    ],
)
def test_a_schedule_of_learning_rates_of_another_optimizer_is_warned_of_once(schedule, peak) -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches())
    scheduler = schedule(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 5, scheduler=scheduler)
    assert len(caught) == bool(peak)
    assert not peak or re.search(peak, str(caught[0].message))


def of_another_model(model, batch):
    return loss_fn(make_model(), batch)


def detached(model, batch):
    return loss_fn(model, batch).detach()


def of_no_number(model, batch):
    return loss_fn(model, batch) * math.nan


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (
            of_another_model,
            "curvature_data does not depend on the parameters: compute it with the model that loss_fn gets",
        ),
        (detached, "curvature_data does not depend on the parameters: .* do not detach it"),
        (of_no_number, "curvature_data is nan before the first step: look at loss_fn and the data"),
    ],
)
def test_a_loss_that_comparisons_can_tell_nothing_of_is_warned_of_once(measured, message) -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, measured, curvature_data=make_batches())
    with pytest.warns(UserWarning, match=message) as caught:
        train(model, optimizer, 20)
    assert len(caught) == 1


def test_a_forgotten_train_is_warned_of_before_it_is_an_error() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches())
    train(model, optimizer, 10)
    optimizer._comparison.adaptation.advantage = -1.0
    for _ in range(2):
        optimizer.eval()
        optimizer.train()
        train(model, optimizer, 1)
    optimizer.eval()
    with pytest.warns(UserWarning, match=r"eval\(\) was called, and not its train\(\): .* will be refused") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    optimizer._comparison.adaptation.advantage = 1.0
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call the optimizer's train\(\)"):
        train(model, optimizer, 1)


def test_where_eval_never_does_anything_nothing_is_said() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), compare_every=0)
    optimizer.eval()
    train(model, optimizer, 2)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def make_deeper() -> nn.Sequential:
    return nn.Sequential(*make_model()[:2], nn.Linear(8, 8), nn.Linear(8, 3))


@pytest.mark.parametrize("partition", ["canonical", "trivial"])
@pytest.mark.parametrize(
    ("make_other", "message"),
    [
        (
            lambda: make_model(16),
            r"parameter '0\.weight' has shape \(8, 5\) here, and \(16, 5\) there; make the model as",
        ),
        (
            make_deeper,
            "the state is of 6 parameters, this optimizer trains 4: make the model as the one that was saved",
        ),
    ],
)
def test_the_state_of_another_model_is_refused_and_changes_nothing(make_other, message, partition) -> None:
    optimizers = []
    for model in (make_model(), make_other()):
        optimizers.append(ns.NewtonSummary(model, loss_fn, curvature_data=make_batches(), partition=partition))
        train(model, optimizers[-1], 5)
    before = copy.deepcopy(optimizers[0].state_dict())
    with pytest.raises(ValueError, match=message):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert str(optimizers[0].state_dict()) == str(before)


def test_states_that_are_none_are_refused() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_batches())
    for state in (None, {}, model.state_dict()):
        with pytest.raises(ValueError, match=r"not that of a NewtonSummary optimizer: give what its state_dict\(\)"):
            optimizer.load_state_dict(state)
    lacking = copy.deepcopy(optimizer.state_dict())
    del lacking["newton_summary"]["parts"]["comparison"]
    with pytest.raises(ValueError, match="this optimizer has a 'comparison', the state has none"):
        optimizer.load_state_dict(lacking)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ("nadam", "make it as it was made, with the same direction="),
        ("soap", "this optimizer has a 'sides', .* given or"),
    ],
)
def test_the_state_of_another_direction_says_so(direction, message) -> None:
    options = {"curvature_data": make_batches()}
    other = ns.NewtonSummary(make_model(), loss_fn, direction=direction, **options)
    with pytest.raises(ValueError, match=message):
        ns.NewtonSummary(make_model(), loss_fn, **options).load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", [np.int64, np.float64, float])
def test_numbers_of_numpy_are_no_hindrance_to_a_checkpoint(kind) -> None:
    model, batches = make_model(), make_batches()
    options = {name: kind(5) for name in ("lr", "steps", "every", "compare_every", "seed")}
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=batches, **options)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert (optimizer.every, optimizer.compare_every) == (5, 5)
    assert optimizer.param_groups[0]["lr"] == 5.0


def test_a_state_without_shapes_is_of_an_older_version() -> None:
    model, twin = make_model(), make_model()
    optimizers = [ns.NewtonSummary(m, loss_fn, curvature_data=make_batches()) for m in (model, twin)]
    train(model, optimizers[0], 5)
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizers[0].state_dict())
    del state["newton_summary"]["shapes"]
    optimizers[1].load_state_dict(state)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        train(m, optimizer, 10, 5)
    assert same(model, twin)


def make_loader() -> DataLoader:
    parts = zip(*make_batches(), strict=True)
    return DataLoader(TensorDataset(*map(torch.cat, parts)), batch_size=16, shuffle=True)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("make_data", [make_batches, make_loader])
def test_an_optimizer_may_be_copied_as_a_whole_while_it_trains(make_data, copied) -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=make_data())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    train(model, optimizer, 7, scheduler=scheduler)
    twin, its, scheduler_of_twin = copied((model, optimizer, scheduler))
    train(model, optimizer, 15, 7, scheduler)
    train(twin, its, 15, 7, scheduler_of_twin)
    assert same(model, twin)
    assert its.rates == optimizer.rates


# What a loop changes around a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_type_is_nothing_to_a_step(dtype) -> None:
    models = make_model(), make_model()
    first, second = (ns.NewtonSummary(model, loss_fn, curvature_data=make_batches()) for model in models)
    train(models[0], first, 30)
    for t in range(30):
        loss_fn(models[1], make_batches()[t % 5]).backward()
        torch.set_default_dtype(dtype)
        second.step()
        second.zero_grad()
        torch.set_default_dtype(torch.float32)
    assert same(*models)


@pytest.mark.parametrize("evaluates", [False, True])
def test_weights_in_half_precision_resume_with_all_digits_of_their_average(evaluates) -> None:
    batches = [(x.bfloat16(), y) for x, y in make_batches()]
    models = make_model().bfloat16(), make_model().bfloat16()
    first, second = (ns.NewtonSummary(model, loss_fn, curvature_data=batches) for model in models)

    def run(model, optimizer) -> None:
        for batch in batches * 8:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()

    run(models[0], first)
    if evaluates:
        first._comparison.adaptation.advantage = 1.0  # so that the average is in place while it is saved
        first.eval()
        assert first._comparison.average.is_in_place
    file = io.BytesIO()
    torch.save([models[0].state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    second.load_state_dict(state)
    for model, optimizer in zip(models, (first, second), strict=True):
        optimizer.train()
        run(model, optimizer)
    averages = [[optimizer.state[p]["average"] for p in optimizer.state] for optimizer in (first, second)]
    assert averages[0][0].dtype == torch.float32
    assert all(map(torch.equal, *averages))
    assert same(*models)


def test_a_model_that_is_converted_while_it_trains_is_refused() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model.half(), loss_fn, curvature_data=make_batches())
    model.float()  # before the first step nothing is remembered
    train(model, optimizer, 5)
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"are float64 on cpu, and were float32 on cpu .*: convert or move the"):
        optimizer.step()
    model.float()
    train(model, optimizer, 5)


# Errors of the user's code -------------------------------------------------------------------------------------------


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("direction", ["nadam", "momentum"])
def test_an_error_of_the_loss_says_what_it_was_called_with(direction) -> None:
    """Batches of curvature_data are not what the training loop makes of those that it reads."""
    model, data = make_model(), [{"x": x.double(), "y": y} for x, y in make_batches()]
    options = {"curvature_data": data, "direction": direction}
    optimizer = ns.NewtonSummary(model, lambda m, b: loss_fn(m, (b["x"], b["y"])), **options)
    before = copy.deepcopy(model)
    loss_fn(model, make_batches()[0]).backward()
    with pytest.raises(RuntimeError, match="same dtype") as caught:
        optimizer.step()
    assert notes_of(caught.value) == (
        "loss_fn(model, batch) was called with a Sequential and a dict, batch['x']: float64 of shape (16, 5), "
        "batch['y']: int64 of shape (16,)"
    )
    assert same(model, before)


def test_a_loss_that_steps_back_by_itself_is_told_so_and_adds_to_no_gradient() -> None:
    def whole_step(model, batch):
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    model = make_model()
    optimizer = ns.NewtonSummary(model, whole_step, curvature_data=make_batches())
    loss_fn(model, make_batches()[0]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="second time") as caught:
        train(model, optimizer, 10)
    assert notes_of(caught.value) == "a loss function only gives the loss: does loss_fn call backward() itself?"


def test_a_loss_in_a_dictionary_is_to_be_taken_out() -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, lambda m, b: {"loss": loss_fn(m, b)}, curvature_data=make_batches())
    with pytest.raises(ValueError, match="got dict: return the loss out of it, and nothing else"):
        train(model, optimizer, 1)


def test_a_batch_of_many_tensors_is_described_by_its_first_ones() -> None:
    assert described([torch.ones(1)] * 9).count("batch[") == 6
    assert described(None) == "a NoneType"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_batch_of_tensors_without_a_shape_is_described() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert described([nested]) == "a list, batch[0]: float32 of shape (nested)"


class Unreliable(Dataset):
    """Data of which single reads fail."""

    def __init__(self, failing: set[int]) -> None:
        self.samples = make_loader().dataset
        self.reads, self.failing = 0, failing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        self.reads += 1
        if self.reads in self.failing:
            raise OSError("no such share")
        return self.samples[index]


@pytest.mark.parametrize("failing", [{1}, {40}, {1, 17, 33, 40}])
def test_data_that_cannot_be_read_says_whose_it_is_and_a_loop_may_go_on(failing) -> None:
    model = make_model()
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=DataLoader(Unreliable(failing), 16, shuffle=True))
    notes, stayed = [], []
    for t in range(60):
        before = copy.deepcopy(model)
        try:
            train(model, optimizer, 1, t)
        except OSError as error:
            notes.append(notes_of(error))
            stayed.append(same(model, before))
    assert len(notes) == len(failing)
    assert all("raised by curvature_data, of which batch" in note for note in notes)
    assert all(stayed)
    assert optimizer.counts["compared"] == 7


def test_what_failed_before_the_first_step_is_made_up_for() -> None:
    """The first comparison chooses the sides of matrices, and finds where the rates begin."""
    models, data = (make_model(64), make_model(64)), make_batches()[:1] * 5
    optimizers = [ns.NewtonSummary(model, loss_fn, curvature_data=data) for model in models]
    calls = optimizers[1]._samples.loss
    calls.loss_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(models[1], optimizers[1], 1)
    calls.loss_fn = loss_fn
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    assert same(*models)


def interrupted(model, batch):
    raise KeyboardInterrupt


def test_data_that_ran_out_says_what_to_pass() -> None:
    model, data = make_model(), deque(make_batches())
    optimizer = ns.NewtonSummary(model, loss_fn, curvature_data=data)
    train(model, optimizer, 30)
    data.clear()
    with pytest.raises(RuntimeError, match="mutated during iteration") as caught:
        train(model, optimizer, 30, 30)
    assert "raised by curvature_data" in notes_of(caught.value)
    with pytest.raises(ValueError, match=r"emptied since: .*; pass a DataLoader, a list of batches, or an object that"):
        train(model, optimizer, 1, 30)
    data += make_batches()
    train(model, optimizer, 30, 30)
