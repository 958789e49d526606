"""Small files and numbers that would hang, fill the memory or end in a traceback: one line, before any work."""

import json
import os
import socket
from collections.abc import Sequence
from typing import Literal

import pytest

from opensora import contents
from opensora.contents import check_regular, parse_json, read_json, read_text
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxLatents
from opensora.distributed.checkpoint import read_counters
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.keywords import check_keywords
from opensora.limits import check_count
from opensora.overrides import apply_overrides
from opensora.training.config import LoopConfig
from opensora.training.vae.config import VAETaskConfig
from opensora.training.vae.latent_space import build_autoencoder


def _loop(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def _fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _socket(folder):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "s"))
    return folder / "s"


def _dangling(folder):
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


SPECIAL = {
    "is a pipe": _fifo,
    "is a device": lambda folder: "/dev/zero",
    "is a socket": _socket,
    "is a folder": lambda folder: folder,
    "does not exist": lambda folder: folder / "missing",
    "link to a file that does not exist": _dangling,
    "symbolic links": _loop,
    "null byte|cannot be read": lambda folder: "a\0b",
    "too long": lambda folder: folder / ("x" * 5000),
}


@pytest.mark.parametrize("words", SPECIAL)
@pytest.mark.parametrize("read", [check_regular, read_text, read_json])
def test_only_regular_files_are_opened(tmp_path, words, read):
    with pytest.raises(OpenSoraError, match=words) as caught:
        read(SPECIAL[words](tmp_path), "prompt file")
    assert "\n" not in str(caught.value) and "prompt file" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_called_so(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(OpenSoraError, match="permission denied"):
        read_json(path)


BROKEN = {
    "more than 64 deep": "[" * 65 + "]" * 65,
    "lie within each other": "[" * 1_000_000,
    "is too large": "9" * 5000,
    r"integer 18446744073709551616 is too large": str(2**64),
    "number 1e999 is too large": "[1e999]",
    "NaN is no number": "[NaN]",
    "-Infinity is no number": "[-Infinity]",
    "key 'a' is there twice": '{"a": 1, "b": 2, "a": 3}',
    "holds half a character": '["\\ud800"]',
    "the text 'a.x00' holds half a character or NUL": '{"a\\u0000": 1}',
    "at line 2": "[1,\n x]",
}


@pytest.mark.parametrize("words", BROKEN)
def test_json_that_would_be_stumbled_over_later(tmp_path, words):
    path = tmp_path / "config.json"
    path.write_text(BROKEN[words])
    with pytest.raises(OpenSoraError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


def test_json_that_is_fine_is_what_json_says(tmp_path):
    value = {"a": [1, -2.5, 2**63, True, None, "ü\n一"], "b": {"c": {}}}
    assert parse_json(json.dumps(value), "x") == value
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a cat\nein Bär".encode("latin-1"), "not UTF-8 in line 2"),
        ("a cat".encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\xff", "is a picture, expected text"),
    ],
)
def test_text_of_another_encoding_is_named(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(OpenSoraError, match=words):
        read_text(tmp_path / "a.txt", "prompt file")


def test_more_than_the_limit_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(contents.JSON_LIMIT_BYTES + 1)  # a hole: no disk is needed for it
    with pytest.raises(OpenSoraError, match="more than 64 MiB"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "value", [0, -1, 101, True, 1.0, "3", None, [1], float("nan"), pytest.param(10**5000, id="long")]
)
def test_counts_are_held_against_their_limit(value):
    with pytest.raises(OpenSoraError, match=r"`frames` is .*, expected a whole number from 1 to 100"):
        check_count("`frames`", value, 100)
    assert check_count("`frames`", 100, 100) == 100


@pytest.mark.parametrize("value", [None, "3", 1.5, -1, True, [1]])
def test_counters_of_a_checkpoint_are_whole_numbers(tmp_path, value):
    (tmp_path / "index.json").write_text(json.dumps({"step": 3, "batches": value, "files": {}}))
    with pytest.raises(OpenSoraError, match=r"index.json is damaged: batches is .*, expected a whole number"):
        read_counters(tmp_path, ["batches"])


def _init(depth: int = 2, patch: Sequence[int] = (1, 2), kind: Literal["a", "b"] = "a", scale: float | None = None):
    pass


KEYWORDS = {
    "unknown option 'dept'; did you mean 'depth'": {"dept": 3},
    "depth is the text 'x', expected a whole number": {"depth": "x"},
    "depth is true, expected a whole number": {"depth": True},
    "depth is null": {"depth": None},
    "depth is 1000000000, expected 1,000 at most": {"depth": 10**9},
    "patch is a list of 2, expected a list, each entry a whole number": {"patch": [1, "2"]},
    "patch has 5,000 entries": {"patch": [1] * 5000},
    "kind is the text 'c', expected one of a, b": {"kind": "c"},
    "scale is an object of 0, expected a number or null": {"scale": {}},
}


@pytest.mark.parametrize("words", KEYWORDS)
def test_keywords_of_a_file_are_checked_as_they_are_read(words):
    with pytest.raises(OpenSoraError, match=f"^config.json: {words}"):
        check_keywords(_init, KEYWORDS[words], "config.json")
    check_keywords(_init, {"depth": 3, "patch": [2, 2], "kind": "b", "scale": 1, "_note": object()}, "config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loop": 10**9}, "`loop` is 1000000000, expected a whole number from 1 to 10,000"),
        ({"height": 10**9, "width": 64}, "`height` is 1000000000"),
        ({"num_frames": 10**9}, "`num_frames` is 1000000000"),
        ({"num_frames": "9" * 5000}, "`num_frames` is 999"),
        ({"num_inference_steps": 10**9}, "`num_inference_steps` is 1000000000"),
        ({"num_inference_steps": "9" * 900}, "`num_inference_steps` is 999"),
        ({"prompt": "a cat " * 10**6}, "`prompt` has 6,000,000 characters"),
    ],
)
def test_numbers_and_texts_beyond_their_limit_are_refused_before_any_work(changes, words):
    with pytest.raises(OpenSoraError, match=words) as caught:
        ClipRequest(**{"prompt": "a cat", **changes}).check()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (ManifestClips({"64x64": {"17": (1.0, 4)}}), "num_workers=1000000000"),
        (LoopConfig(steps=10), "prefetch=1000000000"),
        (ToyboxLatents(), "num_clips=1000000000000"),
        (LoopConfig(steps=10), "seed=-9999999999999999999"),
        (ToyboxLatents(), "clips.num_frames=1000000000"),
    ],
)
def test_numbers_of_a_recipe_are_held_against_their_limits(settings, change):
    with pytest.raises(OpenSoraError, match="at most"):
        apply_overrides(settings, [change])


def test_an_autoencoder_that_a_recipe_describes_is_checked_as_it_is_read():
    config = VAETaskConfig(stage="frames", autoencoder={"spatial_patch_size": {}})
    with pytest.raises(OpenSoraError, match=r"objective\.autoencoder: spatial_patch_size is .*whole number"):
        build_autoencoder(config, "meta")
