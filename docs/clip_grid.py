"""Draws the picture of the README, clips of the bundled model side by side: `python docs/clip_grid.py OUTPUT.gif`."""

import sys
from pathlib import Path

import numpy as np
import torch

import opensora
from opensora.media.write import write_video

PROMPTS = (
    "a small red ball rolls left over the grass",
    "a large yellow ring spins at night",
    "a small white square bounces on the water",
    "a large purple triangle grows in front of a grey wall",
    "a small blue cross climbs at sunset",
    "a big green ball orbits on a wooden table",
    "a tiny pink ring slides to the right across the desert",
    "a large orange square sinks in the sky",
)
COLUMNS, SCALE, GAP = 4, 3, 6


def main() -> None:
    pipeline = opensora.load_pipeline("toybox")
    seeds = [torch.Generator().manual_seed(42 + i) for i in range(len(PROMPTS))]
    clips = pipeline(list(PROMPTS), generator=seeds, output_type="np").frames
    clips = np.repeat(np.repeat((clips * 255).round().astype(np.uint8), SCALE, axis=2), SCALE, axis=3)
    clips = np.pad(clips, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(clips[i : i + COLUMNS]), axis=2) for i in range(0, len(clips), COLUMNS)]
    grid = np.concatenate(rows, axis=1)[:, :-GAP, :-GAP]
    write_video(Path(sys.argv[1]), grid, fps=pipeline.config["fps"])


if __name__ == "__main__":
    main()
