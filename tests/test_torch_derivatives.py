"""What docs/torch-derivatives.md says of torch is so; when torch has mended something, a test says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from newton_summary.measure.composed import Composed

PAGE = Path(__file__).parents[1] / "docs" / "torch-derivatives.md"
SHAPE = (6, 4, 5)


def made(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(layer, *shape: int):
    """A smooth function of the layer's output, along a line through its input."""
    x, d, c = (made(*shape, seed=seed) for seed in range(3))
    return lambda t: (layer(x + t * d) * c).sin().sum()


def standardised(y, dims, eps=1e-5):
    centred = y - y.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


LENGTHS = made(3, 1, seed=7)
LAYERS = {
    "layer_norm": (
        along(lambda y: functional.layer_norm(y, (5,)), *SHAPE),
        along(lambda y: standardised(y, 2), *SHAPE),
    ),
    "batch_norm": (
        along(lambda y: functional.batch_norm(y, None, None, training=True), *SHAPE),
        along(lambda y: standardised(y, (0, 2)), *SHAPE),
    ),
    "instance_norm": (along(functional.instance_norm, *SHAPE), along(lambda y: standardised(y, 2), *SHAPE)),
    "weight_norm": (
        along(lambda v: torch._weight_norm(v, LENGTHS, 0), 3, 4),
        along(lambda v: v * LENGTHS / v.norm(dim=1, keepdim=True), 3, 4),
    ),
    "group_norm": (
        along(lambda y: functional.group_norm(y, 2), *SHAPE),
        along(lambda y: standardised(y.view(6, 2, -1), 2).view_as(y), *SHAPE),
    ),
    "rms_norm": (
        along(lambda y: functional.rms_norm(y, (5,), eps=1e-5), *SHAPE),
        along(lambda y: y / (y.square().mean(2, keepdim=True) + 1e-5).sqrt(), *SHAPE),
    ),
}


def reverse(f) -> list[float]:
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value, found = f(t), []
    for _ in range(3):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        found.append(value.item())
    return found


def pushed(f):
    return lambda t: torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


def forward_over_reverse(f) -> list[float]:
    first = torch.func.grad(f)
    return [g(torch.zeros((), dtype=torch.float64)).item() for g in (first, pushed(first), pushed(pushed(first)))]


def forward(f) -> list[float]:
    first = pushed(f)
    return [g(torch.zeros((), dtype=torch.float64)).item() for g in (first, pushed(first), pushed(pushed(first)))]


MODES = {"nested reverse": reverse, "forward over reverse": forward_over_reverse, "nested forward": forward}
ROWS = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?.*?\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.M)
CASES = [
    (layer, mode, cell)
    for first, second, *cells in ROWS
    for layer in (first, second)
    if layer
    for mode, cell in zip(MODES, cells, strict=True)
]


def test_the_table_is_read() -> None:
    assert len(CASES) == 3 * len(LAYERS)
    assert {layer for layer, _, _ in CASES} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_definitions_are_right(layer) -> None:
    """By finite differences, which the higher orders of the table are held to; torch's own values agree with them."""
    own, plain = LAYERS[layer]
    t = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(own(t), plain(t), rtol=1e-12, atol=0)
    h, at = 1e-3, lambda k: plain(torch.tensor(k * 1e-3, dtype=torch.float64)).item()
    first, second, third = reverse(plain)
    assert (8 * (at(1) - at(-1)) - at(2) + at(-2)) / (12 * h) == pytest.approx(first, rel=1e-6)
    assert (16 * (at(1) + at(-1)) - at(2) - at(-2) - 30 * at(0)) / (12 * h**2) == pytest.approx(second, rel=1e-5)
    differences = 13 * (at(-1) - at(1)) + 8 * (at(2) - at(-2)) + at(-3) - at(3)
    assert differences / (8 * h**3) == pytest.approx(third, rel=1e-3)


@pytest.mark.parametrize(("layer", "mode", "cell"), CASES)
def test_torch_is_as_wrong_as_the_page_says(layer, mode, cell) -> None:
    own, plain = LAYERS[layer]
    if cell == "not there":
        with pytest.raises(NotImplementedError):
            MODES[mode](own)
        return
    if torch.__version__ >= "2.14" and mode == "nested reverse" and layer in ("batch_norm", "instance_norm"):
        with pytest.raises(RuntimeError, match="batch_norm does not support 3rd"):
            MODES[mode](own)
        return
    values = MODES[mode](own)
    for order, (value, right, said) in enumerate(zip(values, reverse(plain), cell.split(","), strict=True), start=1):
        error = abs(value - right) / abs(right)
        if "**" in said:
            assert error > 1e-3, f"torch has mended {layer}, order {order}, {mode}: take it out of {PAGE.name}"
            assert error == pytest.approx(float(said.strip(" *%")) / 100, rel=0.05), "the page's figure"
        else:
            assert error < 1e-12, f"torch has broken {layer}, order {order}, {mode}: add it to {PAGE.name}"


@pytest.mark.parametrize("layer", ["layer_norm", "batch_norm", "instance_norm", "weight_norm"])
def test_composed_is_right(layer) -> None:
    own, plain = LAYERS[layer]

    def composed(t):
        with Composed():
            return own(t)

    assert reverse(composed) == pytest.approx(reverse(plain), rel=1e-12)


def test_the_page_shows_it(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, PAGE.name, "exec"), names)
    wrong, right = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    assert abs(wrong - right) > 0.01 * abs(right)
    plain, h = names["plain"], torch.tensor(1e-4, dtype=torch.float64)
    assert float((plain(h) + plain(-h) - 2 * plain(0 * h)) / h**2) == pytest.approx(right, abs=1e-4)
