"""How well a video autoencoder gives clips back, beside bilinear pictures as small as its latents.

    python docs/vae_training.py prepare CLIP... --output FOLDER
    python docs/vae_training.py measure MODEL FOLDER --size 144x176 [--picture PNG]

`prepare` brings clips to a short side of 144 px (antialiased) and writes all but the last 17 frames of each into
FOLDER/train and those into FOLDER/held_out. `measure` takes every window of 17 frames that lies side by side in a clip,
resized and cropped around the centre to the size, and prints the mean PSNR over all frames (RGB in 8 bits, peak 255)
of what the autoencoder makes of it (the posterior's mean), and of the same frames made 8 times smaller and as large
again: shrunk with and without antialiasing, enlarged bilinearly.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.checkpoints.components import load_component
from opensora.media.read import read_video
from opensora.media.transforms import fill_video, to_video
from opensora.media.write import write_video
from opensora.models.autoencoders.video import VideoAutoencoder

SHORT_SIDE, HELD_OUT, WINDOW = 144, 17, 17
SUFFIXES = (".mp4", ".mpg", ".avi")


def prepare(paths: list[Path], output: Path) -> None:
    """Writes the parts to train on and to keep."""
    for path in paths:
        frames, fps = read_video(path)
        video = torch.tensor(frames).permute(0, 3, 1, 2).float()
        scale = SHORT_SIDE / min(video.shape[2:])
        size = tuple(round(side * scale) // 16 * 16 for side in video.shape[2:])
        if scale != 1:
            resized = [round(side * scale) for side in video.shape[2:]]
            video = F.interpolate(video, size=resized, mode="bilinear", antialias=True)
        top, left = ((have - want) // 2 for have, want in zip(video.shape[2:], size, strict=True))
        video = video[:, :, top : top + size[0], left : left + size[1]].round().clamp(0, 255)
        pixels = video.to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for part, piece in (("train", pixels[:-HELD_OUT]), ("held_out", pixels[-HELD_OUT:])):
            (output / part).mkdir(parents=True, exist_ok=True)
            print(write_video(output / part / f"{path.stem}.mp4", piece, fps), *piece.shape[:3])


def windows(path: Path, height: int, width: int) -> Iterator[Tensor]:
    """Videos (1, 3, 17, height, width) in [-1, 1], side by side."""
    frames, _ = read_video(path)
    for start in range(0, len(frames) - WINDOW + 1, WINDOW):
        yield fill_video(to_video(frames[start : start + WINDOW]), height, width)[None]


def bilinear(video: Tensor, antialias: bool) -> Tensor:
    """The video made 8 times smaller and as large again, frame by frame."""
    frames = video[0].transpose(0, 1)
    small = F.interpolate(frames, scale_factor=1 / 8, mode="bilinear", antialias=antialias)
    return F.interpolate(small, size=frames.shape[2:], mode="bilinear").transpose(0, 1)[None]


def psnr(made: Tensor, video: Tensor) -> Tensor:
    """Decibels of every frame, (T,), of what a screen shows: 8 bits."""
    made, video = (((x.clamp(-1, 1) + 1) * 127.5).round() for x in (made, video))
    return 10 * torch.log10(255**2 / (made - video).square().mean(dim=(0, 1, 3, 4)).clamp_min(1e-6))


@torch.no_grad()
def measure(model: Path, folder: Path, height: int, width: int, picture: Path | None) -> None:
    """Prints a table, clip by clip and over all frames; draws a frame of each clip three times."""
    autoencoder = load_component(model, VideoAutoencoder)
    print(f"{'clip':24} frames  autoencoder  bilinear  without antialiasing  (PSNR in dB)")
    everything, rows = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        figures = []
        for video in windows(path, height, width):
            made = autoencoder.decode_latents(autoencoder.encode_video(video), WINDOW)
            choices = (made, bilinear(video, True), bilinear(video, False))
            figures.append(torch.stack([psnr(choice, video) for choice in choices]))
            if len(figures) <= 2:  # the second window, where there is one
                shown = torch.cat([x[0, :, WINDOW // 2] for x in (video, choices[1], made)], dim=2)
        if figures:
            everything.append(torch.cat(figures, dim=1))
            rows.append(shown)
            print_row(path.stem, everything[-1])
    if not everything:
        raise SystemExit(f"{folder} holds no clip of {WINDOW} frames or more")
    print_row("all frames", torch.cat(everything, dim=1))
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_video(picture, torch.cat(rows, dim=1)[:, None].clamp(-1, 1), fps=1)


def print_row(name: str, figures: Tensor) -> None:
    made, smooth, sharp = figures.mean(dim=1).tolist()
    print(f"{name:24} {figures.shape[1]:6}  {made:11.2f}  {smooth:8.2f}  {sharp:20.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("clips", nargs="+", type=Path)
    preparing.add_argument("--output", type=Path, required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--size", default="144x176", help="height x width, multiples of 8")
    measuring.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.clips, args.output)
    else:
        height, width = map(int, args.size.split("x"))
        measure(args.model, args.folder, height, width, args.picture)


if __name__ == "__main__":
    main()
