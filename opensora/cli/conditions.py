"""Frames that are given on the command line, in either of two languages, and videos made of several loops.

Readable: `--image`, `--last-image`, `--extend`, `--edit`. In a long video the first loop begins with the image, or
where the extended clip ends, and the last loop ends with the last image. The scripts' way: `--reference-path` and
`--mask-strategy`, or both in a JSON object at the end of a prompt, which goes before the options. Both come out as
`GivenFrames`, one for each loop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from opensora.cli.given_files import GivenFiles
from opensora.cli.options import FLAG, given_options, option
from opensora.cli.record import NamedFrames, PlacedReferences, Sampling
from opensora.errors import OpenSoraError
from opensora.models.text.prompts import PromptReferences, parse_mask_strategy, split_loops

if TYPE_CHECKING:
    from opensora.conditioning import GivenFrames
    from opensora.pipeline import OpenSoraPipeline


@dataclass(frozen=True)
class FrameOptions:
    """Resized and cropped to the clip's size. Pictures, or any video: mp4, gif, webp, our png sheets."""

    image: Annotated[Path | None, option("FILE")] = None
    """The clip begins with this picture."""
    last_image: Annotated[Path | None, option("FILE")] = None
    """The clip ends with this picture; with --image it connects the two."""
    extend: Annotated[Path | None, option("FILE")] = None
    """The clip goes on where this video ends, repeating its last frames."""
    backwards: Annotated[bool, FLAG] = False
    """With --extend: the clip ends where the video begins."""
    edit: Annotated[Path | None, option("FILE")] = None
    """This video is made anew after the prompt; needs --strength."""
    strength: Annotated[float | None, option("S")] = None
    """How much of the edited video is made anew: 0 nothing, 1 everything."""

    def check(self) -> None:
        """Raises `OpenSoraError` for options that contradict or want each other."""
        if self.edit is not None and (self.image or self.last_image or self.extend):
            raise OpenSoraError("--edit gives all frames; leave out --image, --last-image and --extend")
        if self.edit is not None and self.strength is None:
            raise OpenSoraError("--edit needs --strength: how much is made anew, from 0 (nothing) to 1 (everything)")
        if self.edit is None and self.strength is not None:
            raise OpenSoraError("--strength says how much of a clip is edited; give the clip as --edit")
        check_share("--strength", self.strength)
        if self.backwards and self.extend is None:
            raise OpenSoraError("--backwards says where a clip is extended; give the clip as --extend")
        end, other = ("last", self.last_image) if self.backwards else ("first", self.image)
        if self.extend is not None and other is not None:
            name = "--last-image" if self.backwards else "--image"
            raise OpenSoraError(f"the {end} frames come from --extend already; leave out {name}")

    def read(self, files: GivenFiles) -> NamedFrames | None:
        """The files, read; None if nothing is given."""
        if not any(given_options(self)):
            return None
        picture, clip = files.read_picture, files.read_clip
        return NamedFrames(
            image=picture("--image", self.image) if self.image else None,
            last_image=picture("--last-image", self.last_image) if self.last_image else None,
            extend=clip("--extend", self.extend) if self.extend else None,
            backwards=self.backwards,
            edit=clip("--edit", self.edit) if self.edit else None,
            strength=self.strength,
        )


@dataclass(frozen=True)
class ReferenceOptions:
    """Given frames as Open-Sora's scripts name them; a prompt may also end in a JSON object with these two."""

    reference_path: Annotated[str | None, option("A;B")] = None
    """Pictures and videos, separated by semicolons."""
    mask_strategy: Annotated[str | None, option("L,R,S,T,N,E;...")] = None
    """Each entry: in loop L put N latent frames of reference R, from its frame S on, at frame T; E of them anew."""
    align: Annotated[int | None, option("N")] = None
    """Starts move to the nearest multiple of so many latent frames."""

    def read(self, prompt: PromptReferences, num_loops: int, files: GivenFiles) -> PlacedReferences | None:
        """The references of one prompt, read; None if there are none.

        Args:
            prompt: what the prompt itself says; it goes before the options.
            num_loops: of the run.
            files: where they are kept.

        Raises:
            OpenSoraError: a missing half, an unreadable file, or an entry for a loop or reference that is not there.
        """
        paths = [path.strip() for path in (prompt.reference_path or self.reference_path or "").split(";")]
        paths = [path for path in paths if path]
        strategy = prompt.mask_strategy or self.mask_strategy or ""
        placements = parse_mask_strategy(strategy)
        if not paths and not placements:
            if self.align is not None:
                raise OpenSoraError("--align moves the frames of --reference-path; give one, and --mask-strategy")
            return None
        if not placements:
            raise OpenSoraError('which frames of the reference go where? give --mask-strategy, "0" to begin with it')
        if not paths:
            raise OpenSoraError("--mask-strategy places frames of references; give them as --reference-path")
        if self.align is not None and self.align < 1:
            raise OpenSoraError(f"--align is {self.align}, expected 1 or more")
        for placement in placements:
            if placement.loop >= num_loops:
                raise OpenSoraError(
                    f"the mask strategy {strategy!r} is for loop {placement.loop} too (0 is the first), "
                    f"but --loop is {num_loops}"
                )
            if not -len(paths) <= placement.reference < len(paths):
                raise OpenSoraError(
                    f"the mask strategy {strategy!r} takes reference {placement.reference} (0 is the first), "
                    f"but --reference-path names {len(paths)}"
                )
        found = tuple(files.read("--reference-path", path) for path in paths)
        return PlacedReferences(found, strategy, self.align)


