"""The three stages of making a clip, each as a computation that can be run by itself, on real or on meta networks.

    text     the text encoder reads the prompt
    denoise  one step of the transformer, on all branches of guidance
    decode   the autoencoder turns latents into pixels

What runs is the pipeline's own code as far as it takes memory; tokens, latents and timesteps have arbitrary values.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from opensora.denoiser import Denoiser
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.tiles import TiledCodec
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.guidance import GuidanceStep
from opensora.models.int8 import computing_dtype
from opensora.offloading import Offload
from opensora.pipeline import OpenSoraPipeline
from opensora.weights import cast_weights

COMPONENT_OF = {"text": "text_encoder", "denoise": "transformer", "decode": "autoencoder"}
"""Stage -> the network that works in it, in the order in which they run."""


@dataclass(frozen=True)
class Choices:
    """How a clip is made, as far as memory is concerned.

    Attributes:
        dtype: precision of the networks; int8 for weights in eight bits, see `opensora.models.int8`.
        offload: what is in memory only while it works, see `opensora.offloading`; None for nothing.
        sequential_guidance: the branches of guidance one after the other instead of in one batch.
        micro_batch_size: frames that the autoencoder decodes at once; None for all.
        tile_frames: likewise in tiles that overlap, of a `TiledCodec`; None for its own.
    """

    dtype: torch.dtype
    offload: Offload | None = None
    sequential_guidance: bool = False
    micro_batch_size: int | None = None
    tile_frames: int | None = None


@dataclass(frozen=True)
class Clip:
    """What is to be made.

    Attributes:
        size: of the clip.
        guided: whether there is more than one branch.
        conditioned: whether known frames are shown to the network beside the noise.
        num_videos: clips in one batch.
    """

    size: VideoSize
    guided: bool = True
    conditioned: bool = False
    num_videos: int = 1


def network_of(pipeline: OpenSoraPipeline, stage: str, choices: Choices) -> nn.Module:
    """The network that works in a stage, or several in one, set up as chosen."""
    names = pipeline.text_conditioner.encoders if stage == "text" else (COMPONENT_OF[stage],)
    networks = [cast_weights(getattr(pipeline, name), computing_dtype(choices.dtype)) for name in names]
    network = networks[0] if len(networks) == 1 else nn.ModuleList(networks)
    if isinstance(network, VideoCodec):
        network.micro_batch_size = choices.micro_batch_size
    if isinstance(network, TiledCodec):
        network.enable_tiling(tile_sample_frames=choices.tile_frames)
    return network


@torch.no_grad()
def run_stage(pipeline: OpenSoraPipeline, stage: str, clip: Clip, choices: Choices) -> None:
    """Does the work of one stage; its network is the one of `network_of`."""
    {"text": _text, "denoise": _denoise, "decode": _decode}[stage](pipeline, clip, choices)


def alike(pipeline: OpenSoraPipeline, stage: str) -> list[Sequence[tuple[Any, str]]]:
    """Parts of a stage that need the same memory for inputs of the same shapes, see `Tracer.peak_bytes`.

    Blocks of one make; micro batches and chunks of frames.
    """
    if stage == "denoise":
        groups: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
        for block in pipeline.transformer.blocks:
            groups[repr(block)].append((block, "forward"))
        return list(groups.values())
    if stage == "decode":
        return [[call] for call in pipeline.autoencoder.decoders()]
    return []


def branches_of(pipeline: OpenSoraPipeline, clip: Clip) -> tuple[str, ...]:
    """Branches of guidance in the first step, in which no model's own rule leaves any out."""
    if not clip.guided:
        return ("text",)
    rule = pipeline.guidance_rule()
    return rule.branches(GuidanceStep(0, 1000, 1000.0, clip.conditioned))


def _text(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    conditioner = pipeline.text_conditioner
    conditioner.encode_tokens(conditioner.blank_tokens(clip.num_videos, torch.get_default_device()))


def _denoise(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    conditioner, latents, size = pipeline.text_conditioner, _latents(pipeline, clip), clip.size
    clip_conditions = ClipConditions(pipeline.config.fps, size.height, size.width, size.num_frames)
    text = conditioner.blank_states(clip.num_videos, latents.device, computing_dtype(choices.dtype))
    # Texts and frames have values, too: of branches that read the same one alone would be computed.
    null = None if conditioner.null_prompt is None else replace(text, states=text.states + 1)
    known = None
    if clip.conditioned:
        known = ChannelConditioning(latents + 1, torch.ones(latents.shape[0], latents.shape[2], dtype=torch.bool))
    denoiser = Denoiser(
        pipeline.transformer,
        conditioner.branches(text, null),
        clip_conditions,
        channels=known,
        sequential=choices.sequential_guidance,
    )
    names = branches_of(pipeline, clip)
    denoiser(names, latents, torch.full((clip.num_videos,), 500.0), step=0, num_steps=1)


def _decode(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    pipeline.decode(_latents(pipeline, clip), clip.size.num_frames)


def _latents(pipeline: OpenSoraPipeline, clip: Clip) -> torch.Tensor:
    size, autoencoder = clip.size, pipeline.autoencoder
    latent_size = autoencoder.latent_size((size.num_frames, size.height, size.width))
    return torch.zeros(clip.num_videos, autoencoder.latent_channels, *latent_size)
