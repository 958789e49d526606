"""Sizes of Open-Sora 2.0: a number of pixels and an aspect ratio, on a grid of cells; integers alone, no torch.

A resolution such as `768px` is the area of a square of that side. Sizes for sampling have as many whole cells as fit
below the exact width, then below that area; those that training cut its clips to may have a row or a column more, where
that comes nearer to the area.
"""

import math
import re
from fractions import Fraction

from opensora.errors import OpenSoraError

# Width:height of cinema and screens, in the published order, which decides between equals; the rest are their
# transposes.
_RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
GRID_PX = 16
"""Sides of the published sizes are multiples of it, and of what the autoencoder divides."""

_NAME = re.compile(r"([1-9]\d{0,4})px")


def is_pixel_resolution(resolution: str) -> bool:
    """Whether a resolution is a square's side in pixels, such as `256px`."""
    return _NAME.fullmatch(resolution) is not None


def pixels_of(resolution: str) -> int:
    """The area that `256px` stands for.

    Raises:
        OpenSoraError: another spelling.
    """
    match = _NAME.fullmatch(resolution)
    if match is None:
        raise OpenSoraError(f"resolution {resolution!r} is no square's side in pixels; expected for example 256px")
    return int(match[1]) ** 2


def grid_sizes(pixels: int, cell: int) -> dict[str, tuple[int, int]]:
    """(height, width) of every aspect ratio, by its name (width:height), for sampling.

    Args:
        pixels: the area.
        cell: pixels along a side of a cell.

    Raises:
        OpenSoraError: too few pixels for a cell.
    """
    return _with_transposes({name: _below(name, pixels, cell) for name in _RATIOS})


def training_grid_sizes(pixels: int, cell: int) -> dict[str, tuple[int, int]]:
    """Those of training: a cell more where that is nearer to the area, each size once.

    Raises:
        OpenSoraError: too few pixels for a cell.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name in _RATIOS:
        height, width = _below(name, pixels, cell)
        near = ((height, width), (height + cell, width), (height, width + cell))
        size = min(near, key=lambda size: abs(size[0] * size[1] - pixels))
        if size not in sizes.values():
            sizes[name] = size
    return _with_transposes(sizes)


def closest_ratio(names: dict[str, tuple[int, int]], height: float, width: float) -> str:
    """The aspect ratio among `names` whose height / width is nearest to a size's; the first of two equals."""
    return min(names, key=lambda name: abs(height_to_width(name) - height / width))


def height_to_width(name: str) -> float:
    """Height / width of an aspect ratio by its name."""
    return float(1 / _ratio(name))


def _below(name: str, pixels: int, cell: int) -> tuple[int, int]:
    width = math.isqrt(int(pixels * _ratio(name))) // cell * cell
    height = pixels // width // cell * cell if width else 0
    if not height:
        raise OpenSoraError(f"{pixels} pixels are too few for {name} in cells of {cell} px; take more")
    return height, width


def _with_transposes(sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Every size, and those turned by a right angle, which count where a ratio has both."""
    turned = {":".join(reversed(name.split(":"))): (width, height) for name, (height, width) in sizes.items()}
    return {**sizes, **turned}


def _ratio(name: str) -> Fraction:
    """Width / height of "16:9"."""
    width, height = name.split(":")
    return Fraction(width) / Fraction(height)
