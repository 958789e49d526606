"""`opensora inspect` tells the transformers of 2.0 and FLUX apart, and parts of 2.0 that do not belong together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_two_encoders
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_mmdit import build
from tiny_published import network, write_tokenizer
from transformers import CLIPTokenizer, T5Tokenizer

from opensora.cli.main import main as opensora
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.mmdit import MMDiT
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.pipeline import OpenSoraPipeline


def inspect(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, str]:
    code = opensora(["inspect", str(path), "--quick"])
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "transformer of Open-Sora 2.0 (MMDiT)"),
        ({"patch_size": 1}, "transformer of Open-Sora 2.0, for the deep compression autoencoder (MMDiT)"),
        (
            {"fused_qkv": True, "interleaved_rope": True, "guidance_embed": True, "cond_embed": False},
            "FLUX.1 image transformer (MMDiT)",
        ),
    ],
)
def test_lone_files(capsys, tmp_path, changes, told):
    model = build(**changes)
    save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    code, said = inspect(capsys, tmp_path / "weights.safetensors")
    assert code == 0 and told in said
    assert (
        f"interleaved_rope={model.config.interleaved_rope}" in said and "interleaved_rope: shapes do not tell" in said
    )


def test_a_lone_file_that_lacks_a_tensor(capsys, tmp_path):
    """Heads of 128 as published: shapes suffice to build it."""
    weights = dict(build(hidden_size=256, axes_dim=(16, 56, 56)).state_dict())
    save_file(weights, tmp_path / "whole.safetensors")
    assert "nothing is wrong with it" in inspect(capsys, tmp_path / "whole.safetensors")[1]
    del weights["single_blocks.1.norm.key_norm.scale"]
    save_file(weights, tmp_path / "part.safetensors")
    code, said = inspect(capsys, tmp_path / "part.safetensors")
    assert code == 2 and "1 missing tensors (single_blocks.1.norm.key_norm.scale)" in said


def test_a_lone_file_that_is_not_compared_is_not_called_whole(capsys, tmp_path):
    """Heads of 16, which shapes do not tell."""
    save_file(dict(build().state_dict()), tmp_path / "weights.safetensors")
    code, said = inspect(capsys, tmp_path / "weights.safetensors")
    assert code == 0 and "nothing is wrong" not in said
    assert "whether all of its tensors are there cannot be told" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole model of 2.0, in miniature."""
    made = tmp_path_factory.mktemp("whole")
    entry = tiny_two_encoders.tiny("opensora-2.0")
    assert entry.text_encoder_2 is not None
    write_tokenizer(made / "words")
    tiny_two_encoders.write_clip_tokenizer(made / "letters")
    torch.manual_seed(0)
    pipe = OpenSoraPipeline(
        transformer=MMDiT(**entry.transformer.config),
        scheduler=RectifiedFlowScheduler(micro_frame_size=None),
        autoencoder=network(entry.autoencoder),
        text_encoder=network(entry.text_encoder),
        tokenizer=T5Tokenizer.from_pretrained(made / "words"),
        text_encoder_2=tiny_two_encoders.clip_encoder(entry.text_encoder_2),
        tokenizer_2=CLIPTokenizer.from_pretrained(made / "letters"),
        trained_on={"latent_space": entry.autoencoder.config["latent_space"]},
        height=32,
        width=48,
        num_frames=5,
    )
    pipe.save_pretrained(made / "model")
    return made / "model"


def swapped(folder: Path, tmp_path: Path, part: str, make: Any) -> Path:
    """The model with another part in the place of one."""
    for file in folder.rglob("*"):
        if file.is_file() and part not in file.relative_to(folder).parts[:1]:
            there = tmp_path / "model" / file.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.symlink_to(file)
    make(tmp_path / "model" / part)
    return tmp_path / "model"


def test_a_whole_model(capsys, folder):
    code, said = inspect(capsys, folder)
    assert code == 0, said
    assert "text encoder 2" in said and "CLIP text encoder" in said


def test_another_autoencoder(capsys, folder, tmp_path):
    config = {**tiny_two_encoders.tiny("opensora-2.0").autoencoder.config, "latent_channels": 8}
    make = HunyuanVideoAutoencoder(**config).save_pretrained
    code, said = inspect(capsys, swapped(folder, tmp_path, "autoencoder", make))
    assert code == 2 and "16 latent channels" in said, said


def test_an_autoencoder_of_frames(capsys, folder, tmp_path):
    frames = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=16)
    code, said = inspect(capsys, swapped(folder, tmp_path, "autoencoder", frames.save_pretrained))
    assert code == 2 and "another network than the HunyuanVideoAutoencoder wanted here: AutoencoderKL" in said


