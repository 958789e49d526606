"""References: videos and pictures of which frames are placed into a clip, as mask strategies say it.

A list of `FramePlacement` (see `models.text.prompts`) says which latent frames of which reference go where.
`place_references` takes them out of the references' latents; networks that are shown frames encoded alone are given
those of `place_pieces`, of which each is a clip by itself.

Everything counts in latent frames unless it says otherwise.
"""

from collections.abc import Callable, Sequence

import torch

from opensora.conditioning.frames import (
    FrameConditioning,
    check_something_is_made,
    encode_alone,
    first_latent_frame,
    frames_of,
)
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.offload_hooks import execution_device
from opensora.models.text.prompts import FramePlacement


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


def place_pieces(
    autoencoder: VideoCodec,
    size: VideoSize,
    placements: Sequence[FramePlacement],
    reference_frames: Sequence[int],
    read: Callable[[int, slice], torch.Tensor],
    *,
    loop: int = 0,
) -> FrameConditioning:
    """Frames of references in their place, each placement's encoded alone.

    Args:
        autoencoder: encodes them.
        size: of the clip.
        placements: what goes where, as in `place_references`.
        reference_frames: how many video frames each reference has.
        read: number of a reference and which frames -> (3, T, H, W) in [-1, 1].
        loop: the loop of a long video this clip is.

    Raises:
        OpenSoraError: a reference that is not there, a start outside of reference or clip, or nothing left to make.
    """
    conditioning = FrameConditioning.none(autoencoder, size)
    total = conditioning.latents.shape[2]
    for placement in placements:
        if placement.loop == loop:
            number = _check_number(placement, len(reference_frames))
            chosen = piece_of(autoencoder, placement, reference_frames[number])
            target = _start("target_start", placement.target_start, total)
            latents = encode_alone(autoencoder, read(number, chosen))[:, :, : total - target]
            conditioning = conditioning.put(latents, target, placement.edit_ratio)
    check_something_is_made(conditioning, size)
    return conditioning


def piece_of(autoencoder: VideoCodec, placement: FramePlacement, num_frames: int) -> slice:
    """The frames of a video of `num_frames` that make a clip of the latent frames that a placement takes.

    A start that is counted from the end of the reference means its last frames, whole latent frames or not.

    Raises:
        OpenSoraError: a start outside of the reference.
    """
    whole = autoencoder.size_rule().frames_within(num_frames)
    total = autoencoder.latent_frames(whole)
    start = _start("reference_start", placement.reference_start, total)
    length = min(placement.length, total - start)
    count = autoencoder.shortest_clip(length)
    if placement.reference_start < 0:
        end = num_frames - (total - start - length) * autoencoder.temporal_factor
        return slice(end - count, end)
    first = autoencoder.frames_before(start, whole)
    return slice(first, first + count)


def taken_latents(
    placements: Sequence[FramePlacement], reference: int, count: int, num_latents: int, alignment: int | None
) -> tuple[int, int]:
    """The first latent frame of a reference that any placement takes, and one past the last; (0, 0) if none does.

    Args:
        placements: of all loops.
        reference: number of the reference,
        count: of so many.
        num_latents: latent frames that it has.
        alignment: see `place_references`.

    Raises:
        OpenSoraError: a start outside of the reference.
    """
    taken = []
    for placement in placements:
        if placement.reference % count == reference:
            start = _start("reference_start", placement.reference_start, num_latents)
            start = start if alignment is None else align_start(start, alignment, num_latents)
            taken.append((start, min(start + placement.length, num_latents)))
    return (min(start for start, _ in taken), max(end for _, end in taken)) if taken else (0, 0)


@torch.no_grad()
def encode_span(
    autoencoder: VideoCodec,
    read: Callable[[slice], torch.Tensor],
    num_frames: int,
    span: tuple[int, int],
) -> torch.Tensor:
    """Latents of a video of which only some will be used: only the chunks in which those lie are read and encoded.

    Args:
        autoencoder: encodes.
        read: reads frames of the video, (3, T, H, W) in [-1, 1].
        num_frames: that it has.
        span: first latent frame that will be used, and one past the last.

    Returns:
        (C, N, h, w), zeros outside of those chunks, on the autoencoder's device.
    """
    first, end = frames_of(autoencoder, *span, num_frames)
    begin, end = autoencoder.chunk_start(first, num_frames), max(end, first + 1)
    while end < num_frames and autoencoder.chunk_start(end, num_frames) != end:
        end += 1
    end = begin + autoencoder.size_rule().frames_from(end - begin)  # with the frame that chunks may share
    latents = autoencoder.encode_video(read(slice(begin, end))[None].to(execution_device(autoencoder)))[0]
    total = autoencoder.latent_frames(num_frames)
    start = first_latent_frame(autoencoder, begin, num_frames)
    whole = latents.new_zeros(latents.shape[0], total, *latents.shape[2:])
    whole[:, start : start + latents.shape[1]] = latents
    return whole


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
        edit_ratio: their denoising strength, 0 to 1.
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


def _check_number(placement: FramePlacement, count: int) -> int:
    """Number of the reference that a placement names, of `count`; from the end where it is negative."""
    number = placement.reference
    if not -count <= number < count:
        have = "there is none" if count == 0 else f"there are {count}, numbered from 0"
        raise OpenSoraError(f"the mask strategy {placement} names reference {number}, but {have}")
    return number % count


def _reference(references: Sequence[torch.Tensor], placement: FramePlacement, latents: torch.Tensor) -> torch.Tensor:
    number = _check_number(placement, len(references))
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
