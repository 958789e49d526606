"""The formats that weights of the family are published in, turned into the keywords and names of this package.

Three kinds of `config.json` are read besides our own: that of the reference's models (saved by transformers), that of
diffusers' autoencoders, and T5's. A keyword that nothing is known of is refused, one that only says how the reference
computes is dropped. Where a file has no configuration beside it, the shapes of its tensors tell what they can. What is
true of one family of networks alone stands beside it, see `models.format`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opensora.checkpoints.published import PUBLISHED
from opensora.containers.runs import described_in
from opensora.contents import read_object, shown
from opensora.errors import OpenSoraError
from opensora.models.families import format_of
from opensora.models.format import Format, Identity
from opensora.models.identify import identify
from opensora.weights import read_header


def find_config(path: Path, cls: type[nn.Module], assumed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keywords of a class for the weights at a path: as its `config.json` says, else as shapes tell.

    Args:
        path: a component's folder, or a file of weights.
        cls: what is to be built.
        assumed: keywords that stand where neither `config.json` nor shapes say anything, as a published model has
            them.

    Raises:
        OpenSoraError: the weights are another network's, the configuration has an unknown keyword, or there is none
            and shapes do not suffice.
    """
    family = format_of(cls)
    where = described_in(path, family.kind)
    stored = read_object(where) if where.is_file() else None
    if stored is not None and not family.is_foreign_config(stored):
        named = stored.get("_class_name", cls.__name__)
        if named != cls.__name__:
            raise OpenSoraError(
                f"{where} describes another network than the {cls.__name__} wanted here: {shown(named)}"
            )
        return stored
    base = _told_by_shapes(path, family, identify(read_header(path, family.kind)), assumed)
    return base if stored is None else base | family.translate_config(stored, where, base, assumed)


def _told_by_shapes(
    path: Path, family: Format, identity: Identity | None, assumed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The assumed keywords, corrected by what shapes tell."""
    if identity is None:
        if assumed is None:
            raise OpenSoraError(f"{path} holds no config.json and tensors of an unknown network; give its folder")
        return dict(assumed)
    config = family.config_of(identity)
    if config is None:
        wanted = family.cls.__name__
        raise OpenSoraError(f"{path} holds another network than the {wanted} wanted here: {identity.summary}")
    if assumed is None and family.assumes_published(config):
        assumed = _published_config(family, config)
    return config if assumed is None else family.complete(config, assumed, path)


def _published_config(family: Format, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the published network of a family that could take the place of one with these keywords."""
    class_name = f"{family.library}.{family.cls.__name__}"
    parts = [getattr(model, family.kind or "") for model in PUBLISHED.values()]
    fitting = (part.config for part in parts if part.class_name == class_name)
    return next((known for known in fitting if family.difference(config, known) is None), None)


def adapt_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Weights under the names of a model of this package; those that are so already come back unchanged.

    Args:
        model: what they are for.
        weights: as stored.
        source: what to call them in a log line.
    """
    return format_of(type(model)).adapt_weights(model, weights, source)
