"""The networks that an objective is made of, each from where the user says: a model's name, a folder, a file.

On torch's meta device networks are built without reading a weight, so that a run can be planned on a machine that holds
none of them: configurations of published models are known.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from opensora.checkpoints import hub
from opensora.checkpoints.identify import identify, read_header
from opensora.checkpoints.key_maps import find_config
from opensora.checkpoints.loading import build_model, find_class, load_component, load_settings_of
from opensora.checkpoints.published import BUNDLED, PUBLISHED, component_folders, published_name
from opensora.checkpoints.sources import PIPELINE_INDEX, is_component, read_index
from opensora.checkpoints.weights import cast_weights
from opensora.errors import OpenSoraError

PartName = Literal["transformer", "autoencoder", "text_encoder", "tokenizer"]
META = "meta"

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Untrained:
    """A network of random weights, the same every time: for runs that try the machinery.

    Attributes:
        options: keywords of its class.
        seed: which weights.
    """

    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


Origin = str | Path
"""A model's name, the folder of a pipeline, or a network's own folder or file."""


@dataclass(frozen=True)
class Found:
    """Where a part lies.

    Attributes:
        path: its folder or file; what to call it where nothing is read.
        class_name: module and class, where the origin says so.
        config: keywords of the class, where they are known without the files.
    """

    path: Path
    class_name: tuple[str, str] | None = None
    config: Mapping[str, Any] | None = None


def find_part(origin: Origin, name: PartName, *, on_disk: bool = True) -> Found:
    """A part of a model.

    Args:
        origin: where to look.
        name: which part.
        on_disk: whether its files are needed.

    Raises:
        OpenSoraError: it is not there; of a published model the message says how to fetch it.
    """
    full_name = published_name(str(origin))
    if full_name is not None:
        part = PUBLISHED[full_name].parts[name]
        module, _, class_name = part.class_name.rpartition(".")
        cached = hub.look_up(part)
        path = hub.part_path(part, cached)
        if path is None and on_disk:
            size = hub.gigabytes(part.size_bytes)
            raise OpenSoraError(
                f"the {name} of {full_name} ({part.repository}, {size}) is not on this machine; "
                f"fetch it by: {hub.fetch_command(part)}"
            )
        return Found(path or Path(part.repository), (module, class_name), part.config)
    known = BUNDLED.get(str(origin))
    folder = known.folder if known is not None else Path(origin).expanduser()
    if (folder / PIPELINE_INDEX).is_file():
        entry = read_index(folder).get(name)
        if not is_component(entry):
            raise OpenSoraError(f"{folder / PIPELINE_INDEX} names no {name}")
        assert entry is not None
        return Found(component_folders(folder, [name])[name], (entry[0], entry[1]))
    if not folder.exists():
        raise OpenSoraError(f"no {name} in {origin}; train it first, or give a model's name, its folder or its weights")
    return Found(folder)


def build_part(
    origin: Origin | Untrained,
    name: PartName,
    cls: type[Network],
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network on a device, in evaluation mode and without gradients: one that is used and not trained.

    Raises:
        OpenSoraError: see `find_part` and `load_component`.
    """
    if isinstance(origin, Untrained):
        with torch.random.fork_rng(devices=[]), _on(device):
            torch.manual_seed(origin.seed)
            network = build_model(cls, origin.options, Path(f"objective.{name}"))
        cast_weights(network, dtype)
    else:
        found = find_part(origin, name, on_disk=device != META)
        if device == META:
            network = outline(found, cls, dtype)
        else:
            network = load_component(found.path, cls, dtype, config=found.config)
    return network.to(device).requires_grad_(False).eval()


def outline(found: Found, cls: type[Network], dtype: torch.dtype = torch.float32) -> Network:
    """The network of a part on the meta device; of its weights, names and shapes are read at most."""
    config = found.config
    if config is None:
        header: Any = read_header(found.path)
        config = find_config(found.path, cls, header)
    with _on(META):
        network = build_model(cls, config, found.path)
    cast_weights(network, dtype)
    return network


def transformer_class(found: Found) -> type[nn.Module]:
    """The class of a transformer, as its folder says or its tensors tell.

    Raises:
        OpenSoraError: they are those of no network that is known.
    """
    if found.class_name is not None:
        return find_class("transformer", *found.class_name)
    identity = identify(read_header(found.path))
    if identity is None or not identity.supported or identity.kind != "transformer":
        what = "an unknown network" if identity is None else identity.summary
        raise OpenSoraError(f"{found.path} holds {what}; expected a transformer of this family")
    return find_class("transformer", *identity.runner)


def find_tokenizer(origin: Origin) -> Any:
    """The tokenizer of a model, or the one in a text encoder's own folder.

    Raises:
        OpenSoraError: there is none.
    """
    found = find_part(origin, "tokenizer")
    if found.class_name is None:
        from transformers import AutoTokenizer

        return load_settings_of(found.path, AutoTokenizer)
    return load_settings_of(found.path, find_class("tokenizer", *found.class_name))


def _on(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.device(META) if device == META else contextlib.nullcontext()
