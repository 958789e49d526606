"""Buckets: the sizes that clips are trained at, and which clip goes into which.

A bucket is a resolution, a number of frames and an aspect ratio; all clips of a batch come from one. The configuration
is Open-Sora's own, as JSON or a Python dictionary:

    {"240p": {"1": (0.5, 48), "51": (1.0, 2)},  # resolution: {frames: (keep, batch size)}
     "144p": {"51": ((1.0, 0.33), 24)}}

A resolution is one of `geometry.resolution_names()`, or one size such as "256x256" (height x width).

A clip goes to the largest resolution that it fills to four fifths, there to the largest number of frames that it has
more of (taken at the frame interval), and there to the nearest aspect ratio. `keep` is the chance that it stays; if it
does not, it tries the next smaller resolution. Where `keep` is a pair, its second number is the chance that the number
of frames is considered at all, before the next smaller one is. Images go to 1 and nowhere else.

Every clip draws for itself, by numpy's generator of its own seed plus the number of resolution and frames.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from opensora.data.batch import BatchShape
from opensora.data.seeded_draws import first_uniforms
from opensora.errors import OpenSoraError
from opensora.geometry import aspect_table, closest_size, num_pixels, resolution_names
from opensora.settings import nearest_name

BucketConfig = dict[str, dict[str, Any]]
"""Resolution -> frames, as text -> (keep, batch size); keep is a chance, or a pair of them, see above."""

_FILLED = 0.8


class Dropped(Enum):
    """Why a clip is in no bucket."""

    TOO_SMALL = "too small"
    TOO_SHORT = "too short"
    NOT_KEPT = "not kept by chance"
    NO_IMAGES = "images are not wanted at its size"
    NO_VIDEOS = "videos are not wanted at its size"


_REASONS = tuple(Dropped)


@dataclass(frozen=True)
class Bucket:
    """One size of clips.

    Attributes:
        resolution: its name.
        num_frames: T.
        aspect_ratio: height / width, as the resolution's table has it.
        height, width: in pixels.
        batch_size: B; 0 where nothing is kept.
    """

    resolution: str
    num_frames: int
    aspect_ratio: float
    height: int
    width: int
    batch_size: int

    @property
    def label(self) -> str:
        """Resolution and frames, such as "240p 51f"."""
        return f"{self.resolution} {self.num_frames}f"


@dataclass(frozen=True)
class _Rule:
    """What is said of a resolution and a number of frames; `first` is the first of its buckets, one an aspect ratio."""

    resolution: str
    num_frames: int
    keep: float
    considered: float | None  # None where `keep` is not a pair
    batch_size: int
    first: int

    @property
    def chance(self) -> float:
        return self.keep * (1.0 if self.considered is None else self.considered)


@dataclass(frozen=True)
class _Clips:
    frames: np.ndarray
    pixels: np.ndarray
    seeds: np.ndarray

    def uniforms(self, clips: np.ndarray, number: int, count: int) -> np.ndarray:
        """(count, len(clips)) what these clips draw for a rule."""
        return first_uniforms(self.seeds[clips] + number, count)


@dataclass(frozen=True)
class Assignment:
    """Where clips go.

    Attributes:
        bucket: (n,) number of the bucket, -1 for none.
        reason: (n,) number of the reason among `Dropped`, -1 for clips that have a bucket.
    """

    bucket: np.ndarray
    reason: np.ndarray

    def dropped(self) -> dict[Dropped, np.ndarray]:
        """Which clips have no bucket, by reason."""
        found = {reason: np.flatnonzero(self.reason == number) for number, reason in enumerate(_REASONS)}
        return {reason: clips for reason, clips in found.items() if len(clips)}


class Buckets:
    """All buckets of a configuration, by descending resolution, then descending frames.

    Args:
        config: see the top of the file.

    Attributes:
        buckets: in the order of their numbers.

    Raises:
        OpenSoraError: an unknown resolution (names the nearest), an impossible number, or nothing that is ever kept.
    """

    def __init__(self, config: Mapping[str, Mapping[Any, Any]]) -> None:
        self.rules: list[_Rule] = []
        self.buckets: list[Bucket] = []
        for resolution in sorted(_checked_names(config), key=_pixels, reverse=True):
            for num_frames, keep, considered, batch_size in _lengths(resolution, config[resolution]):
                rule = _Rule(resolution, num_frames, keep, considered, batch_size, len(self.buckets))
                self.rules.append(rule)
                for ratio, (height, width) in _sizes(resolution).items():
                    self.buckets.append(Bucket(resolution, num_frames, ratio, height, width, batch_size))
        if not any(rule.chance for rule in self.rules):
            raise OpenSoraError("the buckets keep nothing: every keep probability is 0")

    def __len__(self) -> int:
        return len(self.buckets)

    def index(self, resolution: str, num_frames: int) -> int:
        """The number of resolution and frames, which is added to a clip's seed."""
        return [(rule.resolution, rule.num_frames) for rule in self.rules].index((resolution, num_frames))

    @property
    def by_chance(self) -> bool:
        """Whether clips go elsewhere with another seed."""
        return any(0 < chance < 1 for rule in self.rules for chance in (rule.keep, rule.considered or 0))

    def shapes(self, num_batches: np.ndarray | None = None) -> list[BatchShape]:
        """Every size that batches have, aspect ratios taken together.

        Args:
            num_batches: (len(self),) how many there are of each bucket. Without them every resolution and number of
                frames is taken to have as many as its chance to keep a clip, and to lie at 16:9.
        """
        shapes = []
        for rule in self.rules:
            ratios = len(_sizes(rule.resolution))
            if num_batches is None:
                weight, (height, width) = rule.chance, _landscape(rule.resolution)
            else:
                here = num_batches[rule.first : rule.first + ratios]
                common = self.buckets[rule.first + int(here.argmax())]
                weight, height, width = float(here.sum()), common.height, common.width
            if weight:
                label = self.buckets[rule.first].label
                shapes.append(BatchShape(label, rule.batch_size, rule.num_frames, height, width, weight))
        total = sum(shape.share for shape in shapes)
        return [replace(shape, share=shape.share / total) for shape in shapes]

    def assign(
        self,
        num_frames: np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
        seeds: np.ndarray,
        frame_interval: int = 1,
    ) -> Assignment:
        """Puts clips into buckets.

        Args:
            num_frames: (n,) integers, 1 for images.
            height: (n,) pixels.
            width: (n,) pixels.
            seeds: (n,) integers, 0 or more; each clip draws with its own.
            frame_interval: every how manieth frame of a video is taken.
        """
        clips = _Clips(np.asarray(num_frames), np.asarray(height) * np.asarray(width), np.asarray(seeds))
        chosen = np.full(len(clips.frames), -1)  # the rule
        reason = np.full(len(clips.frames), _REASONS.index(Dropped.TOO_SMALL))
        for resolution in dict.fromkeys(rule.resolution for rule in self.rules):
            large = np.flatnonzero((chosen < 0) & (clips.pixels >= _pixels(resolution) * _FILLED))
            is_image = clips.frames[large] == 1
            self._choose(resolution, clips, large[is_image], None, chosen, reason)
            self._choose(resolution, clips, large[~is_image], frame_interval, chosen, reason)
        reason[chosen >= 0] = -1
        ratio = np.asarray(height) / np.asarray(width)
        bucket = np.full(len(chosen), -1)
        for number, rule in enumerate(self.rules):
            here = np.flatnonzero(chosen == number)
            known = np.array(list(_sizes(rule.resolution)))
            bucket[here] = rule.first + np.abs(known - ratio[here, None]).argmin(axis=1)
        return Assignment(bucket, reason)

    def possible(self, num_frames: int, height: int, width: int, frame_interval: int = 1) -> list[int]:
        """Numbers of all buckets that a clip may ever be in, whatever it draws, in the order in which it tries them."""
        found = []
        for resolution, rules in itertools.groupby(self.rules, lambda rule: rule.resolution):
            if height * width < _pixels(resolution) * _FILLED:
                continue
            for rule in rules:
                if (rule.num_frames == 1) != (num_frames == 1) or 1 < num_frames <= rule.num_frames * frame_interval:
                    continue
                if rule.chance:
                    known = np.array(list(_sizes(resolution)))
                    found.append(rule.first + int(np.abs(known - height / width).argmin()))
                if rule.chance == 1:
                    return found
                if rule.considered in (None, 1):
                    break
        return found

    def _choose(
        self,
        resolution: str,
        clips: "_Clips",
        waiting: np.ndarray,
        frame_interval: int | None,
        chosen: np.ndarray,
        reason: np.ndarray,
    ) -> None:
        """One resolution's turn with the images (no interval) or the videos `waiting`; writes what it decides."""
        is_image = frame_interval is None
        rules = [
            (number, rule)
            for number, rule in enumerate(self.rules)
            if rule.resolution == resolution and (rule.num_frames == 1) == is_image
        ]
        if not rules:
            unwanted = Dropped.NO_IMAGES if is_image else Dropped.NO_VIDEOS
            reason[waiting[reason[waiting] == _REASONS.index(Dropped.TOO_SMALL)]] = _REASONS.index(unwanted)
            return
        undrawn = reason[waiting] != _REASONS.index(Dropped.NOT_KEPT)
        reason[waiting[undrawn]] = _REASONS.index(Dropped.TOO_SHORT)
        for number, rule in rules:
            long_enough = np.full(len(waiting), is_image)
            if frame_interval is not None:
                long_enough = clips.frames[waiting] > rule.num_frames * frame_interval
            candidates = waiting[long_enough]
            reason[candidates] = _REASONS.index(Dropped.NOT_KEPT)
            is_pair = rule.considered is not None
            draws = np.zeros((2, len(candidates)))
            if is_pair or 0 < rule.keep < 1:
                draws = clips.uniforms(candidates, number, 1 + is_pair)
            considered = draws[0] <= rule.considered if is_pair else np.ones(len(candidates), bool)
            kept = considered & (draws[-1] < rule.keep)
            chosen[candidates[kept]] = number
            # Whoever is drawn out here tries the next resolution, not a smaller number of frames.
            waiting = np.concatenate([waiting[~long_enough], candidates[~considered]])


