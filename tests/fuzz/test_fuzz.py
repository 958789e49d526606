"""The fuzz test can fail: each way of going wrong is seen as such, and a case is the same case every time."""

import signal

import pytest
from fuzz.cases import make_case
from fuzz.mutations import mutate_bytes, mutate_json
from fuzz.run import judge

LINE = "opensora: --height is -1, expected 1 or more\n"
TRACE = 'Traceback (most recent call last):\n  File "/x/opensora/geometry.py", line 3, in check\nKeyError: 1\n'


@pytest.mark.parametrize(
    ("code", "err", "new", "words"),
    [
        (0, "", ["out/clip.mp4"], ""),
        (2, LINE, [], ""),
        (2, "note: seed 3\n" + LINE, [], ""),
        (1, TRACE, [], "traceback: KeyError: 1 in opensora/geometry.py:3 (check)"),
        (-signal.SIGALRM, "", [], "still ran after 20 s"),
        (-signal.SIGSEGV, "", [], "ended with -11"),
        (1, "", [], "ended with 1"),
        (2, "error\n", [], "without a line"),
        (2, LINE + LINE, [], "more than a line"),
        (2, "opensora: " + "9" * 5000 + "\n", [], "more than a line"),
        (2, "opensora: <class 'int'> is not\n", [], "speaks Python"),
        (2, LINE, ["out/clip.mp4"], "refused, but wrote out/clip.mp4"),
        (0, "", ["out/.clip.mp4.part"], "left over"),
    ],
)
def test_what_is_wrong_is_seen(code, err, new, words):
    wrong = judge(code, err, new, ["generate"])
    assert wrong == words if not words else words in wrong


def test_a_case_is_the_same_case_every_time(tmp_path):
    for folder in ("tiny", "cache", "run", "lone", "zipped", "old", "look", "clips"):
        (tmp_path / folder).mkdir()
    import random

    def mutated(seed):
        rng = random.Random(seed)
        return mutate_json('{"a": [1, {"b": 2}], "c": "d"}', rng), mutate_bytes(bytes(range(200)), rng)

    assert [mutated(seed) for seed in range(50)] == [mutated(seed) for seed in range(50)]
    assert len({mutated(seed) for seed in range(50)}) > 40
    settings = [number for number in range(60) if _kind(number, tmp_path) == "settings"]
    assert settings and all(
        make_case(number, 0, tmp_path).args == make_case(number, 0, tmp_path).args for number in settings
    )


def _kind(number, base):
    try:
        return make_case(number, 0, base).said
    except (OSError, IndexError):  # a case of a file, of which there are none here
        return ""
