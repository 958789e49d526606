"""Finds out which colours the latents of the bundled models have: `python docs/latent_colours.py [PICTURE.png]`.

Clips of the toy world are encoded, and the colours that fit them best go into `opensora/server/latent_colours.json`, by
which previews of clips that are being made are drawn. PICTURE shows other clips: a frame of each, what the autoencoder
makes of it, and its latents in these colours.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import opensora
from opensora.checkpoints.published import BUNDLED
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_rgb import LatentRgb
from opensora.server.colours import KNOWN, name_of
from opensora.toybox.specs import sample_specs
from opensora.toybox.world import render

CLIPS, NUM_FRAMES, SEED = 64, 17, 0
SHOWN, CELL_PX, GAP = 6, 128, 4
FIGURES = 4  # digits behind the point, of colours from 0 to 1


def encoded(codec: VideoCodec, num_clips: int, split: str) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Latents (C, T', H', W') of clips one after the other, the clips, and what is decoded of the latents (uint8)."""
    video, _ = render(sample_specs(num_clips, SEED, split=split), NUM_FRAMES)
    latents = codec.encode_video(video)
    return torch.cat(list(latents), dim=1), frames(video), frames(codec.decode_latents(latents, NUM_FRAMES))


def frames(video: torch.Tensor) -> np.ndarray:
    """Frames (T, H, W, 3) of videos (B, 3, T, H, W), one after the other."""
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return torch.cat(list(pixels), dim=1).permute(1, 2, 3, 0).numpy()


def rounded(colours: LatentRgb) -> dict[str, list]:
    """With as many figures as can be seen."""
    told = asdict(colours)
    weight = [[round(value, FIGURES) for value in row] for row in told["weight"]]
    return {"weight": weight, "bias": [round(value, FIGURES) for value in told["bias"]]}


def picture(codec: VideoCodec, colours: LatentRgb) -> Image.Image:
    """Rows of frames, decoded frames and latents, of clips that nothing was fitted to."""
    latents, drawn, decoded = encoded(codec, SHOWN, "held_out")
    shown = colours.pictures(latents)
    rows = [rows[len(rows) // SHOWN // 2 :: len(rows) // SHOWN] for rows in (drawn, decoded, shown)]
    sheet = Image.new("RGB", ((CELL_PX + GAP) * SHOWN, (CELL_PX + GAP) * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            cell = Image.fromarray(frame).resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
            sheet.paste(cell, (x * (CELL_PX + GAP), y * (CELL_PX + GAP)))
    return sheet


@torch.no_grad()
def main() -> None:
    known: dict[str, dict[str, list]] = {}
    for name in BUNDLED:
        codec = opensora.load_pipeline(name).autoencoder
        if name_of(codec) in known:  # they may share one
            continue
        latents, _, decoded = encoded(codec, CLIPS, "train")
        colours = LatentRgb.fit(latents, decoded)
        known[name_of(codec)] = rounded(colours)
        if len(sys.argv) > 1 and len(known) == 1:
            picture(codec, colours).save(sys.argv[1])
    home = Path(opensora.__file__).parent / "server" / KNOWN
    home.write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