def test_a_transformer_of_pictures(capsys, folder, tmp_path):
    """FLUX's in the place of Open-Sora's, which it was trained from."""
    config = tiny_two_encoders.tiny("opensora-2.0").transformer.config
    flux = MMDiT(**{**config, "fused_qkv": True, "interleaved_rope": True, "guidance_embed": True, "cond_embed": False})
    model = swapped(folder, tmp_path, "transformer", flux.save_pretrained)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").unlink()
    options = {"guidance_options": {"image_guidance_scale": 3.0}}
    (model / "model_index.json").write_text(json.dumps({**index, **options}))
    code, said = inspect(capsys, model)
    assert code == 2 and "guides by known frames, which the transformer is not shown" in said


def test_another_latent_space(capsys, folder, tmp_path):
    config = tiny_two_encoders.tiny("opensora-2.0").autoencoder.config
    other = HunyuanVideoAutoencoder(**{**config, "latent_space": {"scaling_factor": 0.5}})
    code, said = inspect(capsys, swapped(folder, tmp_path, "autoencoder", other.save_pretrained))
    assert code == 2 and "0.476986" in said and "0.5" in said


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no second encoder": ("", {"text_encoder_2": [None, None]}, "reads text by a T5 encoder and a CLIP encoder"),
    "a second tokenizer of no class": ("", {"tokenizer_2": [1, 2]}, "tokenizer_2 is a list of 2, expected [library,"),
    "patches of 0": ("transformer", {"patch_size": 0}, "patch_size is 0, expected 1 or more"),
    "less than no layers": ("transformer", {"depth": -1}, "depth is -1, expected 0 or more"),
    "axes of another head": ("transformer", {"axes_dim": [2, 6, 6]}, "axes_dim is [2, 6, 6]"),
    "fused layers": ("transformer", {"fused_qkv": True}, "of two different models"),
    "a CLIP in a number": ("text_encoder_2", {"text_config": 5}, "text_config is the number 5"),
    "a CLIP without places": ("text_encoder_2", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configurations_that_are_none(capsys, folder, tmp_path, change):
    """Of the model and of a plan of it, which reads them too."""
    part, values, why = CHANGES[change]

    def write(path: Path) -> None:
        name = "model_index.json" if not part else f"{part}/config.json"
        stored = json.loads((folder / name).read_text())
        if part:
            shutil.copytree(folder / part, path)
        (tmp_path / "model" / name).unlink()
        (tmp_path / "model" / name).write_text(json.dumps({**stored, **values}))

    model = swapped(folder, tmp_path, part or "none", write)
    code, said = inspect(capsys, model)
    assert code == 2 and why in said
    code = opensora(["plan", "--model", str(model), "--device", "cpu"])
    said = capsys.readouterr().err
    assert ((code, said.count("\n")) == (2, 1) and why in said) or change == "fused layers"


def test_rotary_positions_of_the_other_kind_are_pointed_out(capsys, folder, tmp_path):
    """Weights do not tell, and clips would be noise."""

    def write(path: Path) -> None:
        shutil.copytree(folder / "transformer", path)
        stored = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**stored, "interleaved_rope": True}))

    assert "interleaved_rope: " not in inspect(capsys, folder)[1]
    code, said = inspect(capsys, swapped(folder, tmp_path, "transformer", write))
    assert code == 0 and "interleaved_rope: True as configured; shapes do not tell; published weights have it" in said


@pytest.mark.parametrize("table", ["AAAA;", "AQAAAGE=", "/////w==", 5])
def test_a_damaged_table_of_characters(capfd, folder, tmp_path, table):
    """At which the library that reads it would end the process with a page of text."""

    def write(path: Path) -> None:
        shutil.copytree(folder / "tokenizer", path)
        stored = json.loads((path / "tokenizer.json").read_text())
        stored["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
        (path / "tokenizer.json").write_text(json.dumps(stored))

    code = opensora(["inspect", str(swapped(folder, tmp_path, "tokenizer", write)), "--quick"])
    err = capfd.readouterr().err
    assert code == 2 and "its precompiled_charsmap is damaged" in err and err.count("\n") == 1


def test_a_tokenizer_of_no_length(capsys, folder, tmp_path):
    def write(path: Path) -> None:
        shutil.copytree(folder / "tokenizer", path)
        stored = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**stored, "model_max_length": {}}))

    code, said = inspect(capsys, swapped(folder, tmp_path, "tokenizer", write))
    assert code == 2 and "model_max_length is an object of 0, expected a whole number" in said


def test_another_clip(capsys, folder, tmp_path):
    entry = tiny_two_encoders.tiny("opensora-2.0").text_encoder_2
    assert entry is not None
    wider = tiny_two_encoders.clip_encoder(entry, hidden_size=48)
    code, said = inspect(capsys, swapped(folder, tmp_path, "text_encoder_2", wider.save_pretrained))
    assert code == 2 and "wrong text encoder: the transformer reads text states of width 24, it makes 48" in said
