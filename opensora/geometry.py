"""Sizes of videos: what a model can make, what people call it, and what lies nearest when it cannot.

Everything here is arithmetic on integers; nothing imports torch. A size is always (frames, height, width), in that
order. `SizeRule` says which sizes a model can make; `VideoSize.check` raises with the nearest valid value instead of
correcting one silently. The resolution tables are those the published 1.1 and 1.2 models were trained with (1.1 knows
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

from opensora.errors import OpenSoraError

AspectOrder = Literal["width:height", "height:width"]

# Named resolutions: "height/width:HEIGHTxWIDTH", the ratio as the published tables write it.
_TABLES = {
    "144p": """
        0.38:117x312 0.43:125x291 0.48:133x277 0.50:135x270 0.53:139x262 0.54:141x260 0.56:144x256 0.62:151x241
        0.67:156x234 0.75:166x221 1.00:192x192 1.33:221x165 1.50:235x156 1.78:256x144 1.89:263x139 2.00:271x135
        2.08:277x132
    """,
    "256": """
        0.25:128x512 0.26:128x496 0.27:128x480 0.28:128x464 0.32:144x448 0.33:144x432 0.35:144x416 0.4:160x400
        0.42:160x384 0.48:176x368 0.5:176x352 0.52:176x336 0.57:192x336 0.6:192x320 0.68:208x304 0.72:208x288
        0.78:224x288 0.82:224x272 0.88:240x272 0.94:240x256 1.0:256x256 1.07:256x240 1.13:272x240 1.21:272x224
        1.29:288x224 1.38:288x208 1.46:304x208 1.67:320x192 1.75:336x192 2.0:352x176 2.09:368x176 2.4:384x160
        2.5:400x160 2.89:416x144 3.0:432x144 3.11:448x144 3.62:464x128 3.75:480x128 3.88:496x128 4.0:512x128
    """,
    "240p": """
        0.38:196x522 0.43:210x490 0.48:222x462 0.50:226x452 0.53:232x438 0.54:236x436 0.56:240x426 0.62:252x404
        0.67:262x393 0.75:276x368 1.00:320x320 1.33:370x278 1.50:392x262 1.78:426x240 1.89:440x232 2.00:452x226
        2.08:462x222
    """,
    "360p": """
        0.38:294x784 0.43:314x732 0.48:332x692 0.50:340x680 0.53:350x662 0.54:352x652 0.56:360x640 0.62:380x608
        0.67:392x588 0.75:416x554 1.00:480x480 1.33:554x416 1.50:588x392 1.78:640x360 1.89:660x350 2.00:678x340
        2.08:692x332
    """,
    "480p": """
        0.38:392x1046 0.43:420x980 0.48:444x925 0.50:452x904 0.53:466x880 0.54:470x870 0.56:480x854 0.62:506x810
        0.67:522x784 0.75:554x738 1.00:640x640 1.33:740x555 1.50:784x522 1.78:854x480 1.89:880x466 2.00:906x454
        2.08:924x444
    """,
    "720p": """
        0.38:588x1568 0.43:628x1466 0.48:666x1388 0.50:678x1356 0.53:698x1318 0.54:706x1306 0.56:720x1280
        0.62:758x1212 0.67:784x1176 0.75:832x1110 1.00:960x960 1.33:1108x832 1.50:1176x784 1.78:1280x720
        1.89:1320x698 2.00:1358x680 2.08:1386x666
    """,
    "1080p": """
        0.38:882x2352 0.43:942x2198 0.48:998x2080 0.50:1018x2036 0.53:1048x1980 0.54:1058x1958 0.56:1080x1920
        0.62:1138x1820 0.67:1176x1764 0.75:1248x1664 1.00:1440x1440 1.33:1662x1246 1.50:1764x1176 1.78:1920x1080
        1.89:1980x1048 2.00:2036x1018 2.08:2078x998
    """,
    "2k": """
        0.38:1176x3136 0.43:1256x2930 0.48:1330x2770 0.50:1358x2716 0.53:1398x2640 0.54:1412x2612 0.56:1440x2560
        0.62:1518x2428 0.67:1568x2352 0.75:1662x2216 1.00:1920x1920 1.33:2218x1664 1.50:2352x1568 1.78:2560x1440
        1.89:2638x1396 2.00:2716x1358 2.08:2772x1330
    """,
    "2880": """
        0.25:1408x5760 0.26:1408x5568 0.27:1408x5376 0.28:1408x5184 0.32:1600x4992 0.33:1600x4800 0.34:1600x4672
        0.4:1792x4480 0.42:1792x4288 0.47:1920x4096 0.49:1920x3904 0.51:1920x3776 0.55:2112x3840 0.59:2112x3584
        0.68:2304x3392 0.72:2304x3200 0.78:2496x3200 0.83:2496x3008 0.89:2688x3008 0.93:2688x2880 1.0:2880x2880
        1.07:2880x2688 1.12:3008x2688 1.21:3008x2496 1.28:3200x2496 1.39:3200x2304 1.47:3392x2304 1.7:3584x2112
        1.82:3840x2112 2.03:3904x1920 2.13:4096x1920 2.39:4288x1792 2.5:4480x1792 2.92:4672x1600 3.0:4800x1600
        3.12:4992x1600 3.68:5184x1408 3.82:5376x1408 3.95:5568x1408 4.0:5760x1408
    """,
    "4k": """
        0.38:1764x4704 0.43:1886x4400 0.48:1996x4158 0.50:2036x4072 0.53:2096x3960 0.54:2118x3918 0.62:2276x3642
        0.56:2160x3840 0.67:2352x3528 0.75:2494x3326 1.00:2880x2880 1.33:3326x2494 1.50:3528x2352 1.78:3840x2160
        1.89:3958x2096 2.00:4072x2036 2.08:4156x1994
    """,
}
# These three are the 256 table, enlarged.
_ENLARGED = {"512": 2, "1024": 4, "2048": 8}

# The number of pixels each name stands for (the area of its reference format, not of every entry).
_PIXELS = {
    "144p": 36_864,
    "256": 65_536,
    "240p": 102_240,
    "360p": 230_400,
    "512": 262_144,
    "480p": 409_920,
    "720p": 921_600,
    "1024": 1_048_576,
    "1080p": 2_073_600,
    "2k": 3_686_400,
    "2048": 4_194_304,
    "2880": 8_294_400,
    "4k": 8_294_400,
}

# Two ratios this near (relative) are the same format: 9:16 = 0.5625 is the tables' 0.56 and 0.57.
_SAME_FORMAT = 0.03


def nearest_valid(value: float, multiple: int = 1, offset: int = 0, maximum: int | None = None) -> int:
    """The number nearest to `value` of the form offset + k * multiple, at least 1 and at most `maximum`.

    Of two equally near ones, the larger.
    """
    below, above = _neighbours(value, multiple, offset, maximum)
    return below if value - below < above - value else above


def _neighbours(value: float, multiple: int, offset: int, maximum: int | None) -> tuple[int, int]:
    """The nearest valid numbers at or below and at or above `value`; the same one twice where only one exists."""
    smallest = offset % multiple or multiple
    steps = math.floor((value - smallest) / multiple)
    below = smallest + max(steps, 0) * multiple
    above = below if below >= value else below + multiple
    if maximum is not None:
        largest = smallest + max((maximum - smallest) // multiple, 0) * multiple
        below, above = min(below, largest), min(above, largest)
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
    """

    spatial_multiple: int = 8
    frame_multiple: int = 1
    frame_offset: int = 0
    max_frames: int | None = None
    max_side: int | None = None

    def nearest_frames(self, num_frames: float) -> int:
        """The valid frame count nearest to `num_frames` (which may be fractional)."""
        return nearest_valid(num_frames, self.frame_multiple, self.frame_offset, self.max_frames)

    def frames_from(self, num_frames: int) -> int:
        """The smallest valid frame count that is not below `num_frames`, whatever `max_frames` says."""
        return _neighbours(num_frames, self.frame_multiple, self.frame_offset, None)[1]

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
        _check_number("num_frames", self.num_frames, rule.frame_multiple, rule.frame_offset, rule.max_frames)
        _check_number("height", self.height, rule.spatial_multiple, 0, rule.max_side)
        _check_number("width", self.width, rule.spatial_multiple, 0, rule.max_side)
        return self


