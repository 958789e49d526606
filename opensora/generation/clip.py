"""A clip that was made, and the one way from it to a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.errors import OpenSoraError
from opensora.files import check_writable, replacing
from opensora.generation.notebook import clip_html
from opensora.generation.record import Record, sidecar_path
from opensora.media.transforms import to_pixels
from opensora.media.write import write_video
from opensora.settings import as_json

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.pipeline import OpenSoraPipelineOutput


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, and how they were made.

    Attributes:
        frames: uint8, (T, H, W, 3).
        fps: frames per second.
        record: how the clip was made, enough to make it again; None if nobody knows.
        num_evaluations, num_forecast: see `OpenSoraPipelineOutput`; of this clip, 0 if nobody knows.
    """

    frames: np.ndarray
    fps: float
    record: Record | None = None
    num_evaluations: int = 0
    num_forecast: int = 0

    @classmethod
    def of(cls, output: "OpenSoraPipelineOutput", fps: float | None = None, number: int = 0) -> "Clip":
        """A video that a pipeline returned, of whatever `output_type` but "latent".

        Args:
            output: of a call.
            fps: frames per second it plays at; None for the model's own.
            number: of the video, of several.

        Raises:
            OpenSoraError: latents, which are no pictures.
        """
        rate: float = output.settings["fps"] / output.settings["frame_interval"] if fps is None else fps
        frames = output.frames[number]
        if isinstance(frames, list):  # PIL images
            return cls(np.stack([np.asarray(frame) for frame in frames]), rate)
        if isinstance(frames, np.ndarray):
            return cls(to_pixels(frames), rate)
        if frames.shape[1] != 3:
            raise OpenSoraError(f"got latents of shape {tuple(frames.shape)}; a clip is made of pictures (T, 3, H, W)")
        return cls(to_uint8(frames), rate)

    def save(self, path: str | Path, *, format: str | None = None, metadata: bool = True) -> Path:
        """Writes the clip, with its record inside the file and beside it (`clip.mp4.json`), and returns its path.

        Args:
            path: where; the ending names the format unless `format` does; `frames/%04d.png` writes numbered frames.
            format: mp4, mov, webm, mkv (lossless), gif, webp, png (one sheet of all frames), or frames (a folder).
            metadata: keep the record; otherwise no record is left, nor that of a clip that was there.

        Raises:
            OpenSoraError: an unknown format, one that cannot hold the clip, or a place that cannot be written.
        """
        path, record = Path(path), self.record if metadata else None
        if record is None:
            write_video(path, self.frames, self.fps, format=format)
            sidecar_path(path).unlink(missing_ok=True)  # one that is there tells of the clip that was there
            return path
        check_writable(sidecar_path(path))
        with replacing(sidecar_path(path)) as sidecar:  # both or none
            sidecar.write_bytes(as_json(record))
            write_video(path, self.frames, self.fps, record.as_metadata(), format=format)
        return path

    def _repr_html_(self) -> str:
        """What notebooks show: the clip plays, and its record can be unfolded."""
        return clip_html(self.frames, self.fps, self.record)


def to_uint8(video: "Tensor") -> np.ndarray:
    """Frames (T, 3, H, W) in [0, 1] as uint8 (T, H, W, 3), rounded.

    Raises:
        OpenSoraError: values that are not finite.
    """
    frames = video.permute(0, 2, 3, 1).cpu().numpy()
    if not np.isfinite(frames).all():
        raise OpenSoraError(
            "the decoded frames hold NaN or infinite values; try float32 as `dtype`, or check the weights"
        )
    return to_pixels(frames)
