"""From a name or a folder to a pipeline that is ready to run, and nothing on the way that could run foreign code.

Where a model's parts lie is found by `source.ModelSource`, how each is read stands in `components`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from opensora.adapters.adapter import read_adapter
from opensora.checkpoints.precision import dtype_named
from opensora.checkpoints.source import ModelSource, Part
from opensora.errors import OpenSoraError
from opensora.offloading import STREAMED, BlockStream, Offload, Offloader, stream_to_accelerator
from opensora.settings import expected_one_of

if TYPE_CHECKING:
    from opensora.models.autoencoders.latent_space import Override
    from opensora.pipeline import OpenSoraPipeline


def load_pipeline(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    override_latent_space: "Override | None" = None,
    components: Mapping[str, str | Path] | None = None,
    adapters: Mapping[str, float] | Mapping[Path, float] | None = None,
    download: bool = False,
    offload: Offload | bool | None = None,
) -> "OpenSoraPipeline":
    """Load a model by name or from a folder.

    Args:
        name_or_path: a bundled model ("toybox", "toybox-iddpm"), a published one ("opensora-1.2", see
            `published.PUBLISHED`), a folder that `save_pretrained` wrote, or such a folder's repository on the Hub
            ("somebody/model", or "somebody/model@revision").
        device: where it runs.
        dtype: precision of the networks; None is float32 on the CPU and bfloat16 elsewhere. int8: the weights of text
            encoders and the transformer lie in memory in eight bits, and all compute in bfloat16. Latents stay float32.
        override_latent_space: used instead of the one declared with the autoencoder's weights, or of those fields of
            it, and recorded in every output.
        components: component -> folder or file that takes the place of the model's own, in our format or in the one
            that the reference saves: "transformer", "autoencoder", "text_encoder", "tokenizer".
        adapters: adapter (its file or folder) -> how strongly it acts: 1 as it was trained, 0 not at all.
        download: fetch what this machine lacks of a published model or a repository. Nothing else ever goes to the
            network.
        offload: "networks" (or True): each network is in memory only while it works. On an accelerator it lies in the
            CPU's memory otherwise; on the CPU it is read from its files whenever it is needed. "blocks": of text
            encoders and the transformer besides only the block that works, and the next one.

    Returns:
        The pipeline, in evaluation mode on `device`.

    Raises:
        OpenSoraError: unknown name, a missing or damaged file, weights that do not fit, an adapter of another model, or
            an absent device.
    """
    if offload not in (None, False, True, *get_args(Offload)):
        raise OpenSoraError(f"`offload` is {offload!r}, {expected_one_of(offload, get_args(Offload))}")
    device = resolve_device(device)
    dtype = dtype or dtype_named(None, on_cpu=device.type == "cpu")
    merged = [(read_adapter(path), scale) for path, scale in (adapters or {}).items()]
    for adapter, _ in merged:
        adapter.log_notes()
    source = ModelSource.find(name_or_path, components, download=download)
    loaders: dict[str, Callable[[], nn.Module]] = {}
    streams: dict[str, BlockStream] = {}
    from_files = bool(offload) and device.type == "cpu"

    def load(part: Part) -> Any:
        if not part.is_network:
            return part.load_settings()
        adapted = {"adapters": merged} if part.name == "transformer" else {}
        if from_files and offload == "blocks" and part.kind in STREAMED:
            network, weights = part.open(dtype, **adapted)
            streams[part.name] = BlockStream(network, weights, str(part.path))
            return network
        options = {"dtype": dtype, **adapted}
        if part.name == "autoencoder":
            options["override_latent_space"] = override_latent_space
        loaders[part.name] = functools.partial(part.load, **options)
        network = part.load(**options, without_data=from_files, device="cpu" if offload else device)
        if part.name == "autoencoder" and override_latent_space is not None:  # none where the weights declare the same
            network.override_latent_space(dataclasses.replace(network.latent_space, replaces=None))
        return network

    pipeline = source.pipeline(load)
    pipeline.register_to_config(_name_or_path=str(name_or_path))
    if not offload:
        return pipeline.to(device)
    networks: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in (*loaders, *streams)}
    if offload == "blocks" and not from_files:
        for name in [name for name in networks if name.startswith(STREAMED)]:
            stream_to_accelerator(networks.pop(name), device)
    pipeline.offloader = Offloader(device, networks, loaders if from_files else {}, streams)
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
