"""Commands as new users type them wrongly: each is answered in one line that says what to do, with exit code 2."""

import pytest

from opensora.cli.main import main
from opensora.cli.parsing import parse
from opensora.cli.train import Train
from opensora.errors import OpenSoraError

BALL = "a red ball rolls left"

WRONG = [
    # commands
    (["genrate", BALL], "did you mean generate?"),
    (["Train", "overfit"], "did you mean train?"),
    ([BALL], "unknown command"),
    (["-help"], "did you mean --help?"),
    (["data", "manifst", "clips"], "did you mean manifest?"),
    (["data"], "Expected one of {manifest, plan, precompute}"),
    (["evaluate", "fvd"], "known: toybox, prompts, given-frames, toybox-vae, loss, compare"),
    # what a command needs
    (["generate"], 'for example: opensora generate "a red ball rolls left"'),
    (["generate", "a", "red", "ball"], "unexpected red, ball; text with spaces belongs in quotes"),
    (["inspect"], "NAME|PATH is missing"),
    (["data", "manifest", "clips"], "--output FILE.csv|FILE.parquet is missing"),
    (["data", "plan"], "MANIFEST is missing: Table of clips"),
    (["train"], "RECIPE is missing"),
    (["convert", "toybox"], "FOLDER is missing"),
    # dashes
    (["generate", BALL, "—seed", "3"], "—seed begins with another dash than options do; write --seed"),
    (["generate", BALL, "–seed=3"], "write --seed=3"),
    (["generate", BALL, "−−seed", "3"], "write --seed"),
    (["generate", BALL, "-seed", "3"], "unknown option -seed; did you mean --seed?"),
    (["generate", BALL, "-o", "clip.mp4"], "unknown option -o; did you mean --output?"),
    (["generate", BALL, "-x"], "unknown option -x; options begin with two dashes"),
    (["generate", BALL, "seed=3"], "options begin with two dashes: --seed 3"),
    (["train", "overfit", "-output", "runs/x"], "did you mean --output?"),
    # values
    (["generate", BALL, "--seed"], "--seed needs a value: --seed N|random"),
    (["generate", BALL, "--seed", "--output", "x.mp4"], "--seed needs a value"),
    (["generate", BALL, "--negative-prompt", "-dark"], "one with a dash in front is --negative-prompt=-dark"),
    (["generate", BALL, "--seed", "1e3"], "'1e3' is not a whole number, nor random"),
    (["generate", BALL, "--seed", "-1"], "--seed is -1, expected a number from 0"),
    (["generate", BALL, "--height", "64px"], "'64px' is not a whole number"),
    (["generate", BALL, "--guidance-scale", "0,5"], "'0,5' is not a number; write 0.5"),
    (["generate", BALL, "--num-frames", "2sec"], "a duration such as 4s"),
    (["generate", BALL, "--image-size", "64×64"], "--image-size is '64×64', expected H W"),
    (["generate", BALL, "--image-size", "64x64"], "expected H W"),
    (["generate", BALL, "--aspect-ratio", "16x9"], "for example 16:9"),
    (["generate", BALL, "--resolution", "240 p"], "known: 144p, 256, 240p"),
    (["generate", BALL, "--model", ""], "--model is empty; give NAME|PATH, or leave --model out"),
    (["generate", BALL, "--output="], "--output is empty"),
    (["generate", BALL, "--model", "Toybox"], "did you mean 'toybox'?"),
    (["generate", BALL, "--dtype", "fp16"], "known: float32, bfloat16, float16"),
    (["generate", BALL, "--device", "gpu"], "here there is: cpu"),
    (["generate", BALL, "--offload", "yes"], "--offload is 'yes', expected one of networks, blocks"),
    (["generate", BALL, "--no-metadata=true"], "--no-metadata takes no value"),
    # twice, and two at once
    (["generate", BALL, "--seed", "1", "--seed", "2"], "--seed is given twice; give it once"),
    (["generate", BALL, "--cfg-scale", "1", "--guidance-scale=2"], "as --cfg-scale and as --guidance-scale"),
    (["generate", BALL, "--num_frames", "9", "--num-frames", "17"], "--num-frames is given twice"),
    (["generate", BALL, "--prompt", "b"], "give one of them"),
    # options of other programs and commands
    (["generate", BALL, "--duration", "2s"], "--num-frames 2s"),
    (["generate", BALL, "--steps", "10"], "write --num-inference-steps N"),
    (["generate", BALL, "--Seed", "3"], "did you mean --seed?"),
    (["generate", BALL, "--dry-run"], "unknown option --dry-run; it is one of opensora push and train"),
    (["generate", BALL, "--clips-per-day", "9"], "unknown option --clips-per-day; it is one of opensora plan serving"),
    (["generate", BALL, "--llm-refine"], "--refine-endpoint URL --refine-model NAME"),
    (["data", "plan", "clips.csv", "--output", "x"], "unknown option --output"),
    # files
    (["generate", BALL, "--output", "C:\\clips\\ball.mp4"], "is a path of Windows; here folders are separated by /"),
    (["generate", BALL, "--output", "ball.mp5"], "must end in one of .mp4"),
    (["generate", BALL, "--output", "ball.mp4", "--format", "gif"], "ends in .mp4 but the format asked for is gif"),
    (["generate", BALL, "--format", "MP4"], "did you mean mp4?"),
    (["generate", BALL, "--image", "folder"], "is a folder"),
    (["generate", "--prompt-path", "folder"], "prompt file folder is a folder, expected a file"),
    (["generate", "--prompt-path", "no.txt"], "prompt file no.txt does not exist"),
    (["generate", BALL, "--output", "file.txt/ball.mp4"], "cannot be written"),
    (["generate", BALL + ' {"reference_path": "a.png}'], "is not a JSON object"),
    (["inspect", "no.safetensors"], "no.safetensors"),
    (["convert", "toybox", "full"], "full"),
    # recipes and their settings
    (["train", "v1_2_stage"], "did you mean v1_2_stage3?"),
    (["train", "v1_2_debug", "--steps", "3"], "written KEY=VALUE, such as loop.steps=100"),
    (["train", "v1_2_debug", "--loop.steps=3"], "have no dashes in front and a = behind: loop.steps=VALUE"),
    (["train", "v1_2_debug", "--world-size", "8"], "--world-size goes with --dry-run"),
]


