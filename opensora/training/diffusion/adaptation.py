"""Starting a transformer from weights that lack some of its parts, and choosing which of its parts are trained.

The way of Open-Sora 1.2 from an image model to a video model (PixArt, then q/k norm, rectified flow, frame rates,
temporal blocks) is a row of such starts. What is new begins so that it changes as little as it can: blocks over time
and new conditions add nothing at first, norms have weight 1, a new last layer predicts zero. Nothing is new unless it
was named, and a log line says how much of each part was.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opensora.checkpoints.components import build_model
from opensora.checkpoints.key_maps import adapt_weights
from opensora.checkpoints.source import find_part
from opensora.errors import OpenSoraError
from opensora.models.families import format_of, network_class
from opensora.models.format import Part, RenamedWeights
from opensora.models.transformer import SpaceTimeTransformer
from opensora.training.parts import META, Origin, meta_model
from opensora.weights import load_weights, read_header, read_weights

logger = logging.getLogger(__name__)


def build_transformer(
    architecture: str,
    options: dict | None,
    init_from: Origin | None,
    new_parts: tuple[Part, ...],
    device: str,
) -> SpaceTimeTransformer:
    """The transformer that a run begins with, on the CPU (or the meta device), in training mode.

    Args:
        architecture: its class, where `options` say how large it is.
        options: keywords of the class; None for those of the weights it starts from.
        init_from: a model or a transformer to start from; None for random weights.
        new_parts: parts that those weights may lack, see `start_from`.
        device: "meta" builds it without weights.

    Raises:
        OpenSoraError: neither options nor weights, or weights that do not fit.
    """
    if init_from is None:
        if options is None:
            raise OpenSoraError("a transformer needs objective.transformer (its options), or objective.init_from")
        with torch.device(META) if device == META else torch.device("cpu"):
            return build_model(network_class("transformer", architecture), options, Path("objective.transformer"))
    if device == META and options is not None:
        model = build_transformer(architecture, options, None, (), device)
        _check_start(model, init_from, new_parts)
        return model
    part = find_part(init_from, "transformer", on_disk=device != META)
    if device == META:
        return meta_model(part).train()
    if options is None and not new_parts:
        return part.load().train()
    cls = part.cls if options is None else network_class("transformer", architecture)
    model: SpaceTimeTransformer = build_model(cls, part.keywords() if options is None else options, part.path)
    start_from(model, read_weights(part.path, "transformer"), new_parts, source=str(part.path))
    return model.train()


def start_from(
    model: SpaceTimeTransformer, weights: Mapping[str, Tensor], new_parts: tuple[Part, ...], *, source: str
) -> dict[str, int]:
    """Fills a transformer with weights that lack parts of it.

    Weights of an image model or of an earlier generation may have other names, see `Format.from_ancestor`.

    Args:
        model: as its class initialises it: new parts keep these weights but for what is said below.
        weights: of whatever it starts from.
        new_parts: "qk_norm": norms of queries and keys may be missing, and have weight 1 then. "temporal_blocks":
            everything that attends along time may be missing, or is left behind with an earlier generation; its
            projections back to the tokens begin at 0. "conditions": embedders of frame rate, size and the like may be
            missing (their last layers begin at 0) or too many (they are left out). "first_layer": takes in latents, and
            is new where those of another autoencoder have another size. "last_layer": begins at 0 in any case, for a
            model that learns to predict something else. Of each, tensors of other sizes are left behind.
        source: what to call the weights in a message.

    Returns:
        Part -> how many of its tensors are new.

    Raises:
        OpenSoraError: a part is missing that was not named, or anything else does not fit.
    """
    adapted, missing = _matched(model, weights, new_parts, source)
    family, own = format_of(type(model)), model.state_dict()
    if "last_layer" in new_parts:
        missing |= {name: "last_layer" for name in own if family.part_of(name) == "last_layer"}
    new = {name: own[name] for name, part in missing.items() if part is not None}
    for name, tensor in new.items():
        if any(pattern.search(name) for pattern in family.zero_at_first):
            nn.init.zeros_(tensor)
    load_weights(model, RenamedWeights(adapted, {name: name for name in adapted}, new), source=source)
    counts = Counter(part for part in missing.values() if part is not None)
    for part in new_parts:
        logger.warning("%s: %d tensors of %s are new", source, counts[part], part)
    return dict(counts)


def _check_start(model: SpaceTimeTransformer, init_from: Origin, new_parts: tuple[Part, ...]) -> None:
    """Holds names and shapes of what a run starts from against its transformer, which has no data either.

    Weights that are not there yet, those of an earlier stage perhaps, are left out.

    Raises:
        OpenSoraError: see `start_from`.
    """
    try:
        part = find_part(init_from, "transformer", on_disk=False)
    except OpenSoraError:
        return
    if part.published is None:
        header = read_header(part.path, "transformer")
        weights = {name: torch.empty(info.shape, device=META) for name, info in header.items()}
    else:
        weights = meta_model(part).state_dict()
    adapted, _ = _matched(model, weights, new_parts, str(init_from))
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if foreign := [name for name in adapted if own.get(name) != adapted[name].shape]:
        raise OpenSoraError(
            f"{init_from}: {len(foreign)} tensors have another name or shape than those of the "
            f"{type(model).__name__} wanted here ({foreign[0]}, ...); weights and configuration are of two different "
            "models"
        )


def _matched(
    model: SpaceTimeTransformer, weights: Mapping[str, Tensor], new_parts: tuple[Part, ...], source: str
) -> tuple[Mapping[str, Tensor], dict[str, Part | None]]:
    """Weights as a model names them, and which of its tensors are missing, with their parts.

    Raises:
        OpenSoraError: a part is missing that was not named.
    """
    renamed = _renamed(model, weights, new_parts)
    family, own = format_of(type(model)), model.state_dict()
    adapted = adapt_weights(model, renamed, source)
    missing: dict[str, Part | None] = {name: family.part_of(name) for name in own if name not in adapted}
    unnamed = Counter(part for part in missing.values() if part is not None and part not in new_parts)
    if unnamed and (foreign := [name for name in adapted if name not in own and family.part_of(name) is None]):
        raise OpenSoraError(  # nothing of it would be left: no advice to begin all that anew
            f"{source} is of another network than the {type(model).__name__} wanted here: it lacks "
            f"{len(missing)} tensors ({next(iter(missing))}, ...) and holds {len(foreign)} others ({foreign[0]}, ...); "
            "give its own objective.architecture, or other weights as objective.init_from"
        )
    if unnamed:
        parts = ", ".join(f"{count} tensors of {part}" for part, count in unnamed.items())
        raise OpenSoraError(
            f"{source} lacks {parts}; if they are to be initialised, name them in objective.new_parts: "
            f"{','.join([*new_parts, *unnamed])}"
        )
    return adapted, missing


def choose_trained(
    transformer: SpaceTimeTransformer, train: Literal["all", "temporal", "spatial"], *, freeze_text_embedder: bool
) -> None:
    """Says which parameters have gradients.

    Args:
        transformer: to be trained.
        train: "temporal" for what attends along time alone, "spatial" for all the rest.
        freeze_text_embedder: keep what projects the text, and the null text, as they are.
    """
    family = format_of(type(transformer))
    for name, parameter in transformer.named_parameters():
        kind = "temporal" if family.temporal and family.temporal.search(name) else "spatial"
        frozen_text = freeze_text_embedder and family.text_embedder and family.text_embedder.search(name)
        parameter.requires_grad_(parameter.requires_grad and train in ("all", kind) and not frozen_text)


def _renamed(
    model: SpaceTimeTransformer, weights: Mapping[str, Tensor], new_parts: tuple[Part, ...]
) -> Mapping[str, Tensor]:
    """Weights of an image model or an earlier generation under the model's names, without what is left behind."""
    family, own = format_of(type(model)), model.state_dict()
    renamed = family.from_ancestor(model, weights)
    replaceable = [part for part in ("temporal_blocks", "conditions") if part in new_parts]
    kept = [name for name in renamed if name in own or family.part_of(name) not in replaceable]
    resized = [name for name in kept if family.part_of(name) in new_parts and renamed[name].shape != own[name].shape]
    return RenamedWeights(renamed, {name: name for name in kept if name not in resized})
