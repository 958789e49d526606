"""Clips that latents are measured on: which are chosen, which are passed over, and what is said of them."""

import numpy as np
import pytest
from PIL import Image

from opensora.checkpoints.file_hashes import file_hash
from opensora.clip_rows import ClipRow
from opensora.errors import OpenSoraError
from opensora.lab.latents.clips import VideoSize, choose_clips
from opensora.manifest import write_manifest
from opensora.media.write import write_video

SIZE = VideoSize(4, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of one brightness each, a short one, a picture, and one that is broken."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        frames = np.full((6, 32, 48, 3), 40 * number, np.uint8)
        write_video(folder / ("more" if number % 2 else "") / f"{number}.mkv", frames, fps=8)
    write_video(folder / "short.mkv", frames[:3], fps=8)
    Image.fromarray(frames[0]).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom no film")
    return folder


@pytest.fixture(scope="module")
def manifest(folder):
    names = [("" if number % 2 == 0 else "more/") + f"{number}.mkv" for number in range(6)]
    rows = [ClipRow(folder / name, "", 6, 32, 48, 8.0) for name in names]
    rows += [ClipRow(folder / "short.mkv", "", 3, 32, 48, 8.0), ClipRow(folder / "broken.mp4", "", 9, 32, 48, 8.0)]
    path = folder.parent / "clips.csv"
    write_manifest(path, rows)
    return path


def brightness(clips) -> list[float]:
    return [round(float(video.mean()), 2) for video in clips]


def test_a_folder_gives_all_clips_that_are_long_enough_and_names_the_others(folder):
    clips = choose_clips(str(folder), SIZE, 100, seed=0)
    videos = list(clips)
    assert {tuple(video.shape) for video in videos} == {(1, 3, 4, 16, 24)}
    assert clips.num_read == 6 and len(set(brightness(videos))) == 6
    reasons = {name.rpartition("/")[2]: reason for name, reason in clips.left_out.items()}
    assert reasons.keys() == {"short.mkv", "picture.png", "broken.mp4"}
    assert "give 3 or fewer" in reasons["short.mkv"] and "pictures alone" in reasons["picture.png"]
    assert f"6 clips of {folder} (sha256 " in clips.said and "4 frames of 16x24, seed 0" in clips.said


@pytest.mark.parametrize("data", ["folder", "manifest"])
def test_a_seed_chooses_always_the_same_and_another_seed_others(data, request):
    data = str(request.getfixturevalue(data))
    chosen = [brightness(choose_clips(data, SIZE, 2, seed)) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len({tuple(one) for one in chosen}) > 1
    assert all(len(one) == 2 for one in chosen)
    fewer = brightness(choose_clips(data, SIZE, 1, 0))
    assert fewer == chosen[0][:1]


def test_a_manifest_is_known_by_its_hash(manifest):
    clips = choose_clips(str(manifest), SIZE, 100, seed=0)
    assert len(brightness(clips)) == 6 and clips.sha256 == file_hash(manifest)
    assert [name.rpartition("/")[2] for name in clips.left_out] == ["broken.mp4"]


def test_a_folder_is_known_by_names_and_sizes_of_its_clips(folder, tmp_path):
    known = choose_clips(str(folder), SIZE, 1, seed=0).sha256
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.rglob("*"):
        target = copied / path.relative_to(folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    assert choose_clips(str(copied), SIZE, 1, seed=5).sha256 == known
    (copied / "0.mkv").write_bytes(b"1")
    assert choose_clips(str(copied), SIZE, 1, seed=0).sha256 != known


def test_images_are_clips_of_one_frame(folder):
    clips = choose_clips(str(folder), VideoSize(1, 16, 16), 100, seed=0)
    assert len(brightness(clips)) == 8 and len(clips.left_out) == 1


def test_toy_clips_are_those_of_no_training(folder):
    first, second = (list(choose_clips("toybox", SIZE, number, seed=3)) for number in (2, 5))
    assert len(first) == 2 and len(second) == 5
    assert float(second[0].std()) > 0 and choose_clips("toybox", SIZE, 2, seed=3).sha256 == ""


def test_where_there_is_nothing_one_line_says_so(folder, manifest, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    table = tmp_path / "short.csv"
    write_manifest(table, [ClipRow(folder / "short.mkv", "", 3, 32, 48, 8.0)])
    pictures = tmp_path / "pictures.csv"
    write_manifest(pictures, [ClipRow(folder / "picture.png", "", 1, 32, 48, None)])
    cases = {
        str(empty): "no clips in",
        str(tmp_path / "absent"): "does not exist; give a folder of clips",
        str(table): "has 3 frames at most, where `num_frames` is 4; give 3 or fewer",
        str(pictures): "has pictures alone, of 1 frame",
    }
    for data, reason in cases.items():
        with pytest.raises(OpenSoraError, match=reason):
            choose_clips(data, SIZE, 3, seed=0)
    only = tmp_path / "only broken"
    only.mkdir()
    (only / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(OpenSoraError, match=r"no clip of .* can be measured: .*broken.mp4"):
        list(choose_clips(str(only), SIZE, 3, seed=0))


@pytest.mark.parametrize(("num_clips", "seed", "name"), [(0, 0, "num_clips"), (10**9, 0, "num_clips"), (1, -1, "seed")])
def test_numbers_have_limits(num_clips, seed, name):
    with pytest.raises(OpenSoraError, match=name):
        choose_clips("toybox", SIZE, num_clips, seed)


@pytest.mark.parametrize("size", [(0, 16, 16), (4, 10**6, 16), (10**7, 16, 16)])
def test_sizes_have_limits(size):
    with pytest.raises(OpenSoraError):
        VideoSize(*size)
