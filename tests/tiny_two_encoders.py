"""Open-Sora 2.0 in miniature: the files of a published model of two text encoders as the Hub's cache holds them."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_pipeline import TEXT_WIDTH
from tiny_published import TEXT, network, pipeline_from, snapshot, write_json, write_text_encoder, write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from opensora.checkpoints.published import PUBLISHED, PublishedModel, PublishedPart
from opensora.pipeline import OpenSoraPipeline

NAMES = [name for name in PUBLISHED if name.startswith("opensora-2.0")]
TRANSFORMER = {
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "caption_channels": TEXT_WIDTH,
    "pooled_channels": 24,
    "model_max_length": 60,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,"
WORDS = ["<|startoftext|>", "<|endoftext|>"]
CLIP: dict[str, Any] = {
    "vocab_size": 2 * len(LETTERS) + len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "VideoDCAutoencoder": {
        "latent_channels": 8,
        "widths": [4, 8, 8, 32],
        "encoder_depths": [1, 1, 1, 1],
        "decoder_depths": [1, 1, 1, 1],
        "attention": [False, False, False, True],
        "temporal_downsample": [False, True, True],
    },
    "HunyuanVideoAutoencoder": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
}


def tiny(name: str, **defaults: Any) -> PublishedModel:
    """A published model's entry with small networks, few steps and small clips."""
    model = PUBLISHED[name]

    def smaller(part: PublishedPart, **config: Any) -> PublishedPart:
        return dataclasses.replace(part, config={**part.config, **config})

    autoencoder = smaller(model.autoencoder, **AUTOENCODERS[model.autoencoder.class_name.rsplit(".", 1)[1]])
    channels = autoencoder.config["latent_channels"]
    assert model.text_encoder_2 is not None
    frames = 8 if model.defaults["num_frames"] % 4 == 0 else 5
    sizes = {"height": 32, "width": 48, "num_frames": frames, "num_inference_steps": 3}
    return dataclasses.replace(
        model,
        transformer=smaller(model.transformer, **TRANSFORMER, in_channels=channels),
        autoencoder=autoencoder,
        text_encoder=dataclasses.replace(model.text_encoder, config=TEXT),
        text_encoder_2=smaller(model.text_encoder_2, **CLIP),
        defaults={**model.defaults, **sizes, **defaults},
    )


def pipeline_of(name: str, sampler: str | None = None, **defaults: Any) -> OpenSoraPipeline:
    """A published model in memory, in miniature."""
    model = tiny(name, **defaults)
    assert model.text_encoder_2 is not None
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    return pipeline_from(model, sampler, text_encoder_2=clip_encoder(model.text_encoder_2), tokenizer_2=tokenizer)


def write_published(cache: Path, model: PublishedModel) -> dict[str, Any]:
    """All files of a published model; returns the networks they were written from."""
    assert model.text_encoder_2 is not None and model.tokenizer_2 is not None
    networks = {
        name: network(getattr(model, name), i) for i, name in enumerate(("transformer", "autoencoder", "text_encoder"))
    }
    networks["text_encoder_2"] = clip_encoder(model.text_encoder_2)
    for name in ("transformer", "autoencoder"):
        part = getattr(model, name)
        weights = {key: tensor.bfloat16() for key, tensor in networks[name].state_dict().items()}
        save_file(weights, snapshot(cache, part) / part.lone_file)
    write_text_encoder(snapshot(cache, model.text_encoder), model, networks["text_encoder"])
    write_tokenizer(snapshot(cache, model.tokenizer))
    write_clip_encoder(snapshot(cache, model.text_encoder_2), networks["text_encoder_2"])
    write_clip_tokenizer(snapshot(cache, model.tokenizer_2))
    return networks


def clip_encoder(part: PublishedPart, **changes: Any) -> CLIPTextModel:
    torch.manual_seed(7)
    return CLIPTextModel(CLIPTextConfig(**{**part.config, **changes})).eval()


def write_clip_encoder(folder: Path, encoder: CLIPTextModel) -> None:
    """With the encoder of images in the same file, and its configuration in the same one."""
    weights = {f"text_model.{name}": tensor.clone() for name, tensor in encoder.state_dict().items()}
    weights |= {"vision_model.embeddings.class_embedding": torch.zeros(4), "logit_scale": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads(encoder.config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text})


def write_clip_tokenizer(folder: Path) -> None:
    """Letters alone, within words and at their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *WORDS]
    write_json(folder / "vocab.json", {entry: i for i, entry in enumerate(entries)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": WORDS[0], "eos_token": WORDS[1], "unk_token": WORDS[1], "pad_token": WORDS[1]}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    )
