"""Pictures, pictures that move, and sheets of frames: what Pillow reads, as clips.

Those that move are of formats that note how long each of their pictures is seen: webp, png and avif (and gif, whose
frames FFmpeg decodes). Several pictures without times, as in tiff, mpo and heic, are no clip: the first is taken.
Clips that `write_video` wrote note their own measures, and come back as they were given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensora.contents import parse_json
from opensora.errors import OpenSoraError
from opensora.media.opening import open_picture
from opensora.media.pictures import upright_rgb
from opensora.media.timing import Timeline, WrittenClip
from opensora.media.write import CLIP_KEY, EXIF_IMAGE_DESCRIPTION, METADATA_KEY, sheet_columns

_MOVING = ("GIF", "WEBP", "PNG", "AVIF")


@dataclass
class Pictures:
    """The pictures of a file as the frames of a clip, see `video.Video`."""

    path: Path
    timeline: Timeline
    notes: list[str] = field(default_factory=list)
    _sheet: WrittenClip | None = None

    @classmethod
    def of(cls, path: Path, image: Image.Image, written: WrittenClip | None) -> "Pictures":
        """What a file holds that Pillow has opened.

        Args:
            path: of the file.
            image: of the file, at its first picture.
            written: what is noted inside.
        """
        num_pictures = getattr(image, "n_frames", 1)
        if image.format == "PNG" and written and num_pictures == 1:
            return cls(path, Timeline.even(written.num_frames, written.fps), [], written)
        if num_pictures == 1:
            return cls(path, Timeline.even(1, written.fps if written else None))
        if image.format not in _MOVING:
            return cls(path, Timeline.even(1, None), [f"it holds {num_pictures} pictures, the first is taken"])
        delays_ms = []
        for number in range(num_pictures):
            image.seek(number)
            image.load()  # some know it only then
            delays_ms.append(float(image.info.get("duration") or 0))
        return cls(path, Timeline.of_animation(delays_ms, as_noted=written is not None))

    def decode(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames, uint8 (H, W, 3) each, one after the other; `indices` ascend."""
        with open_picture(self.path) as image:
            if image is None:
                raise OpenSoraError("no picture any more")
            if self._sheet is not None:
                cells = self._cut_sheet(self._picture(image), self._sheet)
                yield from (cells[index] for index in indices)
                return
            for index in indices:
                if index or image.tell():
                    image.seek(index)
                yield self._picture(image)

    def decode_all(self) -> Iterator[np.ndarray]:
        """Every frame."""
        return self.decode(range(self.timeline.num_frames))

    def _picture(self, image: Image.Image) -> np.ndarray:
        picture, notes = upright_rgb(image)
        self.notes += [note for note in notes if note not in self.notes]
        return np.asarray(picture)

    def _cut_sheet(self, sheet: np.ndarray, clip: WrittenClip) -> np.ndarray:
        columns = sheet_columns(clip.num_frames, clip.height, clip.width)
        rows = -(-clip.num_frames // columns)
        if sheet.shape[:2] != (rows * clip.height, columns * clip.width):
            raise OpenSoraError(
                f"{sheet.shape[0]}x{sheet.shape[1]} pixels are no sheet of {clip.num_frames} frames of "
                f"{clip.height}x{clip.width}; it was changed after it was written"
            )
        cells = sheet.reshape(rows, clip.height, columns, clip.width, 3).transpose(0, 2, 1, 3, 4)
        return cells.reshape(-1, clip.height, clip.width, 3)[: clip.num_frames]


def notes_in(image: Image.Image) -> dict[str, Any]:
    """What `write_video` noted inside an image: the clip's measures and its metadata, by key."""
    if image.format == "PNG":
        source = "the metadata of the picture"
        return {key: parse_json(image.info[key], source) for key in (CLIP_KEY, METADATA_KEY) if key in image.info}
    text = image.info.get("comment") if image.format == "GIF" else image.getexif().get(EXIF_IMAGE_DESCRIPTION)
    try:
        notes = parse_json(text or "null", "the comment")
    except (OpenSoraError, TypeError):  # any program may leave a comment
        return {}
    return notes if isinstance(notes, dict) else {}
