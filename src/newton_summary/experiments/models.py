"""The networks of the experiments (docs/method.md, section 4)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from newton_summary.measure import preserved_randomness


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers ``linear1`` … of these sizes, from the inputs to the classes, with an activation between them.

    Example:
        >>> [tuple(p.shape) for p in mlp([4, 3, 2]).parameters()]
        [(3, 4), (3,), (2, 3), (2,)]
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        layers[f"linear{number}"] = nn.Linear(before, after)
        if number < len(sizes) - 1:
            layers[f"activation{number}"] = activation()
    return nn.Sequential(layers)


def lenet() -> nn.Sequential:
    """LeNet for 3 × 32 × 32 images and ten classes, with tanh and max-pooling."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 5),
            activation1=nn.Tanh(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            activation2=nn.Tanh(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(16 * 5 * 5, 120),
            activation3=nn.Tanh(),
            linear2=nn.Linear(120, 84),
            activation4=nn.Tanh(),
            linear3=nn.Linear(84, 10),
        )
    )


def initialised(build: Callable[[], nn.Module], seed: int, gain: float = 1.0) -> nn.Module:
    """A model with weights drawn from N(0, gain² / fan_in) and biases of 0; the global random state stays as it was.

    Args:
        build: makes the model.
        seed: decides every weight.
        gain: σ_w, the standard deviation of a weight times √fan_in.
    """
    with preserved_randomness(), torch.no_grad():
        model = build()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, gain / math.sqrt(parameter[0].numel()), generator=generator)
            else:
                parameter.zero_()
    return model
