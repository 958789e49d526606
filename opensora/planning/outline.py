"""A model's pipeline without its weights: every network is there with its configuration and the shapes of its tensors.

Configurations are read, weights are not, so this works for a published model that was never downloaded.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from opensora.checkpoints.identify import identify, read_header
from opensora.checkpoints.key_maps import find_config
from opensora.checkpoints.loading import (
    build_model,
    check_known,
    find_class,
    load_settings_of,
    published_settings,
)
from opensora.checkpoints.published import (
    PUBLISHED,
    PublishedModel,
    PublishedPart,
    component_folders,
    published_name,
)
from opensora.checkpoints.sources import PIPELINE_INDEX, find_folders, find_model, is_component, read_index
from opensora.checkpoints.weights import WEIGHT_SUFFIXES, read_object
from opensora.errors import OpenSoraError
from opensora.models.families import format_of
from opensora.models.format import Identity
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.tracing import Tracer


@dataclass(frozen=True)
class Outline:
    """What is known of a model before anything of it is loaded.

    Attributes:
        name: what the user calls it, and what it was taken for where that is another thing.
        pipeline: the pipeline, its networks without data; it cannot run, for it has no tokenizer either.
    """

    name: str
    pipeline: OpenSoraPipeline


def outline(tracer: Tracer, name_or_path: str | Path, components: Mapping[str, str | Path] | None = None) -> Outline:
    """The outline of a model by name, of a pipeline's folder, or of weights of one network.

    Args:
        tracer: in whose world the networks are built.
        name_or_path: as for `load_pipeline`; besides, a file of weights or a network's folder, which is completed by
            the published model that it fits.
        components: component -> path that takes its place.

    Raises:
        OpenSoraError: an unknown model, a configuration that cannot be read or fits no network, or parts that do not
            fit each other.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    full_name = published_name(name)
    if full_name is not None:
        return Outline(full_name, _published(tracer, PUBLISHED[full_name], components or {}))
    if path.is_file() or (path.is_dir() and not (path / PIPELINE_INDEX).is_file() and _holds_weights(path)):
        identity = _identify(path)
        full_name = _model_with(identity, path)
        given = {identity.kind: path, **(components or {})}
        return Outline(
            f"{path.name}, {identity.summary}, with the rest of {full_name}",
            _published(tracer, PUBLISHED[full_name], given),
        )
    return Outline(name, _folder(tracer, find_model(name_or_path), components))


def _folder(tracer: Tracer, folder: Path, given: Mapping[str, str | Path] | None) -> OpenSoraPipeline:
    index = read_index(folder)
    names = [name for name, value in index.items() if is_component(value) and not name.startswith("_")]
    defaults = {name: value for name, value in index.items() if not name.startswith("_") and name not in names}
    check_known([*names, *defaults], inspect.signature(OpenSoraPipeline.__init__).parameters, folder / PIPELINE_INDEX)
    parts: dict[str, Any] = {}
    for name, path in find_folders(folder, names, given).items():
        cls = find_class(name, *index[name])
        if issubclass(cls, nn.Module):
            own = component_folders(folder, [name])[name] / "config.json"
            config = {key: value for key, value in read_object(own).items() if not key.startswith("_")}
            if name in (given or {}):
                config = find_config(path, cls, _header(path), config)
            parts[name] = _without_data(tracer, cls, config, own)
        elif name != "tokenizer":
            parts[name] = load_settings_of(path, cls)
    needed = ("transformer", "scheduler", "autoencoder", "text_encoder")
    missing = [name for name in needed if name not in parts]
    if missing:
        raise OpenSoraError(f"{folder / PIPELINE_INDEX} names no {', '.join(missing)}; a pipeline needs {needed}")
    return OpenSoraPipeline(**parts, tokenizer=None, **defaults)


def _published(tracer: Tracer, model: PublishedModel, given: Mapping[str, str | Path]) -> OpenSoraPipeline:
    parts: dict[str, Any] = {}
    for name, part in model.parts.items():
        cls = find_class(name, *part.class_name.rsplit(".", 1))
        if issubclass(cls, nn.Module):
            path = Path(given[name]).expanduser() if name in given else Path(part.repository)
            config = find_config(path, cls, _header(path), part.config) if name in given else part.config
            parts[name] = _without_data(tracer, cls, config, path)
    parts["scheduler"], defaults = published_settings(model)
    return OpenSoraPipeline(**parts, tokenizer=None, **defaults)


def _without_data(tracer: Tracer, cls: type, config: Mapping[str, Any], path: Path) -> nn.Module:
    with tracer.without_data():
        return build_model(cls, config, path).eval()


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())


def _header(path: Path) -> Any:
    """Names and shapes, which are all that a configuration is found by, in place of weights."""
    if not path.exists():
        raise OpenSoraError(f"{path} does not exist")
    return read_header(path)


def _identify(path: Path) -> Identity:
    identity = identify(read_header(path))
    if identity is None:
        raise OpenSoraError(
            f"{path} holds weights of a network that nothing is known of; give a model's name or folder"
        )
    if not identity.supported:
        raise OpenSoraError(f"{path} holds weights of a network that this package cannot run: {identity.summary}")
    return identity


def _model_with(identity: Identity, path: Path) -> str:
    """The published model that such weights are a part of, the newest if there are several."""

    family = format_of(find_class(identity.kind, *identity.runner))

    def fits(part: PublishedPart) -> bool:
        same_class = part.class_name == ".".join(identity.runner)
        return same_class and family.difference(identity.config, part.config) is None

    fitting = [name for name, model in PUBLISHED.items() if fits(model.parts[identity.kind])]
    if not fitting:
        raise OpenSoraError(
            f"{path} holds a {identity.summary}, which no known model is made with; give a model's folder"
        )
    return fitting[-1]
