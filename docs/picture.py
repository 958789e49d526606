"""Makes the README's pictures, held-out prompts drawn by the bundled model: `python docs/picture.py`.

A moving one, and a sheet on which each clip is a row of frames under its prompt.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import opensora
from opensora.evaluation.toybox import contact_sheet, generate, held_out_samples
from opensora.media.write import write_video

IMAGES = Path(__file__).parent / "images"
ROWS, COLUMNS, SCALE, MARGIN, FPS = 3, 6, 2, 1, 8
ON_SHEET = 12


def main() -> None:
    pipeline = opensora.load_pipeline("toybox", device="cpu")
    samples = held_out_samples(ROWS * COLUMNS)
    clips = generate(pipeline, samples)  # (N, 3, T, H, W), -1 to 1
    captioned = [(sample.prompt, clip) for sample, clip in zip(samples, clips, strict=True)]
    contact_sheet(captioned[:ON_SHEET], IMAGES / "contact_sheet.png")
    framed = F.pad(clips.repeat_interleave(SCALE, 3).repeat_interleave(SCALE, 4), [MARGIN] * 4, value=1.0)
    rows = [torch.cat(list(row), dim=3) for row in framed.split(COLUMNS)]
    frames = (torch.cat(rows, dim=2).permute(1, 2, 3, 0) + 1) * 127.5  # (T, H, W, 3)
    write_video(IMAGES / "toybox.gif", frames.round().clamp(0, 255).byte().numpy(), FPS)


if __name__ == "__main__":
    main()
