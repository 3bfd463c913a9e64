"""The networks of the experiments: their sizes and their initial weights."""

import math

import pytest
import torch

from newton_summary.experiments.models import initialised, lenet, mlp
from newton_summary.experiments.tasks import TASKS

SHAPES = {"digits": (1, 8, 8), "mlp-mnist": (1, 28, 28), "lenet-cifar10": (3, 32, 32)}
SCALARS = {
    "digits": 64 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10,
    "mlp-mnist": 784 * 1024 + 1024 + 1024 * 200 + 200 + 200 * 100 + 100 + 100 * 10 + 10,
    "lenet-cifar10": 62_006,  # LeNet-5's figure for three channels
}


@pytest.mark.parametrize("name", TASKS)
def test_sizes(name):
    model = TASKS[name].make_model(0)
    assert sum(p.numel() for p in model.parameters()) == SCALARS[name]
    assert model(torch.randn(2, *SHAPES[name])).shape == (2, 10)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_weights_have_the_variance_of_their_fan_in_and_biases_are_zero():
    model = initialised(lambda: mlp([500, 400, 300]), seed=0, gain=math.sqrt(2))
    for layer in (model.linear1, model.linear2):
        fan_in = layer.weight.shape[1]
        assert layer.weight.std().item() * math.sqrt(fan_in / 2) == pytest.approx(1.0, abs=0.01)
        assert abs(layer.weight.mean().item()) < 1e-3
        assert not layer.bias.any()
    convolution = initialised(lenet, seed=0).conv2
    assert convolution.weight.std().item() * math.sqrt(6 * 25) == pytest.approx(1.0, abs=0.05)


def test_the_seed_decides_and_nothing_global_changes():
    before = torch.get_rng_state()
    models = [TASKS["digits"].make_model(seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    models.append(TASKS["digits"].make_model(0))
    weights = [model.linear1.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], weights[2])