@dataclass(frozen=True)
class LoopOptions:
    """A long video is made of clips (loops) that go on from one another; a prompt for each: "|0|a cat|2|a dog"."""

    loop: Annotated[int | None, option("N", "1")] = None
    """Number of loops."""
    condition_frame_length: Annotated[int | None, option("K")] = None
    """Latent frames carried over from loop to loop, or taken over from --extend."""
    condition_frame_edit: Annotated[float | None, option("E", "0")] = None
    """How much of the frames carried over is made anew, 0 to 1."""

    @property
    def num_loops(self) -> int:
        """As asked for, or 1."""
        return 1 if self.loop is None else self.loop

    def check(self, frames: FrameOptions) -> None:
        """Raises `OpenSoraError` for impossible numbers, or options that want others."""
        if self.num_loops < 1:
            raise OpenSoraError(f"--loop is {self.loop}, expected 1 or more")
        if self.condition_frame_length is not None:
            if self.condition_frame_length < 1:
                raise OpenSoraError(f"--condition-frame-length is {self.condition_frame_length}, expected 1 or more")
            if self.loop is None and frames.extend is None:
                raise OpenSoraError("--condition-frame-length is for --loop and --extend; give one of them")
        check_share("--condition-frame-edit", self.condition_frame_edit)
        if self.condition_frame_edit is not None and self.loop is None:
            raise OpenSoraError("--condition-frame-edit is for long videos; give --loop")
        if frames.edit is not None and self.num_loops > 1:
            raise OpenSoraError("--edit makes one clip as long as the one given; leave out --loop")

    def check_prompt(self, prompt: str) -> list[str]:
        """The texts of a prompt for all loops.

        Raises:
            OpenSoraError: a text for a loop that is not made, or a mistake in `|0|...`.
        """
        texts, starts = split_loops(prompt)
        if starts and starts[-1] >= self.num_loops:
            raise OpenSoraError(
                f"the prompt says what loop {starts[-1]} shows (0 is the first), but --loop is {self.num_loops}"
            )
        if not all(texts):
            raise OpenSoraError(f"a text of the prompt {prompt!r} is empty; say what that loop shows")
        return texts


def frames_of_loops(
    pipe: "OpenSoraPipeline", given: NamedFrames | PlacedReferences | None, files: GivenFiles, sampling: Sampling
) -> "list[GivenFrames | None]":
    """What is given in each loop of a clip.

    Raises:
        OpenSoraError: too few frames, or frames that have no place in the clip.
    """
    if given is None:
        return [None] * sampling.num_loops
    make = _named if isinstance(given, NamedFrames) else _placed
    return list(make(pipe, given, files, sampling))  # pyright: ignore[reportArgumentType]


def notes_on_files(
    given: NamedFrames | PlacedReferences | None, files: GivenFiles, sampling: Sampling
) -> Iterator[str]:
    """What happens to given files that a user may not expect: cropping, and another speed."""
    for file in given.files if given else ():
        clip = files[file]
        height, width = clip.frames.shape[1:3]
        if abs(height / width * sampling.width / sampling.height - 1) > 0.01:
            made = f"{sampling.height}x{sampling.width}"
            yield f"{file.name} is {height}x{width} (height x width), cropped to the shape of {made}"
        if len(clip.frames) > 1 and abs(clip.fps / sampling.file_fps - 1) > 0.01:
            yield f"{file.name} plays at {clip.fps:g} fps, the new clip at {sampling.file_fps:g}; no frame is left out"


def _named(
    pipe: "OpenSoraPipeline", given: NamedFrames, files: GivenFiles, sampling: Sampling
) -> "Iterator[GivenFrames | None]":
    from opensora.conditioning import condition

    size, last = sampling.size, sampling.num_loops - 1
    first_frames, last_frames = slice(size.num_frames), slice(-size.num_frames, None)

    def video(file, chosen=first_frames):
        return None if file is None else files[file].fill(size.height, size.width, chosen)

    for loop in range(sampling.num_loops):
        extended = given.extend if loop == (last if given.backwards else 0) else None
        image = video(given.image) if loop == 0 else None
        last_image = video(given.last_image) if loop == last else None
        if extended is image is last_image is given.edit is None:
            yield None
            continue
        yield condition(
            pipe.autoencoder,
            size,
            image=image,
            last_image=last_image,
            extend=video(extended, first_frames if given.backwards else last_frames),
            backwards=given.backwards,
            condition_frames=sampling.condition_frames,
            edit=video(given.edit),
            strength=given.strength,
        )


def _placed(
    pipe: "OpenSoraPipeline", given: PlacedReferences, files: GivenFiles, sampling: Sampling
) -> "Iterator[GivenFrames | None]":
    import torch

    from opensora.conditioning import GivenFrames, place_references

    autoencoder, size = pipe.autoencoder, sampling.size
    placements = parse_mask_strategy(given.mask_strategy)
    with torch.no_grad():
        videos = (files[file].fill(size.height, size.width) for file in given.files)
        references = [autoencoder.encode_video(video[None].to(autoencoder.device))[0] for video in videos]
    empty = GivenFrames.none(autoencoder, size).latents[0]
    for loop in range(sampling.num_loops):
        if not any(placement.loop == loop for placement in placements):
            yield None
            continue
        latents, strength = place_references(empty, references, placements, loop=loop, alignment=given.alignment)
        yield GivenFrames(latents[None], strength[None])


def check_share(option: str, share: float | None) -> None:
    """Raises `OpenSoraError` for a share outside of 0 to 1."""
    if share is not None and not 0 <= share <= 1:
        raise OpenSoraError(f"{option} is {share:g}, expected 0 (nothing) to 1 (everything)")
