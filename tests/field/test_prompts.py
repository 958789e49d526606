"""What becomes of a prompt on its way to the text encoder: nothing of it is lost without a word."""

import io
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_pipeline import make_pipeline
from tiny_published import pipeline_of

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.batch import STANDARD_INPUT, read_prompts
from opensora.generation.engine import Engine
from opensora.generation.loading import LoadedModel
from opensora.generation.record import read_record
from opensora.generation.request import ClipRequest
from opensora.models.text.cleaning import clean_text, leaves_nothing, removed_words
from opensora.models.text.prompts import split_references

RED_BALL = "a small red ball rolls left"
CHINESE = "一个小红球向左滚过草地"


@pytest.fixture(scope="module")
def published():
    """Open-Sora 1.2 in miniature: it cleans prompts and adds scores."""
    return pipeline_of("opensora-1.2")


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    published.save_pretrained(path)
    return str(path)


def refusal(args, capsys):
    """The line that a command is refused by."""
    capsys.readouterr()
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    return err


# --- what cleaning takes


@pytest.mark.parametrize(
    ("text", "removed"),
    [
        (RED_BALL, []),
        ("A Red—Ball, “rolls” LEFT... ＦＡＳＴ", []),
        ("this-is_my-cute_cat", []),
        (CHINESE, [CHINESE]),
        (f"a ball {CHINESE}, slowly", [CHINESE]),
        ("R2D2 waves at a 猫cat", ["R2D2", "猫"]),
        ("a map, see maps.example.com or IMG_20240101.jpg", ["maps", "example", "com", "IMG", "20240101", "jpg"]),
        ("a 1920x1080 screen", ["1920x1080"]),
    ],
)
def test_what_cleaning_removes_is_known_word_by_word(text, removed):
    assert removed_words(text, clean_text(text)) == removed


@pytest.mark.parametrize("text", [CHINESE, "雪", "#123 @somebody", "https://example.com"])
def test_texts_of_which_cleaning_leaves_nothing(text):
    assert leaves_nothing(text)


@pytest.mark.parametrize("text", ["", " ", "...", "ねこ", "고양이", "кот", "قطة", "a 猫"])
def test_texts_of_which_it_leaves_something_or_that_were_empty(text):
    assert not leaves_nothing(text)


@pytest.mark.parametrize("model", ["opensora-1.0-16x256x256", "opensora-1.1-stage3", "opensora-1.2"])
def test_no_published_model_runs_on_a_prompt_that_it_reads_nothing_of(model):
    pipe = pipeline_of(model)
    for call in (
        lambda: pipe(CHINESE),
        lambda: pipe([RED_BALL, CHINESE]),
        lambda: pipe(RED_BALL, negative_prompt=CHINESE),
        lambda: pipe.encode_prompt(CHINESE),
    ):
        with pytest.raises(
            OpenSoraError, match=r"nothing is left of the (negative )?prompt '一个.*write it in English"
        ):
            call()
    with pytest.raises(OpenSoraError, match="can read nothing of the prompt 'ねこ'"):  # not cleaned away, and unknown
        pipe("ねこ")


def test_what_the_model_reads_otherwise_is_logged(published, caplog):
    plain = {"aesthetic": None}  # the small tokenizer has no digits
    with caplog.at_level(logging.WARNING, logger="opensora.sampling.prompting"):
        published.encode_prompt(f"a red ball R2D2 {CHINESE}", "ねこ rain", scores=plain)
    prompt, negative = (record.message for record in caplog.records)
    assert prompt.startswith("this model reads the prompt as 'a red ball") and f"without 'R2D2', '{CHINESE}'" in prompt
    assert "the negative prompt as 'ねこ rain', and cannot tell 'ねこ' from other unknown characters" in negative
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="opensora.sampling.prompting"):
        published.encode_prompt(RED_BALL, "green rain", scores=plain)
    assert not caplog.records


