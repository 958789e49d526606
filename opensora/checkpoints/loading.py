"""From a name or a folder to a pipeline that is ready to run, and nothing on the way that could run foreign code.

Where a model's parts lie is found by `source.ModelSource`, how each is read stands in `components`.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opensora.checkpoints.adapters import read_adapter
from opensora.checkpoints.source import ModelSource, Part
from opensora.errors import OpenSoraError
from opensora.offloading import Offloader

if TYPE_CHECKING:
    from opensora.models.autoencoders.latent_space import LatentSpace
    from opensora.pipeline import OpenSoraPipeline


def load_pipeline(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    override_latent_space: "LatentSpace | None" = None,
    components: Mapping[str, str | Path] | None = None,
    adapters: Mapping[str, float] | Mapping[Path, float] | None = None,
    download: bool = False,
    offload: bool = False,
) -> "OpenSoraPipeline":
    """Load a model by name or from a folder.

    Args:
        name_or_path: a bundled model ("toybox", "toybox-iddpm"), a published one ("opensora-1.2", see
            `published.PUBLISHED`), a folder that `save_pretrained` wrote, or such a folder's repository on the Hub
            ("somebody/model").
        device: where it runs.
        dtype: precision of the networks; None is float32 on the CPU and bfloat16 elsewhere. Latents stay float32.
        override_latent_space: used instead of the one declared with the autoencoder's weights, and recorded in every
            output.
        components: component -> folder or file that takes the place of the model's own, in our format or in the one
            that the reference saves: "transformer", "autoencoder", "text_encoder", "tokenizer".
        adapters: adapter (its file or folder) -> how strongly it acts: 1 as it was trained, 0 not at all.
        download: fetch what this machine lacks of a published model or a repository. Nothing else ever goes to the
            network.
        offload: each network is in memory only while it works. On an accelerator it lies in the CPU's memory otherwise;
            on the CPU it is read from its files whenever it is needed.

    Returns:
        The pipeline, in evaluation mode on `device`.

    Raises:
        OpenSoraError: unknown name, a missing or damaged file, weights that do not fit, an adapter of another model, or
            an absent device.
    """
    device = resolve_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    merged = [(read_adapter(path), scale) for path, scale in (adapters or {}).items()]
    source = ModelSource.find(name_or_path, components, download=download)
    loaders: dict[str, Callable[[], nn.Module]] = {}

    def load(part: Part) -> Any:
        if not part.is_network:
            return part.load_settings()
        options = {
            "dtype": dtype,
            "adapters": merged if part.name == "transformer" else (),
            "override_latent_space": override_latent_space if part.name == "autoencoder" else None,
        }
        loaders[part.name] = functools.partial(part.load, **options)
        network = part.load(**options, without_data=offload and device.type == "cpu")
        if part.name == "autoencoder" and override_latent_space is not None:
            network.override_latent_space(override_latent_space)
        return network

    pipeline = source.pipeline(load)
    pipeline.register_to_config(_name_or_path=str(name_or_path))
    if not offload:
        return pipeline.to(device)
    networks = {name: getattr(pipeline, name) for name in loaders}
    pipeline.offloader = Offloader(device, networks, loaders if device.type == "cpu" else {})
    with pipeline.on_device("autoencoder"):
        pass  # a damaged one shows now, and not when everything else is done
    return pipeline


def choose_device(name: str | None) -> torch.device:
    """The device of that name; for None an accelerator if there is one, else the CPU.

    Raises:
        OpenSoraError: no such device, or it is absent here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return resolve_device(name or accelerator or "cpu")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        OpenSoraError: no such device, or it is absent here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise OpenSoraError(f"device {str(device)!r} is not available; here there is: {here}") from error
    return found