def _check_number(name: str, value: int, multiple: int, offset: int, maximum: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OpenSoraError(f"{name} is {value!r}, expected a whole number")
    below, above = _neighbours(value, multiple, offset, maximum)
    if value in (below, above):
        return
    if value < 1:
        problem = "must be positive"
    elif maximum is not None and value > maximum:
        problem = f"is more than this model can make ({maximum})"
    elif offset % multiple:
        problem = f"must be {offset % multiple} more than a multiple of {multiple}"
    else:
        problem = f"must be a multiple of {multiple}"
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
        _check_number("num_frames", int(match[1]), rule.frame_multiple, rule.frame_offset, rule.max_frames)
        return int(match[1])
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
    if not match or int(match[1]) == 0:
        raise OpenSoraError(f"num_frames {spelled!r} is neither a count such as 51 nor 4x clips nor a duration like 4s")
    number = int(match[1])
    if match[2] == "s":
        if number % clip_s:
            nearest = nearest_valid(number, clip_s)
            raise OpenSoraError(f"duration {spelled} is no multiple of {clip_s}s; the nearest valid is {nearest}s")
        number //= clip_s
    return number * clip_frames if match[2] else number


def resolution_names() -> list[str]:
    """The named resolutions, smallest first."""
    return sorted(_PIXELS, key=lambda name: _PIXELS[name])


def num_pixels(resolution: str) -> int:
    """The number of pixels a named resolution stands for."""
    return _PIXELS[_known(resolution)]


@functools.cache
def aspect_table(resolution: str) -> dict[float, tuple[int, int]]:
    """A named resolution's sizes: {height / width: (height, width)}, in the published order."""
    resolution = _known(resolution)
    enlarged = _ENLARGED.get(resolution, 1)
    text = _TABLES["256" if enlarged > 1 else resolution]
    table = {}
    for entry in text.split():
        ratio, size = entry.split(":")
        height, width = size.split("x")
        table[float(ratio)] = (int(height) * enlarged, int(width) * enlarged)
    return table


def closest_size(resolution: str, height: float, width: float) -> tuple[int, int]:
    """The (height, width) of a named resolution whose ratio is nearest to height / width; the first of two equals."""
    table = aspect_table(resolution)
    return table[min(table, key=lambda ratio: abs(ratio - height / width))]


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


def image_size(resolution: str, aspect_ratio: str, order: AspectOrder = "width:height") -> tuple[int, int]:
    """(height, width) of a named resolution and an aspect ratio such as `16:9`.

    Raises:
        OpenSoraError: an unknown name, or an aspect ratio the resolution's table does not hold (names the nearest).
    """
    table = aspect_table(resolution)
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
    default: tuple[int, int], resolution: str, aspect_ratio: str | None = None, order: AspectOrder = "width:height"
) -> tuple[int, int]:
    """(height, width) of a named resolution as `image_size`, by default of the format nearest to the default size's."""
    return closest_size(resolution, *default) if aspect_ratio is None else image_size(resolution, aspect_ratio, order)


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
        resolution: one of `resolution_names()`.
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
        found = table_size(default, resolution, aspect_ratio, order)
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
    if resolution not in _PIXELS:
        raise OpenSoraError(f"unknown resolution {resolution!r}; known: {', '.join(resolution_names())}")
    return resolution