def test_the_command_says_what_is_not_read_and_the_record_keeps_it(folder, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    prompt = f"A red ball, {CHINESE}"
    assert main(["generate", prompt, "--negative-prompt", "Rain", "--model", folder, "--output", str(clip)]) == 0
    err = capsys.readouterr().err
    assert err.count("note: this model reads the prompt as 'a red ball, aesthetic score: 6.5.', without") == 1
    assert err.count(CHINESE) == 1  # told once
    record = read_record(clip)
    assert record.prompt == prompt and record.spelled_prompt == ("a red ball, aesthetic score: 6.5.",)
    assert record.spelled_negative_prompt == "rain" and CHINESE in record.notes[0]


def test_the_command_refuses_what_is_not_read_before_the_first_clip(folder, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{RED_BALL}\n{CHINESE}\n", encoding="utf-8")
    output = ["--model", folder, "--output", str(tmp_path / "out") + "/"]
    assert CHINESE in refusal(["generate", "--prompt-path", str(lines), *output], capsys)
    assert CHINESE in refusal(["generate", RED_BALL, "--negative-prompt", CHINESE, *output], capsys)
    assert "has 201 tokens" in refusal(["generate", RED_BALL, "--negative-prompt", "rain " * 50, *output], capsys)
    assert not list(tmp_path.glob("out/*"))


def test_texts_of_loops_and_refined_prompts_are_looked_at_too(published):
    engine = Engine(published)
    with pytest.raises(OpenSoraError, match="nothing is left of the prompt '雪'"):
        engine.prepare([ClipRequest("|0|rain|1|雪", loop=2, num_frames=34)])
    with pytest.raises(OpenSoraError, match="nothing is left of the prompt '雪'"):
        engine.prepare([ClipRequest("rain", refined_prompt="雪")])
    (clip,) = engine.prepare([ClipRequest("|0|Rain|1|GRASS", loop=2, num_frames=34, scores={"aesthetic": None})])
    assert clip.spelled == ("rain", "grass")


# --- negative prompts


@pytest.mark.parametrize("empty", ["", " ", "\n\u3000"])
def test_an_empty_negative_prompt_is_none(empty):
    pipe = make_pipeline()
    none, blank = (pipe(RED_BALL, negative, generator=0, output_type="np") for negative in (None, empty))
    assert (none.frames == blank.frames).all()
    assert none.settings == blank.settings
    engine = Engine(pipe, LoadedModel("small", "0" * 64, {}, ()))
    records = [engine.generate(ClipRequest(RED_BALL, negative)).record for negative in (None, empty)]
    assert records[0] == records[1] and records[0].negative_prompt is None


# --- braces


@pytest.mark.parametrize(
    "prompt",
    ["a {red|blue} ball", "a { ball", "}{", "a {b} {c}", "{ball", 'a sign: {"hello"}', "f(x) = {1, 2}", "a {b: 1} c"],
)
def test_braces_that_are_no_json_are_text(prompt):
    assert split_references(prompt)[0] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        'a {"reference_path": "x.png}',
        "a {'reference_path': 'x.png'}",
        "a {reference_path: x.png}",
        "a {“reference_path”: “x.png”}",
        'a {"reference_path": "x.png"} and more',
        'a {"mask_strategy": "0",}',
        'a {"prompt": "b"}',
    ],
)
def test_braces_that_are_meant_as_json_are_never_shown(prompt):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        split_references(prompt)


# --- prompt files


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_a_prompt_file_are_what_an_editor_shows(tmp_path, ends, mark):
    lines = ["a\u2028ball", "red\x0bblue", "x\x0cy", "1\x1c2\x1d3\x1e4", "next\x85line", "p\u2029q"]
    path = tmp_path / "prompts.txt"
    path.write_bytes((mark + ends.join([*lines, "", "  ", "last"])).encode())
    assert read_prompts((), path).texts == [*lines, "last"]


def test_prompt_files_in_other_encodings_are_refused_by_name(tmp_path):
    for encoding, said in (("utf-16", "UTF-16"), ("utf-16-le", "text"), ("gb18030", "not UTF-8 in line 2")):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes(f"a red ball\n{CHINESE}\n".encode(encoding))
        with pytest.raises(OpenSoraError, match=f"{encoding}.txt.*{said}"):
            read_prompts((), path)


