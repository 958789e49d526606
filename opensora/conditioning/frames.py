"""Frame conditioning: what a clip is made from besides text.

`FrameConditioning` holds latents, and a strength for each frame: 1 is generated from noise, 0 is kept, 0.4 is
noised and denoised for the last 0.4 of the way. The schedulers' `activate_frames` takes both. There are two ways to it:

- `condition` says it in words: begin with this image, end with that one, go on where this clip ends, edit it.
- `place_references` is the reference's way: a list of `FramePlacement` (see `models.text.prompts`) says which latent
  frames of which reference go where.

Everything counts in latent frames unless it says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.offload_hooks import execution_device
from opensora.models.text.prompts import FramePlacement


@dataclass(frozen=True)
class FrameConditioning:
    """Frames that a model is conditioned on instead of making them up.

    Attributes:
        latents: normalised, (B, C, T, h, w), B = 1 for the same frames in every clip; what frames of strength 1 hold
            does not matter.
        strength: (B, T) in [0, 1], the denoising strength of each frame.

    Raises:
        OpenSoraError: shapes that do not belong together, or a strength out of range.
    """

    latents: torch.Tensor
    strength: torch.Tensor

    def __post_init__(self) -> None:
        expected = (self.latents.shape[0], self.latents.shape[2]) if self.latents.ndim == 5 else None
        if self.strength.shape != expected:
            raise OpenSoraError(
                f"conditioning frames have latents of shape {tuple(self.latents.shape)} and strengths of "
                f"{tuple(self.strength.shape)}; expected (B, C, T, h, w) and (B, T)"
            )
        if not ((self.strength >= 0) & (self.strength <= 1)).all():
            raise OpenSoraError("the denoising strength of a frame is outside of 0 (kept) to 1 (generated)")

    @classmethod
    def none(cls, autoencoder: VideoCodec, size: VideoSize) -> "FrameConditioning":
        """No frame conditioned on yet, for a clip of this size."""
        latent_size = autoencoder.latent_size((size.num_frames, size.height, size.width))
        return cls(torch.zeros(1, autoencoder.latent_channels, *latent_size), torch.ones(1, latent_size[0]))

    def put(self, latents: torch.Tensor, start: int, strength: float = 0.0) -> "FrameConditioning":
        """The same with latents (B, C, n, h, w) at `start`, in place of what was there."""
        batch, end = max(len(latents), len(self.latents)), start + latents.shape[2]
        held, strengths = (
            tensor.repeat(batch // len(tensor), *[1] * (tensor.ndim - 1)) for tensor in vars(self).values()
        )
        held[:, :, start:end] = latents.to(held)
        strengths[:, start:end] = strength
        return FrameConditioning(held, strengths)


def condition(
    autoencoder: VideoCodec,
    size: VideoSize,
    *,
    image: torch.Tensor | None = None,
    last_image: torch.Tensor | None = None,
    extend: torch.Tensor | None = None,
    backwards: bool = False,
    condition_frames: int | None = None,
    edit: torch.Tensor | None = None,
    strength: float | None = None,
) -> FrameConditioning:
    """Frame conditioning, said in words; all videos are (3, T, H, W) in [-1, 1] of the clip's height and width.

    Args:
        autoencoder: encodes them.
        size: of the clip that is to be made.
        image: its first frame.
        last_image: its last frame; together with `image` it connects two pictures. Kept best where that frame is a
            chunk of the autoencoder (18 or 52 frames for chunks of 17).
        extend: a clip that this one goes on from: it begins with the last frames of that one.
        backwards: it ends with the first frames of `extend` instead.
        condition_frames: latent frames taken over from `extend`; None for 2, or for the last chunk when going
            backwards in a clip of several.
        edit: a clip to denoise again; what is left of it shapes the result.
        strength: its denoising strength, 0 to 1.

    Raises:
        OpenSoraError: contradictions, a video of another height and width, too few frames in it, or nothing left to
            make.
    """
    conditioning = FrameConditioning.none(autoencoder, size)
    total = conditioning.latents.shape[2]
    if edit is not None:
        if any(other is not None for other in (image, last_image, extend)):
            raise OpenSoraError("a clip to edit gives all frames; leave out image, last_image and extend")
        if strength is None:
            raise OpenSoraError(
                "a clip to edit needs a denoising strength; give strength, from 0 (kept) to 1 (generated)"
            )
        _check_video("edit", edit, size, size.num_frames)
        return conditioning.put(encode_in_place(autoencoder, edit, size.num_frames, 0, total), 0, strength)
    if strength is not None:
        raise OpenSoraError("strength says how much of a clip is edited; give the clip as edit")
    if extend is not None:
        taken_at = "last" if backwards else "first"
        if (last_image if backwards else image) is not None:
            raise OpenSoraError(f"the {taken_at} frames come from extend already; leave out the {taken_at} image")
        length = condition_frames
        if length is None:
            length = default_condition_frames(autoencoder, size.num_frames, backwards=backwards)
        if not 0 < length < total:
            raise OpenSoraError(f"{length} of {total} latent frames to be taken over; expected 1 to {total - 1}")
        start = total - length if backwards else 0
        first, end = (autoencoder.frames_before(frame, size.num_frames) for frame in (start, start + length))
        _check_video("extend", extend, size, end - first)
        frames = extend[:, : end - first] if backwards else extend[:, extend.shape[1] - (end - first) :]
        conditioning = conditioning.put(encode_in_place(autoencoder, frames, size.num_frames, start, length), start)
    for name, picture, start in (("image", image, 0), ("last_image", last_image, total - 1)):
        if picture is not None:
            _check_video(name, picture, size, 1)
            conditioning = conditioning.put(
                encode_in_place(autoencoder, picture[:, :1], size.num_frames, start, 1), start
            )
    if not conditioning.strength.any():
        raise OpenSoraError(
            f"all of {size.num_frames} frames are conditioned on, so nothing is left to make; "
            "give less, or ask for more frames"
        )
    return conditioning


def default_condition_frames(autoencoder: VideoCodec, num_frames: int, *, backwards: bool) -> int:
    """2 latent frames; going backwards, those of the last chunk if it is not the only one: it knows no other."""
    last_chunk = autoencoder.chunk_start(num_frames - 1, num_frames)
    if not backwards or autoencoder.temporal_factor == 1 or last_chunk == 0:
        return 2
    return autoencoder.latent_frames(num_frames) - autoencoder.latent_frames(last_chunk)


@torch.no_grad()
def encode_in_place(
    autoencoder: VideoCodec, video: torch.Tensor, num_frames: int, start: int, length: int
) -> torch.Tensor:
    """Latent frames `start` .. `start + length` of a clip of which only those frames are known.

    A latent frame means something else at another place of its chunk, so the frames are encoded where they stand: what
    comes before them in the chunk is taken to be their first frame, standing still; a video that is too short stands
    still at its end.

    Args:
        autoencoder: encodes.
        video: the known frames, (3, F, H, W) or (B, 3, F, H, W).
        num_frames: frames of the whole clip.
        start: first latent frame.
        length: number of latent frames.

    Returns:
        (B, C, length, h, w), on the autoencoder's device; B = 1 for a single video.
    """
    video = video[None] if video.ndim == 4 else video
    first, end = autoencoder.frames_before(start, num_frames), autoencoder.frames_before(start + length, num_frames)
    begin = autoencoder.chunk_start(first, num_frames)
    before = first - begin
    after = autoencoder.size_rule().frames_from(end - begin) - before - min(end - first, video.shape[2])
    video = video[:, :, : end - first]
    still_before, still_after = (video[:, :, at].unsqueeze(2) for at in (0, -1))
    whole = torch.cat(
        [still_before.expand(-1, -1, before, -1, -1), video, still_after.expand(-1, -1, after, -1, -1)], dim=2
    )
    latents = autoencoder.encode_video(whole.to(execution_device(autoencoder)))
    skipped = start - next(k for k in range(start + 1) if autoencoder.frames_before(k, num_frames) >= begin)
    return latents[:, :, skipped : skipped + length]


def _check_video(name: str, video: torch.Tensor, size: VideoSize, num_frames: int) -> None:
    if video.ndim != 4 or (video.shape[0], *video.shape[2:]) != (3, size.height, size.width):
        raise OpenSoraError(
            f"{name} has the shape {tuple(video.shape)}; expected (3, T, {size.height}, {size.width}), the clip's size"
        )
    if video.shape[1] < num_frames:
        raise OpenSoraError(f"{name} has {video.shape[1]} frames; this clip of {size.num_frames} needs {num_frames}")


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
