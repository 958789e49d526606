"""`opensora generate` with prompt refinement; the language model is a function here, talking to one is tested apart."""

import json

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.media.read import read_metadata, read_video
from opensora.refinement import Refiner

PROMPT = "a cat"
REFINE = ["--refine-endpoint", "http://127.0.0.1:1/v1", "--refine-model", "small"]
ENDPOINT = ["--model", "other", *REFINE]


@pytest.fixture
def refined(monkeypatch):
    """What was refined, and with which key."""
    asked = []

    def refine(self, prompt):
        asked.append((prompt, self.key))
        return f"{prompt} in the rain"

    monkeypatch.setattr(Refiner, "refine", refine)
    return asked


def test_the_refined_prompt_is_shown_and_both_are_recorded(pipe, refined, capsys):
    assert main(["generate", PROMPT, *ENDPOINT, "--output", "a.png"]) == 0
    assert "refined prompt: a cat in the rain\n" in capsys.readouterr().err
    assert [call.prompt for call in pipe.calls] == ["a cat in the rain"]
    record = read_metadata("a.png")
    assert (record["prompt"], record["refined_prompt"]) == ("a cat", "a cat in the rain")


def test_made_again_without_asking_again(pipe, refined):
    assert main(["generate", PROMPT, *ENDPOINT, "--output", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
    assert len(refined) == 1 and pipe.calls[0] == pipe.calls[1]
    assert np.array_equal(read_video("a.png")[0], read_video("b.png")[0])
    assert read_metadata("b.png")["refined_prompt"] == "a cat in the rain"


def test_a_prompt_of_several_clips_is_refined_once(pipe, refined, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = ["--prompt-path", "prompts.txt", "--num-videos", "2", "--output", "a.png"]
    assert main(["generate", *options, *ENDPOINT]) == 0
    assert [prompt for prompt, _ in refined] == ["a cat", "a dog"]
    assert [call.prompt.split()[1] for call in pipe.calls] == ["cat", "cat", "dog", "dog"]


def test_the_key_comes_from_a_file_or_a_named_variable_and_stays_secret(pipe, refined, tmp_path, monkeypatch, capsys):
    (tmp_path / "key.txt").write_text("sk-from-file\n")
    monkeypatch.setenv("MY_KEY", "sk-from-variable")
    assert main(["generate", PROMPT, *ENDPOINT, "--refine-key-file", "key.txt", "--output", "a.png"]) == 0
    assert main(["generate", PROMPT, *ENDPOINT, "--refine-key-env", "MY_KEY", "--output", "b.png"]) == 0
    assert [key for _, key in refined] == ["sk-from-file", "sk-from-variable"]
    said = "".join(capsys.readouterr()) + json.dumps([read_metadata("a.png"), read_metadata("b.png")])
    assert "sk-from" not in said and "127.0.0.1" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refine-model", "small"], "needs both --refine-endpoint URL and --refine-model NAME"),
        (["--refine-endpoint", "http://localhost/v1"], "needs both"),
        ([*REFINE, "--model", "toybox"], "toybox knows a closed list of words"),
        ([*ENDPOINT, "--refine-key-file", "no.txt"], "key file no.txt does not exist"),
        ([*ENDPOINT, "--refine-key-env", "NOT_SET"], "variable NOT_SET (--refine-key-env) is not set"),
        ([*ENDPOINT, "--refine-key-env", "A", "--refine-key-file", "b"], "both say the key"),
        (
            ["--model", "other", "--refine-model", "small", "--refine-endpoint", "localhost"],
            "is to be an address such as",
        ),
        ([*REFINE, "--model", "nowhere"], "unknown model 'nowhere'"),
    ],
)
def test_mistakes(pipe, refined, capsys, options, message):
    assert main(["generate", PROMPT, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err
    assert not refined and not pipe.calls


def test_an_endpoint_that_fails_stops_before_the_model_is_loaded(pipe, monkeypatch, capsys):
    def refine(self, prompt):
        raise OpenSoraError("the endpoint http://127.0.0.1:1/v1 cannot be reached: refused")

    monkeypatch.setattr(Refiner, "refine", refine)
    assert main(["generate", PROMPT, *ENDPOINT]) == 2
    assert "cannot be reached" in capsys.readouterr().err and not hasattr(pipe, "asked")
