"""Makes `docs/gallery.md` and its pictures with the bundled model: `python docs/gallery.py`.

Every picture is made by the command that stands above it on the page; the commands run in a temporary folder, in order,
because later ones use the clips of earlier ones.
"""

import contextlib
import io
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora.cli.main import main
from opensora.evaluation.judge import load_judge
from opensora.evaluation.toybox import contact_sheet
from opensora.media.read import read_video
from opensora.media.transforms import to_video

DOCS = Path(__file__).parent.resolve()
COLUMNS = 9
EVALUATION = "evaluate given-frames --num-clips 60"


@dataclass(frozen=True)
class Entry:
    """A part of the page: what it shows, and the commands whose clips it shows."""

    title: str
    text: str
    commands: tuple[str, ...]


ENTRIES = (
    Entry(
        "Text to image",
        "One frame is an image; the model is told so by its frame rate.",
        ('generate "a large red ball over the grass" --num-frames 1 --seed 3 --output still.png',),
    ),
    Entry(
        "Text to video",
        "",
        ('generate "a large blue square moves right on the sand" --seed 11 --output source.mp4',),
    ),
    Entry(
        "Image to video",
        "The clip begins with the picture.",
        ('generate "a large red ball bounces over the grass" --image still.png --output from-image.mp4',),
    ),
    Entry(
        "Connect two pictures",
        "First and last frame are two new pictures. 18 frames are a chunk of the autoencoder and one frame more, so "
        "the last frame is encoded by itself and kept exactly.",
        (
            'generate "a large blue square on the sand" --num-frames 1 --seed 5 --output here.png',
            'generate "a large blue square on the sand" --num-frames 1 --seed 7 --output there.png',
            'generate "a large blue square moves right on the sand" --image here.png --last-image there.png '
            "--num-frames 18 --output connected.mp4",
        ),
    ),
    Entry(
        "Go on where a clip ends",
        "The new clip begins with the last five frames of that one, and moves on from there by its own prompt.",
        ('generate "a large blue square moves up on the sand" --extend source.mp4 --output extended.mp4',),
    ),
    Entry(
        "Go back to where a clip came from",
        "34 frames, of which the second half is conditioned on.",
        (
            'generate "a large red ball bounces over the grass" --extend from-image.mp4 --backwards --num-frames 34 '
            "--output before.mp4",
        ),
    ),
    Entry(
        "Edit a clip",
        "The second clip of this page edited under another prompt, denoised from a little to nearly all of it.",
        tuple(
            f'generate "a large white square moves right on the sand" --edit source.mp4 --strength {strength} '
            f"--output edited-{strength}.mp4"
            for strength in (0.3, 0.6, 0.9)
        ),
    ),
    Entry(
        "A long video with changing prompts",
        "Four clips, each of which begins with the last five frames of the one before: 53 frames.",
        (
            'generate "|0|a small green ball moves right at night|1|a small green ball moves up at night'
            '|2|a small green ball moves left at night|3|a small green ball spins at night" '
            "--loop 4 --seed 2 --output long.mp4",
        ),
    ),
)


def shown(path: Path) -> tuple[torch.Tensor, str]:
    """A clip (3, T, H, W) in [-1, 1], and what the judge reads in it."""
    video = to_video(read_video(path)[0])
    if video.shape[1] == 1:
        return video, "judge (frame): " + words(video.repeat(1, 2, 1, 1), without=("motion",))
    return video, "judge: " + words(video)


def words(video: torch.Tensor, without: tuple[str, ...] = ()) -> str:
    (read,) = load_judge().read(video[None])
    return ", ".join(label for name, label in read.items() if name not in without)


def page() -> str:
    parts = [
        "# Gallery",
        "Every way to steer the bundled model, each with its command. `python docs/gallery.py` runs them all and makes "
        "this page. Pictures show nine frames of a clip, under its name and what the judge reads in it.",
    ]
    for entry in ENTRIES:
        rows = []
        for command in entry.commands:
            path = Path(run(command))
            video, read = shown(path)
            rows.append((f"{path.name}   {read}", video))
        rows = [row for row in rows if row[1].shape[1] > 1] or rows  # pictures are seen in the clips made of them
        picture = DOCS / "images" / "gallery" / f"{entry.title.lower().replace(' ', '-')}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, picture, columns=min(COLUMNS, rows[0][1].shape[1]))
        commands = "\n".join(f"opensora {command}" for command in entry.commands)
        parts += [f"## {entry.title}", *([entry.text] if entry.text else []), f"```\n{commands}\n```"]
        parts.append(f"![{entry.title}](images/gallery/{picture.name})")
    parts += [
        "## How often it works",
        "Held-out clips, conditioned on some of their frames. `dB`: the worst such frame that came out, against what "
        "the autoencoder alone makes of it (100 is the most that is counted). `%`: clips in which the judge reads "
        "what the prompt says.",
        f"```\nopensora {EVALUATION}\n{run(EVALUATION)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def run(command: str) -> str:
    """What an opensora command prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if main(shlex.split(command)) != 0:
            raise SystemExit(f"failed: opensora {command}")
    return said.getvalue().strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = page()
    (DOCS / "gallery.md").write_text(text, encoding="utf-8")