@pytest.fixture(autouse=True)
def _desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    (tmp_path / "clips").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "clips.csv").write_text("path,text\n")


@pytest.mark.parametrize(
    ("args", "says"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(args, says, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("opensora: ") and err.count("\n") == 1, err
    assert says in err
    assert "Traceback" not in err and "typing." not in err and len(err) < 500
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "args",
    [
        ["overfit", "loop.steps=3", "loop.seed=1", "--output", "runs/x"],
        ["overfit", "loop.steps=3", "--output", "runs/x", "loop.seed=1"],
        ["--output", "runs/x", "overfit", "loop.steps=3", "loop.seed=1"],
        ["loop.steps=3", "--output=runs/x", "loop.seed=1", "overfit"],
    ],
)
def test_options_may_stand_between_settings(args):
    options = parse(Train, args, "opensora train")
    assert (options.recipe, options.overrides, str(options.output)) == (
        "overfit",
        ("loop.steps=3", "loop.seed=1"),
        "runs/x",
    )


def test_a_value_that_looks_like_a_setting_stays_with_its_option():
    options = parse(Train, ["overfit", "--output", "a=b", "loop.steps=3"], "opensora train")
    assert (str(options.output), options.overrides) == ("a=b", ("loop.steps=3",))


def test_what_is_right_is_not_refused():
    from opensora.cli.generate import Generate

    options = parse(Generate, ["— a red ball", "--negative-prompt", "", "--adapter", "a", "--adapter", "b"], "x")
    assert options.prompt == "— a red ball" and options.negative_prompt == "" and options.model.adapter == ("a", "b")
    with pytest.raises(OpenSoraError, match="given twice"):
        parse(Generate, ["a", "--image", "a.png", "--image", "b.png"], "x")
