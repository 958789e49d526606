"""The format of MMDiTs, see `format`: weights of Open-Sora 2.0, and those of FLUX.1 that training started from."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opensora.contents import describe_value
from opensora.errors import OpenSoraError
from opensora.models.format import REFERENCE_OPTIONS, Format, Identity, TensorShapes, known_keywords, known_values
from opensora.models.mmdit import MMDiT
from opensora.models.mmdit_layout import convert_layout, is_fused

# The reference's keywords -> ours; the rest bear the same names.
_NAMES = {
    "context_in_dim": "caption_channels",
    "vec_in_dim": "pooled_channels",
}
_DROPPED = {"strict_load", "grad_ckpt_settings", "force_huggingface", "lora_ckpt_path", "lora_scale", "cache_dir"}
_AXES = {128: [16, 56, 56]}
"""Features of a head -> how many code frame, row and column, in all published weights."""


class _MMDiTFormat(Format):
    cls = MMDiT
    kind = "transformer"
    summary = "transformer of Open-Sora 2.0"
    prefixes = ("double_blocks.0.", "single_blocks.0.")

    # Attention and MLP of every layer, in either layout.
    lora_targets = (
        *(
            f"{stream}_attn.{layer}"
            for stream in ("img", "txt")
            for layer in ("qkv", "q_proj", "k_proj", "v_proj", "proj")
        ),
        *(f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in ("0", "2")),
        *("linear1", "q_proj", "k_proj", "v_mlp", "linear2"),
    )
    text_embedder = re.compile(r"^(txt|vector)_in\.")
    parts = {
        "conditions": re.compile(r"^(cond|guidance)_in\."),
        "first_layer": re.compile(r"^img_in\."),
        "last_layer": re.compile(r"^final_layer\.linear\."),
    }
    zero_at_first = (re.compile(r"^cond_in\."), re.compile(r"^guidance_in\.out_layer\."), parts["last_layer"])

    def identify(self, shapes: TensorShapes) -> Identity | None:
        identity = super().identify(shapes)
        return identity and replace(identity, summary=_summary(identity.config))

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        hidden_size, features = shapes.size("img_in.weight", 0), shapes.size("img_in.weight", 1)
        conditions = shapes.size("cond_in.weight", 1)
        unsure = {
            "theta": "shapes do not tell; 10000 in every published model",
            "interleaved_rope": "shapes do not tell; published weights have it where qkv is fused (FLUX), else not",
            "bf16_timesteps": "shapes do not tell; True in every published model",
            "known_frames_alone": "shapes do not tell; True in every published model",
            "model_max_length": "shapes do not tell; 512 in every published model",
        }
        cells = conditions - features if conditions and features else None  # (C + 1) p^2 - C p^2
        if cells is None:
            unsure["patch_size"] = "cond_in, which tells it, is missing; 2 in every published model without"
            cells = 4
        head_dim = shapes.size("single_blocks.0.norm.query_norm.scale", 0)
        unsure["axes_dim"] = "shapes do not tell; [16, 56, 56] in every published model, which has heads of 128"
        mlp = shapes.size("double_blocks.0.img_mlp.0.weight", 0)
        fused = shapes.has("double_blocks.0.img_attn.qkv.") or shapes.has("single_blocks.0.linear1.")
        config = known_values(
            in_channels=features // cells if features else None,
            patch_size=math.isqrt(cells),
            hidden_size=hidden_size,
            num_heads=hidden_size // head_dim if hidden_size and head_dim else None,
            depth=shapes.count("double_blocks"),
            depth_single_blocks=shapes.count("single_blocks"),
            mlp_ratio=mlp / hidden_size if mlp and hidden_size else None,
            axes_dim=_AXES.get(head_dim or 0),
            qkv_bias=shapes.has(f"double_blocks.0.img_attn.{'qkv' if fused else 'q_proj'}.bias"),
            caption_channels=shapes.size("txt_in.weight", 1),
            pooled_channels=shapes.size("vector_in.in_layer.weight", 1),
            guidance_embed=shapes.has("guidance_in."),
            cond_embed=conditions is not None,
            fused_qkv=fused,
            interleaved_rope=fused,
        )
        return config, unsure

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        return super().is_foreign_config(stored) or not _NAMES.keys().isdisjoint(stored)

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Keywords from the reference's configuration, whose `in_channels` are those of a patch."""
        renamed = {_NAMES.get(name, name): value for name, value in stored.items()}
        if "use_liger_rope" in renamed:
            renamed["interleaved_rope"] = not renamed.pop("use_liger_rope")
        if "in_channels" in renamed:
            features, patch = renamed["in_channels"], renamed.get("patch_size", 2)
            if not all(isinstance(number, int) and number > 0 for number in (features, patch)):
                raise OpenSoraError(
                    f"{where}: in_channels is {describe_value(features)} and patch_size {describe_value(patch)}; "
                    "expected whole numbers of 1 or more"
                )
            renamed["in_channels"] = features // patch**2
        return known_keywords(renamed, where, self.cls, REFERENCE_OPTIONS | _DROPPED)

    def difference(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        if config.get("cond_embed") != other.get("cond_embed"):
            return f"it has {'a' if config.get('cond_embed') else 'no'} layer for known frames"
        if config.get("patch_size") != other.get("patch_size"):
            return f"its patches have an edge of {config.get('patch_size')}"
        return None

    def complete(self, config: Mapping[str, Any], assumed: Mapping[str, Any], where: Path) -> dict[str, Any]:
        """Rotary positions, which no shape tells, are those of the published model that has the same layout."""
        same_layout = config.get("fused_qkv") == assumed.get("fused_qkv")
        told = (
            {"interleaved_rope": assumed["interleaved_rope"]} if same_layout and "interleaved_rope" in assumed else {}
        )
        return {**assumed, **config, **told}

    def from_ancestor(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """FLUX's weights, which are fused and interleaved, in the layout of the model."""
        config: Any = model.config
        stored = is_fused(weights)
        if stored == config.fused_qkv:
            return weights
        kinds = {"to_fused": config.fused_qkv, "to_interleaved": config.interleaved_rope}
        return convert_layout(weights, interleaved=stored, **kinds)


def _summary(config: Mapping[str, Any]) -> str:
    """Which of the published kinds weights are."""
    if config["cond_embed"]:
        compressed = ", for the deep compression autoencoder" if config.get("patch_size") == 1 else ""
        return _MMDiTFormat.summary + compressed
    if config["fused_qkv"]:
        return "FLUX.1 image transformer"
    return "FLUX.1 image transformer in the layout of Open-Sora 2.0"


FORMAT = _MMDiTFormat()
