"""Predicted against measured memory: `python -m benchmarks memory [--only TEXT]` prints the table of docs/memory.md.

Every row is one stage (or a whole clip) of a published model's configuration with random weights, in a process of its
own: the network is built and filled, the code is warmed up on a small input, and then the peak of resident memory is
read that the work adds (VmHWM of /proc/self/status, which can be reset), so this needs Linux. Where a network would
take too much time or memory it has fewer layers; the prediction then is for those layers, too. All of it stays
below 5 GB.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tables.resident import forget_peak, peak_bytes, settled_bytes

# By default glibc keeps up to some ten megabytes of freed blocks for later, which hides what was really taken.
_RETURN_FREED_MEMORY = "glibc.malloc.mmap_threshold=131072"

PROMPT = "a small red ball rolls left over the grass"


@dataclass(frozen=True)
class Row:
    """One configuration: of a published model, with `changes` to its components' configurations."""

    model: str
    stage: str
    size: tuple[int, int, int]  # frames, height, width
    dtype: str
    micro_batch_size: int | None = 4
    sequential_guidance: bool = False
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        frames, height, width = self.size
        parts = [self.model, f"{frames} x {height}x{width}", self.dtype]
        if self.stage == "decode":
            parts.append(f"micro batch {self.micro_batch_size}")
        if self.sequential_guidance:
            parts.append("sequential guidance")
        for name, config in self.changes.items():
            if name in self.components():
                parts += [f"{key} {value}" for key, value in config.items() if key != "vocab_size"]
        return ", ".join(parts)

    def components(self) -> list[str]:
        """The networks that are built."""
        one = {"text": "text_encoder", "denoise": "transformer", "decode": "autoencoder"}
        return list(one.values()) if self.stage == "clip" else [one[self.stage]]


def _layers(transformer: int, text_encoder: int = 1) -> dict[str, dict[str, Any]]:
    """Fewer layers: they are all alike, and what a network takes while it works does not grow with their number."""
    return {"transformer": {"depth": transformer}, "text_encoder": {"num_layers": text_encoder, "vocab_size": 1024}}


ROWS = [
    Row("opensora-1.0", "text", (16, 256, 256), "float32", changes={"text_encoder": {"num_layers": 2}}),
    Row("opensora-1.2", "text", (51, 240, 424), "bfloat16", changes={"text_encoder": {"num_layers": 4}}),
    Row("opensora-1.0", "denoise", (16, 256, 256), "bfloat16", changes=_layers(4)),
    Row("opensora-1.1", "denoise", (16, 240, 424), "bfloat16", changes=_layers(2)),
    Row("opensora-1.2", "denoise", (17, 144, 256), "bfloat16"),
    Row("opensora-1.2", "denoise", (51, 240, 424), "bfloat16", changes=_layers(2)),
    Row("opensora-1.2", "denoise", (51, 240, 424), "bfloat16", sequential_guidance=True, changes=_layers(2)),
    Row("opensora-1.2", "denoise", (17, 480, 848), "float32", changes=_layers(1)),
    Row("opensora-1.2", "denoise", (17, 720, 1280), "bfloat16", changes=_layers(1)),
    Row("opensora-1.0", "decode", (4, 256, 256), "float32"),
    Row("opensora-1.2", "decode", (5, 240, 424), "bfloat16"),
    Row("opensora-1.2", "decode", (17, 144, 256), "bfloat16", micro_batch_size=1),
    Row("opensora-1.2", "decode", (4, 144, 256), "float32", micro_batch_size=2),
    Row("opensora-1.2", "decode", (2, 480, 848), "bfloat16"),
    Row("opensora-1.2", "clip", (17, 144, 256), "bfloat16", changes=_layers(4)),
    Row("opensora-1.1", "clip", (4, 144, 256), "float32", changes=_layers(2)),
]


def write_configurations(row: Row, folder: Path) -> None:
    """A pipeline's folder without weights."""
    from opensora.checkpoints.published import PUBLISHED, published_name

    model = PUBLISHED[published_name(row.model) or row.model]
    index: dict[str, Any] = {"_class_name": "OpenSoraPipeline", **model.defaults}
    for name, part in model.parts.items():
        index[name] = part.class_name.rsplit(".", 1)
        (folder / name).mkdir()
        config = {**part.config, **row.changes.get(name, {})}
        (folder / name / "config.json").write_text(json.dumps(config))
    index["scheduler"] = model.scheduler_class.rsplit(".", 1)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(model.scheduler_config)))
    (folder / "model_index.json").write_text(json.dumps(index))


# --- predicted --------------------------------------------------------------------------------------------------------


