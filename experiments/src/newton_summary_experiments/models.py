"""The networks of the experiments (docs/method.md, section 4)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def vgg11(divisor: int = 1) -> nn.Sequential:
    """VGG-11's eight convolutions with ELU and max-pooling, and one linear layer, for 3 × 32 × 32 images.

    Args:
        divisor: what all widths, 64 to 512 channels, are divided by.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before, number = 3, 0
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width == 0:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            continue
        number += 1
        layers[f"conv{number}"] = nn.Conv2d(before, width // divisor, 3, padding=1)
        layers[f"activation{number}"] = nn.ELU()
        before = width // divisor
    layers["flatten"], layers["linear"] = nn.Flatten(), nn.Linear(before, 10)
    return nn.Sequential(layers)


class ScaledLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a constant, ``scale``."""

    scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Features, shape (B, out)."""
        return functional.linear(input, self.scale * self.weight, self.bias)


class ScaledConv2d(nn.Conv2d):
    """A convolution whose weight is multiplied by a constant, ``scale``."""

    scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Features, shape (B, channels, height, width)."""
        features: Tensor = self._conv_forward(input, self.scale * self.weight, self.bias)
        return features


def ntk(model: nn.Sequential, gain: float = 1.0) -> nn.Sequential:
    """The same function in the NTK parameterisation: weights σ_w / √fan_in · w̃, so that w̃ starts from N(0, 1).

    Args:
        model: linear layers and convolutions in a row.  Its other layers are shared.
        gain: σ_w.

    Example:
        >>> model = mlp([4, 3, 2])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(ntk(model)(x), model(x), atol=1e-6)
        True
    """
    layers = OrderedDict(model.named_children())
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear):
            layers[name] = _scaled(ScaledLinear(layer.in_features, layer.out_features), layer, gain)
        elif isinstance(layer, nn.Conv2d):
            new = ScaledConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)  # type: ignore[arg-type]
            layers[name] = _scaled(new, layer, gain)
    return nn.Sequential(layers)


@torch.no_grad()
def _scaled(new: ScaledLinear | ScaledConv2d, old: nn.Linear | nn.Conv2d, gain: float) -> nn.Module:
    """A layer with the function of an old one."""
    new.to(old.weight.dtype)
    new.scale = gain / math.sqrt(old.weight[0].numel())
    new.weight.copy_(old.weight / new.scale)
    assert new.bias is not None
    assert old.bias is not None
    new.bias.copy_(old.bias)
    return new


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
