"""What takes two seconds in a clip takes two seconds in whatever is made of it: by time where its rate is uneven."""

import random
from fractions import Fraction

import numpy as np
import pytest
from numbered_clips import HEIGHT, WIDTH, encode, number_of, numbered
from PIL import Image

from opensora.clip_rows import ClipRow
from opensora.data.buckets import Bucket
from opensora.data.clips import read_clip
from opensora.data.scan import make_manifest, verify_clips
from opensora.errors import OpenSoraError
from opensora.generation.inputs import InputFiles, notes_on_files
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest
from opensora.manifest import read_manifest
from opensora.media.frames import ClipFile, probe
from opensora.media.read import read_video

# Ten frames of a tenth of a second, one that stays for two seconds, ten more.
HELD = [*range(0, 1000, 100), 1000, *range(3000, 4000, 100)]
HELD_NUMBERS = [*range(10), *[10] * 20, *range(11, 21)]
VARIABLE = {
    "phone.mp4": {},
    "screen.mkv": {},
    "browser.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "0"},
    "camera.mov": {"bf": "3"},
}


def numbers(frames) -> list[int]:
    return [number_of(frame) for frame in frames]


def sampling(file_fps: float = 10, num_frames: int = 9, input_fps: float | None = None) -> Sampling:
    return Sampling(num_frames, HEIGHT, WIDTH, file_fps, 1, 1.0, None, input_fps=input_fps)


def told(video) -> list[int]:
    """Numbers of the frames of a video (3, T, H, W) in [-1, 1]."""
    return numbers(((video.permute(1, 2, 3, 0) + 1) * 127.5).round().numpy())


@pytest.mark.parametrize("name", VARIABLE)
def test_a_hold_of_two_seconds_lasts_two_seconds(tmp_path, name):
    path = encode(tmp_path / name, numbered(21), HELD, **VARIABLE[name])
    frames, fps = read_video(path)
    assert fps == pytest.approx(10, rel=0.01)
    assert numbers(frames) == HELD_NUMBERS
    facts = probe(path)
    assert facts.is_variable and (facts.num_frames, facts.fps) == (40, fps)
    assert probe(path, "decode") == facts
    for rate in (5, 20, 24):
        at_rate, _ = read_video(path, rate)
        assert len(at_rate) == 4 * rate and numbers(at_rate).count(10) == pytest.approx(2 * rate, abs=1)


def test_frames_that_come_early_or_late_are_no_variable_rate(tmp_path):
    """As phones write them: a few milliseconds off the beat."""
    rng = random.Random(0)
    times = [33 * k + rng.randint(-8, 8) for k in range(60)]
    clip = ClipFile(encode(tmp_path / "a.mp4", numbered(50), sorted(times)[:50], fps=30))
    assert not clip.timeline.is_variable and clip.fps == pytest.approx(30, rel=0.02)
    assert numbers(clip.frames(range(50))) == list(range(50))


def test_a_clip_that_goes_on_from_one_of_variable_rate(tmp_path):
    """Taken by time at the rate of the new clip, with a word; the note is what the record holds."""
    path = encode(tmp_path / "held.mp4", numbered(21), HELD)
    files = InputFiles()
    inputs = files.read(ClipRequest("a cat", edit=path, strength=0.5))
    clip = files[inputs.edit]
    at_ten = sampling(10, 30)
    assert told(clip.fill(at_ten, slice(30))) == HELD_NUMBERS[:30]
    assert told(clip.fill(at_ten, slice(-9, None))) == HELD_NUMBERS[-9:]
    assert told(clip.fill(sampling(20, 60), slice(60))) == [n for n in HELD_NUMBERS for _ in range(2)][:60]
    (first, second) = notes_on_files(inputs, files, at_ten)
    assert first == "the first 30 of 40 frames are edited"
    assert second == "held.mp4 has a frame rate that varies; its frames are taken by time, 10 a second"


