"""The nine problems of the comparison with tuned optimizers: their models and losses, on made-up data."""

from __future__ import annotations

import pytest
import torch

import newton_summary as ns
from newton_summary.experiments import data
from newton_summary.experiments.errors import UsageError
from newton_summary.experiments.suite import PROBLEMS

IMAGES = {"lenet": (3, 32, 32), "resnet": (3, 32, 32), "digits": (1, 8, 8)}


def made_up(name: str, count: int = 8):
    generator = torch.Generator().manual_seed(1)  # another than the weights have
    if name == "transformer":
        return tuple(torch.randint(65, (count, 64), generator=generator) for _ in range(2))
    images = torch.randn(count, *IMAGES.get(name, (1, 28, 28)), generator=generator)
    if name == "autoencoder":
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


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_seed_decides_the_weights_and_leaves_the_random_state_alone(name) -> None:
    problem = PROBLEMS[name]
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


def test_a_text_that_is_missing_is_looked_for_and_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "folders", lambda: [tmp_path])
    from newton_summary.experiments import suite

    with pytest.raises(UsageError, match=r"tinyshakespeare\.txt is not there\. Looked for"):
        suite._text.__wrapped__()
