"""Pictures and videos that a user gives: read before the model is loaded, known by their content, found again."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.cli.record import GivenFile
from opensora.errors import OpenSoraError
from opensora.media.read import read_video

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class GivenClip:
    """What a file holds: frames, uint8 (T, H, W, 3), and frames per second. A picture has one frame."""

    frames: np.ndarray
    fps: float

    def fill(self, height: int, width: int, chosen: slice = slice(None)) -> "torch.Tensor":
        """The chosen frames as a video (3, T, height, width) in [-1, 1], resized and cropped around the centre."""
        from PIL import Image

        from opensora.media.transforms import fill_image, fill_video, to_video

        if len(self.frames) == 1:
            return to_video(np.asarray(fill_image(Image.fromarray(self.frames[0]), height, width))[None])
        return fill_video(to_video(self.frames[chosen]), height, width)


class GivenFiles:
    """The files of a run, each read once."""

    def __init__(self) -> None:
        self._files: dict[Path, GivenFile] = {}
        self._clips: dict[GivenFile, GivenClip] = {}

    def __getitem__(self, file: GivenFile) -> GivenClip:
        return self._clips[file]

    def read(self, option: str, path: str | Path) -> GivenFile:
        """Reads a file that was given by an option.

        Raises:
            OpenSoraError: it is not there, or neither picture nor video.
        """
        path = Path(path).expanduser()
        if path not in self._files:
            try:
                clip = GivenClip(*read_video(path))
            except OpenSoraError as error:
                raise OpenSoraError(f"{option}: {error}") from error
            file = GivenFile(path.name, file_hash(path))
            self._files[path], self._clips[file] = file, clip
        return self._files[path]

    def read_picture(self, option: str, path: str | Path) -> GivenFile:
        """As `read`, for a picture."""
        file = self.read(option, path)
        frames = len(self[file].frames)
        if frames > 1:
            raise OpenSoraError(
                f"{option}: {path} is a video of {frames} frames, expected a picture; --extend goes on from a video"
            )
        return file

    def read_clip(self, option: str, path: str | Path) -> GivenFile:
        """As `read`, for a video."""
        file = self.read(option, path)
        if len(self[file].frames) == 1:
            raise OpenSoraError(f"{option}: {path} is a single picture, expected a video; --image takes a picture")
        return file

    def find(self, wanted: Iterable[GivenFile], given: Iterable[Path], clip: Path) -> None:
        """Reads the files that a clip was made with, wherever they are now.

        Args:
            wanted: as recorded.
            given: where the user says they are.
            clip: they may also lie beside it, or in the current folder.

        Raises:
            OpenSoraError: one is not found, or one was given that the clip was not made with.
        """
        wanted, given = list(wanted), list(given)
        hashes = {path: _hash_if_there(path.expanduser()) for path in given}
        for path, found in hashes.items():
            if found not in {file.sha256 for file in wanted}:
                raise OpenSoraError(f"{path} is not among the files that {clip.name} was made with, or has changed")
        for file in wanted:
            places = [*given, clip.parent / file.name, Path(file.name)]
            place = next((path for path in places if _hash_if_there(path.expanduser()) == file.sha256), None)
            if place is None:
                other = [str(path) for path in places[len(given) :] if path.is_file()]
                what = f"{other[0]} is another file of that name" if other else "it is not beside the clip"
                raise OpenSoraError(
                    f"{clip.name} was made with {file.name} (SHA-256 {file.sha256[:12]}...), but {what}; "
                    "say where it is with --image, --extend, --edit or --reference-path"
                )
            self._files[place.expanduser()] = file
            self._clips[file] = GivenClip(*read_video(place.expanduser()))

    def check_not_overwritten(self, output: Path) -> None:
        """Raises `OpenSoraError` if a clip would take the place of a file that it is made from."""
        if output.resolve() in {path.resolve() for path in self._files}:
            raise OpenSoraError(f"{output} is a file that the clip is made from; choose another --output")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_if_there(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None
