"""`opensora latents`: audits in words, JSON and pictures; statistics written into an autoencoder, or refused."""

import json
import sys

import pytest
import torch
from PIL import Image
from published_pipelines import pipeline_of
from safetensors.torch import load_file
from tiny_published import network, tiny

from opensora.checkpoints.source import find_part
from opensora.cli.main import main
from opensora.lab.latents import clips as latent_clips
from opensora.lab.latents.clips import VideoSize, choose_clips
from opensora.models.autoencoders.latent_space import LatentSpace

SMALL = {"--model": "codec", "--num-clips": "6", "--num-frames": "4", "--height": "32", "--width": "48"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def codec(tmp_path, monkeypatch):
    """A 2D autoencoder of one's own in the current folder."""
    monkeypatch.chdir(tmp_path)
    network(tiny("opensora-1.1-stage3").autoencoder).save_pretrained("codec")
    return tmp_path / "codec"


def run(what: str, *words: str) -> int:
    """`opensora latents WHAT` of the small autoencoder, unless the words say otherwise."""
    said = {name: value for name, value in SMALL.items() if name not in words}
    return main(["latents", what, "--device", "cpu", *(word for pair in said.items() for word in pair), *words])


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("opensora: ") and error.count("\n") == 1, error
    return error


# --- audit ------------------------------------------------------------------------------------------------------------


def test_an_audit_in_words_in_json_and_in_a_picture(codec, capsys):
    args = ["audit", "--output", "new/found.json", "--plot", "found.png"]
    assert run(*args) == 0
    printed = capsys.readouterr().out
    assert "codec: 6 held-out toy clips, 4 frames of 32x48, seed 0" in printed
    assert "latents: wrong factor: " in printed and '"latent_space": {"scaling_factor"' in printed
    assert "IDDPM, linear" in printed and "SDXL" in printed
    found = json.loads((codec.parent / "new/found.json").read_text())
    assert found["verdicts"][0]["kind"] == "wrong factor" and len(found["latents"]["mean"]) == 4
    assert sum(found["histogram"]["counts"][0]) == 6 * 4 * 4 * 6  # clips, frames, cells
    with Image.open(codec.parent / "found.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
    assert run(*args[:3]) == 0, "results are written anew"


def test_another_factor_may_be_looked_at(codec, capsys):
    assert run("audit", "--scaling-factor", "0.5", "--convention", "divide") == 0
    printed = capsys.readouterr().out
    assert "the declaration was overridden" in printed and "1/0.5" in printed
    assert json.loads((codec / "config.json").read_text())["latent_space"]["scaling_factor"] == 0.18215


def test_audits_do_not_depend_on_the_machines_mood(codec):
    assert run("audit", "--output", "a.json") == run("audit", "--output", "b.json") == 0
    assert (codec.parent / "a.json").read_text() == (codec.parent / "b.json").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data", "absent"], "absent does not exist; give a folder of clips, a manifest (.csv, .parquet) or toybox"),
        (["--data", "codec"], "no clips in codec"),
        (["--model", "toybux"], "toybux"),
        (["--model", "nothing/here"], "nothing/here"),
        (["--height", "33"], "it must be a multiple of 8; use 32 or 40"),
        (["--num-frames", "0"], "--num-frames is 0"),
        (["--width", "99999999"], "--width is 99999999"),
        (["--num-clips", "0"], "--num-clips is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--scaling-factor", "-1"], "scaling_factor -1.0 given, but it must be a positive number"),
        (["--scaling-factor", "nan"], "must be a positive number"),
        (["--convention", "divide"], "--convention has no effect without --scaling-factor"),
        (["--output", "found.txt"], "give a file that ends in .json"),
        (["--plot", "found.jpg"], "give a file that ends in .png"),
        (["--plot", "codec/config.json/x.png"], "cannot be written"),
    ],
)
def test_what_the_user_can_mend_is_one_line(codec, capsys, words, reason):
    assert run("audit", *words) == 2
    assert reason in error_line(capsys)
    assert [path.name for path in codec.parent.iterdir()] == ["codec"], "nothing is half written"


def test_a_model_without_an_autoencoder(codec, capsys):
    (codec.parent / "model").mkdir()
    (codec.parent / "model/model_index.json").write_text('{"_class_name": "OpenSoraPipeline"}')
    assert run("audit", "--model", "model") == 2
    assert "names no autoencoder" in error_line(capsys)


