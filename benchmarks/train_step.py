"""Processor milliseconds of one training step of a small STDiT3, forward and backward in bf16 autocast on one thread.

`python benchmarks/train_step.py [--compile] [--tanh-gelu] [--batch 32] [--width 192] [--depth 4]`. Processor time, not
the clock: it means the same beside other work. Measured on one core of a Xeon with AMX, best of 12, 32 clips of 4x5x8x8
latents and 16 text tokens: 410 ms; with --tanh-gelu 455; with --compile 280 to 315 (330 to 340 with --tanh-gelu).
"""

import argparse
import time

import torch

from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit3 import STDiT3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the blocks first (half a minute)")
    parser.add_argument("--tanh-gelu", action="store_true", help="the published GELU instead of the exact one")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--runs", type=int, default=12)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = STDiT3(
        hidden_size=args.width,
        depth=args.depth,
        num_heads=4,
        caption_channels=128,
        model_max_length=24,
        learn_null_text=True,
        exact_gelu=not args.tanh_gelu,
    )
    if args.compile:
        model.compile_repeated_blocks()
    latents, timestep = torch.randn(args.batch, 4, 5, 8, 8), torch.rand(args.batch) * 1000
    text, drop_text = torch.randn(args.batch, 16, 128, requires_grad=True), torch.rand(args.batch) < 0.1
    mask = torch.ones(args.batch, 16, dtype=torch.long)
    mask[::2, 10:] = 0

    clip = ClipConditions(fps=8.0, height=64.0, width=64.0, num_frames=17)

    def step() -> float:
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(latents, timestep, text, mask, clip_conditions=clip, drop_text=drop_text).sample
        prediction.float().square().mean().backward()
        model.zero_grad()
        return time.process_time() - started

    for _ in range(3):
        step()
    times = sorted(step() for _ in range(args.runs))
    print(f"best {1000 * times[0]:.0f} ms, median {1000 * times[len(times) // 2]:.0f} ms")


if __name__ == "__main__":
    main()
