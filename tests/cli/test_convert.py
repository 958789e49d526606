"""`opensora convert`: what comes out loads with equal weights and makes equal frames, or nothing comes out."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from exploit import Exploit
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_autoencoder, make_pipeline
from tiny_published import frame_config, frame_weights, network, snapshot, tiny, write_json, write_published
from tiny_transformers import build
from transformers import T5EncoderModel

from opensora.checkpoints.components import load_component
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import BUNDLED, PUBLISHED, PublishedModel
from opensora.cli.main import main
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.weights import fingerprint

NAMES = ["opensora-1.0-16x256x256", "opensora-1.1-stage3", "opensora-1.2", "opensora-1.3"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(*args: Any) -> int:
    return main(["convert", *map(str, args)])


def refusal(capsys, *args: Any) -> str:
    """The one-line error, after which there is no output, whole or in part."""
    capsys.readouterr()
    output = Path(args[1])
    before = sorted(output.parent.rglob("*"))
    assert convert(*args) == 2
    out, err = capsys.readouterr()
    assert "written" not in out and err.count("\n") == 1 and err.startswith("opensora: ")
    assert sorted(output.parent.rglob("*")) == before
    return err


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def frames(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a ball", generator=torch.Generator().manual_seed(5), output_type="pt").frames


@pytest.fixture
def published(tmp_path, monkeypatch):
    """`published(name)` puts a small model of that name into the cache; returns its entry and networks."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def make(name: str) -> tuple[PublishedModel, dict[str, Any]]:
        monkeypatch.setitem(PUBLISHED, name, tiny(name))
        return PUBLISHED[name], write_published(cache, PUBLISHED[name])

    make.cache = cache  # type: ignore[attr-defined]
    return make


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_becomes_a_folder_that_makes_the_same_frames(published, tmp_path, capsys, name):
    model, _ = published(name)
    output = tmp_path / "converted" / "model"
    assert convert(name, output) == 0
    assert f"written: {output}" in capsys.readouterr().out
    original, converted = load_pipeline(name), load_pipeline(output)
    for part in ("transformer", "autoencoder", "text_encoder"):
        assert same_weights(getattr(original, part), getattr(converted, part))
    assert torch.equal(frames(original), frames(converted))
    assert converted.config.guidance_scale == model.defaults["guidance_scale"]
    told = LatentSpace.from_dict(model.autoencoder.config["latent_space"])
    assert not told.differences(LatentSpace.from_dict(converted.config.trained_on["latent_space"]))
    assert converted.config.trained_on["autoencoder"] == fingerprint(converted.autoencoder.state_dict())
    assert not list(output.rglob("*.bin")) and main(["inspect", str(output)]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_and_the_parts_that_go_with_it(published, tmp_path, name):
    """Files of a published model, lying about; its name is told by the transformer's shapes."""
    model, networks = published(name)
    paths = {part: snapshot(published.cache, model.parts[part]) for part in model.parts}
    transformer = paths["transformer"] / (model.transformer.lone_file or "model.safetensors")
    moved = {part: Path(shutil.copytree(path, tmp_path / part)) for part, path in paths.items()}
    shutil.rmtree(published.cache)
    output = tmp_path / "out"
    given = ["--autoencoder", moved["autoencoder"], "--text-encoder", moved["text_encoder"]]
    assert convert(moved["transformer"] / transformer.name, output, *given, "--tokenizer", moved["tokenizer"]) == 0
    converted = load_pipeline(output)
    for part, original in networks.items():
        assert same_weights(getattr(converted, part), original)
    assert converted.config.num_inference_steps == 3
    assert "autoencoder" not in converted.config.trained_on, "nobody knows whether it was trained with this very file"


def test_a_bundled_model_gets_all_its_parts(tmp_path):
    """toybox-iddpm has no autoencoder of its own until it is written."""
    output = tmp_path / "out"
    assert convert("toybox-iddpm", output) == 0
    original, converted = (
        load_file(BUNDLED["toybox"].folder / "autoencoder" / WEIGHTS),
        load_file(output / "autoencoder" / WEIGHTS),
    )
    assert original.keys() == converted.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, converted[name]) and tensor.dtype == converted[name].dtype
    assert len({path.stat().st_mode for path in output.rglob("*") if path.is_file()}) == 1, "all can be read alike"


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A model's folder that knows what it was trained on."""
    folder = tmp_path / "recorded"
    pipeline = make_pipeline()
    record = {
        "latent_space": pipeline.autoencoder.latent_space.to_dict(),
        "autoencoder": fingerprint(pipeline.autoencoder.state_dict()),
    }
    make_pipeline(trained_on=record).save_pretrained(folder)
    return folder


