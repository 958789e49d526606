"""Files that are handed over as weights and are something else, and weights in eight bits."""

import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest
import tiny_published
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import T5EncoderModel

from opensora.checkpoints.components import load_component, load_settings_of
from opensora.checkpoints.conversion import convert
from opensora.checkpoints.fit import inspect_model
from opensora.checkpoints.key_maps import find_config
from opensora.checkpoints.loading import load_pipeline
from opensora.errors import OpenSoraError
from opensora.models.stdit3 import STDiT3
from opensora.weights import read_weights

PART = tiny_published.tiny("opensora-1.2").transformer
STATE = {name: tensor.contiguous() for name, tensor in tiny_published.network(PART).state_dict().items()}


def archive(make):
    buffer = io.BytesIO()
    make(buffer)
    return buffer.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("weights/model.safetensors", b"x" * 100)


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())


NO_WEIGHTS = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "web page"),
    "zip": (archive(zipped), "unpack it"),
    "tar": (archive(tarred), "unpack it"),
    "gzip": (gzip.compress(b"x" * 1000), "unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "unpack it"),
    "json": (json.dumps({"error": "not found"}).encode(), "a JSON file"),
    "text": (b"[project]\nname = 'access denied'\n", "is a text file; expected weights"),
    "gguf": (b"GGUF" + bytes(100), "GGUF"),
    "picture": (archive(lambda file: Image.new("RGB", (4, 4)).save(file, "PNG")), "a picture"),
    "empty": (b"", "damaged"),
    "noise": (os.urandom(3) + bytes(range(256)), "damaged"),
    "TorchScript": (archive(lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)), "TorchScript"),
    "a whole module": (archive(lambda file: torch.save(torch.nn.Linear(2, 2), file)), "refused"),
    "a cut-off file": (archive(lambda file: torch.save(STATE, file))[:-200], "damaged"),
}


