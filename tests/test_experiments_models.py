"""The networks of the experiments: their sizes and their initial weights."""

import math

import pytest
import torch

from newton_summary_experiments.models import initialised, lenet, mlp, ntk, vgg11
from newton_summary_experiments.tasks import TASKS, get_task

CIFAR = (3, 32, 32)
SHAPES = {"digits": (1, 8, 8), "mlp-mnist": (1, 28, 28)}
SCALARS = {
    "digits": 64 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10,
    "mlp-mnist": 784 * 1024 + 1024 + 1024 * 200 + 200 + 200 * 100 + 100 + 100 * 10 + 10,
    "lenet-cifar10": 62_006,  # LeNet-5's figure for three channels
    "vgg-cifar10": 9_220_480 + 512 * 10 + 10,  # torchvision's figure for the features of VGG-11, and the last layer
    "bigmlp-cifar10": 3072 * 1024 + 1024 + 19 * (1024 * 1024 + 1024) + 1024 * 10 + 10,
    "vbigmlp-cifar10": 3072 * 1024 + 1024 + 99 * (1024 * 1024 + 1024) + 1024 * 10 + 10,
}
QUICK = {
    **SCALARS,
    "vgg-cifar10": 144_560 + 64 * 10 + 10,
    "bigmlp-cifar10": 3072 * 256 + 256 + 19 * (256 * 256 + 256) + 256 * 10 + 10,
    "vbigmlp-cifar10": 3072 * 64 + 64 + 99 * (64 * 64 + 64) + 64 * 10 + 10,
}
GROUPS = {
    "digits": 8,
    "mlp-mnist": 8,
    "lenet-cifar10": 10,
    "vgg-cifar10": 18,
    "bigmlp-cifar10": 42,
    "vbigmlp-cifar10": 10,
}


@pytest.mark.parametrize("name", TASKS)
def test_sizes_at_both_budgets(name):
    for budget, sizes in (("quick", QUICK), ("full", SCALARS)):
        task = get_task(name, budget)
        if budget == "full" and sizes[name] > 5e6:  # only counted: drawing a hundred million weights takes long
            with torch.device("meta"):
                model = task.build()
        else:
            model = task.make_model(0)
            assert model(torch.randn(2, *SHAPES.get(name, CIFAR))).shape == (2, 10)
        assert sum(p.numel() for p in model.parameters()) == sizes[name]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert len(task.partition(model)) == GROUPS[name]


@pytest.mark.parametrize("build", [lenet, lambda: vgg11(16), lambda: mlp([3072, 7, 10])])
@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_the_ntk_parameterisation_is_the_same_function_of_standard_normal_weights(build, gain):
    model = initialised(build, 0, gain)
    other = ntk(model, gain)
    x = torch.randn(3, *CIFAR)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        fan_in = theirs[0].numel()
        expected = theirs * math.sqrt(fan_in) / gain if name.endswith("weight") else theirs
        torch.testing.assert_close(ours, expected)
    assert abs(next(other.parameters()).std().item() - 1) < 0.1


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
