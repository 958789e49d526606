"""Videos written and read back: pixels, timing, metadata, odd sizes, interruptions and broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.errors import OpenSoraError
from opensora.media import write
from opensora.media.read import read_metadata, read_video
from opensora.media.write import write_video

FILES = [name for name in write.FORMATS if name != "frames"]
METADATA = {"prompt": 'a ball – 一个红球 "quoted"\nsecond line', "seed": 2**40, "nested": {"list": [1, 2.5, None]}}


def clip(num_frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A red square that walks over smooth green and blue ramps."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 1] = np.linspace(30, 200, width).astype(np.uint8)
    frames[..., 2] = np.linspace(30, 200, height).astype(np.uint8)[:, None]
    for index in range(num_frames):
        frames[index, 8:24, 2 * index : 2 * index + 16] = (220, 30, 30)
    return frames


@pytest.mark.parametrize(("suffix", "mean_error"), [("mp4", 4), ("gif", 6), ("webp", 4), ("png", 0)])
def test_round_trip(tmp_path, suffix, mean_error):
    path = write_video(tmp_path / f"a.{suffix}", clip(), 8, METADATA)
    frames, fps = read_video(path)
    assert frames.shape == clip().shape and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - clip()).mean() <= mean_error
    assert fps == pytest.approx(8, rel=0.02)
    assert read_metadata(path) == METADATA
    assert list(tmp_path.iterdir()) == [path]


def test_colours_are_not_shifted(tmp_path):
    for colour in [(220, 30, 30), (30, 200, 60), (40, 60, 220), (250, 250, 250), (0, 0, 0)]:
        frames = np.full((3, 32, 32, 3), colour, np.uint8)
        back, _ = read_video(write_video(tmp_path / "a.mp4", frames, 8))
        assert np.abs(back.astype(int) - frames).max() <= 3, colour


@pytest.mark.parametrize("suffix", write.FORMATS)
@pytest.mark.parametrize("size", [(1, 16, 16), (3, 17, 23), (5, 16, 31), (2, 31, 16)])
def test_odd_sizes_and_single_frames_come_back_whole(tmp_path, suffix, size):
    video = clip(*size)
    frames, _ = read_video(write_video(tmp_path / f"a.{suffix}", video, 8))
    assert frames.shape == video.shape
    assert np.abs(frames.astype(int) - video).mean() < 12


@pytest.mark.parametrize("suffix", FILES)
def test_the_same_frames_make_the_same_bytes(tmp_path, suffix):
    one = write_video(tmp_path / f"a.{suffix}", clip(), 8, METADATA)
    two = write_video(tmp_path / f"b.{suffix}", clip(), 8, METADATA)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("fps", [7.5, 24, 29.97, 30000 / 1001])
def test_frame_rates(tmp_path, fps):
    _, found = read_video(write_video(tmp_path / "a.mp4", clip(), fps))
    assert found == pytest.approx(fps, rel=1e-4)


def test_gif_times_do_not_drift():
    durations = write.frame_durations_ms(800, 8, "GIF")
    assert sum(durations) == 100_000 and set(durations) == {120, 130}


def test_a_float_video_is_scaled_and_clamped(tmp_path):
    video = torch.linspace(-1.2, 1.2, 3 * 2 * 8 * 8).reshape(3, 2, 8, 8)
    frames, _ = read_video(write_video(tmp_path / "a.png", video, 8))
    assert frames.shape == (2, 8, 8, 3)
    expected = (video.clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 3, 0)
    assert np.abs(frames - expected.numpy()).max() <= 1


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.int64),
        np.full((3, 2, 8, 8), np.nan, np.float32),
    ],
)
def test_impossible_videos(tmp_path, video):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        write_video(tmp_path / "a.mp4", video, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", write.FORMATS)
@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 0.0001, 1001])
def test_impossible_fps(tmp_path, suffix, fps):
    with pytest.raises(OpenSoraError, match="fps"):
        write_video(tmp_path / f"a.{suffix}", clip(), fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "fps"), [("mp4", 0.01), ("mp4", 1000), ("gif", 0.01), ("gif", 50), ("webp", 90)])
def test_the_slowest_and_the_fastest(tmp_path, suffix, fps):
    frames, found = read_video(write_video(tmp_path / f"a.{suffix}", clip(3), fps))
    assert len(frames) == 3 and found == pytest.approx(fps)
    with pytest.raises(OpenSoraError, match=r"from 0\.01 to 50 for gif"):
        write_video(tmp_path / "b.gif", clip(), 101)


@pytest.mark.parametrize("suffix", write.FORMATS)
@pytest.mark.parametrize("order", [[0] * 9, [0, 0, 1, 2, 2, 2], [0, 1, 1], [0]])
@pytest.mark.parametrize("fps", [8, 24])
def test_equal_frames_come_back_as_often_as_they_were_written(tmp_path, suffix, order, fps):
    video = clip(3)[order]
    frames, found = read_video(write_video(tmp_path / f"a.{suffix}", video, fps, METADATA))
    assert frames.shape == video.shape and found == pytest.approx(fps)
    # Nearer to its own picture than to any other.
    distances = np.abs(frames[:, None].astype(int) - clip(3)[None]).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == order


def test_an_animation_of_another_program_is_read(tmp_path):
    pictures = [Image.fromarray(frame) for frame in clip(3)]
    options = {"save_all": True, "append_images": pictures[1:], "duration": [100, 300, 100]}
    for comment in [{}, {"comment": b"made by hand"}, {"comment": b'"text"'}]:
        pictures[0].save(tmp_path / "a.gif", **options, **comment)
        frames, fps = read_video(tmp_path / "a.gif")
        assert len(frames) == 5 and fps == 10
        with pytest.raises(OpenSoraError, match="does not say how it was made"):
            read_metadata(tmp_path / "a.gif")


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("12:30.mp4", clip(), 8, METADATA)
    assert len(read_video("12:30.mp4")[0]) == 9 and read_metadata("12:30.mp4") == METADATA


def test_a_sheet_too_big_to_be_read_is_not_written(tmp_path, monkeypatch):
    good = write_video(tmp_path / "good.png", clip(), 8, METADATA)  # 27648 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 27648 // 2)
    with pytest.warns(Image.DecompressionBombWarning):
        assert len(read_video(good)[0]) == 9
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 27648 // 2 - 1)
    with pytest.raises(OpenSoraError, match=r"^a png sheet of 9 frames of 48x64 has 27,648 pixels[^\n]*$"):
        write_video(tmp_path / "bad.png", clip(), 8)
    for read in (read_video, read_metadata):
        with pytest.raises(OpenSoraError, match=r"good.png [^\n]*exceeds limit[^\n]*$"):
            read(good)
    assert list(tmp_path.iterdir()) == [good]


def test_formats():
    assert write.format_of("a.MP4") == "mp4"
    assert write.format_of("a", "gif") == "gif"
    for path, kind in [("a.avi", None), ("a", None), ("a.mp4", "gif"), ("a.mp4", "avi")]:
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
            write.format_of(path, kind)


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_old_file_and_no_half_one(tmp_path, suffix, error, monkeypatch):
    path = write_video(tmp_path / f"a.{suffix}", clip(), 8)
    before = path.read_bytes()

    def half(temporary, *_, **__):
        temporary.write_bytes(b"half")
        raise error

    monkeypatch.setattr(write, f"_write_{suffix if hasattr(write, f'_write_{suffix}') else 'stream'}", half)
    with pytest.raises((KeyboardInterrupt, OpenSoraError)):
        write_video(path, clip(), 8)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_files_without_metadata(tmp_path):
    for suffix in write.FORMATS:
        with pytest.raises(OpenSoraError, match="does not say how it was made"):
            read_metadata(write_video(tmp_path / f"a.{suffix}", clip(), 8))


@pytest.mark.parametrize("suffix", FILES)
def test_broken_files(tmp_path, suffix):
    good = write_video(
        tmp_path / f"good.{suffix}", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8), 8
    )
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text = tmp_path / f"text.{suffix}"
    text.write_text("not a video")
    empty = tmp_path / f"empty.{suffix}"
    empty.write_bytes(b"")
    for path in [cut, text, empty, tmp_path / f"missing.{suffix}", tmp_path]:
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
            read_video(path)
        assert str(path) in str(caught.value)
    for path in [text, empty, tmp_path / f"missing.{suffix}"]:
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
            read_metadata(path)


def test_a_photo_stands_as_it_was_taken(tmp_path):
    """Cameras store what the sensor saw, and beside it how they were held."""
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: turn by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_video(tmp_path / "photo.jpg")[0].shape == (1, 30, 20, 3)