# --- resolutions ------------------------------------------------------------------------------------------------------


def _single_size(resolution: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resolution)
    return (int(match[1]), int(match[2])) if match else None


def _sizes(resolution: str) -> dict[float, tuple[int, int]]:
    """{height / width: (height, width)}."""
    if (size := _single_size(resolution)) is not None:
        return {size[0] / size[1]: size}
    return aspect_table(resolution)


def _pixels(resolution: str) -> int:
    size = _single_size(resolution)
    return num_pixels(resolution) if size is None else size[0] * size[1]


def _landscape(resolution: str) -> tuple[int, int]:
    """The size nearest to 16:9."""
    return _single_size(resolution) or closest_size(resolution, 9, 16)


# --- reading the configuration ----------------------------------------------------------------------------------------


def _checked_names(config: Mapping[str, Any]) -> list[str]:
    if not config:
        raise OpenSoraError('no buckets; give at least one resolution, such as {"240p": {"51": [1.0, 2]}}')
    for name, lengths in config.items():
        if name not in resolution_names() and _single_size(name) is None:
            near = nearest_name(name, resolution_names())
            raise OpenSoraError(f"buckets have the unknown resolution {name!r}{near}, or a size such as 256x256")
        if not isinstance(lengths, Mapping) or not lengths:
            raise OpenSoraError(f"buckets of {name} are {lengths!r}, expected {{frames: [keep, batch size]}}")
    return list(config)


