"""One denoising step of the released transformers at full size: `python -m benchmarks full-size-step [--threads 1]`.

Weights are random numbers in bfloat16, sizes and samplers those the models are released with, unless others are asked
for. A step is what the pipeline does between two timesteps: the network on all branches of guidance in one batch,
guidance, the scheduler. The text is as long as the model reads, and turned into keys and values beforehand. Every model
runs in a process of its own; peak is the most memory that process ever had, Python and its libraries included. CPU
seconds, of all threads together, say what a step costs where the clock also counts what other processes did.

Networks too large for a machine are measured with fewer of their blocks, each of full width:

    python -m benchmarks full-size-step --models opensora-2.0 --size 33x256x256 --depth 2 2 --steps 1
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MODELS = ("opensora-1.0", "opensora-1.1", "opensora-1.2", "opensora-1.3-360p")
DEPTHS = ("depth", "depth_single_blocks")


def build(part: Any, depths: list[int]) -> Any:
    """The transformer, filled with a million random numbers over and over."""
    import torch

    from opensora.weights import cast_weights

    config = {**part.keywords(), **dict(zip(DEPTHS, depths, strict=False))}
    with torch.device("meta"):
        model = cast_weights(part.cls(**config), torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    numbers = (0.02 * torch.randn(1 << 20)).to(torch.bfloat16)
    for tensor in model.state_dict().values():
        for piece in tensor.view(-1).split(len(numbers)):
            piece.copy_(numbers[: len(piece)])
    return model


def pipeline_of(name: str, builders: Mapping[str, Callable[[Any], Any]]) -> Any:
    """The published pipeline, the networks of `builders` built by these; its other networks have no data."""
    import torch

    from opensora.checkpoints.source import ModelSource

    def part_of(part: Any) -> Any:
        if part.name in builders:
            return builders[part.name](part)
        if not part.is_network:
            return None if part.name.startswith("tokenizer") else part.load_settings()
        with torch.device("meta"):
            return part.build()

    return ModelSource.find(name, on_disk=False).pipeline(part_of)


def measure(name: str, threads: int, steps: int, depths: list[int], sizes: list[int] | None) -> dict[str, Any]:
    """One model, in this process."""
    import torch

    from opensora.denoiser import Denoiser
    from opensora.geometry import VideoSize
    from opensora.models.guidance import NOT_GIVEN, GuidanceStep

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pipeline = pipeline_of(name, {"transformer": lambda part: build(part, depths)})
    transformer, conditioner, config = pipeline.transformer, pipeline.text_conditioner, pipeline.config
    size = VideoSize(*(sizes or (config.num_frames, config.height, config.width)))
    latent_size = pipeline.autoencoder.latent_size((size.num_frames, size.height, size.width))
    clip = pipeline._clip_conditions(size, None, None)
    scheduler = pipeline._prepared_scheduler(None, None, None, clip, torch.device("cpu"))
    rule = pipeline.guidance_rule(None, None, None, NOT_GIVEN)

    with torch.inference_mode():
        text, null = (_random_text(conditioner) for _ in range(2))
        texts = conditioner.branches(text, None if conditioner.null_prompt is None else null)
        scale = rule.describe().get("guidance_scale") if transformer.reads_guidance else None
        denoiser = Denoiser(transformer, texts, clip, guidance_scale=scale)
        sample = torch.randn(1, pipeline.autoencoder.latent_channels, *latent_size)
        first = GuidanceStep(0, len(scheduler.timesteps), scheduler.timesteps[0])
        denoiser._context(rule.branches(first))
        seconds, cpu_seconds = [], []
        for i, t in enumerate(scheduler.timesteps[:steps]):
            started, cpu_started = time.perf_counter(), time.process_time()
            step = GuidanceStep(i, len(scheduler.timesteps), t)
            predictions = denoiser(rule.branches(step), sample, t, step=i, num_steps=step.num_steps)
            sample = scheduler.step(rule.combine(predictions, step), t, sample).prev_sample
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    if not torch.isfinite(sample).all():
        sys.exit(f"{name}: the latents are not finite")
    patches = math.prod(-(-n // p) for n, p in zip(latent_size, transformer.patch_size, strict=True))
    unit = 1024 if sys.platform == "linux" else 1
    return {
        "size": f"{size.num_frames}x{size.height}x{size.width}",
        "tokens": patches,
        "branches": denoiser.num_evaluations // steps,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _random_text(conditioner: Any) -> Any:
    """As many tokens as the network reads."""
    import dataclasses

    import torch

    blank = conditioner.blank_states(1, "cpu", torch.bfloat16)
    pooled = None if blank.pooled is None else torch.randn(blank.pooled.shape).to(blank.pooled)
    return dataclasses.replace(blank, states=torch.randn(blank.states.shape).to(blank.states), pooled=pooled)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks full-size-step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the first may pay for what later ones find ready")
    parser.add_argument("--size", type=size_of, metavar="FRAMESxHEIGHTxWIDTH", help="instead of the model's own")
    parser.add_argument("--depth", type=int, nargs="+", default=[], help="blocks instead of the released number")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, as JSON
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.models[0], args.threads, args.steps, args.depth, args.size)))
        return
    print(
        "| model | frames x height x width | tokens | branches | parameters | each step, s | CPU, s | peak memory, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        command = [sys.executable, "-m", "benchmarks", "full-size-step", *argv, "--here", "--models", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(result.returncode)
        row = json.loads(result.stdout)
        clock, cpu = (", ".join(f"{value:.1f}" for value in row[key]) for key in ("seconds", "cpu_seconds"))
        sizes = f"{row['size']} | {row['tokens']} | {row['branches']} | {row['parameters'] / 1e6:.0f} M"
        print(f"| {name} | {sizes} | {clock} | {cpu} | {row['peak_bytes'] / 1e9:.2f} |", flush=True)


def size_of(text: str) -> list[int]:
    """Frames, height and width of an option."""
    return [int(part) for part in text.split("x")]
