"""A trained pipeline as a folder that the rest of the package loads."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.models.autoencoders.codec import VideoCodec
from opensora.pipeline import OpenSoraPipeline
from opensora.weights import cast_weights, fingerprint


def copies(networks: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The networks once more, in another precision."""
    return {name: cast_weights(copy.deepcopy(network), dtype) for name, network in networks.items()}


def origin_of_latents(autoencoder: VideoCodec) -> dict[str, object]:
    """What a pipeline records as `trained_on`."""
    return {
        "latent_space": autoencoder.latent_space.to_dict(),
        "autoencoder": fingerprint(autoencoder.state_dict()),
    }


def save_pipeline(pipeline: OpenSoraPipeline, folder: Path, *, with_text_encoder: bool) -> None:
    """Writes a pipeline.

    Args:
        pipeline: to be written.
        folder: where.
        with_text_encoder: False leaves the weights of text encoders out and writes their configurations: T5 is the
            largest part of a published model, and never trained. The folder is then loaded with
            `components={"text_encoder": ...}`.
    """
    if with_text_encoder:
        pipeline.save_pretrained(folder)
        return
    parts: dict[str, Any] = {name: part for name, part in pipeline.components.items() if part is not None}
    for name, part in parts.items():
        if name.startswith("text_encoder"):
            part.config.save_pretrained(folder / name)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
