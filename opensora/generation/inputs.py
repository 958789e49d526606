"""Pictures and videos that frames of a clip are taken from: looked into before the model is loaded, known by their
content, and decoded where frames of them are needed.

They are named in one of two ways: in words (`image`, `last_image`, `extend`, `edit`), or as references that a mask
strategy places. In a long video the first loop begins with the image, or where the extended clip ends, and the last
loop ends with the last image.

A video of a constant rate gives its frames one by one. One whose rate varies is taken by time at the rate of the new
clip, or any video at a rate that is asked for (`input_fps`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.checkpoints.file_hashes import read_hash
from opensora.contents import check_regular
from opensora.errors import OpenSoraError
from opensora.generation.record import InputFile, NamedFrames, PlacedReferences, Record, Sampling
from opensora.generation.request import ClipRequest
from opensora.media.frames import ClipFile, stored_size
from opensora.models.text.condition_types import V2V_LATENTS, frames_of_pieces, placements_of, placements_of_pieces
from opensora.models.text.prompts import parse_mask_strategy

if TYPE_CHECKING:
    import torch

    from opensora.conditioning.frames import FrameConditioning
    from opensora.pipeline import OpenSoraPipeline

Inputs = NamedFrames | PlacedReferences | None
"""What a clip is made from besides text, as its record tells it."""


@dataclass(frozen=True, eq=False)
class InputClip:
    """A file that was looked into, and what of it is seen.

    Attributes:
        name: of the file.
        clip: its frames, not decoded yet.
        height, width: of its frames, in pixels.
    """

    name: str
    clip: ClipFile
    height: int
    width: int

    @classmethod
    def of(cls, path: Path) -> "InputClip":
        """Looks into a file, and decodes its first frame.

        Raises:
            OpenSoraError: it cannot be read; the message does not name the file.
        """
        clip = ClipFile(path)
        height, width = next(clip.frames([0])).shape[:2]
        return cls(path.name, clip, height, width)

    @property
    def is_picture(self) -> bool:
        """A single frame."""
        return self.clip.num_frames() == 1

    def taken_fps(self, input_fps: float | None, file_fps: float) -> float | None:
        """The rate at which its frames are taken by time; None where they are taken one by one.

        Args:
            input_fps: asked for.
            file_fps: that the new clip plays at.
        """
        if self.is_picture or self.clip.timeline.plays_at(input_fps):
            return None
        return input_fps or file_fps

    def num_taken(self, sampling: Sampling) -> int:
        """Frames that are taken of all of it."""
        return self.clip.num_frames(self.taken_fps(sampling.input_fps, sampling.file_fps))

    def fill(self, sampling: Sampling, chosen: slice = slice(None)) -> "torch.Tensor":
        """Frames as a video (3, T, height, width) in [-1, 1], resized and cropped around the centre.

        Args:
            sampling: says size and rate of the new clip.
            chosen: which of the frames that are taken; no others are decoded.

        Raises:
            OpenSoraError: one cannot be decoded.
        """
        import torch
        from PIL import Image

        from opensora.media.transforms import fill_image, fill_video, to_video

        height, width = sampling.height, sampling.width
        rate = self.taken_fps(sampling.input_fps, sampling.file_fps)
        try:
            if self.is_picture:
                picture = Image.fromarray(next(self.clip.frames([0])))
                return to_video(np.asarray(fill_image(picture, height, width))[None])
            numbers = range(self.clip.num_frames(rate))[chosen]
            # One by one, because a clip at its full size may be far larger than what is left of it.
            frames = (to_video(frame[None]) for frame in self.clip.frames(numbers, rate))
            return torch.cat([fill_video(frame, height, width) for frame in frames], dim=1)
        except OpenSoraError as error:
            raise OpenSoraError(f"{self.clip.path} cannot be read: {error}") from error


class InputFiles:
    """The files of a run, each read once.

    Args:
        most_pixels: of a frame; None for what memory holds.
    """

    def __init__(self, most_pixels: int | None = None) -> None:
        self._most_pixels = most_pixels
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
            self._check_moves(files, request.input_fps)
            return PlacedReferences(files, request.mask_strategy or "", request.align)
        named = NamedFrames(
            image=self._picture("image", request.image),
            last_image=self._picture("last_image", request.last_image),
            extend=self._video("extend", request.extend),
            backwards=request.backwards,
            edit=self._video("edit", request.edit),
            strength=request.strength,
        )
        self._check_moves(named.files, request.input_fps)
        return named if named.files else None

    def _check_moves(self, files: Sequence[InputFile], input_fps: float | None) -> None:
        if input_fps is not None and all(self[file].is_picture for file in files):
            raise OpenSoraError("`input_fps` says at which rate a video is taken; a picture has none, so leave it out")

    def check_not_overwritten(self, output: Path) -> None:
        """Raises `OpenSoraError` if a clip would take the place of a file that it is made from."""
        if output.resolve() in {path.resolve() for path in self._files}:
            raise OpenSoraError(f"{output} is a file that the clip is made from; choose another `output`")

    def _read(self, field: str, path: Path) -> InputFile:
        path = path.expanduser()
        if path not in self._files:
            check_regular(path, f"`{field}`:")
            try:
                self._check_pixels(path)
                clip = InputClip.of(path)
            except OpenSoraError as error:
                raise OpenSoraError(f"`{field}`: {path} cannot be read: {error}") from error
            file = InputFile(path.name, read_hash(path))
            self._files[path], self._clips[file] = file, clip
        return self._files[path]

    def _check_pixels(self, path: Path) -> None:
        if self._most_pixels is not None:
            height, width = stored_size(path)
            if height * width > self._most_pixels:
                raise OpenSoraError(f"{height}x{width} are more pixels than {self._most_pixels:,}; send fewer")

    def _picture(self, field: str, path: Path | None) -> InputFile | None:
        if path is None:
            return None
        file = self._read(field, path)
        if not self[file].is_picture:
            frames = self[file].clip.num_frames()
            raise OpenSoraError(
                f"`{field}`: {path} is a video of {frames} frames, expected a picture; `extend` goes on from a video"
            )
        return file

    def _video(self, field: str, path: Path | None) -> InputFile | None:
        if path is None:
            return None
        file = self._read(field, path)
        if self[file].is_picture:
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
    if pipe.transformer.known_frames_alone:
        return list(_pieces(pipe, inputs, files, sampling))
    return list(_placed(pipe, inputs, files, sampling))


def placed_by_type(
    pipe: "OpenSoraPipeline", placed: PlacedReferences, files: InputFiles, request: ClipRequest, sampling: Sampling
) -> PlacedReferences:
    """The references of a request with a `cond_type`, placed as this model means that.

    Raises:
        OpenSoraError: this model does not know it.
    """
    condition_type, length, autoencoder = request.cond_type or "", request.condition_frame_length, pipe.autoencoder
    count = (len(placed.files), sampling.num_loops)
    if pipe.transformer.known_frames_alone:
        num_frames = frames_of_pieces(condition_type, files[placed.files[0]].num_taken(sampling))
        length = length or autoencoder.latent_frames(autoencoder.size_rule().frames_within(num_frames))
        placements, alignment = placements_of_pieces(condition_type, *count, length), None
    else:
        placements, alignment = placements_of(condition_type, *count, length or V2V_LATENTS), 1
    return PlacedReferences(placed.files, ";".join(map(str, placements)), alignment)


def edited_length(edited: InputClip, request: ClipRequest) -> Callable[[float], int]:
    """Frames that are taken of a clip that is edited, for a new one that plays at so many frames a second."""
    return lambda file_fps: edited.clip.num_frames(edited.taken_fps(request.input_fps, file_fps))


def notes_on_files(inputs: Inputs, files: InputFiles, sampling: Sampling) -> Iterator[str]:
    """What happens to files that a user may not expect: cutting, cropping, another speed; after they are encoded."""
    edit = inputs.edit if isinstance(inputs, NamedFrames) else None
    if edit is not None:
        num_frames = files[edit].num_taken(sampling)
        if sampling.num_frames < num_frames:
            yield f"the first {sampling.num_frames} of {num_frames} frames are edited"
    for file in inputs.files if inputs else ():
        given = files[file]
        if abs(given.height / given.width * sampling.width / sampling.height - 1) > 0.01:
            made = f"{sampling.height}x{sampling.width}"
            yield f"{file.name} is {given.height}x{given.width} (height x width), cropped to the shape of {made}"
        if not given.is_picture:
            yield from (f"{file.name} {note}" for note in _notes_on_time(given, sampling))
        yield from (f"{file.name}: {note}" for note in given.clip.notes)


def _notes_on_time(given: InputClip, sampling: Sampling) -> Iterator[str]:
    taken = given.taken_fps(sampling.input_fps, sampling.file_fps)
    fps = taken or given.clip.fps or 0.0
    if given.clip.timeline.is_variable:
        yield f"has a frame rate that varies; its frames are taken by time, {fps:g} a second"
    elif taken is not None:
        yield f"plays at {given.clip.fps or 0:g} fps; its frames are taken by time, {taken:g} a second"
    if abs(fps / sampling.file_fps - 1) > 0.01:
        plays = "plays at" if taken is None else "is taken at"
        yield f"{plays} {fps:g} fps, the new clip at {sampling.file_fps:g}; no frame is left out"


def _named(
    pipe: "OpenSoraPipeline", named: NamedFrames, files: InputFiles, sampling: Sampling
) -> "Iterator[FrameConditioning | None]":
    from opensora.conditioning.frames import condition

    size, last = sampling.size, sampling.num_loops - 1
    first_frames, last_frames = slice(size.num_frames), slice(-size.num_frames, None)

    def video(file, chosen=first_frames):
        return None if file is None else files[file].fill(sampling, chosen)

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
            alone=pipe.transformer.known_frames_alone,
        )


def _placed(
    pipe: "OpenSoraPipeline", placed: PlacedReferences, files: InputFiles, sampling: Sampling
) -> "Iterator[FrameConditioning | None]":
    from opensora.conditioning.frames import FrameConditioning
    from opensora.conditioning.references import encode_span, place_references, taken_latents

    autoencoder, size = pipe.autoencoder, sampling.size
    placements = parse_mask_strategy(placed.mask_strategy)
    references = []
    for number, file in enumerate(placed.files):
        given = files[file]
        num_frames = autoencoder.size_rule().frames_within(given.num_taken(sampling))
        num_latents = autoencoder.latent_frames(num_frames)
        span = taken_latents(placements, number, len(placed.files), num_latents, placed.alignment)
        references.append(encode_span(autoencoder, partial(given.fill, sampling), num_frames, span))
    empty = FrameConditioning.none(autoencoder, size).latents[0]
    for loop in range(sampling.num_loops):
        if not any(placement.loop == loop for placement in placements):
            yield None
            continue
        latents, strength = place_references(empty, references, placements, loop=loop, alignment=placed.alignment)
        yield FrameConditioning(latents[None], strength[None])


def _pieces(
    pipe: "OpenSoraPipeline", placed: PlacedReferences, files: InputFiles, sampling: Sampling
) -> "Iterator[FrameConditioning | None]":
    from opensora.conditioning.references import place_pieces

    placements = parse_mask_strategy(placed.mask_strategy)
    num_frames = [files[file].num_taken(sampling) for file in placed.files]

    def read(number: int, chosen: slice) -> "torch.Tensor":
        return files[placed.files[number]].fill(sampling, chosen)

    for loop in range(sampling.num_loops):
        if not any(placement.loop == loop for placement in placements):
            yield None
            continue
        yield place_pieces(pipe.autoencoder, sampling.size, placements, num_frames, read, loop=loop)


def _hash_if_there(path: Path) -> str | None:
    path = path.expanduser()
    return read_hash(path) if path.is_file() else None
