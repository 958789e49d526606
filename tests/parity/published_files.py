"""The files of Open-Sora 1.0, 1.1 and 1.2 in miniature: published layout, names and formats, random numbers.

Names come from the published lists (`checkpoint_keys`), shapes from them too, shrunk; so nothing of the package takes
part in making them. Every writer returns the weights it wrote, as the formulas need them.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import T5Config, T5EncoderModel

Weights = dict[str, Tensor]

DEPTH = 2
HIDDEN = 48
TEXT_WIDTH = 32
TEXT_CONFIG = {
    "vocab_size": 160,
    "d_model": TEXT_WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SENTENCES = [
    "a small dog runs over the grass, seen from above",
    "two people dance in the rain at night",
    "waves roll onto a beach. aesthetic score: 6.5. motion score: 3.0.",
]
# 2D autoencoders: that of 1.0 and 1.1 brings its configuration, that of 1.2 has the released number of groups, 32.
FRAMES_1_1 = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
FRAMES_1_2 = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "norm_num_groups": 32}
GROUPS_1_2 = 32
SHIFT, SCALE = [-0.10, 0.34, 0.27, 0.98], [3.85, 2.32, 2.33, 3.06]


def random_weights(shapes: Mapping[str, list[int]], seed: int) -> Weights:
    """Every tensor has some effect: matrices keep the size of what goes through them, norms are not 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.2 * normal
        elif len(shape) == 1:
            weights[name] = 0.1 * normal
        elif name == "y_embedder.y_embedding":
            weights[name] = normal
        else:
            weights[name] = normal / math.sqrt(normal[0].numel())
    return weights


# --- transformers -----------------------------------------------------------------------------------------------------


