"""The format of CLIP's text encoder, see `format`; files that hold the image encoder as well are read without it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextModel

from opensora.contents import describe_value
from opensora.errors import OpenSoraError
from opensora.models.format import Format, Identity, RenamedWeights, TensorShapes, known_values

_WRAPPED = "text_model."  # begins all names in published files, and none in the class of today


class _CLIPFormat(Format):
    cls = CLIPTextModel
    kind = "text_encoder"
    summary = "CLIP text encoder"

    def identify(self, shapes: TensorShapes) -> Identity | None:
        for prefix in (_WRAPPED, ""):
            if shapes.has(f"{prefix}embeddings.token_embedding.", f"{prefix}embeddings.position_embedding."):
                return self.identity(*_read_shapes(shapes, prefix))
        return None

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        return "text_config" in stored  # of both encoders; transformers reads that of the text encoder alone

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if not isinstance(stored["text_config"], dict):
            raise OpenSoraError(f"{where}: text_config is {describe_value(stored['text_config'])}, expected an object")
        return stored["text_config"]

    def adapt_weights(self, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        if not any(name.startswith(_WRAPPED) for name in weights):
            return weights
        kept = {name.removeprefix(_WRAPPED): name for name in weights if name.startswith(_WRAPPED)}
        return RenamedWeights(weights, {name: stored for name, stored in kept.items() if "position_ids" not in name})


def _read_shapes(shapes: TensorShapes, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    words, layer = shapes.shape(f"{prefix}embeddings.token_embedding.weight") or (), f"{prefix}encoder.layers"
    width = words[1] if len(words) == 2 else None
    config = known_values(
        vocab_size=words[0] if words else None,
        hidden_size=width,
        intermediate_size=shapes.size(f"{layer}.0.mlp.fc1.weight", 0),
        num_hidden_layers=shapes.count(layer),
        num_attention_heads=max(1, width // 64) if width else None,
        max_position_embeddings=shapes.size(f"{prefix}embeddings.position_embedding.weight", 0),
    )
    return config, {
        "num_attention_heads": "shapes do not tell; heads of 64 in every published model",
        "hidden_act": "shapes do not tell; quick_gelu in the published models of OpenAI",
    }


FORMAT = _CLIPFormat()
