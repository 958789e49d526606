"""The three stages of making a clip, each as a computation that can be run by itself, on real or on meta networks.

    text     the text encoder reads the prompt
    denoise  one step of the transformer, on the conditional and the unconditional branch
    decode   the autoencoder turns latents into pixels

What runs is the pipeline's own code as far as it takes memory; tokens, latents and timesteps have arbitrary values.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensora.checkpoints.weights import cast_weights
from opensora.denoiser import Denoiser
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.clip_conditions import ClipConditions
from opensora.pipeline import OpenSoraPipeline

COMPONENT_OF = {"text": "text_encoder", "denoise": "transformer", "decode": "autoencoder"}
"""Stage -> the network that works in it, in the order in which they run."""


@dataclass(frozen=True)
class Choices:
    """How a clip is made, as far as memory is concerned.

    Attributes:
        dtype: precision of the networks.
        offload: each network is in memory only while it works.
        sequential_guidance: the branches of guidance one after the other instead of in one batch.
        micro_batch_size: frames that the autoencoder decodes at once; None for all.
    """

    dtype: torch.dtype
    offload: bool = False
    sequential_guidance: bool = False
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Clip:
    """What is to be made.

    Attributes:
        size: of the clip.
        guided: whether there is an unconditional branch.
        num_videos: clips in one batch.
    """

    size: VideoSize
    guided: bool = True
    num_videos: int = 1


def network_of(pipeline: OpenSoraPipeline, stage: str, choices: Choices) -> nn.Module:
    """The network that works in a stage, set up as chosen."""
    network = cast_weights(getattr(pipeline, COMPONENT_OF[stage]), choices.dtype)
    if isinstance(network, VideoCodec):
        network.micro_batch_size = choices.micro_batch_size
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


def _text(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    conditioner = pipeline.text_conditioner
    conditioner.encode_tokens(conditioner.blank_tokens(clip.num_videos, torch.get_default_device()))


def _denoise(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    conditioner, latents, size = pipeline.text_conditioner, _latents(pipeline, clip), clip.size
    clip_conditions = ClipConditions(pipeline.config.fps, size.height, size.width, size.num_frames)
    text = conditioner.blank_states(clip.num_videos, latents.device, choices.dtype)
    branches = conditioner.branches(text, None)
    denoiser = Denoiser(pipeline.transformer, branches, clip_conditions, sequential=choices.sequential_guidance)
    names = tuple(branches) if clip.guided else tuple(branches)[:1]
    denoiser(names, latents, torch.full((clip.num_videos,), 500.0), step=0, num_steps=1)


def _decode(pipeline: OpenSoraPipeline, clip: Clip, choices: Choices) -> None:
    pipeline._decode(_latents(pipeline, clip), clip.size, "pt")


def _latents(pipeline: OpenSoraPipeline, clip: Clip) -> torch.Tensor:
    size, autoencoder = clip.size, pipeline.autoencoder
    latent_size = autoencoder.latent_size((size.num_frames, size.height, size.width))
    return torch.zeros(clip.num_videos, autoencoder.latent_channels, *latent_size)
