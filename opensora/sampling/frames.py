"""Frame conditioning of a call, in whatever way: pictures and videos in memory, or conditioning made before."""

from typing import Any

import torch
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, condition
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.media.transforms import clips_of
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.schedulers.frames import Generators, choose_frames, noise_like
from opensora.sampling.finite import check_finite


def condition_on_pictures(
    autoencoder: VideoCodec,
    size: VideoSize,
    num_prompts: int,
    *,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    strength: float | None = None,
    alone: bool = False,
) -> FrameConditioning:
    """What `conditioning.frames.condition` makes of pictures in memory, of which there is one at least.

    Args:
        autoencoder: encodes them.
        size: of the clips that are made.
        num_prompts: of the call.
        image: the first frame, one for all prompts or one each, see `media.transforms.clips_of`.
        last_image: the last frame, likewise.
        video: a clip to denoise again, likewise.
        strength: its denoising strength.
        alone: pictures are encoded alone.

    Returns:
        One row for all prompts, or one each.

    Raises:
        OpenSoraError: something that is no picture or video, another number of them than of prompts, too short a video,
            or contradictions.
    """
    if strength is not None and video is None:
        raise OpenSoraError(
            f"got strength={strength} and no video; strength is the denoising strength of a video; give it as video"
        )
    given = {"image": image, "last_image": last_image, "video": video}
    clips: dict[str, list[Tensor]] = {}
    for name, frames in given.items():
        if frames is None:
            continue
        try:
            clips[name] = clips_of(frames, size.height, size.width, pictures=name != "video")
        except OpenSoraError as error:
            raise OpenSoraError(f"{name}: {error}") from None
        if len(clips[name]) not in (1, num_prompts):
            raise OpenSoraError(f"{name}: got {len(clips[name])} for {num_prompts} prompts; give one, or one each")
    for clip in clips.get("video", ()):
        if clip.shape[1] < size.num_frames:
            raise OpenSoraError(f"video: got {clip.shape[1]} frames for a clip of {size.num_frames}; give as many")
    rows = []
    for k in range(max(map(len, clips.values()))):
        chosen: dict[str, Any] = {
            "edit" if name == "video" else name: each[k % len(each)] for name, each in clips.items()
        }
        rows.append(condition(autoencoder, size, strength=strength, alone=alone, **chosen))
    return FrameConditioning(torch.cat([row.latents for row in rows]), torch.cat([row.strength for row in rows]))


def repeat_each(conditioning: FrameConditioning, times: int) -> FrameConditioning:
    """Every row so often, its copies one after the other; a single row is for all clips."""
    if len(conditioning.latents) == 1:
        return conditioning
    return FrameConditioning(
        conditioning.latents.repeat_interleave(times, dim=0), conditioning.strength.repeat_interleave(times, dim=0)
    )


def begin_with(
    conditioning: FrameConditioning | None, noise: Tensor, *, in_channels: bool = False
) -> tuple[Tensor, Tensor | None, ChannelConditioning | None]:
    """What a run starts from.

    Args:
        conditioning: frames to condition on.
        noise: (B, C, T', H', W').
        in_channels: frames of strength 0 are shown to the network in channels beside the noise, and generated.

    Returns:
        Latents to start from, (B, C, T', H', W'); the denoising strength of each frame, (B, T'), None for 1 everywhere;
        and frames that are shown beside the noise, None for none.

    Raises:
        OpenSoraError: frames of another size, of another number of clips, or that are not finite.
    """
    if conditioning is None:
        return noise, None, None
    check_finite(conditioning.latents, "the latents of the conditioning frames")
    if conditioning.latents.shape[0] not in (1, len(noise)) or conditioning.latents.shape[1:] != noise.shape[1:]:
        raise OpenSoraError(
            f"conditioning frames have latents of shape {tuple(conditioning.latents.shape)}, this run has "
            f"{tuple(noise.shape)}; encode frames for this size, and for every clip or for all at once"
        )
    strength = conditioning.strength.to(noise.device, torch.float32).expand(len(noise), -1)
    held, channels = conditioning.latents.to(noise).expand_as(noise), None
    known = strength == 0
    if in_channels and known.any():
        channels, strength = ChannelConditioning(held, known), torch.where(known, 1.0, strength)
    # A frame of strength 1 is all noise: nothing is left of what was conditioning.
    sample = torch.where(strength[:, None, :, None, None] < 1, held, noise)
    return sample, None if in_channels and bool((strength == 1).all()) else strength, channels


def renoise_known_frames(
    sample: Tensor,
    channels: ChannelConditioning,
    scheduler: Any,
    timestep: Tensor,
    *,
    generator: Generators = None,
    noise: Tensor | None = None,
) -> Tensor:
    """A sample with frames that are known noised to `timestep` in their place (SDEdit).

    Args:
        sample: (B, C, T', H', W'), at this timestep.
        channels: the known frames.
        scheduler: of the run.
        timestep: of the step that comes.
        generator: source of `noise`; a list holds one per clip.
        noise: standard normal noise like `sample`, fresh in every step.
    """
    noise = noise_like(sample, generator) if noise is None else noise
    return choose_frames(channels.mask, scheduler.add_noise(channels.latents, noise, timestep), sample)
