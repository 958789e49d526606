"""Starting a transformer from weights that lack some of its parts, and choosing which of its parts are trained.

The way of Open-Sora 1.2 from an image model to a video model (PixArt, then q/k norm, rectified flow, frame rates,
temporal blocks) is a row of such starts. What is new begins so that it changes as little as it can: blocks over time
and new conditions add nothing at first, norms have weight 1, a new last layer predicts zero. Nothing is new unless it
was named, and a log line says how much of each part was.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opensora.checkpoints.key_maps import adapt_weights, find_config
from opensora.checkpoints.loading import build_model, load_component
from opensora.checkpoints.weights import RenamedWeights, load_weights, read_weights
from opensora.errors import OpenSoraError
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.transformer import SpaceTimeTransformer
from opensora.training.parts import META, Origin, find_part, outline, transformer_class

Architecture = Literal["STDiT", "STDiT2", "STDiT3"]
NewPart = Literal["qk_norm", "temporal_blocks", "conditions", "last_layer"]

ARCHITECTURES: dict[str, type[SpaceTimeTransformer]] = {"STDiT": STDiT, "STDiT2": STDiT2, "STDiT3": STDiT3}

_TEMPORAL = re.compile(r"^temporal_blocks\.|\.attn_temp\.|\.scale_shift_table_temporal$|^t_block_temp\.")
_CONDITIONS = re.compile(r"^(fps|fl|csize|ar)_embedder\.")
_QK_NORM = re.compile(r"\.(q|k)_norm\.")
_LAST_LAYER = re.compile(r"^final_layer\.linear\.")
_BLOCK = re.compile(r"^blocks\.")

logger = logging.getLogger(__name__)


def build_transformer(
    architecture: Architecture,
    options: dict | None,
    init_from: Origin | None,
    new_parts: tuple[NewPart, ...],
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
            return build_model(ARCHITECTURES[architecture], options, Path("objective.transformer"))
    if device == META and options is not None:  # what the weights would be does not matter
        return build_transformer(architecture, options, None, (), device)
    found = find_part(init_from, "transformer", on_disk=device != META)
    cls = transformer_class(found) if options is None else ARCHITECTURES[architecture]
    if device == META:
        return outline(found, cls).train()  # type: ignore[return-value]
    if options is None and not new_parts:
        return load_component(found.path, cls, config=found.config).train()  # type: ignore[return-value]
    weights = read_weights(found.path)
    if options is None:
        options = dict(found.config or find_config(found.path, cls, weights))
    model: SpaceTimeTransformer = build_model(cls, options, found.path)
    start_from(model, weights, new_parts, source=str(found.path))
    return model.train()


def start_from(
    model: SpaceTimeTransformer, weights: Mapping[str, Tensor], new_parts: tuple[NewPart, ...], *, source: str
) -> dict[str, int]:
    """Fills a transformer with weights that lack parts of it.

    Weights of an image model or of an earlier generation (`blocks.0.attn...`) become a STDiT3's spatial blocks.

    Args:
        model: as its class initialises it: new parts keep these weights but for what is said below.
        weights: of whatever it starts from.
        new_parts: "qk_norm": norms of queries and keys may be missing, and have weight 1 then. "temporal_blocks":
            everything that attends along time may be missing, or is left behind with an earlier generation; its
            projections back to the tokens begin at 0. "conditions": embedders of frame rate, size and the like may be
            missing (their last layers begin at 0) or too many (they are left out). "last_layer": begins at 0 in any
            case, for a model that learns to predict something else.
        source: what to call the weights in a message.

    Returns:
        Part -> how many of its tensors are new.

    Raises:
        OpenSoraError: a part is missing that was not named, or anything else does not fit.
    """
    renamed = _renamed(model, weights, new_parts)
    own = model.state_dict()
    adapted = adapt_weights(model, renamed, source)
    missing = {name: _part_of(name) for name in own if name not in adapted}
    unnamed = Counter(part for part in missing.values() if part is not None and part not in new_parts)
    if unnamed:
        told = ", ".join(f"{count} tensors of {part}" for part, count in unnamed.items())
        raise OpenSoraError(
            f"{source} lacks {told}; if they are to begin anew, name them in objective.new_parts: "
            f"{','.join([*new_parts, *unnamed])}"
        )
    if "last_layer" in new_parts:
        missing |= {name: "last_layer" for name in own if _LAST_LAYER.search(name)}
    new = {name: own[name] for name, part in missing.items() if part is not None}
    for name, tensor in new.items():
        if _begins_at_zero(name):
            nn.init.zeros_(tensor)
    load_weights(model, RenamedWeights(adapted, {name: name for name in adapted}, new), source=source)
    counts = Counter(part for part in missing.values() if part is not None)
    for part in new_parts:
        logger.warning("%s: %d tensors of %s are new", source, counts[part], part)
    return dict(counts)


def choose_trained(
    transformer: SpaceTimeTransformer, train: Literal["all", "temporal", "spatial"], *, freeze_text_embedder: bool
) -> None:
    """Says which parameters have gradients.

    Args:
        transformer: to be trained.
        train: "temporal" for what attends along time alone, "spatial" for all the rest.
        freeze_text_embedder: keep what projects the text, and the null text, as they are.
    """
    for name, parameter in transformer.named_parameters():
        kind = "temporal" if _TEMPORAL.search(name) else "spatial"
        frozen_text = freeze_text_embedder and name.startswith("y_embedder.")
        parameter.requires_grad_(parameter.requires_grad and train in ("all", kind) and not frozen_text)


def _renamed(
    model: SpaceTimeTransformer, weights: Mapping[str, Tensor], new_parts: tuple[NewPart, ...]
) -> Mapping[str, Tensor]:
    """Weights of an image model or an earlier generation under the model's names."""
    own = model.state_dict()
    names: dict[str, str] = {}
    for name in weights:
        here = _BLOCK.sub("spatial_blocks.", name) if isinstance(model, STDiT3) else name
        part = _part_of(name)
        left_behind = here not in own and part in ("temporal_blocks", "conditions") and part in new_parts
        if not left_behind:
            names[here] = name
    patches = "x_embedder.proj.weight"
    replaced = {}
    if patches in weights and weights[patches].ndim == 4:  # an image model's patches have no depth in time
        replaced[patches] = weights[patches].unsqueeze(2)
    return RenamedWeights(weights, names, replaced)


def _part_of(name: str) -> NewPart | None:
    """The part that a tensor belongs to, of those that may be new."""
    if _TEMPORAL.search(name):
        return "temporal_blocks"
    if _QK_NORM.search(name):
        return "qk_norm"
    if _CONDITIONS.search(name):
        return "conditions"
    return "last_layer" if _LAST_LAYER.search(name) else None


_ZERO_AT_FIRST = (
    re.compile(r"^temporal_blocks\.\d+\.(attn\.proj|cross_attn\.proj|mlp\.fc2)\."),
    re.compile(r"\.attn_temp\.proj\."),
    re.compile(r"^(fps|fl|csize|ar)_embedder\.mlp\.2\."),
    _LAST_LAYER,
)


def _begins_at_zero(name: str) -> bool:
    return any(pattern.search(name) for pattern in _ZERO_AT_FIRST)
