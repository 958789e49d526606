"""Clips of a manifest as batches: what is in them, what is drawn, and what happens to broken ones."""

import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from broken_clips import BUCKETS, HEIGHT, NUM_FRAMES, WIDTH, make_broken_clips, moving_square
from numbered_clips import encode, number_of, numbered
from PIL import Image

from opensora.data import clips as clips_module
from opensora.data.buckets import Bucket
from opensora.data.clips import ClipSource, ManifestClips, read_clip
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.manifest import ClipRow, write_manifest
from opensora.media.frames import read_frames
from opensora.media.transforms import fill_image, fill_video, to_video
from opensora.media.write import write_video
from opensora.models.clip_conditions import IMAGE_FPS
from opensora.settings import from_dict, to_dict


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return make_broken_clips(tmp_path_factory.mktemp("broken") / "clips", num_good=12)


def keys(count: int, seed: int = 0) -> list[BatchKey]:
    return [BatchKey(seed, position) for position in range(count)]


def test_batches_in_spite_of_everything(broken, caplog):
    """All that can be used comes, what cannot be read is named once with its reason, and nothing stops."""
    source = ClipSource(ManifestClips(BUCKETS, broken.manifest, batches_in_a_row=1))
    with caplog.at_level(logging.WARNING):
        batches = [source.batch(key) for key in keys(3 * len(source.sampler(0).epoch(0).batch_bucket))]
    captions = {caption for batch in batches for caption in batch.captions}
    assert captions == {f'what "{name}" shows,\nin two lines' for name in broken.usable}
    for batch in batches:
        assert batch.video.shape[1:] in [(3, 1, HEIGHT, WIDTH), (3, 9, HEIGHT, WIDTH)]
        assert len(batch.video) == len(batch.captions) == len(batch.conditions.fps) == 2
        assert batch.video.abs().max() <= 1 and batch.video.std() > 0.1
    for name, reason in broken.broken.items():
        (said,) = [record.getMessage() for record in caplog.records if f"/{name}:" in record.getMessage()]
        assert reason in said
    assert source.figures()["broken_clips"] == len(broken.broken)
    assert source.figures()["clips_met"] == len(broken.broken) + len(broken.usable)


def test_a_batch_depends_on_its_place_alone(broken):
    """Replacements included: announced or not, in any order, with any number of threads."""
    config = ManifestClips(BUCKETS, broken.manifest, batches_in_a_row=2)
    first = ClipSource(config)
    first.prefetch(keys(4))
    first.prefetch(keys(12))  # as a trainer does: again, and further
    expected = [first.batch(key) for key in keys(12)]
    again = ClipSource(replace(config, num_workers=0))
    for position in (11, 3, 7, 0, 5):
        batch = again.batch(BatchKey(0, position, step=99))
        assert torch.equal(batch.video, expected[position].video)
        assert batch.captions == expected[position].captions
    other = ClipSource(config).batch(BatchKey(1, 0))
    assert not torch.equal(other.video, expected[0].video)


def test_a_clip_is_a_window_of_frames(broken):
    """Nine frames, three apart, are nine of a window of 27 places; every window is drawn but the very last."""
    row = ClipRow(broken.folder / "long.mp4", "", 40, HEIGHT, WIDTH, 8.0)
    write_video(row.path, moving_square(40), 8)
    bucket = Bucket("48x64", 9, 0.75, HEIGHT, WIDTH, 2)
    whole = to_video(np.stack(list(read_frames(row.path, range(40), 40))))
    starts = set()
    for seed in range(80):
        found = read_clip(row, bucket, 3, random.Random(seed))
        matches = [
            start
            for start in range(14)
            if torch.allclose(found, whole[:, np.linspace(start, start + 26, 9, dtype=int)], atol=1e-6)
        ]
        assert len(matches) == 1
        starts.add(matches[0])
    assert starts == set(range(13))


