"""Sizes, lengths, rates and scores as each model means them, from the published models' own defaults."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.cli.conditions import LoopOptions
from opensora.cli.main import main
from opensora.cli.sampling import SamplingOptions, ScoreOptions, resolve_sampling
from opensora.cli.sizes import SizeOptions
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule
from opensora.media.read import read_metadata, read_video
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a small red ball rolls left"
V1_0, V1_1, V1_2 = "opensora-1.0-hq-16x256x256", "opensora-1.1-stage3", "opensora-1.2"
RULE = SizeRule(spatial_multiple=8)


def pipe_of(config: Any) -> Any:
    return SimpleNamespace(config=config, default_cfg_channels=config.cfg_channels)


def config_of(model: str):
    parameters = inspect.signature(OpenSoraPipeline.__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    if model == "toybox":
        return SimpleNamespace(**defaults | {"height": 64, "width": 64, "num_frames": 17, "fps": 8})
    return SimpleNamespace(**defaults | dict(PUBLISHED[model].defaults))


@pytest.mark.parametrize(
    ("model", "wishes", "made", "told"),
    [
        (V1_2, {}, (240, 424), (240, 426)),
        (V1_2, {"resolution": "240p", "aspect_ratio": "9:16"}, (240, 424), (240, 426)),
        (V1_2, {"resolution": "240p", "aspect_ratio": "16:9"}, (424, 240), (426, 240)),
        (V1_2, {"resolution": "720p"}, (720, 1280), (720, 1280)),
        (V1_2, {"resolution": "480p", "aspect_ratio": "9:16"}, (480, 848), (480, 854)),
        (V1_2, {"resolution": "360p", "aspect_ratio": "1:1"}, (480, 480), (480, 480)),
        (V1_2, {"height": 240, "width": 424}, (240, 424), (240, 426)),
        (V1_2, {"height": 256, "width": 256}, (256, 256), (256, 256)),
        (V1_2, {"aspect_ratio": "9:16"}, (240, 424), (240, 426)),
        (V1_1, {"image_size": (240, 426)}, (240, 424), (240, 426)),
        (V1_1, {"image_size": (240, 424)}, (240, 424), (240, 424)),
        (V1_1, {"resolution": "144p", "aspect_ratio": "16:9"}, (256, 144), (256, 144)),
        (V1_0, {}, (256, 256), None),
        (V1_0, {"resolution": "512"}, (512, 512), None),
        ("toybox", {"resolution": "240p", "aspect_ratio": "9:16"}, (424, 240), None),
        ("toybox", {"aspect_ratio": "2:1"}, (48, 88), None),
        ("toybox", {"image_size": (60, 90)}, (56, 88), None),
    ],
)
def test_each_model_means_its_own_sizes(model, wishes, made, told):
    size = SizeOptions(**wishes).resolve(config_of(model), RULE)
    assert (size.height, size.width) == made and size.nominal_size == told


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (V1_2, "4s", 102),
        (V1_2, "2x", 102),
        (V1_2, "8s", 204),
        (V1_2, "51", 51),
        (V1_2, None, 51),
        (V1_1, "2s", 16),  # of a file at 24 / 3 frames per second
        (V1_1, None, 16),
        ("toybox", "2s", 16),
        ("toybox", None, 17),
    ],
)
def test_each_model_means_its_own_seconds(model, text, expected):
    assert SizeOptions(num_frames=text).resolve(config_of(model), RULE).num_frames == expected


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        (V1_2, "3s", "nearest valid is 4s"),
        (V1_1, "2x", "neither a count such as 17 nor a duration"),
        (V1_2, "0", "neither a count such as 51"),
    ],
)
def test_lengths_that_mean_nothing_to_a_model(model, text, message):
    with pytest.raises(OpenSoraError, match=message):
        SizeOptions(num_frames=text).resolve(config_of(model), RULE)


@pytest.mark.parametrize(
    ("length", "rule", "expected"),
    [(20, RULE, 20), (40, SizeRule(max_frames=34), 34), (20, SizeRule(frame_multiple=4, frame_offset=1), 17)],
)
def test_an_edited_clip_keeps_its_length_as_far_as_can_be(length, rule, expected):
    assert SizeOptions().resolve(config_of("toybox"), rule, edited_frames=length).num_frames == expected
    assert SizeOptions(num_frames="5").resolve(config_of("toybox"), rule, edited_frames=length).num_frames == 5


@pytest.mark.parametrize(
    ("model", "wishes", "file_fps", "told"),
    [
        (V1_1, {}, 8, 24),
        (V1_1, {"fps": 12}, 4, 12),
        (V1_1, {"frame_interval": 2}, 12, 24),
        (V1_1, {"fps": 10}, 10 / 3, 10),
        (V1_2, {}, 24, 24),
        (V1_2, {"save_fps": 10}, 10, 24),
    ],
)
def test_rate_of_the_file_and_rate_told(model, wishes, file_fps, told):
    config = config_of(model)
    size = SizeOptions(**wishes).resolve(config, RULE)
    sampling = resolve_sampling(pipe_of(config), size, SamplingOptions(), ScoreOptions(), LoopOptions())
    assert (sampling.file_fps, sampling.fps) == (file_fps, told)


@pytest.mark.parametrize(
    ("model", "wishes", "expected"),
    [
        (V1_2, {}, {"aesthetic": 6.5, "flow": None, "camera_motion": None}),
        (V1_2, {"aes": "none"}, {"aesthetic": None, "flow": None, "camera_motion": None}),
        (V1_2, {"flow": "2", "camera_motion": "pan left"}, {"aesthetic": 6.5, "flow": 2, "camera_motion": "pan left"}),
        (V1_1, {}, None),
        (V1_1, {"aes": "7"}, {"aesthetic": 7}),  # which the pipeline refuses
    ],
)
def test_scores_take_the_place_of_the_models_own(model, wishes, expected):
    config = config_of(model)
    size = SizeOptions().resolve(config, RULE)
    sampling = resolve_sampling(pipe_of(config), size, SamplingOptions(), ScoreOptions(**wishes), LoopOptions())
    assert sampling.scores == expected


def test_loops_carry_what_the_model_likes():
    config = config_of(V1_2)
    size = SizeOptions().resolve(config, RULE)
    parts = (pipe_of(config), size, SamplingOptions(), ScoreOptions())
    assert resolve_sampling(*parts, LoopOptions()).condition_frames is None
    assert resolve_sampling(*parts, LoopOptions(loop=2)).condition_frames is None  # extending has another default
    assert resolve_sampling(*parts, LoopOptions(loop=2, condition_frame_length=3)).condition_frames == 3


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def tables_model(pipe):
    """One that is told sizes of the tables, as 1.1 and 1.2 are."""
    pipe.config.nominal_size, pipe.config.aspect_ratio_order = [16, 18], "height:width"
    pipe.config.fps, pipe.config.frame_interval = 24, 3
    return pipe


def test_what_was_made_and_what_was_told_are_said(tables_model, capsys):
    options = ["--resolution", "144p", "--aspect-ratio", "1.78:1", "--num-frames", "1", "--output", "a.png"]
    assert main(["generate", PROMPT, *options]) == 0
    err = capsys.readouterr().err
    assert err.startswith("making 1 frame of 256x144 (height x width), standing\n")
    assert main(["generate", PROMPT, "--output", "b.png"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("5 frames of 16x16 (height x width), square; the network is told 16x18; 8 fps, 3 steps: ")
    assert tables_model.calls[1].nominal_size == (16, 18) and tables_model.calls[1].fps == 24
    assert read_video("b.png")[1] == 8
    assert read_metadata("b.png")["sampling"]["nominal_size"] == [16, 18]


def test_all_of_it_is_made_again_from_the_record(tables_model):
    tables_model.config.scores = {"aesthetic": 6.5, "flow": None, "camera_motion": None}
    options = ["--save-fps", "5", "--aes", "none", "--camera-motion", "pan left", "--output", "a.png"]
    assert main(["generate", PROMPT, *options]) == 0
    tables_model.config.nominal_size, tables_model.config.scores = [16, 20], None
    assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
    first, second = tables_model.calls
    assert first == second and first.scores == {"aesthetic": None, "flow": None, "camera_motion": "pan left"}
    assert read_video("b.png")[1] == 5


@pytest.mark.parametrize(
    ("script", "ours"),
    [
        (["--num-sampling-steps", "7"], ["--num-inference-steps", "7"]),
        (["--cfg-scale", "2"], ["--guidance-scale", "2"]),
        (["--cfg-channel", "3"], ["--cfg-channels", "3"]),
        (["--image-size", "24", "32"], ["--height", "24", "--width", "32"]),
        (["--num-sample", "2"], ["--num-videos", "2"]),
        (["--fps", "12", "--num-frames", "9"], ["--num_frames", "9", "--fps", "12"]),
    ],
)
def test_the_scripts_names_mean_the_same(pipe, script, ours):
    assert main(["generate", PROMPT, "--save-dir", "a/", *script]) == 0
    assert main(["generate", "--prompt", PROMPT, "--output", "b/", *ours]) == 0
    half = len(pipe.calls) // 2
    assert pipe.calls[:half] == pipe.calls[half:] and half


def test_parts_of_a_model_can_be_replaced(pipe, tmp_path):
    options = ["--ckpt-path", "w.pth", "--vae-path", "vae", "--text-encoder-path", "t5", "--tokenizer-path", "tok"]
    assert main(["generate", PROMPT, "--output", "a.png", *options]) == 0
    assert {name: str(path) for name, path in pipe.asked.components.items()} == {
        "transformer": "w.pth",
        "autoencoder": "vae",
        "text_encoder": "t5",
        "tokenizer": "tok",
    }
    assert read_metadata("a.png")["components"]["transformer"] == "w.pth"
    pipe.hash = "b" * 64
    with pytest.raises(OpenSoraError, match=r"with --model, its transformer was w\.pth"):
        main_raising(["generate", "--from", "a.png"])


def main_raising(args):
    from opensora.cli.generate import Generate
    from opensora.cli.parsing import parse

    parse(Generate, args[1:], "opensora generate").run()


def test_the_sampler_is_chosen_and_recorded(pipe):
    chosen = []
    pipe.use_sampler = chosen.append
    assert main(["generate", PROMPT, "--sampler", "dpm-solver++", "--output", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
    assert chosen == ["dpm-solver++", "dpm-solver++"]


def test_a_record_of_the_first_version_is_still_read(pipe, tmp_path):
    """As written before given frames, scores, loops and rates of their own."""
    import json

    assert main(["generate", PROMPT, "--seed", "3", "--output", "a.png"]) == 0
    record = json.loads((tmp_path / "a.png.json").read_text())
    old = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale", "cfg_channels")
    record["sampling"] = {name: record["sampling"][name] for name in old}
    for name in ("refined_prompt", "given", "components"):
        del record[name]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert main(["generate", "--from", "old.json", "--output", "b.png"]) == 0
    assert torch.equal(torch.from_numpy(read_video("a.png")[0]), torch.from_numpy(read_video("b.png")[0]))
    assert pipe.calls[0] == pipe.calls[1]


def test_runs_that_share_a_prompt_file_make_the_clips_of_one_run(pipe, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\na green ball\n")
    together = ["generate", "--prompt-path", "prompts.txt", "--seed", "5"]
    assert main([*together, "--output", "all.png"]) == 0
    assert main([*together, "--output", "part.png", "--start-index", "1", "--end-index", "2"]) == 0
    assert capsys.readouterr().out.split()[3:] == ["part-1.png"]
    assert (tmp_path / "part-1.png").read_bytes() == (tmp_path / "all-1.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "24", "32", "--height", "24"], "--image-size says the whole size"),
        (["--image-size", "0", "32"], "expected two sides"),
        (["--frame-interval", "0"], "--frame-interval is 0"),
        (["--save-fps", "0"], "fps is 0"),
        (["--save-fps", "120", "--format", "gif"], "expected a number from 0.01 to 100 for gif"),
        (["--aes", "great"], "--aes is 'great', expected a number such as 6.5, or none"),
        (["--flow", "inf"], "--flow is 'inf'"),
        (["--sampler", "dmp-solver"], "did you mean dpm-solver++?"),
        (["--batch-size", "4"], "there is no option --batch-size: every clip is made by itself"),
        (["--llm-refine", "True"], "--refine-endpoint URL"),
        (["--start-index", "1"], "--start-index and --end-index choose lines of --prompt-path"),
        (["--prompt", "a blue ball"], "PROMPT and --prompt both say"),
        (["--download"], "--download fetches published models, and toybox is none"),
        (["--reso", "240p"], "unknown option --reso"),
    ],
)
def test_impossible_wishes(pipe, capsys, options, message):
    assert main(["generate", PROMPT, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
    assert not pipe.calls


def test_published_models_are_not_fetched_unasked(monkeypatch, capsys, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a cat", "--model", "opensora-1.2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "fetch about" in err and "--download" in err


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("\n", False)])
def test_at_a_terminal_a_user_is_asked(monkeypatch, capsys, tmp_path, answer, fetched):
    import io
    import sys

    from huggingface_hub import constants

    from opensora.checkpoints import hub
    from opensora.cli.loading import ModelOptions

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    asked = []

    def download(part):
        asked.append(part.repository)
        raise OpenSoraError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(OpenSoraError, match="no network" if fetched else "was not fetched"):
        ModelOptions(model="opensora-1.2").locate()
    assert bool(asked) is fetched


@pytest.mark.parametrize("columns", ["80", "200"])
def test_misspelt_options_are_told_from_right_ones_on_any_terminal(pipe, monkeypatch, capsys, columns):
    """Where the terminal is wide, the help page they are looked up in has two columns."""
    monkeypatch.setenv("COLUMNS", columns)
    options = ["--refine-model", "x", "--condition-frame-length", "2", "--end-index", "1", "--hight", "8"]
    assert main(["generate", PROMPT, *options]) == 2
    assert "unknown option --hight; did you mean --height?" in capsys.readouterr().err
