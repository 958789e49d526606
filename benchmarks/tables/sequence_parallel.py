"""What sharing a clip's tokens among processes of one machine costs: `python -m benchmarks sequence-parallel`.

`[--ranks 2] [--frames 16] [--side 32] [--width 384] [--depth 4] [--bf16]`. One training step (forward and backward of
an STDiT3) alone, with one thread, and shared among processes with one thread each that talk by gloo; and the
all-to-alls of such a step by themselves, on tokens of the same size. Seconds are the clock's, medians, so the machine
should be otherwise idle and have a core for each process; they say nothing of accelerators.
"""

import argparse
import socket
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opensora.distributed.sequence_parallel import Shards, bytes_switched
from opensora.models.clip_conditions import ClipConditions
from opensora.models.stdit3 import STDiT3
from opensora.weights import cast_weights


def median_s(work: Callable[[], None], runs: int) -> float:
    times = []
    for run in range(runs + 1):
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        work()
        times += [time.perf_counter() - started] * (run > 0)
    return statistics.median(times)


def measure(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    model = STDiT3(hidden_size=args.width, depth=args.depth, num_heads=6, caption_channels=128).train()
    if args.bf16:
        cast_weights(model, dtype)
    latents, text = torch.randn(1, 4, args.frames, args.side, args.side), torch.randn(1, 32, 128)

    def step() -> None:
        clip = ClipConditions(24.0, 8.0 * args.side, 8.0 * args.side, latents.shape[2])
        model(latents, 500.0, text, clip_conditions=clip).sample.float().square().mean().backward()

    alone = median_s(step, args.runs) if rank == 0 else 0.0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    everybody = dist.group.WORLD
    assert everybody is not None
    model.enable_sequence_parallel(everybody)
    shared = median_s(step, args.runs)

    shards = Shards(everybody, (args.side // 2) ** 2)
    tokens = torch.randn(1, args.frames, shards.patches_per_rank, args.width, dtype=dtype)

    def switches() -> None:
        for _ in range(2 * args.depth):  # forward and backward
            shards.in_whole_frames(lambda frames: frames, tokens).sum().item()

    talking = median_s(switches, args.runs)
    if rank == 0:
        sent = 2 * bytes_switched(
            1, args.frames, shards.num_patches, args.width, args.depth, args.ranks, dtype.itemsize
        )
        print(f"alone {alone:.3f} s; {args.ranks} processes {shared:.3f} s, {alone / shared:.2f} times as fast")
        print(f"switches {talking:.3f} s, {talking / shared:.0%} of it; each process sends {sent / 1e6:.1f} MB a step")
    dist.destroy_process_group()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks sequence-parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("ranks", 2), ("frames", 16), ("side", 32), ("width", 384), ("depth", 4), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, (args, port), nprocs=args.ranks)
