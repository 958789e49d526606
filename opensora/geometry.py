"""Sizes of videos: what a model can make, what people call it, and what lies nearest when it cannot.

Everything here is arithmetic on integers; nothing imports torch. A size is always (frames, height, width), in that
order. `SizeRule` says which sizes a model can make; `VideoSize.check` raises with the nearest valid value instead of
correcting one silently. The resolution tables are those the published 1.1 to 1.3 models were trained with (1.1 knows
a subset of the names): a name such as `240p` or `512` fixes the number of pixels, an aspect ratio picks one (height,
width) of its table.

Aspect ratios are written the way screens are sold, width:height: `16:9` is landscape, `9:16` portrait. The tables' own
keys are height / width, and users of the 1.1 and 1.2 models write ratios in that order too (`AspectOrder`).
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

from opensora import limits
from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.limits import check_count, parse_count
from opensora.pixel_grid import GRID_PX, grid_sizes, is_pixel_resolution, pixels_of
from opensora.resolutions import ENLARGED, PIXELS, TABLES

AspectOrder = Literal["width:height", "height:width"]

_SIXTEENTHS = "_16d"

# Two ratios this near (relative) are the same format: 9:16 = 0.5625 is the tables' 0.56 and 0.57.
_SAME_FORMAT = 0.03


def nearest_valid(value: float, multiple: int = 1, offset: int = 0, maximum: int | None = None) -> int:
    """The number nearest to `value` of the form offset + k * multiple, at least 1 and at most `maximum`.

    Of two equally near ones, the larger.
    """
    below, above = _neighbours(value, multiple, offset, maximum)
    return below if value - below < above - value else above


def _neighbours(value: float, multiple: int, offset: int, maximum: int | None, one: bool = False) -> tuple[int, int]:
    """The nearest valid numbers at or below and at or above `value`; the same one twice where only one exists.

    `one` says whether 1 is valid besides.
    """
    smallest = offset % multiple or multiple
    steps = math.floor((value - smallest) / multiple)
    below = smallest + max(steps, 0) * multiple
    above = below if below >= value else below + multiple
    if maximum is not None:
        largest = smallest + max((maximum - smallest) // multiple, 0) * multiple
        below, above = min(below, largest), min(above, largest)
    if one and value < below:
        return 1, 1 if value <= 1 else above
    return below, above


@dataclass(frozen=True)
class SizeRule:
    """Which sizes a model can make.

    Attributes:
        spatial_multiple: height and width are multiples of this (the autoencoder's factor, in pixels).
        frame_multiple: frame counts are `frame_offset` + k * `frame_multiple`; 1 allows every count.
        frame_offset: see `frame_multiple`; (4, 1) allows 1, 5, 9, 13, 17, ...
        max_frames: the largest frame count, None for no limit.
        max_side: the largest height or width in pixels, None for no limit.
        single_frame: whether an image is allowed besides; with (4, 0) the counts are 1, 4, 8, 12, ...
    """

    spatial_multiple: int = 8
    frame_multiple: int = 1
    frame_offset: int = 0
    max_frames: int | None = None
    max_side: int | None = None
    single_frame: bool = False

    def nearest_frames(self, num_frames: float) -> int:
        """The valid frame count nearest to `num_frames` (which may be fractional)."""
        below, above = _neighbours(
            num_frames, self.frame_multiple, self.frame_offset, self.max_frames, self.single_frame
        )
        return below if num_frames - below < above - num_frames else above

    def frames_within(self, num_frames: int) -> int:
        """The largest valid frame count that is not above `num_frames`; the smallest one where there is none."""
        return _neighbours(num_frames, self.frame_multiple, self.frame_offset, self.max_frames, self.single_frame)[0]

    def frames_from(self, num_frames: int) -> int:
        """The smallest valid frame count that is not below `num_frames`, whatever `max_frames` says."""
        return _neighbours(num_frames, self.frame_multiple, self.frame_offset, None, self.single_frame)[1]

    def nearest_side(self, side_px: float) -> int:
        """The valid height or width nearest to `side_px`."""
        return nearest_valid(side_px, self.spatial_multiple, 0, self.max_side)


@dataclass(frozen=True)
class VideoSize:
    """(frames, height in pixels, width in pixels)."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frame{'s' * (self.num_frames != 1)} of {self.height}x{self.width} (height x width)"

    def check(self, rule: SizeRule | None = None) -> "VideoSize":
        """Returns itself if a model with this rule can make it.

        Raises:
            OpenSoraError: names the first value that does not fit and the nearest that do.
        """
        rule = rule or SizeRule()
        _check_frames(self.num_frames, rule)
        _check_number("height", self.height, rule.spatial_multiple, 0, rule.max_side)
        _check_number("width", self.width, rule.spatial_multiple, 0, rule.max_side)
        return self


def _check_frames(num_frames: int, rule: SizeRule) -> None:
    multiple, offset = rule.frame_multiple, rule.frame_offset
    _check_number("num_frames", num_frames, multiple, offset, rule.max_frames, rule.single_frame)


def _check_number(name: str, value: int, multiple: int, offset: int, maximum: int | None, one: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OpenSoraError(f"{name} is {value!r}, expected a whole number")
    most = limits.FRAMES if name == "num_frames" else limits.SIDE_PX
    if value > most:
        check_count(name, value, most)
    below, above = _neighbours(value, multiple, offset, maximum, one)
    if value in (below, above):
        return
    if value < 1:
        problem = "must be positive"
    elif maximum is not None and value > maximum:
        problem = f"is more than this model can make ({maximum})"
    elif offset % multiple:
        problem = f"must be {offset % multiple} more than a multiple of {multiple}"
    else:
        problem = f"must be a multiple of {multiple}" + ", or 1" * one
    nearest = f"{below}" if below == above or value < 1 else f"{below} or {above}"
    raise OpenSoraError(f"{name} {value} {problem}; the nearest valid is {nearest}")


def parse_num_frames(text: str | int, fps: float, rule: SizeRule | None = None) -> int:
    """Frames from a count (`17`, `"17"`) or a duration (`"4s"`, `"2.5s"`).

    A count is taken as it is and checked; a duration becomes the valid count nearest to seconds * fps.

    Raises:
        OpenSoraError: neither of the two, not positive, or an impossible count (names the nearest valid).
    """
    rule = rule or SizeRule()
    spelled = str(text).strip()
    match = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)(s?)", spelled)
    if not match or isinstance(text, bool) or ("." in match[1] and not match[2]):
        raise OpenSoraError(f"num_frames {spelled!r} is neither a count such as 17 nor a duration such as 4s")
    if not match[2]:
        number = parse_count("num_frames", match[1].lstrip("+"), limits.FRAMES) if len(match[1]) > 9 else int(match[1])
        _check_frames(number, rule)
        return number
    if float(match[1]) <= 0:
        raise OpenSoraError(f"duration {spelled} must be more than 0s")
    if not (fps > 0 and math.isfinite(fps)):
        raise OpenSoraError(f"fps is {fps}, expected a positive number")
    wanted = float(match[1]) * fps
    if rule.max_frames is not None and wanted > rule.max_frames:
        longest = rule.nearest_frames(rule.max_frames)
        raise OpenSoraError(
            f"duration {spelled} at {fps:g} fps is {wanted:g} frames, more than this model can make; "
            f"the nearest valid is {longest} frames ({longest / fps:.3g}s)"
        )
    if not wanted <= limits.FRAMES:
        raise OpenSoraError(f"duration {shown(spelled)} is {wanted:g} frames, expected at most {limits.FRAMES:,}")
    return rule.nearest_frames(wanted)


def named_num_frames(text: str | int, clip_frames: int = 51, clip_s: int = 2) -> int:
    """Frames in the words of the published 1.2 models: `"4x"` is four clips, `"4s"` two of them; a count is itself.

    Their unit is a clip of `clip_frames` frames (three chunks of the autoencoder), which they call `clip_s` seconds
    although at 24 fps it lasts a little longer; so `"8s"` is 204 frames, where `parse_num_frames` looks near 192.

    Raises:
        OpenSoraError: none of the three, not positive, or seconds that are not whole clips (names the nearest).
    """
    spelled = str(text).strip()
    match = re.fullmatch(r"(\d+)([xs]?)", spelled, re.ASCII)
    if not match or not match[1].strip("0"):
        raise OpenSoraError(f"num_frames {spelled!r} is neither a count such as 51 nor 4x clips nor a duration like 4s")
    number = parse_count("num_frames", match[1], limits.FRAMES)
    if match[2] == "s":
        if number % clip_s:
            nearest = nearest_valid(number, clip_s)
            raise OpenSoraError(f"duration {spelled} is no multiple of {clip_s}s; the nearest valid is {nearest}s")
        number //= clip_s
    return check_count("num_frames", number * clip_frames if match[2] else number, limits.FRAMES)


def resolution_names() -> list[str]:
    """The named resolutions, smallest first."""
    return sorted(PIXELS, key=lambda name: PIXELS[name])


def num_pixels(resolution: str) -> int:
    """The number of pixels a named resolution stands for, or one such as `768px`."""
    if is_pixel_resolution(resolution):
        return pixels_of(resolution)
    return PIXELS[_known(resolution).removesuffix(_SIXTEENTHS)]


@functools.cache
def aspect_table(resolution: str) -> dict[float, tuple[int, int]]:
    """A named resolution's sizes: {height / width: (height, width)}, in the published order.

    `360p_16d` and the like are the same tables with all sides rounded down to multiples of 16.
    """
    if _known(resolution).endswith(_SIXTEENTHS):
        sizes = aspect_table(resolution.removesuffix(_SIXTEENTHS))
        return {ratio: (height // 16 * 16, width // 16 * 16) for ratio, (height, width) in sizes.items()}
    enlarged = ENLARGED.get(resolution, 1)
    text = TABLES["256" if enlarged > 1 else resolution]
    table = {}
    for entry in text.split():
        ratio, size = entry.split(":")
        height, width = size.split("x")
        table[float(ratio)] = (int(height) * enlarged, int(width) * enlarged)
    return table


def closest_size(resolution: str, height: float, width: float) -> tuple[int, int]:
    """The (height, width) of a named resolution whose ratio is nearest to height / width; the first of two equals."""
    return _closest(aspect_table(resolution), height, width)


def _closest(table: dict[float, tuple[int, int]], height: float, width: float) -> tuple[int, int]:
    return table[min(table, key=lambda ratio: abs(ratio - height / width))]


def _table(resolution: str, multiple: int) -> dict[float, tuple[int, int]]:
    """{height / width: (height, width)} of any resolution; those by pixels lie on whole patches of latent cells."""
    if not is_pixel_resolution(resolution):
        return aspect_table(resolution)
    sizes = grid_sizes(pixels_of(resolution), math.lcm(multiple, GRID_PX))
    return {parse_aspect_ratio(name): size for name, size in sizes.items()}


def even_size(ratio: float, pixels: int) -> tuple[int, int]:
    """(height, width) of about so many pixels, both even, with height / width near `ratio`: how the tables were made.

    Each side is the even one of the two whole numbers around the exact value, the width that of the height so found.

    Raises:
        OpenSoraError: a ratio or number of pixels that is not positive, or too few pixels for an even side.
    """
    if not (ratio > 0 and math.isfinite(ratio) and pixels > 0):
        raise OpenSoraError(f"got ratio {ratio} and {pixels} pixels; expected positive numbers")
    height = _even_neighbour(math.sqrt(pixels * ratio))
    width = _even_neighbour(height / ratio)
    if not height or not width:
        raise OpenSoraError(f"{pixels} pixels are too few for a ratio of {ratio:g}; take more, or a ratio nearer to 1")
    return height, width


def _even_neighbour(value: float) -> int:
    # The small addition keeps a root that comes out a rounding error below a whole number from losing it.
    above = math.ceil(value + 1e-4)
    return above if above % 2 == 0 else above - 1


def image_size(
    resolution: str, aspect_ratio: str, order: AspectOrder = "width:height", multiple: int = 1
) -> tuple[int, int]:
    """(height, width) of a named resolution and an aspect ratio such as `16:9`.

    Args:
        resolution: one of `resolution_names()`, or such as `768px`.
        aspect_ratio: written in that `order`.
        order: how aspect ratios are written.
        multiple: pixels that an autoencoder divides, which sizes of such as `768px` are made of.

    Raises:
        OpenSoraError: an unknown name, or an aspect ratio the resolution's table does not hold (names the nearest).
    """
    table = _table(resolution, multiple)
    wanted = parse_aspect_ratio(aspect_ratio, order)
    nearest = min(table, key=lambda ratio: abs(math.log(ratio / wanted)))
    height, width = table[nearest]
    if abs(nearest / wanted - 1) > _SAME_FORMAT:
        raise OpenSoraError(
            f"resolution {resolution} has no aspect ratio {aspect_ratio} ({order}); "
            f"the nearest valid is {f'{width}:{height}' if order == 'width:height' else f'{height}:{width}'}"
        )
    return height, width


def parse_aspect_ratio(aspect_ratio: str, order: AspectOrder = "width:height") -> float:
    """Height / width of `"16:9"`.

    Raises:
        OpenSoraError: not two positive numbers with a colon.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", aspect_ratio.strip())
    if not match or float(match[1]) == 0 or float(match[2]) == 0:
        raise OpenSoraError(f"aspect ratio {aspect_ratio!r} is not {order}, for example 16:9, 9:16 or 1:1")
    ratio = float(match[2]) / float(match[1])
    return ratio if order == "width:height" else 1 / ratio


def table_size(
    default: tuple[int, int],
    resolution: str,
    aspect_ratio: str | None = None,
    order: AspectOrder = "width:height",
    multiple: int = 1,
) -> tuple[int, int]:
    """(height, width) of a named resolution as `image_size`, by default of the format nearest to the default size's."""
    if aspect_ratio is not None:
        return image_size(resolution, aspect_ratio, order, multiple)
    return _closest(_table(resolution, multiple), *default)


def resolve_image_size(
    default: tuple[int, int],
    *,
    height: int | None = None,
    width: int | None = None,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    order: AspectOrder = "width:height",
    rule: SizeRule | None = None,
) -> tuple[int, int]:
    """(height, width) from what a person said; every combination means one thing or is an error.

    Height and width say it themselves (one of them alone takes the other from the default, or from the aspect ratio).
    A resolution takes its table's size for the aspect ratio, by default the default's own, rounded down to what the
    autoencoder divides (which is all it would decode anyway: 240x426 becomes 240x424). An aspect ratio alone keeps the
    default's number of pixels.

    Args:
        default: (height, width) the model is at home with.
        height: in pixels.
        width: in pixels.
        resolution: one of `resolution_names()`, or such as `768px`.
        aspect_ratio: written in that `order`.
        order: how aspect ratios are written.
        rule: what the model can make.

    Raises:
        OpenSoraError: contradicting or impossible wishes; names the nearest valid ones.
    """
    rule = rule or SizeRule()
    sides_given = height is not None or width is not None
    if sides_given and resolution is not None:
        raise OpenSoraError("resolution and height / width both say the size; give one of them")
    if height is not None and width is not None and aspect_ratio is not None:
        raise OpenSoraError("height, width and aspect_ratio together say the size twice; give two of them at most")
    if sides_given and aspect_ratio is not None:
        ratio = parse_aspect_ratio(aspect_ratio, order)
        if height is not None:
            width = rule.nearest_side(height / ratio)
        else:
            height = rule.nearest_side((width or 0) * ratio)
    elif resolution is not None:
        found = table_size(default, resolution, aspect_ratio, order, rule.spatial_multiple)
        height, width = (side // rule.spatial_multiple * rule.spatial_multiple for side in found)
    elif aspect_ratio is not None:
        ratio = parse_aspect_ratio(aspect_ratio, order)
        pixels = default[0] * default[1]
        height, width = rule.nearest_side(math.sqrt(pixels * ratio)), rule.nearest_side(math.sqrt(pixels / ratio))
    height = default[0] if height is None else height
    width = default[1] if width is None else width
    VideoSize(rule.nearest_frames(1), height, width).check(rule)
    return height, width


def _known(resolution: str) -> str:
    if resolution.removesuffix(_SIXTEENTHS) not in PIXELS:
        raise OpenSoraError(f"unknown resolution {resolution!r}; known: {', '.join(resolution_names())}, 256px, ...")
    return resolution
