"""What the formats of the space-time transformers of Open-Sora 1.0 to 1.3 share, see `format`.

Parameter names are the published ones already; what differs is less than a line each: position tables that are derived
anew, and the length of the null text.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.format import (
    REFERENCE_OPTIONS,
    Format,
    Identity,
    RenamedWeights,
    TensorShapes,
    known_keywords,
    known_values,
)

_COMPUTED = ("pos_embed", "pos_embed_temporal", "rope.freqs")
_NULL_TEXT = "y_embedder.y_embedding"
_PATCHES = "x_embedder.proj.weight"
_LAST_LAYER = re.compile(r"^final_layer\.linear\.")

logger = logging.getLogger(__name__)


class SpaceTimeFormat(Format):
    """Recognised by its blocks; a subclass names them.

    Attributes:
        first_block: prefix of the first block that attends within frames.
        dropped: options of the reference's configuration that change nothing in this class.
    """

    kind = "transformer"
    first_block: str
    dropped: frozenset[str] = frozenset({"input_size", "space_scale", "time_scale", "no_temporal_pos_emb"})

    # Of every block: attention along its axes (1.0 and 1.1 have two of them), attention to the text, and the MLP.
    lora_targets = (
        *("attn.qkv", "attn.proj"),
        *("attn_temp.qkv", "attn_temp.proj"),
        *("cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
        *("mlp.fc1", "mlp.fc2"),
    )
    temporal = re.compile(r"^temporal_blocks\.|\.attn_temp\.|\.scale_shift_table_temporal$|^t_block_temp\.")
    text_embedder = re.compile(r"^y_embedder\.")
    parts = {
        "temporal_blocks": temporal,
        "qk_norm": re.compile(r"\.(q|k)_norm\."),
        "conditions": re.compile(r"^(fps|fl|csize|ar)_embedder\."),
        "last_layer": _LAST_LAYER,
    }
    zero_at_first = (
        re.compile(r"^temporal_blocks\.\d+\.(attn\.proj|cross_attn\.proj|mlp\.fc2)\."),
        re.compile(r"\.attn_temp\.proj\."),
        re.compile(r"^(fps|fl|csize|ar)_embedder\.mlp\.2\."),
        _LAST_LAYER,
    )

    def identify(self, shapes: TensorShapes) -> Identity | None:
        """What these tensors are; None if they are no network of this family."""
        if not self.recognises(shapes):
            return None
        null_text = shapes.shape(_NULL_TEXT) or ()
        two = (null_text[0], null_text[1]) if len(null_text) == 2 else None
        return self.identity(*self.read_shapes(shapes), null_text=two)

    def recognises(self, shapes: TensorShapes) -> bool:
        """Whether these are tensors of this family."""
        return shapes.has(*self.prefixes) and len(shapes.shape(_PATCHES) or (0,) * 5) == 5

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        """Keywords that all of these transformers have, and those that shapes cannot tell."""
        patch = shapes.shape(_PATCHES)
        hidden_size, in_channels = (patch[0], patch[1]) if patch else (shapes.size("t_embedder.mlp.0.weight", 0), None)
        patch_size = list(patch[2:]) if patch else None
        out_features = shapes.size("final_layer.linear.weight", 0)
        pred_sigma = None
        if patch_size and out_features and in_channels:
            pred_sigma = out_features == 2 * in_channels * math.prod(patch_size)
        mlp = shapes.size(f"{self.first_block}.mlp.fc1.weight", 0)
        unsure = {"exact_gelu": "shapes do not tell; False in every published model"}
        if shapes.shape(_NULL_TEXT) is None:
            unsure["model_max_length"] = f"the null text ({_NULL_TEXT}), which tells it, is missing"
        config = known_values(
            in_channels=in_channels,
            pred_sigma=pred_sigma,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=shapes.count(self.first_block.removesuffix(".0")),
            mlp_ratio=mlp / hidden_size if mlp and hidden_size else None,
            caption_channels=shapes.size("y_embedder.y_proj.fc1.weight", 1) or shapes.size(_NULL_TEXT, 1),
            model_max_length=shapes.size(_NULL_TEXT, 0),
        )
        return config, unsure

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Keywords from the reference's configuration."""
        return known_keywords(stored, where, self.cls, REFERENCE_OPTIONS | self.dropped)

    def adapt_weights(self, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        """Position tables as the model derives them, and a null text of the model's length."""
        own = model.state_dict()
        computed = (name for name in _COMPUTED if name in own and (name not in weights or name != "rope.freqs"))
        replaced = {name: own[name] for name in computed}
        stored, wanted = weights.get(_NULL_TEXT), len(own[_NULL_TEXT])
        if stored is not None and stored.ndim == 2 and 0 < len(stored) != wanted:
            what = "cut" if len(stored) > wanted else "lengthened by its last token"
            logger.warning("%s: the null text of %d tokens is %s to %d", source, len(stored), what, wanted)
            replaced[_NULL_TEXT] = torch.cat([stored, stored[-1:].expand(max(wanted - len(stored), 0), -1)])[:wanted]
        names = {name: name for name in weights if name in own or name not in _COMPUTED}
        return RenamedWeights(weights, names, replaced)

    def from_ancestor(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An image model's patches have no depth in time."""
        replaced = {}
        if _PATCHES in weights and weights[_PATCHES].ndim == 4:
            replaced[_PATCHES] = weights[_PATCHES].unsqueeze(2)
        return RenamedWeights(weights, {self.name_of_ancestor(name): name for name in weights}, replaced)

    def name_of_ancestor(self, name: str) -> str:
        """This family's name of what an image model or an earlier generation calls so."""
        return name


def read_heads(
    shapes: TensorShapes, config: Mapping[str, Any], unsure: dict[str, str], attention: str
) -> dict[str, Any]:
    """Heads and their norm; the width of a head stands in its norm, and half of it in the rotary frequencies.

    Args:
        shapes: of the tensors.
        config: keywords that are known already.
        unsure: takes what cannot be told.
        attention: prefix of an attention layer.
    """
    unsure["input_sq_size"] = "shapes do not tell; 512 in every published model"
    normed, rotated = shapes.size(f"{attention}.q_norm.weight", 0), shapes.size("rope.freqs", 0)
    head_dim = normed or (2 * rotated if rotated else None)
    hidden_size = config.get("hidden_size")
    if head_dim is None or hidden_size is None:
        unsure["num_heads"] = "the rotary frequencies (rope.freqs), which tell it, are missing"
        return {"qk_norm": normed is not None}
    return {"num_heads": hidden_size // head_dim, "qk_norm": normed is not None}
