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

Resolutions by pixels are Open-Sora 2.0's, and follow its rules: `256px` has the sizes of `pixel_grid` in cells of 16
px, `768px_32d` in cells of 32, `512px_ar1:1` one of them. As many frames as are taken are enough; where `keep` is a
pair, its second number is the chance that the number of frames is passed over; and every clip draws from one generator,
number after number.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from opensora.data.batch import BatchShape
from opensora.data.bucket_config import checked_names, follows_pixels, landscape, lengths_of, pixels_of, sizes_of
from opensora.data.seeded_draws import first_uniforms
from opensora.errors import OpenSoraError

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
    def exactly(self) -> bool:
        """Whether as many frames as are taken are enough."""
        return follows_pixels(self.resolution)

    @property
    def chance(self) -> float:
        return self.keep * (1.0 if self.considered is None else self.considered)


@dataclass(frozen=True)
class _Clips:
    frames: np.ndarray
    pixels: np.ndarray
    seeds: np.ndarray
    drawn: np.ndarray  # how many numbers, where one generator gives all of them

    def uniform(self, clips: np.ndarray) -> np.ndarray:
        """(len(clips),) the next number of each of these clips."""
        self.drawn[clips] += 1
        numbers = first_uniforms(self.seeds[clips], int(self.drawn[clips].max(initial=1)))
        return numbers[self.drawn[clips] - 1, np.arange(len(clips))]

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
        for resolution in sorted(checked_names(config), key=pixels_of, reverse=True):
            for num_frames, keep, considered, batch_size in lengths_of(resolution, config[resolution]):
                rule = _Rule(resolution, num_frames, keep, considered, batch_size, len(self.buckets))
                self.rules.append(rule)
                for ratio, (height, width) in sizes_of(resolution).items():
                    self.buckets.append(Bucket(resolution, num_frames, ratio, height, width, batch_size))
        if not any(rule.chance for rule in self.rules):
            raise OpenSoraError("the buckets keep nothing: every keep probability is 0")

    def __len__(self) -> int:
        return len(self.buckets)

    def index(self, resolution: str, num_frames: int) -> int:
        """The number of resolution and frames, which is added to a clip's seed."""
        return [(rule.resolution, rule.num_frames) for rule in self.rules].index((resolution, num_frames))

    def frames_needed(self, num_frames: int, frame_interval: int = 1) -> int:
        """How many frames a clip has to have for a length: see the top of the file; 1 for images."""
        return 1 if num_frames == 1 else num_frames * frame_interval + (0 if self.rules[0].exactly else 1)

    def least_pixels(self, num_frames: int) -> float:
        """How many pixels a frame has to have for the smallest resolution that a length is kept at."""
        kept = (rule for rule in self.rules if rule.num_frames == num_frames and rule.chance)
        return min(pixels_of(rule.resolution) for rule in kept) * _FILLED

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
            ratios = len(sizes_of(rule.resolution))
            if num_batches is None:
                weight, (height, width) = rule.chance, landscape(rule.resolution)
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
        frames, pixels = np.asarray(num_frames), np.asarray(height) * np.asarray(width)
        clips = _Clips(frames, pixels, np.asarray(seeds), np.zeros(len(frames), int))
        chosen = np.full(len(clips.frames), -1)  # the rule
        reason = np.full(len(clips.frames), _REASONS.index(Dropped.TOO_SMALL))
        for resolution in dict.fromkeys(rule.resolution for rule in self.rules):
            large = np.flatnonzero((chosen < 0) & (clips.pixels >= pixels_of(resolution) * _FILLED))
            is_image = clips.frames[large] == 1
            self._choose(resolution, clips, large[is_image], None, chosen, reason)
            self._choose(resolution, clips, large[~is_image], frame_interval, chosen, reason)
        reason[chosen >= 0] = -1
        ratio = np.asarray(height) / np.asarray(width)
        bucket = np.full(len(chosen), -1)
        for number, rule in enumerate(self.rules):
            here = np.flatnonzero(chosen == number)
            known = np.array(list(sizes_of(rule.resolution)))
            bucket[here] = rule.first + np.abs(known - ratio[here, None]).argmin(axis=1)
        return Assignment(bucket, reason)

    def possible(self, num_frames: int, height: int, width: int, frame_interval: int = 1) -> list[int]:
        """Numbers of all buckets that a clip may ever be in, whatever it draws, in the order in which it tries them."""
        found = []
        for resolution, rules in itertools.groupby(self.rules, lambda rule: rule.resolution):
            if height * width < pixels_of(resolution) * _FILLED:
                continue
            for rule in rules:
                needed = self.frames_needed(rule.num_frames, frame_interval)
                if (rule.num_frames == 1) != (num_frames == 1) or num_frames < needed:
                    continue
                if rule.chance:
                    known = np.array(list(sizes_of(resolution)))
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
                long_enough = clips.frames[waiting] >= self.frames_needed(rule.num_frames, frame_interval)
            candidates = waiting[long_enough]
            reason[candidates] = _REASONS.index(Dropped.NOT_KEPT)
            draw = _draw_in_turn if rule.exactly else _draw
            considered, kept = draw(rule, number, clips, candidates)
            chosen[candidates[kept]] = number
            # Whoever is drawn out here tries the next resolution, not a smaller number of frames.
            waiting = np.concatenate([waiting[~long_enough], candidates[~considered]])


def _draw(rule: _Rule, number: int, clips: _Clips, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates a rule considers, and which of these it keeps."""
    is_pair = rule.considered is not None
    draws = np.zeros((2, len(candidates)))
    if is_pair or 0 < rule.keep < 1:
        draws = clips.uniforms(candidates, number, 1 + is_pair)
    considered = draws[0] <= rule.considered if is_pair else np.ones(len(candidates), bool)
    return considered, considered & (draws[-1] < rule.keep)


def _draw_in_turn(rule: _Rule, number: int, clips: _Clips, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where every clip has one generator, which is asked for what chance decides alone."""
    considered, kept = np.ones(len(candidates), bool), np.ones(len(candidates), bool)
    if rule.considered is not None:
        considered = clips.uniform(candidates) > 1 - rule.considered if rule.considered else ~considered
    if rule.keep < 1 or rule.num_frames == 1:
        kept[considered] = clips.uniform(candidates[considered]) <= rule.keep
    return considered, considered & kept
