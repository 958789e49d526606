"""The formats that weights of the family are published in, turned into the keywords and names of this package.

Three kinds of `config.json` are read besides our own: that of the reference's models (saved by transformers), that of
diffusers' autoencoders, and T5's. A keyword that nothing is known of is refused, one that only says how the reference
computes is dropped. Where a file has no configuration beside it, the shapes of its tensors tell what they can.

Parameter names are the published ones already; what differs is less than a line each: position tables that are derived
anew, names of attention layers from before 2023, the decoder of T5, and the length of the null text.
"""

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, T5EncoderModel

from opensora.checkpoints.identify import Identity, identify
from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.weights import RenamedWeights, read_object
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.stdit import STDiT
from opensora.models.transformer import SpaceTimeTransformer

logger = logging.getLogger(__name__)

# How the reference computes or trains, which changes no result here.
_DROPPED = {
    "drop_path",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "force_huggingface",
    "freeze",
    "freeze_y_embedder",
    "from_pretrained",
    "only_train_temporal",
    "skip_y_embedder",
    "type",
}
# Of the first generation; the later ones take any size, and their positions along time are rotary.
_FIRST_GENERATION = {"input_size", "space_scale", "time_scale", "no_temporal_pos_emb"}

# diffusers' autoencoders that a VideoAutoencoder applies to frames.
_FRAME_AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderKLTemporalDecoder)}

_COMPUTED = ("pos_embed", "pos_embed_temporal", "rope.freqs")
_NULL_TEXT = "y_embedder.y_embedding"
_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
_NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- configurations ---------------------------------------------------------------------------------------------------


def class_that_runs(identity: Identity) -> tuple[str, str]:
    """Module and name of the class for such weights: diffusers' autoencoders are run inside a VideoAutoencoder."""
    if identity.class_name in _FRAME_AUTOENCODERS:
        return VideoAutoencoder.__module__, VideoAutoencoder.__name__
    return identity.library, identity.class_name