def predict(row: Row, folder: Path) -> tuple[int, int]:
    """Bytes of weights and of activations."""
    import torch

    from opensora.geometry import VideoSize
    from opensora.planning.meta_pipeline import meta_pipeline
    from opensora.planning.planner import Planner
    from opensora.planning.stages import Choices, Clip
    from opensora.planning.tracing import Tracer

    tracer = Tracer()
    planner = Planner(tracer, meta_pipeline(tracer, folder).pipeline, Clip(VideoSize(*row.size)))
    choices = Choices(
        getattr(torch, row.dtype),
        sequential_guidance=row.sequential_guidance,
        micro_batch_size=row.micro_batch_size,
    )
    if row.stage == "clip":
        return planner.peak(choices)
    stage = next(stage for stage in planner.stages(choices) if stage.name == row.stage)
    return stage.weight_bytes, stage.activation_bytes


# --- measured, in a process of its own --------------------------------------------------------------------------------


def measure(row: Row, folder: Path) -> tuple[int, int]:
    """Bytes of weights and of activations of the networks that a row names; the others stay without data."""
    import torch

    from opensora.geometry import VideoSize
    from opensora.pipeline import OpenSoraPipeline
    from opensora.planning.stages import Choices, Clip, network_of, run_stage
    from opensora.toybox.captions import build_tokenizer
    from opensora.weights import cast_weights

    index = json.loads((folder / "model_index.json").read_text())
    dtype = getattr(torch, row.dtype)
    parts: dict[str, Any] = {"tokenizer": build_tokenizer()}
    before = settled_bytes()
    for name in ("text_encoder", "transformer", "autoencoder"):
        library, class_name = index[name]
        cls = getattr(importlib.import_module(library), class_name)
        config = json.loads((folder / name / "config.json").read_text())
        with torch.device("meta"):
            network = cls(cls.config_class.from_dict(config)) if name == "text_encoder" else cls(**config)
            cast_weights(network.eval(), dtype)
        if name in row.components():
            network = network.to_empty(device="cpu")
            if name == "text_encoder":
                network.tie_weights()
            with torch.no_grad():
                for tensor in (*network.parameters(), *network.buffers()):
                    tensor.uniform_(-0.02, 0.02)
        parts[name] = network
    weights = settled_bytes() - before
    library, class_name = index["scheduler"]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    parts["scheduler"] = getattr(importlib.import_module(library), class_name)(**config)
    defaults = {name: value for name, value in index.items() if not isinstance(value, list) and name[0] != "_"}
    pipeline = OpenSoraPipeline(**parts, **defaults)
    pipeline.set_progress_bar_config(disable=True)
    choices = Choices(dtype, sequential_guidance=row.sequential_guidance, micro_batch_size=row.micro_batch_size)

    def work(size: VideoSize) -> None:
        if row.stage == "clip":
            pipeline(
                PROMPT,
                **dataclasses.asdict(size),
                num_inference_steps=1,
                scores=dict.fromkeys(pipeline.config.scores or {}),  # numbers are no words of this tokenizer's
                generator=torch.Generator().manual_seed(0),
            )
        else:
            run_stage(pipeline, row.stage, Clip(size), choices)

    for stage in ("text", "denoise", "decode"):
        network_of(pipeline, stage, choices)
    # Libraries load code and keep buffers of their own on first use.
    work(VideoSize(min(row.size[0], 5), 32, 32))
    before = settled_bytes()
    forget_peak()
    work(VideoSize(*row.size))
    return weights, peak_bytes() - before


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows that hold this text")
    parser.add_argument("--default-allocator", action="store_true", help="measure with glibc as it is")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(ROWS[int(args.measure[0])], Path(args.measure[1]))))
        return
    environment = os.environ if args.default_allocator else {**os.environ, "GLIBC_TUNABLES": _RETURN_FREED_MEMORY}
    print("| stage | configuration | weights | measured | activations | measured | predicted / measured |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for number, row in enumerate(ROWS):
        if args.only not in f"{row.stage} {row}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_configurations(row, Path(folder))
            predicted = predict(row, Path(folder))
            command = [sys.executable, "-m", "benchmarks", "memory", "--measure", str(number), folder]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if result.returncode:
            sys.exit(f"{row}: the measurement failed")
        measured = json.loads(result.stdout.splitlines()[-1])
        cells = [f"{value / 2**20:,.0f} MB" for pair in zip(predicted, measured, strict=True) for value in pair]
        print(f"| {row.stage} | {row} | {' | '.join(cells)} | {predicted[1] / measured[1]:.2f} |", flush=True)