def refusal(call, *arguments, **options):
    with pytest.raises(OpenSoraError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and "weights_only" not in message
    return message


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "pytorch_model.bin", "x.ckpt"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_is_called_what_it_is(tmp_path, kind, name):
    content, said = NO_WEIGHTS[kind]
    path = tmp_path / "part" / name
    path.parent.mkdir()
    path.write_bytes(content)
    for given in (path, path.parent):
        assert said in refusal(load_component, given, STDiT3, config=PART.config)
        assert said in refusal(inspect_model, given)
        assert said in refusal(convert, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_every_part_of_a_model_is_told_by_its_content(tmp_path, part):
    tiny_published.pipeline_of("opensora-1.2").save_pretrained(tmp_path / "model")
    file = next((tmp_path / "model" / part).glob("*.safetensors"))
    file.write_bytes(NO_WEIGHTS["git-lfs pointer"][0])
    assert "git lfs pull" in refusal(load_pipeline, tmp_path / "model")


def test_a_tokenizer_that_was_not_fetched(tmp_path):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(NO_WEIGHTS["git-lfs pointer"][0])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "git lfs pull" in refusal(load_settings_of, tmp_path, T5Tokenizer)


def test_a_configuration_that_was_not_fetched(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(NO_WEIGHTS["git-lfs pointer"][0])
    assert "git lfs pull" in refusal(load_component, tmp_path, STDiT3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("locked", ["file", "folder"])
def test_weights_that_may_not_be_read(tmp_path, locked):
    save_file(STATE, tmp_path / "model.safetensors")
    place = tmp_path / "model.safetensors" if locked == "file" else tmp_path
    place.chmod(0)
    try:
        assert "ermission denied" in refusal(read_weights, tmp_path / "model.safetensors")
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize("what", ["a pipe", "a folder of formats that are not read"])
def test_what_can_never_hold_weights(tmp_path, what):
    if what == "a pipe":
        os.mkfifo(tmp_path / "x.safetensors")
        assert "is a pipe" in refusal(read_weights, tmp_path / "x.safetensors")
    else:
        (tmp_path / "model.gguf").write_bytes(NO_WEIGHTS["gguf"][0])
        assert "model.gguf, a GGUF file" in refusal(read_weights, tmp_path)


# --- eight bits -------------------------------------------------------------------------------------------------------


def quantised(dtype, scaling, names):
    """STATE with its matrices in eight bits and what a kind of scaling puts beside them; and what that means."""
    stored, meant = dict(STATE), dict(STATE)
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    for layer in (
        name.removesuffix(".weight") for name, t in STATE.items() if name.endswith(".weight") and t.ndim == 2
    ):
        weight = STATE[f"{layer}.weight"]
        if scaling is None:
            scale = torch.ones(())
        elif scaling == "tensor":
            scale = weight.abs().max() / most
        elif scaling == "rows":
            scale = weight.abs().amax(1, keepdim=True) / most + 1e-12
        else:
            rows, columns = (-(-size // 128) for size in weight.shape)
            scale = torch.rand(rows, columns) / most + 1e-3
        whole = scale
        if scaling == "blocks":
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        q = (weight / whole).clamp(-most, most)
        q = q.round().to(dtype) if dtype == torch.int8 else q.to(dtype)
        stored[f"{layer}.weight"], meant[f"{layer}.weight"] = q, q.float() * whole
        if scaling is not None:
            stored[f"{layer}.{names}"] = scale.clone()
            stored[f"{layer}.scale_input"] = torch.ones(())
    if names == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return stored, meant


EIGHT_BITS = [
    (torch.float8_e4m3fn, None, ""),
    (torch.float8_e5m2, None, ""),
    (torch.float8_e4m3fn, "tensor", "scale_weight"),
    (torch.float8_e5m2, "rows", "weight_scale"),
    (torch.float8_e4m3fn, "blocks", "weight_scale_inv"),
    (torch.int8, "rows", "weight_scale"),
]


@pytest.mark.parametrize(
    ("container", "prefix"), [("safetensors", "model.diffusion_model."), ("zip", ""), ("shards", "")]
)
@pytest.mark.parametrize(("dtype", "scaling", "names"), EIGHT_BITS)
def test_eight_bits_are_what_they_mean(tmp_path, dtype, scaling, names, container, prefix):
    stored, meant = quantised(dtype, scaling, names)
    stored = {prefix + name: tensor for name, tensor in stored.items()}
    path = tmp_path / "x.safetensors"
    if container == "shards":
        path = tmp_path
        tiny_published.write_shards(path, stored, "model", ".safetensors")
    else:
        save_file(stored, path) if container == "safetensors" else torch.save(stored, path)
    loaded = load_component(path, STDiT3, config=find_config(path, STDiT3, PART.config)).state_dict()
    for name, tensor in meant.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=0)
    report = inspect_model(path)
    assert report.problems == [] and str(dtype).removeprefix("torch.") in report.dtypes


def test_what_cannot_be_turned_back_is_refused(tmp_path):
    name = "spatial_blocks.0.attn.qkv.weight"
    save_file({**STATE, name: STATE[name].to(torch.int8)}, tmp_path / "x.safetensors")
    said = refusal(load_component, tmp_path / "x.safetensors", STDiT3, config=PART.config)
    assert name in said and "int8" in said
    odd = {name: STATE[name].to(torch.float8_e4m3fn), "spatial_blocks.0.attn.qkv.weight_scale": torch.ones(5)}
    save_file({**STATE, **odd}, tmp_path / "x.safetensors")
    said = refusal(load_component, tmp_path / "x.safetensors", STDiT3, config=PART.config)
    assert name in said and "scale of (5,)" in said


def test_a_text_encoder_with_its_tokenizer_inside(tmp_path):
    """As ComfyUI keeps T5."""
    part = tiny_published.tiny("opensora-1.2").text_encoder
    state = {name: t.contiguous().clone() for name, t in tiny_published.network(part).state_dict().items()}
    stored = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in state.items()}
    save_file({**stored, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "t5.safetensors")
    loaded = load_component(tmp_path / "t5.safetensors", T5EncoderModel, config=part.config).state_dict()
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(loaded[name], stored[name].float())


def test_eight_bits_are_converted_to_bfloat16(tmp_path):
    stored, meant = quantised(torch.float8_e4m3fn, "tensor", "scale_weight")
    save_file(stored, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "out", model="opensora-1.2")
    found = read_weights(tmp_path / "out")
    name = "spatial_blocks.0.attn.qkv.weight"
    assert torch.equal(found[name], meant[name].bfloat16())