def test_another_precision(recorded, tmp_path):
    output = tmp_path / "out"
    assert convert(recorded, output, "--dtype", "bfloat16") == 0
    stored = load_file(output / "transformer" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    original = load_file(recorded / "transformer" / WEIGHTS)
    assert all(torch.equal(tensor, original[name].bfloat16()) for name, tensor in stored.items())
    assert main(["inspect", str(output)]) == 0, "the rounded autoencoder is still known to be the right one"


def test_large_weights_are_written_in_shards(recorded, tmp_path):
    output = tmp_path / "out"
    assert convert(recorded, output, "--max-shard-size", "100KB") == 0
    index = json.loads((output / "transformer" / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    original, converted = load_pipeline(recorded), load_pipeline(output)
    assert same_weights(original.transformer, converted.transformer)


# --- components -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_a_component_in_the_published_format(published, tmp_path, name, part):
    model, networks = published(name)
    entry = model.parts[part]
    folder = snapshot(published.cache, entry)
    output = tmp_path / "out"
    assert convert(folder / entry.lone_file if entry.lone_file else folder, output) == 0
    cls: Any = type(networks[part])
    converted = load_component(output, cls)
    assert same_weights(converted, networks[part])
    if part == "transformer":
        options = {name: value for name, value in entry.config.items() if name not in ("input_size", "patch_size")}
        assert options.items() <= dict(converted.config).items()  # type: ignore[arg-type]
    if isinstance(converted, VideoAutoencoder):
        assert converted.latent_space.scaling_factor == 0.18215


def test_the_moving_average_of_a_run_becomes_a_component(tmp_path):
    network = build(STDiT3, in_channels=4)
    run = tmp_path / "epoch0-global_step100"
    (run / "model").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, run / "model" / "model.safetensors")
    torch.save({f"module.{name}": tensor.half() for name, tensor in network.state_dict().items()}, run / "ema.pt")
    output = tmp_path / "out"
    assert convert(run, output, "--model", "opensora-1.2") == 0
    converted = load_component(output, STDiT3, torch.float16)
    assert same_weights(converted, network.half())
    config = dict(converted.config)  # type: ignore[arg-type]
    assert (config["model_max_length"], config["input_sq_size"]) == (7, 512)
    assert {tensor.dtype for tensor in load_file(output / WEIGHTS).values()} == {torch.float16}


def test_what_shapes_do_not_tell_is_asked_for(tmp_path, capsys):
    path = tmp_path / "mine.safetensors"
    save_file(build(STDiT2, in_channels=4).state_dict(), path)
    said = refusal(capsys, path, tmp_path / "out")
    assert "shapes do not tell" in said and "qk_norm_legacy" in said and "--model" in said
    assert convert(path, tmp_path / "out", "--model", "opensora-1.1") == 0
    load_component(tmp_path / "out", STDiT2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["qk_norm_legacy"] is True


def test_models_of_one_shape_have_to_be_told_apart(tmp_path, capsys, monkeypatch):
    first, second = tiny("opensora-1.0-16x256x256"), tiny("opensora-1.0-16x256x256", guidance_scale=3.0)
    monkeypatch.setitem(PUBLISHED, "opensora-1.0-16x256x256", first)
    monkeypatch.setitem(PUBLISHED, "opensora-1.0-hq-16x256x256", second)
    path = tmp_path / "mine.pth"
    torch.save(network(first.transformer).state_dict(), path)
    said = refusal(capsys, path, tmp_path / "out")
    assert "opensora-1.0-16x256x256, opensora-1.0-hq-16x256x256" in said and "--model" in said
    assert convert(path, tmp_path / "out", "--model", "opensora-1.0-hq-16x256x256") == 0
    load_component(tmp_path / "out", STDiT)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_heads"] == 2


def test_a_frame_autoencoder_keeps_the_factor_of_its_own_configuration(published, tmp_path, capsys):
    _, networks = published("opensora-1.1-stage3")
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(frame_weights(networks["autoencoder"].state_dict()), folder / WEIGHTS)
    assert "scaling_factor" in refusal(capsys, folder, tmp_path / "out"), "shapes do not tell, and nothing else does"
    write_json(folder / "config.json", frame_config(networks["autoencoder"], scaling_factor=0.13025))
    assert convert(folder, tmp_path / "out") == 0
    assert load_component(tmp_path / "out", VideoAutoencoder).latent_space.scaling_factor == 0.13025


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_wrong_autoencoder(published, recorded, tmp_path, capsys):
    other = make_autoencoder()
    with torch.no_grad():
        other.spatial_vae.module.decoder.conv_out.bias.add_(0.01)  # type: ignore[union-attr]
    other.save_pretrained(tmp_path / "other")
    said = refusal(capsys, recorded, tmp_path / "out", "--autoencoder", tmp_path / "other")
    assert "wrong autoencoder" in said
    other.save_pretrained(recorded / "autoencoder")
    assert "wrong autoencoder" in refusal(capsys, recorded, tmp_path / "out")

    # SDXL's autoencoder for 1.1, and for 1.2, which needs the part over time as well
    _, networks = published("opensora-1.1-stage3")
    sdxl = tmp_path / "sdxl"
    sdxl.mkdir()
    save_file(frame_weights(networks["autoencoder"].state_dict()), sdxl / WEIGHTS)
    write_json(sdxl / "config.json", frame_config(networks["autoencoder"], scaling_factor=0.13025))
    said = refusal(capsys, "opensora-1.1-stage3", tmp_path / "out", "--autoencoder", sdxl)
    assert "0.13025" in said and "0.18215" in said
    published("opensora-1.2")
    assert "temporal_vae" in refusal(capsys, "opensora-1.2", tmp_path / "out", "--autoencoder", sdxl)


def test_a_wrong_scaling_factor(recorded, tmp_path, capsys):
    path = recorded / "autoencoder" / "config.json"
    config = json.loads(path.read_text())
    config["latent_space"]["scaling_factor"] = 0.13025
    write_json(path, config)
    assert "wrong scaling factor" in refusal(capsys, recorded, tmp_path / "out")

    config = {
        "spatial": {"block_out_channels": [8, 8], "norm_num_groups": 4},
        "temporal": {"type": "folded", "dim": 8, "encoder_depth": 1, "decoder_depth": 1},
        "latent_space": {**PUBLISHED["opensora-1.2"].autoencoder.config["latent_space"], "scaling_factor": 0.13025},
    }
    VideoAutoencoder(**config).save_pretrained(tmp_path / "vae")
    assert "wrong scaling factor" in refusal(capsys, tmp_path / "vae", tmp_path / "out")


def test_a_truncated_file(recorded, tmp_path, capsys):
    path = recorded / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    for source in (recorded, recorded / "transformer", path):
        said = refusal(capsys, source, tmp_path / "out")
        assert str(path) in said and "damaged" in said


def test_weights_that_are_no_numbers(recorded, tmp_path, capsys):
    path = recorded / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["rope.freqs"][0] = float("nan")
    save_file(weights, path)
    assert "NaN" in refusal(capsys, recorded, tmp_path / "out")


def test_a_pickle_with_code(recorded, tmp_path, capsys):
    path = recorded / "transformer" / "diffusion_pytorch_model.bin"
    torch.save({"x": torch.zeros(1), "code": Exploit(tmp_path / "made")}, path)
    (recorded / "transformer" / WEIGHTS).unlink()
    for source in (path, recorded):
        assert "refused" in refusal(capsys, source, tmp_path / "out")
    assert not (tmp_path / "made").exists()


def test_an_empty_folder_and_an_unknown_name(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refusal(capsys, tmp_path / "empty", tmp_path / "out")
    assert "did you mean 'toybox'?" in refusal(capsys, "toybocks", tmp_path / "out")
    assert "did you mean 'opensora-1.2'?" in refusal(
        capsys, tmp_path / "empty", tmp_path / "out", "--model", "opensora-12"
    )


def test_networks_that_cannot_be_run(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file({"blocks.0.adaLN_modulation.x": torch.zeros(1), "temp_embed": torch.zeros(1)}, path)
    assert "not supported yet" in refusal(capsys, path, tmp_path / "out")
    T5EncoderModel(make_pipeline().text_encoder.config).save_pretrained(tmp_path / "t5")
    said = refusal(capsys, tmp_path / "t5", tmp_path / "out", "--autoencoder", tmp_path)
    assert "is no transformer" in said


def test_options_that_are_none(tmp_path, capsys):
    assert "unknown dtype 'float8'" in refusal(capsys, "toybox", tmp_path / "out", "--dtype", "float8")
    assert "such as 5GB" in refusal(capsys, "toybox", tmp_path / "out", "--max-shard-size", "small")
    assert "leave out --model" in refusal(capsys, "toybox", tmp_path / "out", "--model", "opensora-1.2")


def test_an_output_that_is_in_the_way(recorded, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    assert convert(recorded / "autoencoder", output) == 0, "an empty folder is none"
    assert "something in it" in refusal(capsys, recorded / "autoencoder", output)
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refusal(capsys, recorded / "autoencoder", file)
    assert file.read_text() == "mine"
    assert "cannot be written" in refusal(capsys, recorded / "autoencoder", file / "out")