def find_config(
    path: Path, cls: type, weights: Mapping[str, Tensor], assumed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keywords of a class for the weights at a path: as its `config.json` says, else as shapes tell.

    Args:
        path: a component's folder, or a file of weights.
        cls: what is to be built.
        weights: those of the path.
        assumed: keywords that stand where neither `config.json` nor shapes say anything, as a published model has
            them.

    Raises:
        OpenSoraError: the weights are another network's, the configuration has an unknown keyword, or there is none
            and shapes do not suffice.
    """
    stored = read_object(path / "config.json") if (path / "config.json").is_file() else None
    if stored is not None and (issubclass(cls, PreTrainedModel) or _is_ours(stored)):
        return stored
    base = _told_by_shapes(path, cls, identify(weights), assumed)
    if stored is None:
        return base
    where = path / "config.json"
    if stored.get("_class_name") in _FRAME_AUTOENCODERS:
        return base | _frame_autoencoder(stored, where, assumed)
    if issubclass(cls, VideoAutoencoder):
        return base | _video_autoencoder(stored, where, base)
    return base | _transformer(stored, where, cls)


def _is_ours(stored: Mapping[str, Any]) -> bool:
    """Saved by this package, and not by the reference or as an autoencoder of diffusers."""
    by_transformers = "model_type" in stored or "architectures" in stored or "transformers_version" in stored
    return not by_transformers and stored.get("_class_name") not in _FRAME_AUTOENCODERS


def _told_by_shapes(
    path: Path, cls: type, identity: Identity | None, assumed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The assumed keywords, corrected by what shapes tell."""
    if identity is None:
        if assumed is None:
            raise OpenSoraError(f"{path} holds no config.json and tensors of an unknown network; give its folder")
        return dict(assumed)
    config = dict(identity.config)
    if issubclass(cls, VideoAutoencoder) and identity.class_name in _FRAME_AUTOENCODERS:
        over_time = identity.class_name == AutoencoderKLTemporalDecoder.__name__
        config = {"spatial": config, "temporal_decoder": {} if over_time else None}
    elif identity.class_name != cls.__name__:
        raise OpenSoraError(f"{path} holds another network than the {cls.__name__} wanted here: {identity.summary}")
    if assumed is None and issubclass(cls, VideoAutoencoder) and config.get("temporal"):
        assumed = PUBLISHED["opensora-1.2"].autoencoder.config  # the only released one with a part over time
    if assumed is None:
        return config
    merged = {**assumed, **config}
    # The 2D autoencoder with the temporal decoder takes other keywords than the one without.
    same_kind = (assumed.get("temporal_decoder") is None) == (config.get("temporal_decoder") is None)
    for name in ("spatial", "temporal", "temporal_decoder") if same_kind else ("temporal",):
        if isinstance(assumed.get(name), Mapping) and isinstance(merged[name], Mapping):
            merged[name] = {**assumed[name], **merged[name]}
    if isinstance(assumed.get("temporal"), Mapping) and config.get("temporal", 0) is None:
        raise OpenSoraError(f"{path} holds the 2D part of the autoencoder alone; the part over time is missing")
    return merged


def _transformer(stored: Mapping[str, Any], where: Path, cls: type) -> dict[str, Any]:
    """Keywords of a transformer from the reference's configuration."""
    if stored.get("no_temporal_pos_emb") and issubclass(cls, STDiT):
        raise OpenSoraError(f"{where}: no_temporal_pos_emb is set; a {cls.__name__} has positions along time")
    dropped = _DROPPED | {"no_temporal_pos_emb"} if issubclass(cls, STDiT) else _DROPPED | _FIRST_GENERATION
    return _known_keywords(stored, where, cls, dropped)


def _video_autoencoder(stored: Mapping[str, Any], where: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the autoencoder from the reference's configuration, which names its parts and says little of them."""
    values = dict(stored)
    for name, kind in (("vae_2d", "VideoAutoencoderKL"), ("vae_temporal", "VAE_Temporal_SD")):
        part = values.pop(name, None) or {}
        if part.get("type", kind) != kind:
            raise OpenSoraError(f"{where}: {name} is a {part['type']}; expected a {kind}")
        if "micro_batch_size" in part:
            values.setdefault("micro_batch_size", part["micro_batch_size"])
    latent_space = dict(base.get("latent_space") or {})
    channels = base["temporal"]["latent_channels"] if base.get("temporal") else base["spatial"]["latent_channels"]
    for name in ("shift", "scale"):
        value = values.pop(name, None)
        if value is not None:
            latent_space[name] = [float(value)] * channels if isinstance(value, int | float) else list(value)
    dropped = _DROPPED | {"freeze_vae_2d", "cal_loss"}
    return {**_known_keywords(values, where, VideoAutoencoder, dropped), "latent_space": latent_space}


def _frame_autoencoder(stored: Mapping[str, Any], where: Path, assumed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keywords of the video autoencoder from diffusers' one, which may declare a scaling factor of its own."""
    cls = _FRAME_AUTOENCODERS[stored["_class_name"]]
    spatial = _known_keywords(stored, where, cls, set())
    default = inspect.signature(cls.__init__).parameters["scaling_factor"].default
    space = (assumed or {}).get("latent_space", {"scaling_factor": default})
    factor = spatial.pop("scaling_factor", space["scaling_factor"])
    if factor != space["scaling_factor"] or assumed is None:
        space = {"scaling_factor": factor, "trained_with": "a 2D autoencoder that declares this factor"}
    return {"spatial": spatial, "latent_space": space, "micro_frame_size": None}


def _known_keywords(stored: Mapping[str, Any], where: Path, cls: type, dropped: set[str]) -> dict[str, Any]:
    """What is a keyword of the class; what is neither that nor known to be dropped is an error."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    notes = {"model_type", "torch_dtype", "auto_map", *PretrainedConfig().to_dict()} - known
    unknown = sorted(name for name in stored if name not in known | dropped | notes and not name.startswith("_"))
    if unknown:
        raise OpenSoraError(f"{where}: unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {name: value for name, value in stored.items() if name in known}


# --- names ------------------------------------------------------------------------------------------------------------


def adapt_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Weights under the names of a model of this package; those that are so already come back unchanged.

    Args:
        model: what they are for.
        weights: as stored.
        source: what to call them in a log line.
    """
    if isinstance(model, SpaceTimeTransformer):
        return _adapt_transformer(model, weights, source)
    if isinstance(model, VideoAutoencoder):
        prefix = "" if any(name.startswith("spatial_vae.") for name in weights) else "spatial_vae.module."
        kept = {"scale", "shift"}
        renamed = {name if name in kept else prefix + _new_attention(name): name for name in weights}
        return RenamedWeights(weights, renamed)
    if isinstance(model, T5EncoderModel):
        return RenamedWeights(
            weights, {name: name for name in weights if not name.startswith(("decoder.", "lm_head."))}
        )
    return weights


def _new_attention(name: str) -> str:
    if ".attentions." not in name:
        return name
    return _OLD_ATTENTION.sub(lambda match: _NEW_NAME[match[1]], name)


def _adapt_transformer(model: SpaceTimeTransformer, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Position tables as the model derives them, and a null text of the model's length."""
    own = model.state_dict()
    replaced = {name: own[name] for name in _COMPUTED if name in own and (name not in weights or name != "rope.freqs")}
    stored, wanted = weights.get(_NULL_TEXT), len(model.null_text)
    if stored is not None and stored.ndim == 2 and 0 < len(stored) != wanted:
        what = "cut" if len(stored) > wanted else "lengthened by its last token"
        logger.warning("%s: the null text of %d tokens is %s to %d", source, len(stored), what, wanted)
        replaced[_NULL_TEXT] = torch.cat([stored, stored[-1:].expand(max(wanted - len(stored), 0), -1)])[:wanted]
    names = {name: name for name in weights if name in own or name not in _COMPUTED}
    return RenamedWeights(weights, names, replaced)
