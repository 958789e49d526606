"""Overfits a small model to eight clips, by the commands a training begins with, and draws how that went.

    python docs/training.py CLIPS [--autoencoder FOLDER] [--output runs/overfit] [KEY=VALUE ...]

CLIPS is a folder with a few real videos (`make clips` fetches them into `.venv/real-clips`). Eight short pieces of them
become a dataset: a table of clips, a cache of latents and text, a training run, and a clip generated for each caption.
The pictures go to `docs/training/`: the loss, and what was generated beside what it was trained on. A run that was
stopped goes on. The autoencoder should have seen such clips; the toybox's has not.
"""

import argparse
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from opensora import load_pipeline
from opensora.cli.main import main as opensora
from opensora.evaluation.toybox import contact_sheet
from opensora.media.read import read_video
from opensora.media.transforms import fill_video, to_video
from opensora.media.write import write_video

DOCS = Path(__file__).parent.resolve()
FRAMES = 17


@dataclass(frozen=True)
class Piece:
    """A short clip to be cut: from which video, beginning where, every how manieth frame, and what it shows."""

    video: str
    first: int
    every: int
    caption: str


PIECES = (
    Piece("bigbuckbunny.mp4", 0, 2, "A big rabbit crawls out of a burrow under a tree."),
    Piece("bigbuckbunny.mp4", 60, 2, "A grey rabbit stretches its arms on a green meadow."),
    Piece("bikes.mp4", 0, 1, "White roofs of trucks pass by, seen from above."),
    Piece("bikes.mp4", 31, 1, "A man in a dark suit walks past parked cars."),
    Piece("bikes.mp4", 78, 2, "A van passes a tram and a man with a bicycle."),
    Piece("bikes.mp4", 188, 2, "Somebody walks past a bicycle that leans against a wall."),
    Piece("carphone_pristine.mp4", 30, 2, "A man with a red bow tie talks in a car."),
    Piece("cityCC0.mpg", 0, 6, "Tall buildings with lit windows at night."),
)


def cut(pieces: tuple[Piece, ...], videos: Path, folder: Path) -> None:
    """Writes the pieces as clips with their captions beside them, one frame longer than what is trained on."""
    for number, piece in enumerate(pieces):
        found = next(iter(sorted(videos.rglob(piece.video))), None)
        if found is None:
            raise SystemExit(f"{videos} holds no {piece.video}; make clips fetches it")
        frames, fps = read_video(found)
        path = folder / f"{number}.mp4"
        write_video(path, to_video(frames[piece.first :: piece.every][: FRAMES + 1]), fps=fps / piece.every)
        path.with_suffix(".txt").write_text(piece.caption + "\n", encoding="utf-8")


def learn(settings: tuple[str, ...]) -> None:
    """From the folder `clips` to the trained model in `run/model`: the commands, in order."""
    run("data", "manifest", "clips", "--output", "clips.csv")
    run("data", "plan", "clips.csv", "--recipe", "overfit")
    run("data", "precompute", "overfit", *settings, "--manifest", "clips.csv", "--output", "cache")
    run("train", "overfit", "--cache", "cache", *settings, "--output", "run")


def generate(captions: list[str]) -> None:
    """A clip for every caption."""
    for number, caption in enumerate(captions):
        path = f"generated/{number}.mp4"
        if not Path(path).exists():
            run("generate", caption, "--model", "run/model", "--output", path)


@torch.no_grad()
def compare(captions: list[str], picture: Path) -> dict[str, float]:
    """Draws clips, what the autoencoder keeps of them, and what their captions gave; tells how near that came.

    Returns:
        Mean PSNR in dB of the autoencoder's reconstructions and of the generated clips, both against the originals, and
        the share of generated clips whose nearest original is their own.
    """
    pipeline = load_pipeline("run/model")
    size = pipeline.config["height"], pipeline.config["width"]
    originals = [fill_video(to_video(read_video(f"clips/{n}.mp4")[0][:FRAMES]), *size) for n in range(len(captions))]
    rebuilt = [pipeline.autoencoder(clip[None]).sample[0].clamp(-1, 1) for clip in originals]
    generated = [to_video(read_video(f"generated/{n}.mp4")[0]) for n in range(len(captions))]
    shown = [0, FRAMES // 2, FRAMES - 1]
    rows = [
        (f"{caption}   clip | autoencoder | generated", torch.cat([clip[:, shown] for clip in clips], dim=1))
        for caption, *clips in zip(captions, originals, rebuilt, generated, strict=True)
    ]
    contact_sheet(rows, Path("clips.png"), columns=3 * len(shown), scale=1)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with Image.open("clips.png") as sheet:
        sheet.save(picture, quality=90)
    near = [min(range(len(captions)), key=lambda n: -psnr(clip, originals[n])) == i for i, clip in enumerate(generated)]
    return {
        "autoencoder_db": mean([psnr(a, b) for a, b in zip(rebuilt, originals, strict=True)]),
        "generated_db": mean([psnr(a, b) for a, b in zip(generated, originals, strict=True)]),
        "generated_to_autoencoder_db": mean([psnr(a, b) for a, b in zip(generated, rebuilt, strict=True)]),
        "nearest_is_own": mean([float(hit) for hit in near]),
    }


def draw_loss(metrics: Path, picture: Path) -> None:
    """The loss over the steps, and its mean over the last twentieth of the run up to each."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, losses = zip(*[(row["step"], row["loss"]) for row in rows if "loss" in row], strict=True)
    width = max(1, len(losses) // 20)
    smooth = [mean(list(losses[max(0, i - width + 1) : i + 1])) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.semilogy(steps, losses, color="tab:gray", linewidth=0.5, label="of a step")
    axis.semilogy(steps, smooth, color="tab:blue", label="mean")
    axis.set(xlabel="step", ylabel="loss", title="eight clips learnt by heart")
    axis.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def psnr(clip: Tensor, other: Tensor) -> float:
    """In dB, of clips in [-1, 1]."""
    return float(10 * torch.log10(4 / (clip - other).square().mean().clamp(min=1e-10)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def run(*args: str) -> None:
    """Runs an opensora command and shows it."""
    print("$ opensora " + shlex.join(args), flush=True)
    if opensora(list(args)) != 0:
        raise SystemExit(f"failed: opensora {shlex.join(args)}")


def whole_way(captions: list[str], pictures: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """Everything after the clips lie in `clips`, in the working directory."""
    learn(settings)
    generate(captions)
    draw_loss(Path("run/metrics.jsonl"), pictures / "overfit_loss.png")
    return compare(captions, pictures / "overfit_clips.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder with real videos")
    parser.add_argument("--autoencoder", default="toybox", help="folder or name of the autoencoder")
    parser.add_argument("--output", type=Path, default=Path("runs/overfit"), help="folder for everything but pictures")
    parser.add_argument("settings", nargs="*", help="settings of the recipe, as KEY=VALUE")
    args = parser.parse_intermixed_args()
    videos = args.clips.resolve()
    known = Path(args.autoencoder)
    autoencoder = str(known.resolve() if known.exists() else args.autoencoder)
    (args.output / "clips").mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    if not Path("clips.csv").exists():
        cut(PIECES, videos, Path("clips"))
    captions = [piece.caption for piece in PIECES]
    figures = whole_way(captions, DOCS / "training", (f"objective.autoencoder={autoencoder}", *args.settings))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