def test_a_chosen_rate(tmp_path):
    """`input_fps` takes frames of a constant rate by time, too; without it each is taken once."""
    path = encode(tmp_path / "a.mp4", numbered(40), fps=20)
    files = InputFiles()
    request = ClipRequest("a cat", extend=path, input_fps=10)
    request.check()
    inputs = files.read(request)
    clip = files[inputs.extend]
    assert told(clip.fill(sampling(), slice(5))) == [0, 1, 2, 3, 4]
    assert [n // 2 for n in told(clip.fill(sampling(input_fps=10), slice(5)))] == [0, 1, 2, 3, 4]
    (note,) = notes_on_files(inputs, files, sampling(input_fps=10))
    assert note == "a.mp4 plays at 20 fps; its frames are taken by time, 10 a second"
    (note,) = notes_on_files(inputs, files, sampling())
    assert note == "a.mp4 plays at 20 fps, the new clip at 10; no frame is left out"
    assert len(read_video(path, 40)[0]) == 80


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda path: ClipRequest("a cat", input_fps=10), "`input_fps`.*give one as `extend` or `edit`"),
        (lambda path: ClipRequest("a cat", image=path, input_fps=10), "`input_fps`.*give one as `extend` or `edit`"),
        (lambda path: ClipRequest("a cat", extend=path, input_fps=0), "`input_fps` is 0, expected a number from"),
        (lambda path: ClipRequest("a cat", extend=path, input_fps=float("nan")), "`input_fps` is nan"),
        (lambda path: ClipRequest("a cat", reference_path=(path,), mask_strategy="0", input_fps=9), "picture has none"),
    ],
)
def test_a_rate_that_would_do_nothing_is_an_error(tmp_path, request_of, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(OpenSoraError, match=message):
        request = request_of(tmp_path / "a.png")
        request.check()
        InputFiles().read(request)


def rows(folder, **options) -> list[ClipRow]:
    make_manifest(folder, folder / "clips.csv", uncaptioned=True, **options)
    return read_manifest(folder / "clips.csv", text_required=False).rows


class First(random.Random):
    """Windows begin at the first frame."""

    def randint(self, a, b):
        return a


def window(row: ClipRow, num_frames: int, interval: int = 1) -> list[int]:
    bucket = Bucket("a", num_frames, 1.0, HEIGHT, WIDTH, 1)
    return told(read_clip(row, bucket, interval, First()))


def test_training_takes_a_variable_rate_by_time(tmp_path):
    encode(tmp_path / "held.mp4", numbered(21), HELD)
    (row,) = rows(tmp_path)
    assert (row.num_frames, row.fps) == (40, 10)
    assert window(row, 40) == HELD_NUMBERS
    assert window(row, 10, interval=4) == [HELD_NUMBERS[k] for k in np.linspace(0, 39, 10, dtype=int)]
    assert not verify_clips([row]).broken


def test_training_at_a_chosen_rate(tmp_path):
    """The rate that the manifest states is that at which frames are taken, whatever the file's."""
    encode(tmp_path / "a.mp4", numbered(40), fps=20)
    encode(tmp_path / "b.mp4", numbered(21), HELD)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "c.png")
    even, held, picture = rows(tmp_path, fps=5)
    assert (even.num_frames, even.fps, held.num_frames, held.fps) == (10, 5, 20, 5)
    assert (picture.num_frames, picture.fps) == (1, None)
    assert [n // 4 for n in window(even, 10)] == list(range(10))
    assert window(held, 20).count(10) == 10
    assert not verify_clips([even, held, picture]).broken
    scan = make_manifest(tmp_path, tmp_path / "clips.csv", uncaptioned=True, fps=5)
    assert list(scan.notes) == [
        "it plays at another rate; frames are taken by time at 5 fps",
        "its frame rate varies; frames are taken by time",
    ]


def test_tables_of_others_are_read_as_they_mean_it(tmp_path):
    """Rounded rates are the file's; the average rate of a variable one, with all that it stores, is a rate."""
    even = encode(tmp_path / "a.mp4", numbered(30), fps=30)
    assert window(ClipRow(even, "", 30, HEIGHT, WIDTH, 29.97), 30) == list(range(30))
    held = encode(tmp_path / "b.mp4", numbered(21), HELD)
    average = ClipRow(held, "", 21, HEIGHT, WIDTH, 21 / 4)
    assert window(average, 21).count(10) == pytest.approx(10, abs=2)
    with pytest.raises(OpenSoraError, match=r"15 of 30 frames are there at 15 fps \(it plays at 30"):
        window(ClipRow(even, "", 30, HEIGHT, WIDTH, 15.0), 30)


def animation(path, delays_ms, pictures=None):
    pictures = pictures or [Image.fromarray(frame) for frame in numbered(len(delays_ms))]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    options = {"save_all": True, "append_images": pictures[1:], "duration": delays_ms, "disposal": 1} | lossless
    options = {name: value for name, value in options.items() if name != "disposal" or path.suffix == ".gif"}
    pictures[0].save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animations_play_as_browsers_play_them(tmp_path, name):
    """Delays of 10 ms and less are meant to be as fast as can be, and are played as a tenth of a second."""
    path = animation(tmp_path / name, [0, 10, 10, 0])
    frames, fps = read_video(path)
    assert numbers(frames) == [0, 1, 2, 3] and fps == pytest.approx(10)
    path = animation(tmp_path / name, [20, 20, 20, 20])
    assert read_video(path)[1] == pytest.approx(50)
    path = animation(tmp_path / name, [100, 300, 100, 2000])
    frames, fps = read_video(path)
    assert fps == pytest.approx(10) and numbers(frames) == [0, 1, 1, 1, 2, *[3] * 20]
    facts = probe(path)
    assert facts.is_variable and facts.num_frames == 25
    (row,) = rows(tmp_path)
    assert window(row, 25) == [0, 1, 1, 1, 2, *[3] * 20]


def test_frames_are_seen_from_the_first_on(tmp_path):
    """A clip may begin at any time of its container."""
    times = [5000 + time for time in HELD]
    for suffix in ("mp4", "mkv", "ts"):
        frames, fps = read_video(encode(tmp_path / f"a.{suffix}", numbered(21), times))
        assert numbers(frames) == HELD_NUMBERS and fps == pytest.approx(10, rel=0.01)


def test_times_that_nobody_could_live_through_are_damage(tmp_path):
    path = encode(tmp_path / "a.mkv", numbered(3), [0, 10, 2**40], time_base=Fraction(1, 1000))
    with pytest.raises(OpenSoraError, match="it would last"):
        read_video(path)
