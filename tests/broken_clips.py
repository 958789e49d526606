"""A folder of clips as labs have them: good ones, and one of everything that goes wrong."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora.manifest import ClipRow, read_manifest, write_manifest
from opensora.media.write import write_video

HEIGHT, WIDTH, NUM_FRAMES, FPS = 48, 64, 20, 8
# What fits the good clips: nine frames, and images.
BUCKETS = {"48x64": {"1": (1.0, 2), "9": (1.0, 2)}}


@dataclass(frozen=True)
class BrokenClips:
    """What lies in the folder.

    Attributes:
        folder: where.
        manifest: a table of all files, which promises that each of them is whole.
        usable: names of the files that can be trained on, some of them called what they are not.
        broken: names of those that cannot be read, with a word of the reason.
        dropped: names of those that are in no bucket of `BUCKETS`, with the reason.
    """

    folder: Path
    manifest: Path
    usable: list[str]
    broken: dict[str, str]
    dropped: dict[str, str]


def moving_square(num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3), in which every frame is another one."""
    rng = np.random.default_rng(seed)
    background = rng.integers(40, 200, (height, width + num_frames, 3), np.uint8)
    frames = np.stack([background[:, index : index + width] for index in range(num_frames)])
    side = max(2, height // 4)
    for index in range(num_frames):
        left = (index * 3) % (width - side)
        frames[index, side : 2 * side, left : left + side] = 255
    return frames


def make_broken_clips(folder: Path, num_good: int = 6) -> BrokenClips:
    """Writes the files, a caption beside each, and the table."""
    folder.mkdir(parents=True)
    for number in range(num_good):
        write_video(folder / f"good {number}.mp4", moving_square(seed=number), FPS)
    usable = [f"good {number}.mp4" for number in range(num_good)]

    whole = (folder / "good 0.mp4").read_bytes()
    picture = write_video(folder / "photo.png", moving_square(1), FPS).read_bytes()
    for name, content in {
        "红球 – été.mp4": whole,
        "a video.avi": whole,
        "another video.jpg": whole,
        "a picture.mp4": picture,
    }.items():
        (folder / name).write_bytes(content)
        usable.append(name)
    usable.append("photo.png")

    longer = write_video(folder / "cut.mp4", moving_square(60), FPS).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    for name, content in {
        "cut.mp4": longer[: len(longer) // 2],  # the table of its frames comes first, and promises them all
        "noise.mp4": noise,
        "empty.mp4": b"",
        "words.mp4": b"404: not found\n" * 20,
        "cut picture.png": picture[: len(picture) // 2],
    }.items():
        (folder / name).write_bytes(content)
    broken = {
        "cut.mp4": "truncated",
        "noise.mp4": "not a video",
        "empty.mp4": "not a video",
        "words.mp4": "not a video",
        "cut picture.png": "truncated",
    }

    write_video(folder / "short.mp4", moving_square(4), FPS)
    write_video(folder / "tiny.mp4", moving_square(NUM_FRAMES, 16, 16), FPS)
    dropped = {"short.mp4": "too short", "tiny.mp4": "too small"}

    rows = []
    for name in [*usable, *broken, *dropped]:
        frames = {"cut.mp4": 60, "short.mp4": 4}.get(name, NUM_FRAMES)
        frames = 1 if name in ("photo.png", "a picture.mp4", "cut picture.png") else frames
        height, width = (16, 16) if name == "tiny.mp4" else (HEIGHT, WIDTH)
        text = f'what "{name}" shows,\nin two lines'
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        rows.append(ClipRow(folder / name, text, frames, height, width, None if frames == 1 else float(FPS)))
    manifest = folder.parent / "all.csv"
    write_manifest(manifest, rows)
    assert not read_manifest(manifest).rejected
    return BrokenClips(folder, manifest, usable, broken, dropped)
