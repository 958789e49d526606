"""What clips can be saved as, and how they come back: pixels, frame times, records, and where they go."""

import itertools
import json

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.clip import Clip
from opensora.generation.record import Record, Sampling, read_record, sidecar_path
from opensora.media.read import read_metadata, read_video
from opensora.media.write import FORMATS, write_video

METADATA = {"prompt": 'a ball – 一个红球 "quoted"\nsecond line', "seed": 2**40}
RECORD = Record(
    prompt="a red ball – 一个红球",
    negative_prompt=None,
    seed=7,
    model="toybox",
    model_hash="0" * 64,
    sampling=Sampling(4, 17, 23, 8, 4, 3.0, None),
    device="cpu",
    dtype="float32",
    pipeline={},
    versions={},
)


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize("name", ["a.mkv", "a.png", "a.frames", "shots/%04d.png"])
@pytest.mark.parametrize("size", [(1, 16, 16), (4, 17, 23), (12, 33, 15)])
def test_lossless_files_give_back_every_pixel(tmp_path, name, size):
    frames, fps = read_video(write_video(tmp_path / name, noise(*size), 24, METADATA))
    assert np.array_equal(frames, noise(*size)) and fps == 24


def test_containers_hold_what_their_names_say(tmp_path):
    for ending, container, codec in [
        ("mp4", "mp4", "h264"),
        ("mov", "mov", "h264"),
        ("webm", "webm", "vp9"),
        ("mkv", "matroska", "ffv1"),
    ]:
        with av.open(str(write_video(tmp_path / f"a.{ending}", noise(3, 16, 16), 8))) as file:
            assert container in file.format.name and file.streams.video[0].codec_context.name.endswith(codec)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001])
def test_the_record_is_inside_every_format_and_beside_it(tmp_path, format, fps):
    path = Clip(noise(4, 17, 23), fps, RECORD).save(tmp_path / f"clip.{format}")
    assert read_record(path) == read_record(sidecar_path(path)) == RECORD
    assert sidecar_path(path).name == f"clip.{format}.json"
    frames, found = read_video(path)
    assert frames.shape == (4, 17, 23, 3) and found == pytest.approx(fps)


def test_numbered_frames_have_a_folder_of_their_own(tmp_path):
    path = Clip(noise(11, 16, 16), 8, RECORD).save(tmp_path / "shots" / "ball-%03d.png")
    assert sorted(file.name for file in path.parent.iterdir()) == [f"ball-{number:03d}.png" for number in range(11)]
    assert read_record(tmp_path / "shots") == read_record(path) == read_record(tmp_path / "shots.json") == RECORD
    assert read_record(tmp_path / "shots" / "ball-007.png") == RECORD
    assert np.array_equal(read_video(tmp_path / "shots" / "ball-007.png")[0][0], noise(11, 16, 16)[7])
    (tmp_path / "shots" / "ball-010.png").unlink()
    with pytest.raises(OpenSoraError, match="holds 10 of 11 frames"):
        read_video(tmp_path / "shots")
    for name in ("shots", "shots/%04d.png"):  # never among others
        with pytest.raises(OpenSoraError, match="need a folder of their own"):
            write_video(tmp_path / name, noise(3, 16, 16), 8, format="frames")
    assert len(list((tmp_path / "shots").iterdir())) == 10


def test_numbered_frames_take_the_place_of_those_of_an_earlier_clip(tmp_path):
    path = write_video(tmp_path / "shots" / "%03d.png", noise(11, 16, 16), 8)
    write_video(path, noise(4, 8, 8), 8)
    assert read_video(path.parent)[0].shape == (4, 8, 8, 3)
    for file in path.parent.iterdir():
        Image.open(file).save(file)  # somebody's pictures, by the same names
    with pytest.raises(OpenSoraError, match="need a folder of their own"):
        write_video(path, noise(4, 8, 8), 8)


def test_a_cut_lossless_file_is_damaged(tmp_path):
    for ending in ("mkv", "webm"):
        path = write_video(tmp_path / f"a.{ending}", noise(20, 64, 64), 8)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
            read_video(path)


@pytest.mark.parametrize("fps", [0.5, 7, 8, 12.5, 24, 29.97, 30, 48, 50])
def test_gifs_are_written_as_browsers_play_them(tmp_path, fps):
    path = write_video(tmp_path / "a.gif", noise(50, 8, 8), fps)
    with Image.open(path) as image:
        shown = [page.info["duration"] for page in ImageSequence.Iterator(image)]
    assert min(shown) >= 20, "browsers take less for a tenth of a second"
    for number, end_ms in enumerate(itertools.accumulate(shown), start=1):
        assert abs(end_ms - number * 1000 / fps) <= 5, "never further off than rounding"
    assert read_video(path)[1] == fps


def test_rates_that_a_picture_format_cannot_show(tmp_path):
    for name, fps in (("a.gif", 60), ("a.gif", 51), ("a.webp", 100)):
        with pytest.raises(OpenSoraError, match="expected a number from"):
            write_video(tmp_path / name, noise(2, 8, 8), fps)


# ---- the command line ------------------------------------------------------------------------------------------------

PROMPT = "a small red ball rolls left over the grass"


def made(tmp_path, *args: str) -> list[str]:
    assert main(["generate", PROMPT, *args]) == 0
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def test_folders_and_patterns_as_outputs(pipe, tmp_path):
    name = "a-small-red-ball-rolls-left-over-the-grass-42"
    assert made(tmp_path, "--output", "run.v1/") == [f"run.v1/{name}.mp4", f"run.v1/{name}.mp4.json"]
    assert made(tmp_path, "--output", "run.v2/deeper.x/", "--format", "webm")[2:] == [
        f"run.v2/deeper.x/{name}.webm",
        f"run.v2/deeper.x/{name}.webm.json",
    ]
    (tmp_path / "run.v3").mkdir()
    assert made(tmp_path, "--output", "run.v3", "--format", "mkv")[4:] == [
        f"run.v3/{name}.mkv",
        f"run.v3/{name}.mkv.json",
    ]


def test_frames_as_output(pipe, tmp_path, capsys):
    files = made(tmp_path, "--output", "shots/%02d.png", "--num-videos", "2")
    assert files == sorted(
        [f"shots-{clip}/{frame:02d}.png" for clip in range(2) for frame in range(5)] + ["shots-0.json", "shots-1.json"]
    )
    assert capsys.readouterr().out == f"{tmp_path}/shots-0/%02d.png\n{tmp_path}/shots-1/%02d.png\n"
    assert main(["generate", "--from", "shots-1/%02d.png", "--output", "again.mkv"]) == 0
    assert np.array_equal(read_video(tmp_path / "again.mkv")[0], read_video(tmp_path / "shots-1")[0])
    assert main(["generate", "--from", "again.mkv", "--format", "frames", "--output", "again.shots/"]) == 0
    [folder] = (path for path in (tmp_path / "again.shots").iterdir() if path.is_dir())
    assert np.array_equal(read_video(folder)[0], read_video(tmp_path / "shots-1")[0])
    assert read_metadata(folder) == json.loads((folder.parent / f"{folder.name}.json").read_text())


def test_what_gif_cannot_hold_is_said(pipe, tmp_path, capsys):
    made(tmp_path, "--output", "a.gif", "--fps", "24")
    assert "note: gif counts hundredths of a second: frames are shown for 40 or 50 ms" in capsys.readouterr().err
    made(tmp_path, "--output", "b.gif", "--fps", "20")
    assert "gif counts" not in capsys.readouterr().err
