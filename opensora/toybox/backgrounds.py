"""The calm backgrounds of the toy world, painted as functions of place: any size, and the same wherever a camera looks.

x and y count from the centre in 1/64 of the picture's shorter side; textures stay faint so that objects stay clear.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Painter = Callable[[Tensor, Tensor], Tensor]


def rgb(red: float, green: float, blue: float, like: Tensor) -> Tensor:
    """A colour (0-255) that broadcasts against places: (3, 1, ..., 1)."""
    return torch.tensor([red, green, blue], device=like.device).view(3, *[1] * like.ndim)


def plain(red: float, green: float, blue: float) -> Painter:
    """One colour everywhere."""

    def paint(x: Tensor, y: Tensor) -> Tensor:
        return rgb(red, green, blue, x) + 0 * (x + y)

    return paint


def gradient(top: tuple[float, float, float], bottom: tuple[float, float, float]) -> Painter:
    """From one colour at the top edge to another at the bottom edge."""

    def paint(x: Tensor, y: Tensor) -> Tensor:
        share = (y / 64 + 0.5).clamp(0, 1) + 0 * x
        return rgb(*top, x) + (rgb(*bottom, x) - rgb(*top, x)) * share

    return paint


def day(x: Tensor, y: Tensor) -> Tensor:
    """A pale sky with three soft clouds."""
    sky = gradient((120, 185, 235), (195, 225, 245))(x, y)
    for left, top, wide in ((-17.0, -20.0, 9.0), (14.0, -12.0, 11.0), (-8.0, 17.0, 12.0)):
        cloud = torch.exp(-(((x - left) / wide) ** 2) - ((y - top) / 3.5) ** 2)
        sky = sky + 0.5 * cloud * (rgb(250, 252, 255, x) - sky)
    return sky


def night(x: Tensor, y: Tensor) -> Tensor:
    """A dark sky with eleven stars."""
    sky = gradient((22, 26, 62), (52, 58, 110))(x, y)
    for i in range(11):  # stars on a golden-angle spiral: evenly spread, never in a row
        angle, away = 2.399963 * i + 0.6, 11.5 * math.sqrt(i + 0.4)
        star = torch.exp(-((x - away * math.cos(angle)) ** 2 + (y - away * math.sin(angle)) ** 2) / 1.1)
        sky = sky + star * rgb(110, 110, 90, x)
    return sky


def grass(x: Tensor, y: Tensor) -> Tensor:
    """A lawn."""
    blades = torch.sin(0.55 * x + 1.3 * torch.sin(0.21 * y)) * torch.sin(0.5 * y + 0.9 * torch.sin(0.17 * x))
    return rgb(122, 160, 92, x) + blades * rgb(7, 9, 6, x)


def sand(x: Tensor, y: Tensor) -> Tensor:
    """Rippled sand."""
    ripples = torch.sin(0.42 * y + 0.16 * x + 1.2 * torch.sin(0.11 * x))
    return rgb(216, 192, 148, x) + ripples * rgb(6, 6, 6, x)


def water(x: Tensor, y: Tensor) -> Tensor:
    """Water with low waves."""
    waves = torch.sin(0.6 * y + 0.8 * torch.sin(0.19 * x)) * (0.7 + 0.3 * torch.sin(0.13 * x + 0.4 * y))
    return rgb(70, 140, 158, x) + waves * rgb(8, 10, 10, x)


def wood(x: Tensor, y: Tensor) -> Tensor:
    """Planks."""
    grain = torch.sin(1.1 * y + 0.6 * torch.sin(0.1 * x)) * 0.35
    seam = torch.exp(-((((y + 8) % 16) - 8) ** 2) / 0.8)
    return rgb(138, 98, 70, x) + grain * rgb(8, 7, 6, x) - seam * rgb(26, 22, 18, x) + 0 * x


PAINTERS: dict[str, Painter] = {
    "white": plain(236, 236, 234),
    "grey": plain(140, 142, 145),
    "wood": wood,
    "day": day,
    "sunset": gradient((105, 85, 140), (240, 165, 120)),
    "night": night,
    "grass": grass,
    "sand": sand,
    "water": water,
}


def paint_background(name: str, x: Tensor, y: Tensor) -> Tensor:
    """One background.

    Args:
        name: one of `PAINTERS`.
        x, y: places that broadcast against each other, such as (..., 1, W) and (..., H, 1).

    Returns:
        (3, ..., H, W) in [-1, 1].
    """
    return (PAINTERS[name](x, y) / 127.5 - 1).clamp(-1, 1)
