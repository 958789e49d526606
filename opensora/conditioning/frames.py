"""Frame conditioning: what a clip is made from besides text.

`FrameConditioning` holds latents, and a strength for each frame: 1 is generated from noise, 0 is kept, 0.4 is
noised and denoised for the last 0.4 of the way. The schedulers' `activate_frames` takes both. `condition` says it in
words: begin with this image, end with that one, go on where this clip ends, edit it. The way of Open-Sora's scripts is
in `conditioning.references`.

Known frames are encoded in their place (`encode_in_place`), because a latent frame means something else at another one;
but for networks that were trained to be shown frames encoded alone (`VideoTransformer.known_frames_alone`), they are a
clip by themselves.

Everything counts in latent frames unless it says otherwise.
"""

from dataclasses import dataclass

import torch

from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.offload_hooks import execution_device


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
    alone: bool = False,
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
        alone: pictures and the frames of `extend` are encoded alone, as a clip each.

    Raises:
        OpenSoraError: contradictions, a video of another height and width, too few frames in it, or nothing left to
            make.
    """
    conditioning = FrameConditioning.none(autoencoder, size)
    total = conditioning.latents.shape[2]

    def encode(video: torch.Tensor, start: int, length: int) -> torch.Tensor:
        return encode_known(autoencoder, video, size.num_frames, start, length, alone=alone)

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
        count = frames_taken_over(autoencoder, size.num_frames, start, length, alone=alone)
        _check_video("extend", extend, size, count)
        frames = extend[:, :count] if backwards else extend[:, extend.shape[1] - count :]
        conditioning = conditioning.put(encode(frames, start, length), start)
    for name, picture, start in (("image", image, 0), ("last_image", last_image, total - 1)):
        if picture is not None:
            _check_video(name, picture, size, 1)
            conditioning = conditioning.put(encode(picture[:, :1], start, 1), start)
    check_something_is_made(conditioning, size)
    return conditioning


def check_something_is_made(conditioning: FrameConditioning, size: VideoSize) -> None:
    """Raises `OpenSoraError` if all frames of a clip are conditioned on."""
    if not conditioning.strength.any():
        raise OpenSoraError(
            f"all of {size.num_frames} frames are conditioned on, so nothing is left to make; "
            "give less, or ask for more frames"
        )


def default_condition_frames(autoencoder: VideoCodec, num_frames: int, *, backwards: bool) -> int:
    """2 latent frames; going backwards, those of the last chunk if it is not the only one: it knows no other."""
    last_chunk = autoencoder.chunk_start(num_frames - 1, num_frames)
    if not backwards or autoencoder.temporal_factor == 1 or last_chunk == 0:
        return 2
    return autoencoder.latent_frames(num_frames) - first_latent_frame(autoencoder, last_chunk, num_frames)


def frames_taken_over(autoencoder: VideoCodec, num_frames: int, start: int, length: int, *, alone: bool) -> int:
    """Frames of a video that are encoded to latent frames `start` .. `start + length`; see `encode_known`."""
    if alone:
        return autoencoder.shortest_clip(length)
    first, end = frames_of(autoencoder, start, start + length, num_frames)
    return end - first


def encode_known(
    autoencoder: VideoCodec, video: torch.Tensor, num_frames: int, start: int, length: int, *, alone: bool
) -> torch.Tensor:
    """As `encode_in_place`, or, `alone`, a clip by itself, which has `length` latent frames wherever it will lie."""
    return encode_alone(autoencoder, video) if alone else encode_in_place(autoencoder, video, num_frames, start, length)


@torch.no_grad()
def encode_alone(autoencoder: VideoCodec, video: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, N, h, w) of a video (3, F, H, W) or (B, 3, F, H, W), on the autoencoder's device."""
    video = video[None] if video.ndim == 4 else video
    return autoencoder.encode_video(video.to(execution_device(autoencoder)))


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
    first, end = frames_of(autoencoder, start, start + length, num_frames)
    begin = autoencoder.chunk_start(first, num_frames)
    before = first - begin
    after = autoencoder.size_rule().frames_from(end - begin) - before - min(end - first, video.shape[2])
    video = video[:, :, : end - first]
    still_before, still_after = (video[:, :, at].unsqueeze(2) for at in (0, -1))
    whole = torch.cat(
        [still_before.expand(-1, -1, before, -1, -1), video, still_after.expand(-1, -1, after, -1, -1)], dim=2
    )
    latents = autoencoder.encode_video(whole.to(execution_device(autoencoder)))
    skipped = start - first_latent_frame(autoencoder, begin, num_frames)
    return latents[:, :, skipped : skipped + length]


def frames_of(autoencoder: VideoCodec, start: int, end: int, num_frames: int) -> tuple[int, int]:
    """The video frames that latent frames `start` .. `end` stand for; none where these are none."""
    if start == end:
        nowhere = autoencoder.frames_before(start, num_frames)
        return nowhere, nowhere
    return autoencoder.frame_span(start, num_frames)[0], autoencoder.frame_span(end - 1, num_frames)[1]


def first_latent_frame(autoencoder: VideoCodec, frame: int, num_frames: int) -> int:
    """The first latent frame of the chunk that begins at a video frame."""
    total = autoencoder.latent_frames(num_frames)
    return next(k for k in range(total + 1) if autoencoder.frames_before(k, num_frames) >= frame)


def _check_video(name: str, video: torch.Tensor, size: VideoSize, num_frames: int) -> None:
    if video.ndim != 4 or (video.shape[0], *video.shape[2:]) != (3, size.height, size.width):
        raise OpenSoraError(
            f"{name} has the shape {tuple(video.shape)}; expected (3, T, {size.height}, {size.width}), the clip's size"
        )
    if video.shape[1] < num_frames:
        raise OpenSoraError(f"{name} has {video.shape[1]} frames; this clip of {size.num_frames} needs {num_frames}")
