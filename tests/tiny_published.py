"""Released models in miniature: the files of a published model as the Hub's cache holds them, of random weights.

The layout and formats are the published ones, the sizes are not: the table's entry is made to say so.
"""

import dataclasses
import functools
import importlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tiny_pipeline import TEXT_WIDTH
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.checkpoints.published import PUBLISHED, PublishedModel
from opensora.checkpoints.published_parts import PublishedPart
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.pipeline import OpenSoraPipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SENTENCES = ["a small red ball rolls left", "a large blue cube rolls right over the grass", "rain in the green hills"]
TEXT = {
    "vocab_size": 160,
    "d_model": TEXT_WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SPATIAL = {"block_out_channels": [4, 4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
TEMPORAL = {"filters": 4, "num_groups": 2, "num_res_blocks": 1, "channel_multipliers": [1, 1, 1, 2]}
TRANSFORMER = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": TEXT_WIDTH}


def tiny(name: str, **defaults: Any) -> PublishedModel:
    """A published model's entry with small networks, few steps and small clips."""
    model = PUBLISHED[name]
    autoencoder = dict(model.autoencoder.config)
    autoencoder |= (
        {"spatial": SPATIAL} if "spatial" in autoencoder else {**TEMPORAL, "temporal_downsample": [False, True, True]}
    )
    if "temporal" in autoencoder:
        autoencoder["temporal"] = {**autoencoder["temporal"], **TEMPORAL}
    transformer = {**model.transformer.config, **TRANSFORMER, "model_max_length": 40}
    if "input_size" in transformer:
        transformer["input_size"] = [4, 4, 4]
    sizes = {"height": 32, "width": 48, "num_frames": 4, "num_inference_steps": 3}
    sizes |= {"num_frames": 17} if autoencoder["micro_frame_size"] and "spatial" not in autoencoder else {}
    sizes |= {"nominal_size": [32, 50]} if "nominal_size" in model.defaults else {}

    def with_config(part: PublishedPart, config: dict[str, Any]) -> PublishedPart:
        return dataclasses.replace(part, config=config)

    return dataclasses.replace(
        model,
        transformer=with_config(model.transformer, transformer),
        autoencoder=with_config(model.autoencoder, autoencoder),
        text_encoder=with_config(model.text_encoder, TEXT),
        defaults={**model.defaults, **sizes, **defaults},
    )


def network(part: PublishedPart, seed: int = 0) -> Any:
    """A part as a network with random weights, none of them zero throughout."""
    torch.manual_seed(seed)
    if part.class_name == "transformers.T5EncoderModel":
        return T5EncoderModel(T5Config(**part.config)).eval()
    library, class_name = part.class_name.rsplit(".", 1)
    model = getattr(importlib.import_module(library), class_name)(**part.config)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pipeline_of(name: str, sampler: str | None = None, **defaults: Any) -> OpenSoraPipeline:
    """A published model in memory, in miniature."""
    return pipeline_from(tiny(name, **defaults), sampler)


def pipeline_from(model: PublishedModel, sampler: str | None = None, **more_parts: Any) -> OpenSoraPipeline:
    """The pipeline of an entry, with parts besides those that every model has."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = T5Tokenizer.from_pretrained(folder)
    library, class_name = model.scheduler_class.rsplit(".", 1)
    pipeline = OpenSoraPipeline(
        transformer=network(model.transformer, 1),
        scheduler=getattr(importlib.import_module(library), class_name)(**model.scheduler_config),
        autoencoder=network(model.autoencoder, 2),
        text_encoder=network(model.text_encoder, 3),
        tokenizer=tokenizer,
        **more_parts,
        **model.defaults,
    )
    if sampler is not None:
        pipeline.use_sampler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def tokenizer_model() -> bytes:
    """A sentencepiece model of a few words, with T5's special tokens."""
    written = io.BytesIO()
    SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=written,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


# --- files ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


def snapshot(cache: Path, part: PublishedPart) -> Path:
    """The folder of the part's repository in a cache of the Hub; made if it is not there."""
    stored = cache / f"models--{part.repository.replace('/', '--')}"
    folder = stored / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    (stored / "refs").mkdir(exist_ok=True)
    (stored / "refs" / "main").write_text(COMMIT)
    return folder


def write_published(cache: Path, model: PublishedModel, seed: int = 0) -> dict[str, Any]:
    """All files of a published model; returns the networks they were written from."""
    networks = {name: network(part, seed + i) for i, (name, part) in enumerate(model.parts.items()) if part.config}
    write_transformer(snapshot(cache, model.transformer), model, networks["transformer"])
    write_autoencoder(snapshot(cache, model.autoencoder), model, networks["autoencoder"])
    write_text_encoder(snapshot(cache, model.text_encoder), model, networks["text_encoder"])
    write_tokenizer(snapshot(cache, model.tokenizer))
    return networks


def write_transformer(folder: Path, model: PublishedModel, transformer: torch.nn.Module) -> None:
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    if model.transformer.lone_file:  # 1.0: a pickle of the moving average, position tables of whatever size in it
        weights["pos_embed"] = torch.zeros(1, 3, 5)
        torch.save({"ema": weights}, folder / model.transformer.lone_file)
        return
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", reference_transformer_config(model))


def reference_transformer_config(model: PublishedModel) -> dict[str, Any]:
    """As transformers writes the configuration of the reference's classes."""
    class_name = model.transformer.class_name.rsplit(".", 1)[1].replace("STDiT4", "STDiT3")
    config = {name: value for name, value in model.transformer.config.items() if name != "qk_norm_legacy"}
    return {
        "_name_or_path": "outputs/epoch0",
        "architectures": [class_name],
        "auto_map": {"AutoModel": f"modeling.{class_name}"},
        "model_type": class_name,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "class_dropout_prob": 0.1,
        "drop_path": 0.0,
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False,
        "freeze_y_embedder": True,
        "input_size": [None, None, None],
        "no_temporal_pos_emb": False,
        "only_train_temporal": False,
        **config,
    }


def write_autoencoder(folder: Path, model: PublishedModel, autoencoder: VideoAutoencoder) -> None:
    weights = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    config = model.autoencoder.config
    if "spatial" not in config:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        parts = {"ch": config["filters"], "ch_mult": list(config["channel_multipliers"])}
        kind = "OpenSoraVAE_V1_3_Pipline"  # so it is spelled
        write_json(
            folder / "config.json",
            {"architectures": [kind], "model_type": kind, "encoder": parts, "decoder": parts, "normalization": "video"},
        )
        return
    if config.get("temporal"):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(
            folder / "config.json",
            {
                "architectures": ["VideoAutoencoderPipeline"],
                "model_type": "VideoAutoencoderPipeline",
                "cal_loss": False,
                "freeze_vae_2d": False,
                "from_pretrained": None,
                "micro_frame_size": config["micro_frame_size"],
                "scale": config["latent_space"]["scale"],
                "shift": config["latent_space"]["shift"],
                "torch_dtype": "float32",
                "transformers_version": "4.41.2",
                "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": "somebody/vae", "micro_batch_size": 4},
                "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
            },
        )
        return
    save_file(frame_weights(weights), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", frame_config(autoencoder))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def frame_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The 2D part alone, under the names of 2022."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("spatial_vae.module."):
            for new, old in OLD_NAMES.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            renamed[name.removeprefix("spatial_vae.module.")] = tensor
    return renamed


def frame_config(autoencoder: VideoAutoencoder, **changes: Any) -> dict[str, Any]:
    """As diffusers wrote the configuration of its 2D autoencoder then: without a scaling factor."""
    config = dict(autoencoder.spatial_vae.module.config)
    kept = ("act_fn", "in_channels", "out_channels", "sample_size", "down_block_types", "up_block_types", *SPATIAL)
    return {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **{n: config[n] for n in kept}, **changes}


def write_text_encoder(folder: Path, model: PublishedModel, encoder: T5EncoderModel) -> None:
    """Two shards of a pickle, with their index."""
    write_shards(folder, untied(encoder), "pytorch_model", ".bin")
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **model.text_encoder.config}
    write_json(folder / "config.json", {**config, "is_encoder_decoder": False, "use_cache": False})


def untied(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name, without the second name of T5's embedding."""
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)
    return weights


def write_shards(folder: Path, weights: dict[str, torch.Tensor], stem: str, suffix: str) -> None:
    """Weights in two files and the index that says which holds what."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        tensors = {name: weights[name] for name in part}
        save_file(tensors, folder / file) if suffix == ".safetensors" else torch.save(tensors, folder / file)
        where |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": where})


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(tokenizer_model())
    write_json(folder / "special_tokens_map.json", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 100}
    write_json(folder / "tokenizer_config.json", {**special, "tokenizer_class": "T5Tokenizer", "model_max_length": 512})
