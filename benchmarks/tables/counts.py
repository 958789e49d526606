"""Work of small networks and whole clips in numbers that no machine changes: `python -m benchmarks counts [--write]`.

A test fails where one of them is more than the one kept in `counts.json`; `--write` keeps those of today. Counted are
floating-point operations of networks, calls of networks for a clip under every guider, and operations on memory of one
block. The last depend on how torch takes its operations apart, so they are kept for each of its versions by itself.
All sequences are so short that every CPU chooses the same attention.
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import opensora
from benchmarks.cases.layers import SIZES, Pair
from benchmarks.counting import counted_in
from opensora.files import replacing
from opensora.models.clip_conditions import ClipConditions
from opensora.models.guiders import GUIDERS, make_guider

KEPT = Path(__file__).parents[1] / "counts.json"
PROMPT = "a small red ball rolls left over the grass"
STEPS = 4
SHORT_CLIP: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": STEPS}

Counts = dict[str, dict[str, int]]


def flops_of_networks() -> Counts:
    """Of the bundled model, each network once, under guidance where it applies; of a layer pair, with backward."""
    pipeline, pair = _pipeline("toybox"), Pair(SIZES["tiny"], torch.float32)
    transformer, encoder, autoencoder = pipeline.transformer, pipeline.text_encoder, pipeline.autoencoder
    latents = torch.zeros(2, autoencoder.latent_channels, *autoencoder.latent_size((17, 64, 64)))
    text = torch.zeros(2, 24, transformer.config.caption_channels)
    mask = torch.arange(24).expand(2, -1) < 12
    clip = ClipConditions(fps=8.0, height=64.0, width=64.0, num_frames=17.0)
    with torch.no_grad():
        context = transformer.encode_text(text, mask)
        works: dict[str, Callable[[], object]] = {
            "toybox, text encoder, 12 tokens": lambda: encoder(input_ids=torch.zeros(1, 12, dtype=torch.long)),
            "toybox, text once, 12 of 24 tokens": lambda: transformer.encode_text(text, mask),
            "toybox, one step": lambda: transformer(latents, 500.0, clip_conditions=clip, text_context=context),
            "toybox, decoding 17 frames": lambda: autoencoder.decode_latents(latents[:1], 17),
        }
        counts = {name: {"flops": counted_in(work).flops} for name, work in works.items()}
    training = counted_in(lambda: pair.run_ours(keep_text=False).sum().backward())
    return counts | {"a small layer pair, forward and backward": {"flops": training.flops}}


def calls_of_clips() -> Counts:
    """One clip of so many steps with each way of guidance: how often networks are called, and on how much."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "toybox, no guidance": ("toybox", {"guidance_scale": 1.0}),
        "toybox": ("toybox", {}),
        "toybox, three channels guided": ("toybox", {"cfg_channels": 3}),
        "toybox, a negative prompt": ("toybox", {"negative_prompt": "a large blue square"}),
        **{f"toybox, {name}": ("toybox", {"guider": make_guider(name, 3.0)}) for name in GUIDERS},
        "toybox, cfg in the first half": ("toybox", {"guider": make_guider("cfg:stop=0.5", 3.0)}),
        "toybox-iddpm": ("toybox-iddpm", {}),
    }
    return {f"{name}, {STEPS} steps": _calls(_pipeline(model), options) for name, (model, options) in ways.items()}


def operations_of_blocks() -> Counts:
    """What passes through memory in one block and in a training step of a pair."""
    pair = Pair(SIZES["tiny"], torch.float32)
    space, time = pair.ours.blocks
    rope, modulation = pair.ours.rope(pair.size.num_frames), pair.modulation[:, None]

    def forward(block: nn.Module, keys_values: Any, rope: Any = None) -> Tensor:
        return block(pair.tokens, pair.context.states, modulation, pair.context.bias, keys_values, rope)

    with torch.no_grad():
        kept_space, kept_time = pair.context.keys_values
        counts = {
            "block in space": counted_in(lambda: forward(space, kept_space)).traffic(),
            "block in time": counted_in(lambda: forward(time, kept_time, rope)).traffic(),
        }
    training = counted_in(lambda: pair.run_ours(keep_text=False).sum().backward())
    return counts | {"layer pair, forward and backward": training.traffic()}


def torch_version() -> str:
    """The name under which operations are kept."""
    version = ".".join(torch.__version__.split(".")[:2])
    return f"torch {version}" + ("" if torch.backends.mkldnn.is_available() else " without oneDNN")


def kept() -> dict[str, dict[str, Any]]:
    """What is held against: "flops", "calls", and "operations" by version of torch."""
    return json.loads(KEPT.read_text())


def grown(kept: Mapping[str, Mapping[str, int]], counted: Counts) -> list[str]:
    """A line for every count that is more than the one kept, or of which none is."""
    return [
        f"{name}: {value:,} {what}, kept are {before if before is None else format(before, ',')}"
        for name, counts in counted.items()
        for what, value in counts.items()
        if (before := kept.get(name, {}).get(what)) is None or value > before
    ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"keep them in {KEPT.name}")
    options = parser.parse_args(argv)
    flops, calls, operations = flops_of_networks(), calls_of_clips(), operations_of_blocks()
    for title, counts in (("networks", flops), ("clips", calls), (f"blocks, {torch_version()}", operations)):
        print(f"| {title} | |\n|---|---|")
        for name, values in counts.items():
            print(f"| {name} | {', '.join(f'{value:,} {what}' for what, value in values.items())} |")
        print()
    if options.write:
        others = kept()["operations"] if KEPT.exists() else {}
        document = {"flops": flops, "calls": calls, "operations": others | {torch_version(): operations}}
        with replacing(KEPT) as path:
            path.write_text(json.dumps(document, indent=2) + "\n")


@functools.cache
def _pipeline(name: str) -> Any:
    pipeline = opensora.load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _calls(pipeline: Any, options: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(
        ("network calls", "clips through the network", "text encoder calls", "texts encoded"), 0
    )

    def counting(calls: str, rows: str) -> Callable[..., None]:
        def hook(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            counts[calls] += 1
            counts[rows] += len(args[0] if args else kwargs["input_ids"])

        return hook

    of_transformer = counting("network calls", "clips through the network")
    of_encoder = counting("text encoder calls", "texts encoded")
    hooks = [
        pipeline.transformer.register_forward_pre_hook(of_transformer, with_kwargs=True),
        pipeline.text_encoder.register_forward_pre_hook(of_encoder, with_kwargs=True),
    ]
    try:
        pipeline(PROMPT, **SHORT_CLIP, **options, generator=0, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    return counts