def test_comments_are_an_option(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# balls\na red ball\n  #2\n#3 in the race\nb # c\n")
    assert read_prompts((), path).texts == ["# balls", "a red ball", "#2", "#3 in the race", "b # c"]
    assert read_prompts((), path, skip_comments=True).texts == ["a red ball", "b # c"]
    assert read_prompts((), path, 1, None, skip_comments=True).start == 1
    with pytest.raises(OpenSoraError, match="skip_comments"):
        read_prompts(["a red ball"], None, skip_comments=True)


def stdin_of(content):
    return SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)


@pytest.mark.parametrize("args", [["-"], ["--prompt", "-"], ["--prompt-path", "-"]])
def test_a_dash_reads_standard_input(folder, tmp_path, monkeypatch, args):
    monkeypatch.setattr(sys, "stdin", stdin_of(f"\ufeff{RED_BALL}\r\n\r\ngreen rain".encode()))
    output = ["--output", str(tmp_path / "clip.mp4"), "--num-frames", "1"]
    assert main(["generate", *args, "--model", folder, *output]) == 0
    made = [read_record(tmp_path / f"clip-{number}.mp4") for number in (0, 1)]
    assert [(record.prompt, record.seed) for record in made] == [(RED_BALL, 42), ("green rain", 43)]


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no prompt"), (b"\xff\xfea\x00", "UTF-8")])
def test_standard_input_that_holds_no_prompts_is_refused(monkeypatch, content, said):
    monkeypatch.setattr(sys, "stdin", stdin_of(content))
    with pytest.raises(OpenSoraError, match=f"standard input .*{said}"):
        read_prompts((), STANDARD_INPUT)


# --- seeds


def test_a_random_seed_is_recorded_and_repeated(folder, tmp_path):
    options = ["--model", folder, "--num-frames", "1", "--format", "png"]
    for name in ("one", "other"):
        assert (
            main(["generate", RED_BALL, "--seed", "random", *options, "--output", str(tmp_path / name) + ".png"]) == 0
        )
    one, other = (tmp_path / f"{name}.png" for name in ("one", "other"))
    assert read_record(one).seed != read_record(other).seed
    again = tmp_path / "again.png"
    assert main(["generate", "--from", str(one), "--model", folder, "--output", str(again)]) == 0
    assert json.loads((tmp_path / "one.png.json").read_text()) == json.loads((tmp_path / "again.png.json").read_text())
    assert one.read_bytes() == again.read_bytes()


def test_other_words_than_random_are_refused(capsys):
    err = refusal(["generate", RED_BALL, "--seed", "rand"], capsys)
    assert "--seed" in err and "random" in err


# --- numbers that are none


def test_text_states_that_are_not_finite_are_refused(published):
    pipe = make_pipeline()
    torch.nn.init.constant_(pipe.text_encoder.encoder.final_layer_norm.weight, float("nan"))
    for call in (lambda: pipe.encode_prompt(RED_BALL), lambda: pipe(RED_BALL)):
        with pytest.raises(OpenSoraError, match="the text states of prompt hold NaN"):
            call()
    good, _ = make_pipeline().encode_prompt(RED_BALL)
    with pytest.raises(OpenSoraError, match="the text states of negative_prompt hold NaN"):
        make_pipeline()(prompt_embeds=good, negative_prompt_embeds=good.states * float("inf"))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_frames_that_are_not_finite_are_refused(output_type):
    pipe = make_pipeline()
    decode = pipe.autoencoder.decode_latents
    pipe.autoencoder.decode_latents = lambda latents, frames: decode(latents, frames).index_fill_(
        2, torch.tensor([1]), float("nan")
    )
    with pytest.raises(OpenSoraError, match="the decoded frames hold NaN"):
        pipe(RED_BALL, output_type=output_type)


def test_latents_of_pictures_that_are_not_finite_are_refused():
    pipe = make_pipeline()
    encode = pipe.autoencoder.encode_video
    pipe.autoencoder.encode_video = lambda *args, **options: encode(*args, **options) * float("nan")
    with pytest.raises(OpenSoraError, match="the latents of the conditioning frames hold NaN"):
        pipe(RED_BALL, image=torch.zeros(3, 16, 24))
