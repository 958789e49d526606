"""One denoising step of the released transformers at full size: `python benchmarks/full_size_step.py [--threads 1]`.

Weights are random numbers in bfloat16, sizes and samplers those the models are released with. A step is what the
pipeline does between two timesteps: the network on both branches of guidance in one batch, guidance, the scheduler. The
text is as long as the model reads, and turned into keys and values beforehand. Every model runs in a process of its
own; peak is the most memory that process ever had, Python and its libraries included. CPU seconds, of all threads
together, say what a step costs where the clock also counts what other processes did.
"""

import argparse
import importlib
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

MODELS = ("opensora-1.0", "opensora-1.1", "opensora-1.2")


def find(class_name: str) -> Any:
    module, name = class_name.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def build(part: Any, depth: int | None) -> Any:
    """The transformer, filled with a million random numbers over and over."""
    import torch

    from opensora.checkpoints.weights import cast_weights

    config = {**part.config, **({} if depth is None else {"depth": depth})}
    with torch.device("meta"):
        model = cast_weights(find(part.class_name)(**config), torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    numbers = (0.02 * torch.randn(1 << 20)).to(torch.bfloat16)
    for tensor in model.state_dict().values():
        for piece in tensor.view(-1).split(len(numbers)):
            piece.copy_(numbers[: len(piece)])
    return model


def measure(name: str, threads: int, steps: int, depth: int | None) -> dict[str, Any]:
    """One model, in this process."""
    import torch

    from opensora.checkpoints.published import PUBLISHED, published_name
    from opensora.models.clip_conditions import ClipConditions
    from opensora.models.guidance import ChannelGuidance, GuidanceStep, default_guider

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = PUBLISHED[published_name(name) or name]
    defaults = model.defaults
    size = (defaults["num_frames"], defaults["height"], defaults["width"])
    with torch.device("meta"):
        latent_size = find(model.autoencoder.class_name)(**model.autoencoder.config).latent_size(size)
    height, width = defaults.get("nominal_size") or size[1:]
    scheduler = find(model.scheduler_class)(**model.scheduler_config)
    told = {"num_frames": size[0], "height": height, "width": width} if "flow" in model.scheduler_class else {}
    scheduler.set_timesteps(defaults["num_inference_steps"], **told)
    guidance = ChannelGuidance(default_guider(defaults["guidance_scale"]), defaults["cfg_channels"], 4)

    with torch.inference_mode():
        transformer = build(model.transformer, depth)
        sample = torch.randn(1, 4, *latent_size)
        text = transformer.encode_text(torch.randn(2, *transformer.null_text.shape))
        seconds, cpu_seconds = [], []
        for i, t in enumerate(scheduler.timesteps[:steps]):
            started, cpu_started = time.perf_counter(), time.process_time()
            latents = sample.repeat(2, 1, 1, 1, 1).to(transformer.dtype)
            clip = ClipConditions(defaults["fps"], height, width, size[0])
            prediction = transformer(latents, t.expand(2), text_context=text, clip_conditions=clip).sample.float()
            state = GuidanceStep(i, len(scheduler.timesteps), t)
            sample = scheduler.step(
                guidance.combine(dict(zip(("text", "null"), prediction.chunk(2), strict=True)), state), t, sample
            ).prev_sample
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    if not torch.isfinite(sample).all():
        sys.exit(f"{name}: the latents are not finite")
    patches = math.prod(-(-n // p) for n, p in zip(latent_size, transformer.patch_size, strict=True))
    unit = 1024 if sys.platform == "linux" else 1
    return {
        "size": "x".join(map(str, size)),
        "tokens": patches,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the first may pay for what later ones find ready")
    parser.add_argument("--depth", type=int, help="blocks instead of the released number, to try this script")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, as JSON
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.models[0], args.threads, args.steps, args.depth)))
        return
    print("| model | frames x height x width | tokens | parameters | each step, s | CPU, s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        command = [sys.executable, __file__, "--here", "--models", name, "--threads", str(args.threads)]
        command += ["--steps", str(args.steps)] + ([] if args.depth is None else ["--depth", str(args.depth)])
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(result.returncode)
        row = json.loads(result.stdout)
        clock, cpu = (", ".join(f"{value:.1f}" for value in row[key]) for key in ("seconds", "cpu_seconds"))
        sizes = f"{row['size']} | {row['tokens']} | {row['parameters'] / 1e6:.0f} M"
        print(f"| {name} | {sizes} | {clock} | {cpu} | {row['peak_bytes'] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