def test_sizes_are_met_as_the_reference_meets_them(broken):
    """Videos bilinearly, images bicubically, both cropped to the middle."""
    row = ClipRow(broken.folder / "good 0.mp4", "", NUM_FRAMES, HEIGHT, WIDTH, 8.0)
    found = read_clip(row, Bucket("32x32", 9, 1.0, 32, 32, 2), 1, random.Random(0))
    frames = np.stack(list(read_frames(row.path, range(NUM_FRAMES), NUM_FRAMES)))
    whole = fill_video(to_video(frames), 32, 32)
    assert any(torch.allclose(found, whole[:, start : start + 9], atol=1e-6) for start in range(11))
    row = ClipRow(broken.folder / "photo.png", "", 1, HEIGHT, WIDTH, None)
    found = read_clip(row, Bucket("32x32", 1, 1.0, 32, 32, 2), 1, random.Random(0))
    assert torch.equal(found, to_video(np.asarray(fill_image(Image.open(row.path), 32, 32))[None]))


def test_rates_that_networks_are_told(broken):
    """1.1 was told the file's rate, 1.2 that of the frames taken; images have one of their own."""
    rates = {}
    for told in ("taken", "file"):
        config = ManifestClips(
            {"48x64": {"1": (1.0, 2), "5": (1.0, 2)}}, broken.manifest, frame_interval=2, told_fps=told
        )
        source = ClipSource(config)
        rates[told] = {(b.label, rate) for b in map(source.batch, keys(16)) for rate in b.conditions.fps.tolist()}
    assert rates["taken"] == {("48x64 5f", 4.0), ("48x64 1f", IMAGE_FPS)}
    assert rates["file"] == {("48x64 5f", 8.0), ("48x64 1f", IMAGE_FPS)}


@pytest.fixture
def many_missing(tmp_path):
    """Twenty names of one clip, and a hundred and eighty of none."""
    write_video(tmp_path / "a.mp4", moving_square(), 8)
    rows = [ClipRow(tmp_path / f"missing {i}.mp4", "a", NUM_FRAMES, HEIGHT, WIDTH, 8.0) for i in range(180)]
    rows += [ClipRow(tmp_path / "a.mp4", "a", NUM_FRAMES, HEIGHT, WIDTH, 8.0)] * 20
    write_manifest(tmp_path / "clips.csv", rows)
    return tmp_path / "clips.csv"


def test_too_many_broken_clips_stop_the_run(many_missing):
    source = ClipSource(ManifestClips(BUCKETS, many_missing, max_broken_share=0.5))
    with pytest.raises(OpenSoraError, match=r"of 1\d\d clips are broken.*max_broken_share 0.5.*missing \d+.mp4: ") as e:
        for key in keys(200):
            source.batch(key)
    assert "\n" not in str(e.value)
    patient = ClipSource(ManifestClips(BUCKETS, many_missing, max_broken_share=1.0, num_workers=0))
    assert all(len(patient.batch(key).video) == 2 for key in keys(30))


def test_a_bucket_of_broken_clips_alone(tmp_path):
    """Its place is taken by a clip of another bucket that is long enough; without any, one line says so."""
    write_video(tmp_path / "a.mp4", moving_square(), 8)
    good = ClipRow(tmp_path / "a.mp4", "good", NUM_FRAMES, HEIGHT, WIDTH, 8.0)
    bad = ClipRow(tmp_path / "b.mp4", "bad", NUM_FRAMES, 96, 128, 8.0)
    buckets = BUCKETS | {"96x128": {"9": (1.0, 1)}}
    config = ManifestClips(buckets, tmp_path / "clips.csv", batches_in_a_row=1, max_broken_share=0.5)
    write_manifest(tmp_path / "clips.csv", [good, bad])
    batches = [ClipSource(config).batch(key) for key in keys(2)]
    assert {b.label: b.captions for b in batches} == {"48x64 9f": ["good", "good"], "96x128 9f": ["good"]}
    write_manifest(tmp_path / "clips.csv", [bad])
    config = replace(config, max_broken_share=1.0)
    with pytest.raises(OpenSoraError, match=r"no clip for 96x128 9f can be read.*b.mp4: the file does not exist"):
        ClipSource(config).batch(BatchKey(0, 0))


def test_a_manifest_that_is_wrong_about_its_clips(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(), 8)
    write_video(tmp_path / "a.png", moving_square(1), 8)
    bucket = Bucket("48x64", 9, 0.75, HEIGHT, WIDTH, 2)
    told = ClipRow(tmp_path / "a.mp4", "", NUM_FRAMES, HEIGHT, WIDTH, 8.0)
    for row, reason in [
        (replace(told, height=WIDTH, width=HEIGHT), "48x64 pixels, but the manifest says 64x48"),
        (replace(told, num_frames=NUM_FRAMES + 1), "20 of 21 frames"),
        (replace(told, path=tmp_path / "a.png"), "a picture, but the manifest says 20 frames"),
    ]:
        with pytest.raises(OpenSoraError, match=reason):
            read_clip(row, bucket, 1, random.Random(0))