def _lengths(resolution: str, lengths: Mapping[Any, Any]) -> list[tuple[int, float, float | None, int]]:
    """(frames, keep, considered, batch size), by descending frames."""
    found = []
    for frames, rule in lengths.items():
        where = f"bucket {resolution} {frames}"
        if not re.fullmatch(r"[1-9]\d*", str(frames)):
            raise OpenSoraError(f"{where}: {frames!r} is no number of frames, expected a whole number, 1 or more")
        if not isinstance(rule, (list, tuple)) or len(rule) != 2:
            raise OpenSoraError(f"{where} is {rule!r}, expected [keep, batch size]")
        keep, batch_size = rule
        is_pair = isinstance(keep, (list, tuple))
        chances = keep if is_pair else [keep]
        if is_pair and (len(keep) != 2 or int(frames) == 1):
            raise OpenSoraError(f"{where} has keep {keep!r}, expected one chance{' or two' * (int(frames) > 1)}")
        if not all(isinstance(c, (int, float)) and not isinstance(c, bool) and 0 <= c <= 1 for c in chances):
            raise OpenSoraError(f"{where} has keep {keep!r}, expected a chance from 0 to 1")
        if batch_size is None and chances[0] == 0:
            batch_size = 0
        elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OpenSoraError(f"{where} has batch size {batch_size!r}, expected a whole number, 1 or more")
        found.append((int(frames), float(chances[0]), float(chances[1]) if is_pair else None, batch_size))
    repeated = [frames for frames, count in Counter(entry[0] for entry in found).items() if count > 1]
    if repeated:
        raise OpenSoraError(f"bucket {resolution} {repeated[0]} is given twice; give it once")
    return sorted(found, key=lambda entry: entry[0], reverse=True)
