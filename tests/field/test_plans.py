"""Plans of training data: what will be cut, emptied, enlarged or is missing is said before the first step."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from broken_clips import moving_square

from opensora.cli.main import main
from opensora.clip_rows import ClipRow, ClipRows
from opensora.data.batch import DataContext
from opensora.data.buckets import Buckets
from opensora.data.clips import ManifestClips
from opensora.data.epoch_plan import plan_epoch, plan_lines
from opensora.data.presence import missing_files
from opensora.data.sampler import BucketSampler
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.manifest import write_manifest
from opensora.media.write import write_video
from opensora.recipes import find_recipe
from opensora.training.diffusion import caption_plan
from opensora.training.diffusion.caption_plan import plan_captions
from opensora.training.diffusion.text import FrozenText

BUCKETS = {"48x64": {"9": (1.0, 2), "25": (1.0, 2)}}


def row(name: str = "a.mp4", num_frames: int = 26, height: int = 48, width: int = 64, text: str = "a ball") -> ClipRow:
    return ClipRow(Path(name), text, num_frames, height, width, 8.0)


def planned(rows: list[ClipRow], buckets: dict = BUCKETS, frame_interval: int = 1):
    sampler = BucketSampler(rows, Buckets(buckets), 0, frame_interval=frame_interval)
    return plan_epoch(ClipRows(rows), sampler)


def test_lengths_that_miss_a_bucket_by_a_few_frames_are_told():
    lengths = [26, 25, 25, 24, 20, 9, 10, 5]
    plan = planned([row(f"{number}.mp4", length) for number, length in enumerate(lengths)])
    assert [(near.num_frames, near.needs, near.has) for near in plan.near_misses] == [
        (9, 10, {9: 1}),
        (25, 26, {25: 2, 24: 1}),
    ]
    lines = list(plan_lines(plan, 1, 1, 8))
    told = "25 frames are taken of clips that have 26 at least: 2 have 25, 1 have 24, such as"
    assert lines[lines.index(told) + 1] == "  1.mp4 (25 frames of 48x64)"


def test_near_misses_know_the_frame_interval_and_the_size():
    rows = [row(num_frames=18, name="b.mp4"), row(num_frames=26), row(num_frames=26, height=8, width=8)]
    plan = planned(rows, {"48x64": {"9": (1.0, 2), "13": (1.0, 2)}}, frame_interval=2)
    assert [(near.needs, near.has) for near in plan.near_misses] == [(19, {18: 1}), (27, {26: 1})]
    assert not planned([row(num_frames=1)]).near_misses


def test_clips_that_are_enlarged_are_told():
    plan = planned([row(), row("small.mp4", height=44, width=60), row("large.mp4", height=96, width=128)])
    assert plan.enlarged is not None
    assert (plan.enlarged.clips, round(plan.enlarged.factor, 3)) == (1, round(48 / 44, 3))
    assert "small.mp4" in plan.enlarged.example
    assert planned([row()]).enlarged is None


# --- captions ---------------------------------------------------------------------------------------------------------


def captions_of(texts: list[str], clean: bool = True, **changes):
    """As `v1_2_debug` reads them, with byte tokens, and at most 300 or so of them."""
    settings: Any = find_recipe("v1_2_debug").objective
    settings = replace(settings, defaults={"clean_prompts": clean}, **changes)
    return plan_captions(settings, ClipRows(row(text=text) for text in texts))


def test_captions_that_are_cut_or_emptied_are_counted():
    plan = captions_of(["a ball"] * 3)
    assert plan.num_cut == plan.num_emptied == 0 and plan.lines() == [] and not plan.estimated
    long = "a very long caption " * plan.max_tokens
    fits, cut = "x" * (plan.max_tokens - 1), "x" * plan.max_tokens  # and one that marks the end
    plan = captions_of(["a ball", long, fits, cut, "一个小红球", "红球 rolls"])
    assert (plan.num_cut, plan.most_tokens) == (2, len(long.strip()) + 1)
    assert (plan.num_emptied, plan.emptied) == (1, "一个小红球")
    first, second = plan.lines()
    assert first.startswith(f"captions cut at {plan.max_tokens} tokens: 2; the longest has {len(long):,}: a very long")
    assert second == "captions that cleaning leaves nothing of: 1, such as 一个小红球"
    assert captions_of(["一个小红球"], clean=False).num_emptied == 0


def test_without_the_tokenizer_tokens_are_estimated_and_that_is_said(monkeypatch):
    text = FrozenText("no-such-folder/anywhere")
    plan = captions_of(["a ball", "four " * 5000], text=text)
    assert plan.estimated and plan.num_cut == 1
    assert "by estimate (the tokenizer is not on this machine)" in plan.lines()[0]


def test_of_very_many_captions_some_are_read(monkeypatch):
    monkeypatch.setattr(caption_plan, "_MOST_READ", 10)
    plan = captions_of(["一个小红球"] * 25)
    assert (plan.num_read, plan.every, plan.num_emptied) == (9, 3, 9)
    assert "9 of 9 looked at (1 in 3)" in plan.lines()[0]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nine(tmp_path) -> Path:
    """A table of nine clips, of which one is there."""
    write_video(tmp_path / "0.mp4", moving_square(26), 8)
    (tmp_path / "1.mp4").touch()
    (tmp_path / "2.mp4").mkdir()
    (tmp_path / "3.mp4").symlink_to(tmp_path / "nowhere")
    names = ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "clips\\4.mp4", *(f"{number}.mp4" for number in range(5, 9))]
    write_manifest(tmp_path / "clips.csv", [row(str(tmp_path / name)) for name in names])
    return tmp_path / "clips.csv"


def test_a_set_of_which_most_are_missing_does_not_train(nine):
    clips = ManifestClips(BUCKETS, nine, num_workers=0)
    with pytest.raises(OpenSoraError, match=r"8 of 9 clips are missing, such as .*1\.mp4: it is empty; .*allow 0"):
        clips.open(DataContext())
    assert replace(clips, max_broken_share=0.9).open(DataContext()).shapes()
    source = replace(clips, max_broken_share=0.9).open(DataContext())
    reasons = [reason.split(";")[0] for reason in missing_files(source.rows).values()]  # pyright: ignore
    expected = ["it is empty", "it is no file", "it is a link to nothing", *["it does not exist"] * 5]
    assert reasons == expected


def test_few_missing_clips_are_a_warning(nine, caplog):
    rows = [row(str(nine.parent / "0.mp4"))] * 39 + [row("gone.mp4")]
    write_manifest(nine, rows)
    ManifestClips(BUCKETS, nine, num_workers=0).open(DataContext())
    assert "1 of 40 clips are missing, such as" in caplog.text and "others take their places" in caplog.text


def test_missing_clips_are_named_before_training_and_in_the_plan(nine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = f'objective.data={{"type": "ManifestClips", "buckets": {json.dumps(BUCKETS)}, "manifest": "clips.csv"}}'
    assert main(["train", "v1_2_debug", data, "--output", "run", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "8 of 9 clips are missing" in error and "Traceback" not in error
    (tmp_path / "buckets.json").write_text(json.dumps(BUCKETS))
    plan = ["data", "plan", "clips.csv,clips.csv*2", "--buckets", "buckets.json"]
    assert main(plan) == 0
    told = capsys.readouterr().out
    for line in (
        "missing: 24 of 27 clips",
        "1.mp4: it is empty",
        "4.mp4: it does not exist; backslashes are no folders here",
        "a run would not begin: more than `max_broken_share` 0.05 are missing",
        "rows about a file that another row is about: 9, such as 0.mp4",
    ):
        assert line in told, told
    assert told.count("it is empty") == 1, "repeats are not named again"
    assert main([*plan, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert len(numbers["missing"]) == 8 and numbers["duplicates"] == 9 and numbers["captions"] is None


def test_the_share_of_broken_clips_counts_as_soon_as_all_were_met(tmp_path):
    """Of a small set the share is known before a hundred clips were met."""
    rows = [row(str(tmp_path / f"{number}.mp4")) for number in range(4)]
    write_video(rows[0].path, moving_square(26), 8)
    for each in rows[1:]:
        each.path.write_bytes(b"nothing of a video")
    write_manifest(tmp_path / "clips.csv", rows)
    source = ManifestClips(BUCKETS, tmp_path / "clips.csv", num_workers=0).open(DataContext())
    with pytest.raises(OpenSoraError, match="3 of 4 clips are broken"):
        for position in range(20):
            source.batch(BatchKey(0, position))


def test_clips_whose_rate_varies_are_told(tmp_path, capsys):
    with av.open(str(tmp_path / "vfr.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        times = [*range(0, 1000, 33), *range(3000, 4000, 33)]
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "vfr.txt").write_text("a ball")
    assert main(["data", "manifest", str(tmp_path), "--output", str(tmp_path / "clips.csv")]) == 0
    (tmp_path / "buckets.json").write_text(json.dumps(BUCKETS))
    capsys.readouterr()
    plan = ["data", "plan", str(tmp_path / "clips.csv"), "--buckets", str(tmp_path / "buckets.json"), "--verify"]
    assert main(plan) == 0
    assert "vfr.mkv: its frame rate varies; frames are taken by time" in capsys.readouterr().out
