"""A model's pipeline without its weights: every network is there with its configuration and the shapes of its tensors.

Configurations are read, weights are not, so this works for a published model that was never downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.checkpoints.components import find_class
from opensora.checkpoints.folders import is_pipeline, locate
from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.published_parts import PublishedPart
from opensora.checkpoints.source import ModelSource, Part
from opensora.containers.files import split_choice
from opensora.containers.tensors import WEIGHT_SUFFIXES
from opensora.errors import OpenSoraError
from opensora.models.families import format_of
from opensora.models.format import Identity
from opensora.models.identify import identify
from opensora.pipeline import OpenSoraPipeline
from opensora.planning.tracing import Tracer
from opensora.weights import read_header


@dataclass(frozen=True)
class MetaPipeline:
    """What is known of a model before anything of it is loaded.

    Attributes:
        name: what the user calls it, and what it was taken for where that is another thing.
        pipeline: the pipeline, its networks without data; it cannot run, for it has no tokenizer either.
    """

    name: str
    pipeline: OpenSoraPipeline


def meta_pipeline(
    tracer: Tracer, name_or_path: str | Path, components: Mapping[str, str | Path] | None = None
) -> MetaPipeline:
    """The pipeline of a model, without data, by name, of a pipeline's folder, or of weights of one network.

    Args:
        tracer: in whose world the networks are built.
        name_or_path: as for `load_pipeline`; besides, a file of weights or a network's folder, which is completed by
            the published model that it fits.
        components: component -> path that takes its place.

    Raises:
        OpenSoraError: an unknown model, a configuration that cannot be read or fits no network, or parts that do not
            fit each other.
    """
    name, path = str(name_or_path), locate(name_or_path)
    is_model = is_pipeline(path)
    if split_choice(path)[0].is_file() or (path.is_dir() and not is_model and _holds_weights(path)):
        identity = _identify(path)
        full_name = _model_with(identity, path)
        source = ModelSource.find(full_name, {identity.kind: path, **(components or {})}, on_disk=False)
        name = f"{path.name}, {identity.summary}, with the rest of {full_name}"
    else:
        source = ModelSource.find(name_or_path, components, on_disk=False)
        name = source.name

    def build(part: Part) -> Any:
        if part.is_network:
            with tracer.without_data():
                return part.build().eval()
        return None if part.name.startswith("tokenizer") else part.load_settings()

    return MetaPipeline(name, source.pipeline(build))


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())


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

    fitting = [name for name, model in PUBLISHED.items() if any(map(fits, model.parts.values()))]
    if not fitting:
        raise OpenSoraError(
            f"{path} holds a {identity.summary}, which no known model is made with; give a model's folder"
        )
    return fitting[-1]