def transformer_weights(keys: Mapping[str, Any], seed: int, *, hidden: int, num_heads: int, max_length: int) -> Weights:
    """By the published list, of `DEPTH` blocks."""
    head_dim = hidden // num_heads
    shrunk = {1152 * times: hidden * times for times in (1, 2, 3, 4, 6)}
    shrunk |= {384: hidden // 3, 4096: TEXT_WIDTH, 120: max_length, 200: max_length, 300: max_length}
    shrunk |= {72: head_dim, 36: head_dim // 2}
    shapes = {}
    for name, (shape, _) in keys.items():
        if "blocks." not in name or int(name.split(".")[1]) < DEPTH:
            shapes[name] = [shrunk.get(size, size) for size in shape]
    for table in ("pos_embed", "pos_embed_temporal"):
        shapes.pop(table, None)
    weights = random_weights(shapes, seed)
    # So that latents stay moderate in sampling, where networks of random numbers would blow them up: patches outweigh
    # what blocks add to them, and come out much as they came in, as noise where most of them is noise.
    for name, tensor in weights.items():
        if "blocks." in name and name.split(".")[-2] in ("proj", "fc2"):
            tensor.mul_(0.1)
    into = weights["x_embedder.proj.weight"].mul_(3)
    back = 3 * torch.linalg.pinv(into.flatten(1)).T.unflatten(1, into.shape[1:])  # (D, C, 1, 2, 2)
    out = weights["final_layer.linear.weight"].view(2, 2, 8, hidden)
    out[:, :, :4] = back.squeeze(2).permute(2, 3, 1, 0)
    out[:, :, 4:] *= 0.2
    if "rope.freqs" in weights:
        weights["rope.freqs"] = 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return weights


def write_transformer_1_0(path: Path, keys: Mapping[str, Any], *, moving_average: bool) -> Weights:
    """A pickle of tensors with position tables, which are not read; maybe within a training run's, with an average.

    A lone file says nothing of the number of heads, so it is the released 16.
    """
    weights = transformer_weights(keys, 10, hidden=HIDDEN, num_heads=16, max_length=40)
    tables = random_weights({"pos_embed": [1, 4, HIDDEN], "pos_embed_temporal": [1, 3, HIDDEN]}, 11)
    state: dict[str, Any] = {**tables, **weights}
    if moving_average:
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        state = {"model": random_weights(shapes, 12), "ema": state}
    torch.save(state, path)
    return weights


def write_transformer(folder: Path, keys: Mapping[str, Any], kind: str, num_heads: int, **config: Any) -> Weights:
    """A folder as transformers saves the reference's classes, `STDiT2` or `STDiT3`."""
    folder.mkdir()
    max_length = config["model_max_length"]
    weights = transformer_weights(keys, 20, hidden=HIDDEN, num_heads=num_heads, max_length=max_length)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": [kind],
        "model_type": kind,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "caption_channels": TEXT_WIDTH,
        "class_dropout_prob": 0.1,
        "depth": DEPTH,
        "drop_path": 0.0,
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
        "hidden_size": HIDDEN,
        "in_channels": 4,
        "input_size": [None, None, None],
        "mlp_ratio": 4.0,
        "num_heads": num_heads,
        "patch_size": [1, 2, 2],
        "pred_sigma": True,
        "qk_norm": True,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return weights


# --- autoencoders -----------------------------------------------------------------------------------------------------


def frame_weights(config: Mapping[str, Any], seed: int) -> Weights:
    """Of diffusers' AutoencoderKL."""
    levels = len(config["block_out_channels"])
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with torch.device("meta"):
        autoencoder = AutoencoderKL(latent_channels=4, **blocks, **config)
    weights = random_weights({name: list(tensor.shape) for name, tensor in autoencoder.state_dict().items()}, seed)
    # Latents of random networks are large, and norms forget the scale of what is large beside the biases.
    weights["decoder.conv_in.weight"].mul_(0.01)
    return weights


def write_frame_autoencoder(folder: Path) -> Weights:
    """A folder like that of sd-vae-ft-ema: attention by its names of 2022, no scaling factor."""
    folder.mkdir()
    weights = frame_weights(FRAMES_1_1, 30)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = {}
    for name, tensor in weights.items():
        for new, old in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        stored[name] = tensor
    save_file(stored, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    values = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **FRAMES_1_1,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return weights


def write_video_autoencoder(folder: Path, keys: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """A folder like that of OpenSora-VAE-v1.2: both parts in one file; the configuration tells no sizes."""
    folder.mkdir()
    prefix, shapes = "temporal_vae.", {}
    for name, (shape, _) in keys.items():
        later_block = any(f"res_blocks.{i}.{j}." in name for i in range(4) for j in (1, 2, 3)) or any(
            f"coder.res_blocks.{j}." in name for j in (1, 2, 3)
        )
        if name.startswith(prefix) and not later_block:
            shapes[name.removeprefix(prefix)] = [size // 4 if size >= 128 else size for size in shape]
    spatial, temporal = frame_weights(FRAMES_1_2, 40), random_weights(shapes, 41)
    stored = {f"spatial_vae.module.{name}": tensor for name, tensor in spatial.items()}
    stored |= {f"{prefix}{name}": tensor for name, tensor in temporal.items()}
    stored |= {
        name: torch.tensor(value).view(1, 4, 1, 1, 1) for name, value in {"shift": SHIFT, "scale": SCALE}.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["VideoAutoencoderPipeline"],
        "model_type": "VideoAutoencoderPipeline",
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
        "cal_loss": False,
        "freeze_vae_2d": False,
        "from_pretrained": None,
        "micro_frame_size": 17,
        "scale": SCALE,
        "shift": SHIFT,
        "vae_2d": {
            "type": "VideoAutoencoderKL",
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "local_files_only": False,
            "micro_batch_size": 4,
            "subfolder": "vae",
        },
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
    }
    (folder / "config.json").write_text(json.dumps(values))
    return spatial, temporal


# --- text -------------------------------------------------------------------------------------------------------------


def write_text_encoder(folder: Path) -> tuple[T5EncoderModel, SentencePieceProcessor]:
    """A folder like that of t5-v1_1-xxl: pickles in two shards with an index, and the tokenizer beside them.

    Returns:
        The encoder in float64, and sentencepiece itself for a tokenizer.
    """
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(50)
        encoder = T5EncoderModel(T5Config(**TEXT_CONFIG)).eval().requires_grad_(False)
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    where = {}
    for number, names in enumerate((list(weights)[::2], list(weights)[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name].clone() for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False, **TEXT_CONFIG}
    (folder / "config.json").write_text(json.dumps(config))

    SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = {**special, "extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return encoder.double(), SentencePieceProcessor(model_file=str(folder / "spiece.model"))  # type: ignore[call-arg]
