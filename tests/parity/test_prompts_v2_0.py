"""What Open-Sora 2.0's prompts and captions end in, against the reference."""

from pathlib import Path

import pytest

from opensora.clip_rows import ClipRow
from opensora.data.clips import slowed
from opensora.models.text.prompts import append_scores, caption_of_2_0


@pytest.fixture(scope="module")
def text(golden_json):
    return golden_json("text_v2_0")


def kinds(text, prefix: str) -> dict[tuple[str, ...], dict[str, str]]:
    return {tuple(k.split("|")[1:]): rows for k, rows in text.items() if k.startswith(f"{prefix}|")}


def test_prompts(text):
    rates = {(fps,): rows for (fps,), rows in kinds(text, "add_fps").items()}
    assert rates
    for (fps,), rows in rates.items():
        assert {prompt: append_scores(prompt, fps=float(fps)) for prompt in rows} == rows
    for (score, _kind), rows in kinds(text, "add_motion").items():
        assert {prompt: append_scores(prompt, motion=float(score)) for prompt in rows} == rows
    for (fps, score), rows in kinds(text, "fps_then_motion").items():
        assert {prompt: append_scores(prompt, fps=float(fps), motion=float(score)) for prompt in rows} == rows


def test_a_rate_is_said_once(text):
    for prompt, said in text["check_fps_added"].items():
        once = append_scores(prompt, fps=99)
        assert said == ("99 FPS." not in once and prompt != "ends with 24 FPS")  # there it tells an end without a stop
    told = append_scores("a cat", fps=24, motion=4)
    assert told == "a cat. 24 FPS. 4 motion score." == append_scores(told, fps=24, motion=7)


def test_captions(text):
    """The reference writes whole rates that it did not change with a decimal point, "24.0 FPS"; ours are whole."""
    for kind, expected in text["training_caption"].items():
        fps_max, told = kind.removeprefix("fps_max").split("|vmaf")
        for row, (caption, interval) in zip(text["training_rows"], expected, strict=True):
            fps, motion = row.get("fps"), row.get("score_vmafmotion") if told == "True" else None
            if fps_max == "None":  # nothing of the rate is told, as with a rate that is not known
                assert interval == 1 and caption_of_2_0(row["text"], fps=None, motion=motion) == caption
                continue
            clip = slowed(ClipRow(Path(), row["text"], 240, 8, 8, fps, motion=motion), float(fps_max), tell=True)
            assert (clip.text, clip.num_frames) == (caption.replace(".0 FPS", " FPS"), 240 // interval)


def test_rates_at_which_frames_are_left_out(text):
    for case, (told, interval) in text["map_target_fps"].items():
        fps, fps_max = map(float, case.split("|"))
        clip = slowed(ClipRow(Path(), "a cat", 240, 8, 8, fps), fps_max, tell=True)
        assert (clip.num_frames, clip.fps) == (240 // interval, pytest.approx(fps / interval))
        assert clip.text == f"a cat {told:g} FPS."
