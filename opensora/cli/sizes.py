"""How large and how long: from what a user says to what a model makes and what its network is told.

Names mean what they mean to the users of the model at hand: whether 9:16 lies or stands, and how many frames `4s` are.
The published 1.1 and 1.2 models are told the size of their tables (240x426) though they make whole latent cells
(240x424); so are they here.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from opensora.cli.options import option
from opensora.errors import OpenSoraError
from opensora.geometry import (
    SizeRule,
    VideoSize,
    named_num_frames,
    num_pixels,
    parse_aspect_ratio,
    parse_num_frames,
    resolve_image_size,
    table_size,
)
from opensora.media.write import check_fps


@dataclass(frozen=True)
class ClipSize:
    """Size and rate of a clip.

    Attributes:
        num_frames: of each loop.
        height: in pixels.
        width: in pixels.
        nominal_size: (height, width) that the network is told; None for a model that is told what it makes.
        fps: frames per second that the network is told.
        frame_interval: the file is written at `fps / frame_interval`,
        save_fps: or at this rate.
    """

    num_frames: int
    height: int
    width: int
    nominal_size: tuple[int, int] | None
    fps: float
    frame_interval: int
    save_fps: float | None


@dataclass(frozen=True)
class SizeOptions:
    """A size is height x width; what was made stands in the closing line."""

    num_frames: Annotated[str | None, option("N|4s|2x")] = None
    """Frames (of each loop), seconds, or for 1.2 clips of 51 frames; an edited clip keeps its own number."""
    resolution: Annotated[str | None, option("NAME")] = None
    """Named number of pixels: 144p, 240p, 256, 360p, 480p, 512, 720p, ..."""
    aspect_ratio: Annotated[str | None, option("A:B")] = None
    """Width to height, so that 16:9 lies; for 1.1 and 1.2 height to width as in their tables, so that 9:16 lies."""
    height: Annotated[int | None, option("PX")] = None
    """Height in pixels."""
    width: Annotated[int | None, option("PX")] = None
    """Width in pixels."""
    image_size: Annotated[tuple[int, int] | None, option("H W")] = None
    """Both at once, rounded down to what the model can make, as Open-Sora's scripts do."""
    fps: Annotated[float | None, option("F")] = None
    """Frames per second that the model is told."""
    frame_interval: Annotated[int | None, option("N")] = None
    """The file plays at the model's frames per second divided by this."""
    save_fps: Annotated[float | None, option("F")] = None
    """The file plays at this many frames per second instead."""

    def check(self, file_format: str) -> None:
        """What can be said without the model.

        Raises:
            OpenSoraError: an impossible or contradicting wish.
        """
        if self.image_size is not None:
            others = (self.height, self.width, self.resolution, self.aspect_ratio)
            if any(other is not None for other in others):
                raise OpenSoraError("--image-size says the whole size; leave out --height, --width and the like")
            if min(self.image_size) < 1:
                raise OpenSoraError(f"--image-size is {self.image_size[0]} {self.image_size[1]}, expected two sides")
        if self.resolution is not None:
            num_pixels(self.resolution)
        if self.aspect_ratio is not None:
            parse_aspect_ratio(self.aspect_ratio)
        if self.num_frames is not None and not re.fullmatch(r"[-+]?\d+(\.\d+)?[sx]?", self.num_frames.strip()):
            raise OpenSoraError(
                f"num_frames {self.num_frames!r} is neither a count such as 17, a duration such as 4s nor 2x (clips)"
            )
        if self.frame_interval is not None and self.frame_interval < 1:
            raise OpenSoraError(f"--frame-interval is {self.frame_interval}, expected 1 or more")
        if self.fps is not None and not 0 < self.fps < math.inf:
            check_fps(self.fps, file_format)
        if self.save_fps is not None:
            check_fps(self.save_fps, file_format)

    @property
    def names_a_size(self) -> bool:
        """Whether the size was said in words that a user may read otherwise than the model."""
        return any(said is not None for said in (self.resolution, self.aspect_ratio, self.image_size))

    def resolve(self, config: Any, rule: SizeRule, edited_frames: int | None = None) -> ClipSize:
        """What was asked for, completed by the model's defaults.

        Args:
            config: of the pipeline.
            rule: what the model can make.
            edited_frames: length of the clip that is edited, if one is.

        Raises:
            OpenSoraError: what this model cannot make; names the nearest it can.
        """
        fps = float(config.fps if self.fps is None else self.fps)
        interval = config.frame_interval if self.frame_interval is None else self.frame_interval
        (height, width), nominal = self._image_size(config, rule)
        num_frames = self._num_frames(config, rule, fps / interval, edited_frames)
        VideoSize(num_frames, height, width).check(rule)
        return ClipSize(num_frames, height, width, nominal, fps, interval, self.save_fps)

    def _image_size(self, config: Any, rule: SizeRule) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size made, and the size told."""
        default = (config.height, config.width)
        if self.image_size is not None:
            nominal, multiple = self.image_size, rule.spatial_multiple
            made = (max(nominal[0] // multiple, 1) * multiple, max(nominal[1] // multiple, 1) * multiple)
        else:
            order = config.aspect_ratio_order
            wishes = {"resolution": self.resolution, "aspect_ratio": self.aspect_ratio}
            made = resolve_image_size(default, height=self.height, width=self.width, order=order, rule=rule, **wishes)
            nominal = config.nominal_size if made == default else made
            if self.resolution is not None:
                nominal = table_size(default, self.resolution, self.aspect_ratio, order)
        if config.nominal_size is None:
            return made, None
        return made, (nominal[0], nominal[1])

    def _num_frames(self, config: Any, rule: SizeRule, rate: float, edited_frames: int | None) -> int:
        if self.num_frames is not None:
            if config.clip_frames is not None:
                return named_num_frames(self.num_frames, config.clip_frames, config.clip_s)
            return parse_num_frames(self.num_frames, rate, rule)
        if edited_frames is None:
            return config.num_frames
        nearest = rule.nearest_frames(edited_frames)
        return nearest if nearest <= edited_frames else max(nearest - rule.frame_multiple, 1)


def describe_size(size: VideoSize, nominal_size: tuple[int, int] | None) -> str:
    """`51 frames of 240x424 (height x width), lying; the network is told 240x426`."""
    made = (size.height, size.width)
    shape = "square" if size.height == size.width else "lying" if size.width > size.height else "standing"
    told = "" if nominal_size in (None, made) else "; the network is told {}x{}".format(*nominal_size)
    return f"{size}, {shape}{told}"
