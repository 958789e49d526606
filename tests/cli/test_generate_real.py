"""`opensora generate` with a real, tiny, untrained model saved as a folder; damaged models are refused in one line."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.media.read import read_metadata, read_video
from opensora.media.write import write_video
from opensora.models.autoencoders.latent_space import LatentSpace

PROMPT = "a small red ball rolls left"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["flow", "iddpm"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / request.param
    make_pipeline(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path, monkeypatch):
    """A copy to damage; the current folder is a fresh one."""
    shutil.copytree(saved, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def test_a_clip_and_the_same_clip_again(model, capsys):
    options = ["--num-inference-steps", "3", "--num-frames", "1s", "--cfg-channels", "0,2", "--seed", "3"]
    assert main(["generate", PROMPT, "--model", "model", "--output", "one.mp4", *options]) == 0
    out, err = capsys.readouterr()
    assert out == "one.mp4\n" and "peak memory" in err
    assert main(["generate", "--from", "one.mp4", "--output", "two.mp4"]) == 0
    (one, fps), (two, _) = read_video("one.mp4"), read_video("two.mp4")
    assert fps == 8 and one.shape == (8, 16, 24, 3)
    assert np.array_equal(one, two)
    record = read_metadata("one.mp4")
    assert record["sampling"]["cfg_channels"] == [0, 2] and record["pipeline"]["scheduler"]["class"]
    assert record["pipeline"]["latent_space"] and record["dtype"] == "float32" and len(record["model_hash"]) == 64
    assert json.loads((model.parent / "one.mp4.json").read_text()) == record


def test_a_clip_with_a_scale_for_each_channel_again(model):
    options = ["--model", "model", "--num-inference-steps", "3", "--seed", "3"]
    assert main(["generate", PROMPT, *options, "--channel-scales", "0-2:7,3:1", "--output", "one.mp4"]) == 0
    assert main(["generate", "--from", "one.mp4", "--output", "two.mp4"]) == 0
    assert np.array_equal(read_video("one.mp4")[0], read_video("two.mp4")[0])
    first = ["--guidance-scale", "7", "--cfg-channels", "3"]
    assert main(["generate", PROMPT, *options, *first, "--output", "first.mp4"]) == 0
    assert np.array_equal(read_video("one.mp4")[0], read_video("first.mp4")[0])


OTHER = {"scaling_factor": 0.5, "shift": [0.3, 0.1, 0.0, -0.2], "scale": [1.0, 2.5, 0.75, 1.5]}


@pytest.fixture
def generate(model):
    """The frames of a clip of two steps that begins with a picture, by the model given or in `model`."""
    picture = np.random.default_rng(0).integers(0, 255, (1, 16, 24, 3), np.uint8)
    write_video("first.png", picture, 8)

    def frames(output, *options, model="model"):
        given = [PROMPT, "--model", str(model), "--image", "first.png", "--num-inference-steps", "2", "--seed", "3"]
        assert main(["generate", *given, *options, "--output", output]) == 0
        return read_video(output)[0]

    return frames


def test_the_declared_latent_space_changes_nothing(model, generate):
    declared = read_declared(model)
    plain = generate("plain.mkv")
    for said in ("1", json.dumps({name: declared[name] for name in ("shift", "scale")}), json.dumps({"shift": None})):
        again = generate("again.mkv", "--latent-space", said)
        assert np.array_equal(again, plain) == (said != '{"shift": null}'), said
    assert read_metadata("plain.mkv")["pipeline"]["latent_space"]["replaces"] is None


def test_another_latent_space_is_that_of_a_model_which_declares_it(saved, model, generate):
    pipeline = make_pipeline(saved.name)
    pipeline.autoencoder.set_latent_space(LatentSpace.from_dict(OTHER))
    pipeline.save_pretrained("declares")
    made = generate("made.mkv", "--latent-space", json.dumps(OTHER))
    assert np.array_equal(made, generate("wanted.mkv", model="declares"))
    assert not np.array_equal(made, generate("plain.mkv"))
    recorded = read_metadata("made.mkv")["pipeline"]["latent_space"]
    assert {name: recorded[name] for name in OTHER} == OTHER
    assert recorded["replaces"]["shift"] == read_declared(model)["shift"]
    assert main(["generate", "--from", "made.mkv", "--output", "again.mkv"]) == 0
    assert np.array_equal(read_video("again.mkv")[0], made)
    assert read_metadata("again.mkv")["pipeline"] == read_metadata("made.mkv")["pipeline"]
    offloaded = generate("offloaded.mkv", "--latent-space", json.dumps(OTHER), "--offload", "networks")
    assert np.array_equal(offloaded, made)


def test_a_quarrel_of_configuration_and_weights_is_settled_by_an_override(model, generate, capsys):
    path = model / "autoencoder" / "config.json"
    config = json.loads(path.read_text())
    generate("plain.mkv")
    config["latent_space"]["scale"][0] = 3.0
    path.write_text(json.dumps(config))
    assert main(["generate", PROMPT, "--model", "model", "--output", "clip.mkv"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "two different latent spaces" in said and "--latent-space" in said
    generate("settled.mkv", "--latent-space", json.dumps({"scale": [3.0, 1.5, 1.25, 1.0]}))
    recorded = read_metadata("settled.mkv")["pipeline"]["latent_space"]
    assert recorded["scale"][0] == 3.0 and recorded["replaces"]["scale"][0] == 2.0


def read_declared(model):
    return json.loads((model / "autoencoder" / "config.json").read_text())["latent_space"]


def test_from_with_other_weights(model, capsys):
    assert main(["generate", PROMPT, "--model", "model", "--output", "one.mp4", "--num-inference-steps", "2"]) == 0
    weights = load_file(model / WEIGHTS)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, model / WEIGHTS)
    capsys.readouterr()
    assert main(["generate", "--from", "one.mp4"]) == 2
    assert "is not the one this clip was made with" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def pickle_with_code(model):
    (model / WEIGHTS).unlink()
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))


def weights_with_nan(model):
    weights = load_file(model / WEIGHTS)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, model / WEIGHTS)


def cut_in_half(model):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_with_code, "pickle"),
        (weights_with_nan, "NaN"),
        (cut_in_half, "damaged"),
        (lambda model: (model / WEIGHTS).unlink(), "weights"),
        (lambda model: (model / WEIGHTS).write_text("not weights"), "is a text file"),
        (lambda model: shutil.rmtree(model / "autoencoder"), "autoencoder"),
        (lambda model: (model / "model_index.json").unlink(), "model_index.json"),
        (lambda model: (model / "model_index.json").write_text("{"), "model_index.json"),
        (shutil.rmtree, "unknown model 'model'"),
    ],
)
def test_damaged_models(model, damage, message, capsys):
    damage(model)
    assert main(["generate", PROMPT, "--model", "model", "--output", "clip.mp4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("opensora: "), err
    assert message in err
    assert not list(model.parent.glob("*clip*"))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a zebra eats grass", [], "does not know: zebra, eats. It knows one object (small, large;"),
        (PROMPT, ["--negative-prompt", "ugly"], "does not know: ugly. It knows"),
        ("!!!", [], "'!!!' holds no word"),
    ],
)
def test_a_folder_knows_its_words_as_well(model, prompt, options, message, capsys):
    assert main(["generate", prompt, "--model", "model", "--output", "clip.mp4", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "20"], "nearest valid is 16 or 24"),
        (["--num-frames", "40"], "nearest valid is 34"),
        (["--cfg-channels", "5"], "cfg_channels"),
        (["--cfg-channels", "0,4"], "cfg_channels"),
        (["--channel-scales", "0-4:7"], "--channel-scales names channel 4, expected channels from 0 to 3"),
        (["--device", "nowhere"], "device"),
        (["--latent-space", "0"], "scaling_factor 0.0 given, but it must be a positive number"),
        (["--latent-space", "half"], "--latent-space is the text 'half', expected a scaling factor"),
        (["--latent-space", '{"scale": [1, 2, 3]}'], "shift has 4 channels and scale 3"),
        (["--latent-space", '{"shift": [1, 2, 3], "scale": null}'], "shift for 3 channels, but the latents have 4"),
    ],
)
def test_wishes_the_model_cannot_grant(model, options, message, capsys):
    assert main(["generate", PROMPT, "--model", "model", "--output", "clip.mp4", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("opensora: ") and err.count("\n") == 1, err
    assert message in err
    assert not list(model.parent.glob("*clip*"))


def test_choices_that_save_memory_change_nothing(model, capsys):
    options = ["--model", "model", "--num-inference-steps", "2", "--num-frames", "17"]
    assert main(["generate", PROMPT, *options, "--output", "plain.png"]) == 0
    plain = read_video("plain.png")[0].astype(int)
    options += ["--sequential-guidance", "--micro-batch-size", "1"]
    # A prompt is no kind of offloading.
    for name, saving in (("networks.png", ["--offload", PROMPT]), ("blocks.png", [PROMPT, "--offload", "blocks"])):
        assert main(["generate", *saving, *options, "--output", name]) == 0
        assert abs(plain - read_video(name)[0].astype(int)).max() <= 1
    assert main(["generate", PROMPT, "--model", "model", "--micro-batch-size", "0"]) == 2
    assert "--micro-batch-size is 0" in capsys.readouterr().err
    assert main(["generate", PROMPT, "--model", "model", "--tile-frames", "16"]) == 2
    assert "--tile-frames is for autoencoders that work in tiles" in capsys.readouterr().err


def test_a_clip_does_not_take_the_place_of_what_it_is_made_from(model, capsys):
    assert main(["generate", PROMPT, "--model", "model", "--num-frames", "17", "--output", "clip.mp4"]) == 0
    before = (model.parent / "clip.mp4").read_bytes()
    edit = ["generate", PROMPT, "--model", "model", "--edit", "clip.mp4", "--strength", "0.5", "--output", "clip.mp4"]
    assert main(edit) == 2
    assert "made from" in capsys.readouterr().err and (model.parent / "clip.mp4").read_bytes() == before


def test_a_refused_run_leaves_no_folder(model):
    refused = ["generate", PROMPT, "--model", "model", "--cfg-channels", "9", "--output", "new/clip.mp4"]
    assert main(refused) == 2
    assert not (model.parent / "new").exists()


def test_a_picture_is_no_weights_and_no_attack(model, capsys):
    (model.parent / "ball.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert main(["generate", PROMPT, "--model", "opensora-1.2", "--transformer", "ball.png"]) == 2
    said = capsys.readouterr().err
    assert "ball.png" in said and "run code" not in said and said.count("\n") == 1