def test_a_plot_without_matplotlib_names_the_extra_before_anything_is_done(codec, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("audit", "--plot", "found.png") == 2
    assert 'pip install "opensora[eval]", or leave --plot out' in error_line(capsys)


# --- measure ----------------------------------------------------------------------------------------------------------


def test_measured_figures_are_written_with_what_they_were_measured_on(codec, capsys):
    assert run("measure", "--output", "new") == 0
    before, after = (find_part(name, "autoencoder").load() for name in ("codec", "new"))
    space = after.latent_space
    assert space.trained_with.startswith("6 held-out toy clips, 4 frames of 32x48, seed 0; measured by opensora ")
    assert json.loads((codec.parent / "new/config.json").read_text())["latent_space"] == space.to_dict()
    videos = list(choose_clips("toybox", VideoSize(4, 32, 48), 6, seed=0))
    latents = torch.cat([before.encode_video(video) for video in videos]).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(torch.tensor(space.shift).double(), latents.mean(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(space.scale).double(), latents.std(dim=1), rtol=1e-3, atol=0)
    assert before.latent_space.shift is None, "the first one is as it was"
    printed = capsys.readouterr().out
    assert '"latent_space": {' in printed and "written: new" in printed
    stored = load_file(codec.parent / "new" / WEIGHTS)
    torch.testing.assert_close(stored["shift"].flatten().double(), torch.tensor(space.shift).double())
    assert run("audit", "--model", "new") == 0
    assert "latents: good" in capsys.readouterr().out


def test_in_place_keeps_precision_and_what_lies_beside(codec):
    half = find_part("codec", "autoencoder").load().half()
    half.save_pretrained("codec")
    (codec / "README.md").write_text("mine")
    assert run("measure", "--in-place") == 0
    assert sorted(path.name for path in codec.iterdir()) == ["README.md", "config.json", WEIGHTS]
    assert {tensor.dtype for tensor in load_file(codec / WEIGHTS).values()} == {torch.float16}
    assert find_part("codec", "autoencoder").load().latent_space.shift is not None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "a new folder (--output) or into the autoencoder's own (--in-place)"),
        (["--output", "new", "--in-place"], "a new folder (--output) or into the autoencoder's own (--in-place)"),
        (["--output", "codec"], "with something in it"),
        (["--output", "codec/config.json"], "is a file"),
        (["--output", "new", "--model", "toybox"], "the transformer of toybox was trained on the latents of toybox"),
        (["--output", "new", "--model", "toybox-iddpm"], "say so with --from-scratch"),
        (["--in-place", "--model", "toybox", "--from-scratch"], "write another autoencoder with --output"),
        (["--output", "new", "--data", "absent"], "does not exist"),
    ],
)
def test_what_is_not_measured_is_not_written(codec, capsys, words, reason):
    assert run("measure", *words) == 2
    assert reason in error_line(capsys)
    assert [path.name for path in codec.parent.iterdir()] == ["codec"]


def test_an_autoencoder_of_a_model_is_known_as_such_from_its_own_folder_and_as_a_copy(codec, capsys):
    bundled = find_part("toybox", "autoencoder").path
    copied = codec.parent / "copied"
    copied.mkdir()
    for file in bundled.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    for name in (str(bundled), "copied"):
        assert run("measure", "--model", name, "--output", "new") == 2
        assert "was trained on the latents of" in error_line(capsys)


def test_statistics_of_published_weights_are_known(codec, capsys):
    pipeline_of("opensora-1.2").autoencoder.save_pretrained("like 1.2")
    assert run("measure", "--model", "like 1.2", "--output", "new") == 2
    assert "a released transformer (opensora-1.2) was trained" in error_line(capsys)


def test_from_scratch_writes_another_autoencoder_of_a_model(codec):
    pipeline_of("opensora-1.2").save_pretrained("model")
    before = (codec.parent / "model/autoencoder/config.json").read_text()
    args = ["measure", "--model", "model", "--output", "new"]
    assert run(*args) == 2 and run(*args, "--from-scratch") == 0
    written = find_part("new", "autoencoder").load().latent_space
    assert (
        written.scaling_factor == 0.18215
        and written.shift != LatentSpace.from_dict(json.loads(before)["latent_space"]).shift
    )
    assert (codec.parent / "model/autoencoder/config.json").read_text() == before


@pytest.mark.parametrize("words", [["--output", "new"], ["--in-place"]])
def test_an_interruption_leaves_all_as_it_was(codec, capsys, monkeypatch, words):
    before = {path.name: path.read_bytes() for path in codec.iterdir()}

    def interrupted(self):
        self.num_read += 1
        yield torch.rand(1, 3, 4, 32, 48)
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_clips.Clips, "__iter__", interrupted)
    assert run("measure", *words) == 130
    assert {path.name: path.read_bytes() for path in codec.iterdir()} == before
    assert [path.name for path in codec.parent.iterdir()] == ["codec"]
