"""The problems of the comparison with tuned optimizers: their models and losses, on made-up data."""

from __future__ import annotations

import pytest
import torch

import newton_summary as ns
from newton_summary.errors import UsageError
from newton_summary_experiments import data
from newton_summary_experiments.held_out import HELD_OUT
from newton_summary_experiments.suite import PROBLEMS

TABLES = ("friedman1", "friedman2", "diabetes", "cancer")
IMAGES = {"lenet": (3, 32, 32), "resnet": (3, 32, 32), "convnet": (3, 32, 32), "digits": (1, 8, 8)}
LENGTHS = {"transformer": 64, "lstm": 6}


def made_up(name: str, count: int = 8):
    generator = torch.Generator().manual_seed(1)  # another than the weights have
    if name in TABLES:
        return tuple(t[:count] for t in HELD_OUT[name].read().train)
    if name == "factors":
        return torch.randint(200, (count, 2), generator=generator), torch.randn(count, generator=generator)
    if name in LENGTHS:
        return tuple(torch.randint(65, (count, LENGTHS[name]), generator=generator) for _ in range(2))
    images = torch.randn(count, *IMAGES.get(name, (1, 28, 28)), generator=generator)
    if name in ("autoencoder", "vae"):
        return images, images.flatten(1).sigmoid()
    return images, torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_forward_engine_measures_it_and_the_loss_starts_where_guessing_does(name) -> None:
    problem = PROBLEMS[name]
    model, batch = problem.make_model(0), made_up(name)
    summary = ns.summarize(problem.loss_fn, model, [batch], engine="forward")
    assert summary.is_finite()
    assert summary.loss.item() == pytest.approx(problem.loss_fn(model, batch).item(), rel=1e-5)
    guess = {"transformer": torch.tensor(65.0).log(), "autoencoder": torch.tensor(2.0).log()}
    assert 0.5 < summary.loss.item() / guess.get(name, torch.tensor(10.0).log()).item() < 2
    assert problem.steps >= 1000


def hinge_by_hand(model, batch):
    logits, classes = model(batch[0]), batch[1][:, None]
    above = (1 + logits - logits.gather(1, classes)).clamp(min=0).scatter(1, classes, 0.0)
    return above.mean()


@pytest.mark.parametrize("name", HELD_OUT)
def test_both_engines_measure_the_same_of_what_was_held_out(name) -> None:
    problem = HELD_OUT[name]
    model, batch = problem.make_model(0).double().eval(), made_up(name)
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    ours = ns.summarize(problem.loss_fn, model, [batch], engine="forward")
    loss_fn = hinge_by_hand if name == "hinge" else problem.loss_fn  # torch's has no second derivative
    reference = ns.summarize(loss_fn, model, [batch], engine="nested")
    assert ours.loss.item() == pytest.approx(problem.loss_fn(model, batch).item(), rel=1e-12)
    for quantity in ("gradient", "hessian", "third"):
        one, other = getattr(ours, quantity), getattr(reference, quantity)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))
    assert problem.steps >= 1000


@pytest.mark.parametrize("name", [*PROBLEMS, *HELD_OUT])
def test_a_seed_decides_the_weights_and_leaves_the_random_state_alone(name) -> None:
    problem = {**PROBLEMS, **HELD_OUT}[name]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, twin, other = (list(problem.make_model(seed).parameters()) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(one, twin, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    scaled = problem.make_model(3, scale=0.5).parameters()
    for p, q in zip(one, scaled, strict=True):
        assert torch.equal(q, 0.5 * p if p.dim() >= 2 else p)


def test_digits_need_no_file() -> None:
    samples = PROBLEMS["digits"].read()
    assert len(samples) == 1600
    assert samples is PROBLEMS["digits"].read()


def test_tables_keep_their_units_and_ratings_are_not_those_of_a_model_before_training() -> None:
    assert HELD_OUT["cancer"].read().train[0].amax() > 1000
    assert HELD_OUT["friedman2"].read().train[1].amax() > 1000
    assert len(HELD_OUT["diabetes"].read()) == 398
    ratings = HELD_OUT["factors"]
    samples = ratings.read()
    for seed in range(3):
        assert ratings.loss_fn(ratings.make_model(seed), samples.train) > samples.train[1].var()


def test_a_text_that_is_missing_is_looked_for_and_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "folders", lambda: [tmp_path])
    from newton_summary_experiments import suite

    with pytest.raises(UsageError, match=r"tinyshakespeare\.txt is not there\. Looked for"):
        suite.text.__wrapped__()
