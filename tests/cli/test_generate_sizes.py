"""Sizes, rates, scores and the scripts' names through `opensora generate`, and what is said of them."""

import pytest
import torch

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.media.read import read_metadata, read_video

PROMPT = "a small red ball rolls left"


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
    assert err.startswith("making 1 frame of 256x144 (height x width), portrait\n")
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
    with pytest.raises(OpenSoraError, match=r"with .model., its transformer was w\.pth"):
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
    """As written before conditioning frames, scores, loops and rates of their own."""
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
        (["--save-fps", "0"], "--save-fps is 0"),
        (["--save-fps", "120", "--format", "gif"], "expected a number from 0.01 to 50 for gif"),
        (["--aes", "great"], "--aes is 'great', expected a number such as 6.5, a word such as 'excellent', or none"),
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
    from opensora.cli.generate import _ask_to_fetch
    from opensora.generation.loading import locate_model
    from opensora.generation.request import ClipRequest

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
        locate_model(ClipRequest("", model="opensora-1.2"), ask=_ask_to_fetch)
    assert bool(asked) is fetched


@pytest.mark.parametrize("columns", ["80", "200"])
def test_misspelt_options_are_told_from_right_ones_on_any_terminal(pipe, monkeypatch, capsys, columns):
    """Where the terminal is wide, the help page they are looked up in has two columns."""
    monkeypatch.setenv("COLUMNS", columns)
    options = ["--refine-model", "x", "--condition-frame-length", "2", "--end-index", "1", "--hight", "8"]
    assert main(["generate", PROMPT, *options]) == 2
    assert "unknown option --hight; did you mean --height?" in capsys.readouterr().err
