"""The autoencoder that a run begins with, and the scaling factor that belongs to it.

Frame latents are scaled before the temporal autoencoder sees them, and what is trained on them is bound to that factor:

- training on top of a video autoencoder keeps the factor it was trained with, be it right or wrong: that of Open-Sora
  1.2 was trained with 0.18215 although its spatial part, SDXL's, asks for 0.13025;
- a temporal part trained from scratch takes the spatial autoencoder's own factor, and 1 / std of its latents where it
  declares none;
- whoever wants another says so in `scaling_factor`, and not on top of a temporal part that knows another.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.components import build_model
from opensora.checkpoints.key_maps import adapt_weights
from opensora.checkpoints.source import find_part
from opensora.containers.files import is_there
from opensora.contents import read_object
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.joint import JointCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.families import network_class
from opensora.settings import load_settings, save_settings
from opensora.training.parts import META, meta_model
from opensora.training.vae.settings import VAESettings
from opensora.weights import load_weights, read_weights


def build_autoencoder(config: VAESettings, device: str) -> tuple[Any, bool]:
    """The autoencoder of a run's first step, and whether its scaling factor is known.

    One that is a single network has no scaled frame latents inside, so its factor is what its configuration says.

    On the meta device nothing is read that is not there: `config.autoencoder` then says what there will be.

    Raises:
        OpenSoraError: nothing to begin with, or a scaling factor other than the one the weights were trained with.
    """
    if config.init_from is not None and not (device == META and _is_missing(config.init_from)):
        return _go_on(config, config.init_from, device), True
    if config.autoencoder is None:
        raise OpenSoraError(f"stage {config.stage} needs objective.init_from or objective.autoencoder to begin with")
    with torch.device(device):
        cls = network_class("autoencoder", config.architecture)
        autoencoder = build_model(cls, config.autoencoder, Path("objective.autoencoder"))
    if isinstance(autoencoder, JointCodec):
        return autoencoder, True
    known, space = "latent_space" in config.autoencoder, autoencoder.latent_space
    if config.spatial_from is not None and device != META:
        factor = _load_spatial(autoencoder, Path(config.spatial_from))
        if factor is not None:
            known, space = True, LatentSpace(factor, trained_with=f"configuration of {config.spatial_from}")
    if config.scaling_factor is not None:
        known, space = True, LatentSpace(config.scaling_factor, trained_with="objective.scaling_factor")
    if device != META:
        autoencoder.set_latent_space(space)
    return autoencoder, known


def _is_missing(origin: str) -> bool:
    try:
        find_part(origin, "autoencoder", on_disk=False)
    except OpenSoraError:
        return True
    return False


def _go_on(config: VAESettings, origin: str, device: str) -> Any:
    """The autoencoder of a stage before, or a released one, with its own scaling factor."""
    if _is_missing(origin):
        raise OpenSoraError(
            f"stage {config.stage!r} starts from {origin}, which is not there; "
            "train the stage before, or set objective.init_from"
        )
    part = find_part(origin, "autoencoder", on_disk=device != META)
    if device == META:
        return meta_model(part)
    autoencoder = part.load().to(device)
    factor = autoencoder.latent_space.factor
    if config.scaling_factor is not None and abs(config.scaling_factor / factor - 1) > 1e-6:
        raise OpenSoraError(
            f"objective.scaling_factor is {config.scaling_factor:g}, but {origin} was trained with {factor:g}; "
            "leave it out, or train a temporal part from scratch (objective.spatial_from)"
        )
    return autoencoder


def _load_spatial(autoencoder: VideoAutoencoder, path: Path) -> float | None:
    """Fills the spatial part from diffusers' AutoencoderKL; returns the scaling factor that it declares, if any."""
    if not is_there(path):
        raise OpenSoraError(
            f"{path} is missing; put a spatial autoencoder of diffusers there, or set objective.spatial_from"
        )
    weights = adapt_weights(
        autoencoder, read_weights(path, "autoencoder"), str(path)
    )  # named as parts of a video autoencoder
    load_weights(nn.ModuleDict({"spatial_vae": autoencoder.spatial_vae}), weights, source=str(path))
    described = path / "config.json"
    # diffusers fills in a factor where the file has none, so the file itself is asked.
    return read_object(described).get("scaling_factor") if described.is_file() else None


@torch.no_grad()
def measure_scaling_factor(
    autoencoder: VideoAutoencoder, videos: Iterable[Tensor], measured_on: str, cache: Path | None = None
) -> LatentSpace:
    """Declares 1 / std of the frame latents as the scaling factor.

    Args:
        autoencoder: whose spatial part makes the latents.
        videos: batches (B, 3, T, H, W) in [-1, 1]; read one by one.
        measured_on: what they are, for whoever reads the checkpoint.
        cache: folder that keeps the figure, so that a run that is resumed goes on with the same.
    """
    kept = None if cache is None else cache / "latent_space.json"
    if kept is not None and kept.exists():
        space = load_settings(LatentSpace, kept)
    else:
        count, total, squares = 0, 0.0, 0.0
        for video in videos:
            latents = autoencoder.encode_frames(video).mode().double()
            count, total = count + latents.numel(), total + float(latents.sum())
            squares += float(latents.square().sum())
        if count < 2:
            raise OpenSoraError("no frame latents to measure a scaling factor on; set objective.scaling_factor")
        variance = (squares - total**2 / count) / (count - 1)
        trained_with = f"1 / std of the frame latents of {measured_on}"
        space = replace(LatentSpace(variance**-0.5), trained_with=trained_with)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_settings(space, kept)
    autoencoder.set_latent_space(space)
    return space
