"""The format of T5's encoder, see `format`; files that hold the decoder as well are read without it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import T5EncoderModel

from opensora.models.format import Format, Identity, RenamedWeights, TensorShapes, known_values

# Width of the text states -> what the size is called.
_SIZES = {512: "small", 768: "base", 1024: "large", 2048: "XL", 4096: "XXL"}
_BLOCK = "encoder.block.0.layer"


class _T5Format(Format):
    cls = T5EncoderModel
    kind = "text_encoder"
    summary = "T5 text encoder"
    prefixes = (f"{_BLOCK}.0.SelfAttention.q.",)

    def identify(self, shapes: TensorShapes) -> Identity | None:
        identity = super().identify(shapes)
        if identity is None:
            return None
        gated = shapes.has(f"{_BLOCK}.1.DenseReluDense.wi_0.")
        size = _SIZES.get(identity.config.get("d_model", 0))
        summary = f"T5 {'v1.1 ' if gated else ''}text encoder" + (f", size {size}" if size and gated else "")
        if shapes.has("decoder.block.0."):
            summary += "; with the decoder, which is not used"
        return replace(identity, summary=summary)

    def read_shapes(self, shapes: TensorShapes) -> tuple[dict[str, Any], dict[str, str]]:
        vocabulary = shapes.shape("shared.weight") or shapes.shape("encoder.embed_tokens.weight") or (None, None)
        attention = shapes.shape(f"{_BLOCK}.0.SelfAttention.q.weight") or (None, None)
        bias = f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight"
        heads = shapes.size(bias, 1)
        gated = shapes.has(f"{_BLOCK}.1.DenseReluDense.wi_0.")
        config = known_values(
            vocab_size=vocabulary[0],
            d_model=attention[1],
            d_kv=attention[0] // heads if attention[0] and heads else None,
            d_ff=shapes.size(f"{_BLOCK}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 0),
            num_layers=shapes.count("encoder.block"),
            num_heads=heads,
            relative_attention_num_buckets=shapes.size(bias, 0),
            feed_forward_proj="gated-gelu" if gated else "relu",
        )
        return config, {"relative_attention_max_distance": "shapes do not tell; 128 in every published model"}

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        return False  # transformers reads its own

    def adapt_weights(self, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        kept = {name: name for name in weights if not name.startswith(("decoder.", "lm_head."))}
        return RenamedWeights(weights, kept)


FORMAT = _T5Format()
