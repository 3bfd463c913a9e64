"""K-FAC: its step against one that is computed from dense matrices, and its state."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from newton_summary.errors import UsageError
from newton_summary_experiments.kfac import KFAC
from newton_summary_experiments.models import initialised, mlp
from newton_summary_experiments.tasks import Task, cross_entropy, get_task
from newton_summary_experiments.training import Trainer, config_of

SMALL = Task("small", lambda: mlp([64, 12, 10]), epochs=2)
DAMPING = 0.1


@pytest.fixture(scope="module")
def digits():
    return get_task("digits").read()


def test_the_first_step_is_that_of_the_kronecker_factors(digits):
    """The Fisher factors of every layer, by hand: A of its inputs, B of the gradients at sampled classes."""
    model = initialised(lambda: mlp([64, 12, 10]), 0)
    batch = digits.train[0][:100], digits.train[1][:100]
    optimizer = KFAC(model, lr=0.1, damping=DAMPING, batch_size=100, seed=3)
    loss = optimizer.backward(batch)
    torch.testing.assert_close(loss, cross_entropy(model, batch).detach())

    x = batch[0].flatten(1)
    hidden = torch.tanh(model.linear1(x))
    logits = model.linear2(hidden)
    torch.manual_seed(3 * 1_000_003)
    classes = torch.distributions.Categorical(logits.softmax(1)).sample()
    at_logits = (logits.softmax(1) - functional.one_hot(classes, 10)).detach()
    at_hidden = (at_logits @ model.linear2.weight) * (1 - hidden.square())
    gradients = torch.autograd.grad(functional.cross_entropy(logits, batch[1]), list(model.parameters()))
    layers = ((model.linear1, x, at_hidden, gradients[:2]), (model.linear2, hidden, at_logits, gradients[2:]))
    for layer, inputs, outputs, (weight, bias) in layers:
        inputs, outputs = inputs.detach().double(), outputs.detach().double()
        a, b = inputs.T @ inputs / 100, outputs.T @ outputs / 100
        pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt()
        a += DAMPING**0.5 * pi * torch.eye(len(a))
        b += DAMPING**0.5 / pi * torch.eye(len(b))
        expected = torch.linalg.solve(b, weight.double()) @ torch.linalg.inv(a)
        torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=2e-3, atol=1e-5)
        expected = torch.linalg.solve(b, bias.double())  # ASDL treats a bias as a layer with an input of 1
        torch.testing.assert_close(layer.bias.grad.double(), expected, rtol=2e-3, atol=1e-5)


def test_nothing_global_changes_and_the_seed_decides(digits):
    def gradient(seed):
        model = initialised(lambda: mlp([64, 12, 10]), 0)
        KFAC(model, 0.1, DAMPING, 100, seed).backward((digits.train[0][:100], digits.train[1][:100]))
        return model.linear1.weight.grad

    before = torch.get_rng_state()
    assert torch.allclose(gradient(1), gradient(1))
    assert not torch.allclose(gradient(1), gradient(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [5, 10, 13])
def test_a_run_that_stopped_goes_on_bit_for_bit(digits, stop, tmp_path):
    config = config_of(SMALL, "kfac")
    whole, first, second = (Trainer(SMALL, config, digits) for _ in range(3))
    for _ in range(26):
        whole.take_step()
    for _ in range(stop):
        first.take_step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path)
    for _ in range(26 - stop):
        second.take_step()
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.optimizer.counts == {"measured": 3}


def test_a_loss_that_is_no_number_is_given_back(digits):
    model = initialised(lambda: mlp([64, 12, 10]), 0)
    batch = digits.train[0][:100], digits.train[1][:100]
    optimizer = KFAC(model, 0.1, DAMPING, 100)
    with torch.no_grad():
        model.linear1.weight.fill_(torch.nan)
    assert optimizer.backward(batch).isnan()


def test_another_loss_is_refused(digits):
    task = dataclasses.replace(SMALL, loss_fn=lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(UsageError, match="cross-entropy"):
        Trainer(task, config_of(task, "kfac"), digits)
