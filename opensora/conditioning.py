"""What a clip is made from besides text: frames that are given, and the numbers that tell a network its size.

References are latents of images or clips; a list of `FramePlacement` (see `models.text.prompts`) says which of their
frames go where. Placing them yields latents that hold the given frames, and a strength for each frame: 1 is generated
from noise, 0 stays as given, 0.4 is given and made anew for the last 0.4 of the way. The schedulers' `activate_frames`
takes both. Everything counts in latent frames unless it says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opensora.errors import OpenSoraError
from opensora.models.text.prompts import FramePlacement

# The networks of the family are told that an image is a video at this rate.
IMAGE_FPS = 120.0


def place_references(
    latents: torch.Tensor,
    references: Sequence[torch.Tensor],
    placements: Sequence[FramePlacement],
    *,
    loop: int = 0,
    alignment: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip's latents with frames of references in their place, and the strength of every frame.

    A placement takes as many frames as it asks for and reference and clip can give. Later placements overwrite earlier
    ones; those of other loops are left out.

    Args:
        latents: of one clip, (C, T, H, W), noise or zeros; not changed.
        references: latents, each (C, T_r, H, W).
        placements: what goes where.
        loop: the loop of a long video this clip is.
        alignment: both starts move to the nearest multiple of this many frames (see `align_start`), for autoencoders
            that work in chunks, whose latents mean something else at another position of the chunk.

    Returns:
        latents, (C, T, H, W), and frame strengths, (T,) float32.

    Raises:
        OpenSoraError: a reference that is not there or has another size, or a start outside of reference or clip.
    """
    if latents.dim() != 4:
        raise OpenSoraError(f"got latents of shape {tuple(latents.shape)}; expected one clip (C, T, H, W)")
    placed = latents.clone()
    strength = torch.ones(latents.shape[1], dtype=torch.float32, device=latents.device)
    for placement in placements:
        if placement.loop != loop:
            continue
        reference = _reference(references, placement, latents)
        source = _start("reference_start", placement.reference_start, reference.shape[1])
        target = _start("target_start", placement.target_start, latents.shape[1])
        if alignment is not None:
            source = align_start(source, alignment, reference.shape[1])
            target = align_start(target, alignment, latents.shape[1])
        length = min(placement.length, latents.shape[1] - target, reference.shape[1] - source)
        placed[:, target : target + length] = reference[:, source : source + length].to(placed)
        strength[target : target + length] = placement.edit_ratio
    return placed, strength


def align_start(start: int, alignment: int, num_frames: int) -> int:
    """The multiple of `alignment` nearest to `start`; of two equally near, and past the last whole chunk, the lower.

    Args:
        start: a latent frame, 0 or more.
        alignment: latent frames of a chunk.
        num_frames: latent frames there are; a start never moves up out of the last whole chunk of them.
    """
    if alignment < 1:
        raise OpenSoraError(f"alignment is {alignment}; expected 1 latent frame or more")
    chunk, rest = divmod(start, alignment)
    if 2 * rest > alignment and chunk < num_frames // alignment - 1:
        chunk += 1
    return chunk * alignment


def placement_of_previous_loop(loop: int, reference: int, num_frames: int, edit_ratio: float = 0.0) -> FramePlacement:
    """The end of the previous loop's clip, as the beginning of this one.

    Args:
        loop: number of this loop, 1 or more.
        reference: under which number the previous clip was added to the references.
        num_frames: latent frames that are carried over.
        edit_ratio: how much of them is made anew, 0 to 1.
    """
    return FramePlacement(loop, reference, -num_frames, 0, num_frames, edit_ratio)


def pixel_frames(latent_frames: int, chunk_latents: int = 5, chunk_frames: int = 17) -> int:
    """Video frames of whole chunks of an autoencoder: 10 latent frames of Open-Sora 1.2 are 34 frames.

    Args:
        latent_frames: 0 or more.
        chunk_latents: latent frames of a chunk.
        chunk_frames: video frames of a chunk.

    Raises:
        OpenSoraError: not whole chunks.
    """
    if latent_frames < 0 or latent_frames % chunk_latents:
        raise OpenSoraError(
            f"{latent_frames} latent frames are no whole chunks; expected a multiple of {chunk_latents}"
        )
    return latent_frames // chunk_latents * chunk_frames


@dataclass(frozen=True)
class SizeInputs:
    """What the networks are told about a clip: height and width in pixels, their ratio, frames, frames per second.

    Plain numbers, for the precision they are rounded to is the network's affair.
    """

    height: float
    width: float
    num_frames: float
    aspect_ratio: float
    fps: float


def size_inputs(height: int, width: int, num_frames: int, fps: float) -> SizeInputs:
    """The inputs for a clip of this size; a single frame is an image and has `IMAGE_FPS`.

    Raises:
        OpenSoraError: a value that is not positive.
    """
    for name, value in {"height": height, "width": width, "num_frames": num_frames, "fps": fps}.items():
        if not value > 0:
            raise OpenSoraError(f"{name} is {value}; expected a positive number")
    rate = IMAGE_FPS if num_frames == 1 else float(fps)
    return SizeInputs(float(height), float(width), float(num_frames), height / width, rate)


def _reference(references: Sequence[torch.Tensor], placement: FramePlacement, latents: torch.Tensor) -> torch.Tensor:
    number, count = placement.reference, len(references)
    if not -count <= number < count:
        have = "there is none" if count == 0 else f"there are {count}, numbered from 0"
        raise OpenSoraError(f"the mask strategy {placement} names reference {number}, but {have}")
    reference = references[number]
    channels, _, height, width = latents.shape
    if reference.dim() != 4 or (reference.shape[0], *reference.shape[2:]) != (channels, height, width):
        raise OpenSoraError(
            f"reference {number} has latents of shape {tuple(reference.shape)}; "
            f"expected ({channels}, frames, {height}, {width}) as the clip's; crop it to the clip's size first"
        )
    return reference


def _start(name: str, start: int, num_frames: int) -> int:
    if not -num_frames <= start < num_frames:
        raise OpenSoraError(f"{name} is {start}, outside of {num_frames} latent frames (0 to {num_frames - 1})")
    return start % num_frames