def test_shapes(broken):
    """Of the clips that there are, or of the buckets alone."""
    shapes = ClipSource(ManifestClips(BUCKETS, broken.manifest, batches_in_a_row=1)).shapes()
    assert [(s.label, s.batch_size, s.num_frames, s.height, s.width) for s in shapes] == [
        ("48x64 9f", 2, 9, HEIGHT, WIDTH),
        ("48x64 1f", 2, 1, HEIGHT, WIDTH),
    ]
    # 19 clips and 3 images; which of them are broken nobody knows yet
    assert [s.share for s in shapes] == [10 / 12, 2 / 12]
    unread = ClipSource(ManifestClips(BUCKETS))
    assert [s.share for s in unread.shapes()] == [0.5, 0.5]
    unread.prefetch(keys(2))
    with pytest.raises(OpenSoraError, match="no manifest"):
        unread.batch(BatchKey(0, 0))


def test_what_cannot_be_trained_on_is_refused_at_once(broken, tmp_path):
    with pytest.raises(OpenSoraError, match=r"nothing to train on.*too small"):
        ClipSource(ManifestClips({"720p": {"9": (1.0, 2)}}, broken.manifest))
    with pytest.raises(OpenSoraError, match="does not exist"):
        ClipSource(ManifestClips(BUCKETS, tmp_path / "none.csv"))
    (tmp_path / "empty.csv").write_text("path,text,num_frames,height,width,fps\nx,,9,8,8,8\n")
    with pytest.raises(OpenSoraError, match=r"no row that can be used; row 1.* \(x\): no text"):
        ClipSource(ManifestClips(BUCKETS, tmp_path / "empty.csv"))
    for change, message in [
        ({"frame_interval": 0}, "frame_interval is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_broken_share": 2.0}, "max_broken_share is 2"),
        ({"buckets": {"241p": {"9": (1.0, 2)}}}, "240p"),
    ]:
        with pytest.raises(OpenSoraError, match=message):
            ManifestClips(**{"buckets": BUCKETS, **change})


def test_settings_come_back():
    config = ManifestClips({"240p": {"51": ((1.0, 0.33), 4)}}, None, frame_interval=3, told_fps="file")
    back = from_dict(ManifestClips, to_dict(config))
    assert to_dict(back) == to_dict(config) and back.told_fps == "file"
    assert ClipSource(back).shapes() == ClipSource(config).shapes()


def test_reading_begins_when_announced(broken, monkeypatch):
    read = []
    real = clips_module.read_clip
    monkeypatch.setattr(clips_module, "read_clip", lambda *args: read.append(1) or real(*args))
    source = ClipSource(ManifestClips(BUCKETS, broken.manifest, num_workers=2))
    source.prefetch(keys(2))
    for reads in source._prefetched.values():
        for one in reads:
            one.result()
    before = len(read)
    assert before >= 4
    source.batch(BatchKey(0, 0))
    assert len(read) == before


def test_frames_are_left_out_of_faster_clips(tmp_path):
    """Of 24 frames a second every third, where at most 8 are wanted; the caption and the network are told so."""
    clip = encode(tmp_path / "fast.mp4", numbered(40), fps=24)
    (tmp_path / "clips.csv").write_text(
        f"path,text,num_frames,height,width,fps,score_vmafmotion\n{clip.name},a square,40,48,64,24,3.5\n"
    )
    config = ManifestClips(
        {"48x64": {"9": (1.0, 1)}}, tmp_path / "clips.csv", batches_in_a_row=1, num_workers=0, max_fps=8, rate_told=True
    )
    starts = set()
    for key in keys(12):
        batch = ClipSource(config).batch(key)
        assert batch.captions == ["a square 8 FPS, 4 motion score."] and batch.conditions.fps.tolist() == [8.0]
        frames = ((batch.video[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()
        numbers = [number_of(frame) for frame in frames]
        assert np.diff(numbers).tolist() == [3] * 8
        starts.add(numbers[0])
    assert len(starts) > 1
    with pytest.raises(OpenSoraError, match="max_fps is 0"):
        replace(config, max_fps=0)
