"""Pictures and videos that frames of a clip are taken from: read before the model is loaded, known by their content.

They are named in one of two ways: in words (`image`, `last_image`, `extend`, `edit`), or as references that a mask
strategy places. In a long video the first loop begins with the image, or where the extended clip ends, and the last
loop ends with the last image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.checkpoints.file_hashes import read_hash
from opensora.errors import OpenSoraError
from opensora.generation.record import InputFile, NamedFrames, PlacedReferences, Record, Sampling
from opensora.generation.request import ClipRequest
from opensora.media.read import read_video
from opensora.models.text.prompts import parse_mask_strategy

if TYPE_CHECKING:
    import torch

    from opensora.conditioning.frames import FrameConditioning
    from opensora.pipeline import OpenSoraPipeline

Inputs = NamedFrames | PlacedReferences | None
"""What a clip is made from besides text, as its record tells it."""


@dataclass(frozen=True, eq=False)
class InputClip:
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


class InputFiles:
    """The files of a run, each read once."""

    def __init__(self) -> None:
        self._files: dict[Path, InputFile] = {}
        self._clips: dict[InputFile, InputClip] = {}

    def __getitem__(self, file: InputFile) -> InputClip:
        return self._clips[file]

    def read(self, request: ClipRequest) -> Inputs:
        """Reads what a request names.

        Args:
            request: checked already.

        Raises:
            OpenSoraError: a file that is not there, or neither picture nor video, or a video where a picture belongs.
        """
        if request.reference_path:
            files = tuple(self._read("reference_path", path) for path in request.reference_path)
            return PlacedReferences(files, request.mask_strategy or "", request.align)
        named = NamedFrames(
            image=self._picture("image", request.image),
            last_image=self._picture("last_image", request.last_image),
            extend=self._video("extend", request.extend),
            backwards=request.backwards,
            edit=self._video("edit", request.edit),
            strength=request.strength,
        )
        return named if named.files else None

    def check_not_overwritten(self, output: Path) -> None:
        """Raises `OpenSoraError` if a clip would take the place of a file that it is made from."""
        if output.resolve() in {path.resolve() for path in self._files}:
            raise OpenSoraError(f"{output} is a file that the clip is made from; choose another `output`")

    def _read(self, field: str, path: Path) -> InputFile:
        path = path.expanduser()
        if path not in self._files:
            try:
                clip = InputClip(*read_video(path))
            except OpenSoraError as error:
                raise OpenSoraError(f"`{field}`: {error}") from error
            file = InputFile(path.name, read_hash(path))
            self._files[path], self._clips[file] = file, clip
        return self._files[path]

    def _picture(self, field: str, path: Path | None) -> InputFile | None:
        if path is None:
            return None
        file = self._read(field, path)
        frames = len(self[file].frames)
        if frames > 1:
            raise OpenSoraError(
                f"`{field}`: {path} is a video of {frames} frames, expected a picture; `extend` goes on from a video"
            )
        return file

    def _video(self, field: str, path: Path | None) -> InputFile | None:
        if path is None:
            return None
        file = self._read(field, path)
        if len(self[file].frames) == 1:
            raise OpenSoraError(f"`{field}`: {path} is a single picture, expected a video; `image` takes a picture")
        return file


def find_files(record: Record, given: Sequence[Path], clip: Path) -> dict[InputFile, Path]:
    """The files that a clip was made from, wherever they are now.

    Args:
        record: of the clip.
        given: where the user says they are.
        clip: they may also lie beside it, or in the current folder.

    Raises:
        OpenSoraError: one is not found, or one was given that the clip was not made with.
    """
    wanted = record.given.files if record.given else ()
    for path in given:
        if _hash_if_there(path) not in {file.sha256 for file in wanted}:
            raise OpenSoraError(f"{path} is not among the files that {clip.name} was made with, or has changed")
    found: dict[InputFile, Path] = {}
    for file in wanted:
        places = [*given, clip.parent / file.name, Path(file.name)]
        place = next((path for path in places if _hash_if_there(path) == file.sha256), None)
        if place is None:
            other = [str(path) for path in places[len(given) :] if path.is_file()]
            what = f"{other[0]} is another file of that name" if other else "it is not beside the clip"
            raise OpenSoraError(
                f"{clip.name} was made with {file.name} (SHA-256 {file.sha256[:12]}...), but {what}; "
                "say where it is with `image`, `extend`, `edit` or `reference_path`"
            )
        found[file] = place
    return found


def frames_of_loops(
    pipe: "OpenSoraPipeline", inputs: Inputs, files: InputFiles, sampling: Sampling
) -> "list[FrameConditioning | None]":
    """The frame conditioning of each loop of a clip.

    Raises:
        OpenSoraError: too few frames, or frames that have no place in the clip.
    """
    if inputs is None:
        return [None] * sampling.num_loops
    if isinstance(inputs, NamedFrames):
        return list(_named(pipe, inputs, files, sampling))
    return list(_placed(pipe, inputs, files, sampling))


def notes_on_files(inputs: Inputs, files: InputFiles, sampling: Sampling) -> Iterator[str]:
    """What happens to files that a user may not expect: cutting, cropping, and another speed."""
    edit = inputs.edit if isinstance(inputs, NamedFrames) else None
    if edit is not None and sampling.num_frames < len(files[edit].frames):
        yield f"the first {sampling.num_frames} of {len(files[edit].frames)} frames are edited"
    for file in inputs.files if inputs else ():
        clip = files[file]
        height, width = clip.frames.shape[1:3]
        if abs(height / width * sampling.width / sampling.height - 1) > 0.01:
            made = f"{sampling.height}x{sampling.width}"
            yield f"{file.name} is {height}x{width} (height x width), cropped to the shape of {made}"
        if len(clip.frames) > 1 and abs(clip.fps / sampling.file_fps - 1) > 0.01:
            yield f"{file.name} plays at {clip.fps:g} fps, the new clip at {sampling.file_fps:g}; no frame is left out"


def _named(
    pipe: "OpenSoraPipeline", named: NamedFrames, files: InputFiles, sampling: Sampling
) -> "Iterator[FrameConditioning | None]":
    from opensora.conditioning.frames import condition

    size, last = sampling.size, sampling.num_loops - 1
    first_frames, last_frames = slice(size.num_frames), slice(-size.num_frames, None)

    def video(file, chosen=first_frames):
        return None if file is None else files[file].fill(size.height, size.width, chosen)

    for loop in range(sampling.num_loops):
        extended = named.extend if loop == (last if named.backwards else 0) else None
        image = video(named.image) if loop == 0 else None
        last_image = video(named.last_image) if loop == last else None
        if extended is image is last_image is named.edit is None:
            yield None
            continue
        yield condition(
            pipe.autoencoder,
            size,
            image=image,
            last_image=last_image,
            extend=video(extended, first_frames if named.backwards else last_frames),
            backwards=named.backwards,
            condition_frames=sampling.condition_frames,
            edit=video(named.edit),
            strength=named.strength,
        )


def _placed(
    pipe: "OpenSoraPipeline", placed: PlacedReferences, files: InputFiles, sampling: Sampling
) -> "Iterator[FrameConditioning | None]":
    import torch

    from opensora.conditioning.frames import FrameConditioning, place_references

    autoencoder, size = pipe.autoencoder, sampling.size
    placements = parse_mask_strategy(placed.mask_strategy)
    with torch.no_grad():
        videos = (files[file].fill(size.height, size.width) for file in placed.files)
        references = [autoencoder.encode_video(video[None].to(autoencoder.device))[0] for video in videos]
    empty = FrameConditioning.none(autoencoder, size).latents[0]
    for loop in range(sampling.num_loops):
        if not any(placement.loop == loop for placement in placements):
            yield None
            continue
        latents, strength = place_references(empty, references, placements, loop=loop, alignment=placed.alignment)
        yield FrameConditioning(latents[None], strength[None])


def _hash_if_there(path: Path) -> str | None:
    path = path.expanduser()
    return read_hash(path) if path.is_file() else None
