"""Reading a volume at places that move."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, aten, lowers

_ZEROS, _BORDER, _REFLECTION = range(3)  # how torch numbers what is read outside
_LINEAR = 0


@lowers(aten.grid_sampler_3d.default)
def _grid_sampler_3d(x: Tensor, grid: Tensor, interpolation: int, padding: int, align_corners: bool) -> Tensor:
    """The entries about each place, each by its share; of a picture torch itself has it so.

    Args:
        x: (samples, channels, depth, height, width).
        grid: (samples, …, 3): places from −1 to 1, along the width, the height and the depth.
        interpolation: between the eight entries about a place, or the closest one.
        padding: what lies outside.
        align_corners: whether ±1 are the middles of the outermost entries, or their outer sides.
    """
    sizes = x.shape[2:]
    places = [_place(grid[..., 2 - axis].flatten(1), size, padding, align_corners) for axis, size in enumerate(sizes)]
    whole = x.flatten(2)
    result = torch.zeros(*x.shape[:2], places[0].shape[1], dtype=x.dtype, device=x.device)
    for corner in itertools.product((0, 1) if interpolation == _LINEAR else (0,), repeat=3):
        number, share = torch.zeros_like(places[0], dtype=torch.long), torch.ones_like(places[0])
        for place, size, side in zip(places, sizes, corner, strict=True):
            below = CONSTANT(place).floor() if interpolation == _LINEAR else CONSTANT(place).round()
            part, entry = (place - below if side else below + 1 - place), below + side
            part = part if interpolation == _LINEAR else torch.ones_like(place)
            share = share * torch.where((entry >= 0) & (entry < size), part, 0.0)
            number = number * size + entry.clamp(0, size - 1).long()
        read = whole.gather(2, number.unsqueeze(1).expand(-1, x.shape[1], -1))
        result = result + read * share.unsqueeze(1)
    return result.view(*x.shape[:2], *grid.shape[1:4])


def _place(place: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    """A place between −1 and 1 as one between entries, kept inside or mirrored where that is asked for.

    What is kept inside does not move, nor does what is on the edge.
    """
    place = (place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2
    if padding == _REFLECTION:
        low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        if high == low:
            return torch.zeros_like(place)
        width = high - low
        distance = torch.where(place < low, low - place, place - low)
        turns = CONSTANT((distance / width).floor())
        rest = distance - turns * width
        place = torch.where(turns % 2 == 0, rest + low, width - rest + low)
    if padding == _ZEROS:
        return place
    return torch.where((place > 0) & (place < size - 1), place, CONSTANT(place).clamp(0, size - 1))
