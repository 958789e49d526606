"""Whether `--max-memory` keeps its word: `python -m benchmarks max-memory` prints the table of docs/memory.md.

Every row is a clip of a published model at its full width and depth, or with fewer layers where the row says so, with
random weights in a folder (up to 3 GB in the system's folder for temporary files, removed afterwards), made by
`opensora generate --max-memory`, which chooses how. Measured is the most memory of its own that the process ever had
(RssAnon, read every 20 ms), and what was resident at most, pages of mapped files among it, which the system takes back
whenever it needs them. The text encoder has one small layer: the text is not what is measured. Linux.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.tables.memory import PROMPT, Row, write_configurations
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.tracing import Tracer
from opensora.toybox.captions import build_tokenizer

GB = 2**30
SHARD_BYTES = GB
SMALL_TEXT = {"num_layers": 1, "vocab_size": 1024, "d_ff": 64, "d_kv": 8, "num_heads": 8}


def row(model: str, size: tuple[int, int, int], **transformer: int) -> Row:
    """Of a clip; `transformer` has fewer layers."""
    return Row(model, "clip", size, "bfloat16", changes={"transformer": transformer, "text_encoder": SMALL_TEXT})


ROWS = [
    (row("opensora-1.2", (51, 240, 424)), "6GB"),
    (row("opensora-1.2", (51, 240, 424)), "4GB"),
    (row("opensora-1.2", (51, 240, 424)), "2.5GB"),
    (row("opensora-1.2", (17, 480, 848), depth=4), "3GB"),
    (row("opensora-1.1", (16, 240, 424)), "3.5GB"),
    (row("opensora-1.0", (16, 256, 256), depth=8), "2.5GB"),
]
"""Configurations and what they are allowed."""


def write_model(row: Row, folder: Path) -> None:
    """A pipeline's folder with random weights."""
    write_configurations(row, folder)
    fill(folder)


def fill(folder: Path) -> None:
    """Writes random weights beside the configurations of a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index.pop("scores", None)  # numbers are no words of this tokenizer's
    (folder / "model_index.json").write_text(json.dumps(index))
    build_tokenizer().save_pretrained(folder / "tokenizer")
    pipeline = meta_pipeline(Tracer(), folder).pipeline
    for name, stem in (
        ("text_encoder", "model"),
        ("transformer", "diffusion_pytorch_model"),
        ("autoencoder", "diffusion_pytorch_model"),
    ):
        shards: list[dict[str, torch.Tensor]] = [{}]
        for key, tensor in getattr(pipeline, name).state_dict().items():
            if sum(one.nbytes for one in shards[-1].values()) > SHARD_BYTES:
                shards.append({})
            if key in ("shift", "scale"):  # of the latent space, which the configuration declares as well
                declared = pipeline.autoencoder.latent_space.to_dict()[key]
                shards[-1][key] = (
                    torch.full(tensor.shape, float(key == "scale"))
                    if declared is None
                    else torch.tensor(declared).reshape(tensor.shape)
                )
            else:
                shards[-1][key] = torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards, strict=True):
            save_file(shard, folder / name / file, metadata={"format": "pt"})
        weights = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        listed = {"metadata": {}, "weight_map": weights}
        (folder / name / f"{stem}.safetensors.index.json").write_text(json.dumps(listed))


def measure(command: list[str]) -> tuple[str, int, int]:
    """What a command said, and the most bytes of its own and resident that it ever had.

    Raises:
        SystemExit: it failed.
    """
    process, own, resident = (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
        0,
        0,
    )
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = dict(re.findall(r"^(RssAnon|VmHWM):\s+(\d+)", status.read_text(), re.MULTILINE))
        own, resident = max(own, int(found.get("RssAnon", 0))), max(resident, int(found.get("VmHWM", 0)))
        time.sleep(0.02)
    said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(said)
    return said, own * 1024, resident * 1024


def options(size: tuple[int, int, int]) -> list[Any]:
    frames, height, width = size
    return ["--num-frames", frames, "--height", height, "--width", width, "--num-inference-steps", 1]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks max-memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows that hold this text")
    only = parser.parse_args(argv).only
    print("| configuration | allowed | chosen | predicted | measured | with mapped files | measured / predicted |")
    print("|---|---:|---|---:|---:|---:|---:|", flush=True)
    made: tuple[Row, tempfile.TemporaryDirectory[str]] | None = None
    for one, allowed in ROWS:
        if only not in f"{one} {allowed}":
            continue
        if made is None or made[0] != one:
            if made is not None:
                made[1].cleanup()
            made = one, tempfile.TemporaryDirectory()
            write_model(one, Path(made[1].name))
        folder = Path(made[1].name)
        command = [sys.executable, "-m", "opensora", "generate", PROMPT, "--model", folder, "--dtype", one.dtype]
        command += [*options(one.size), "--max-memory", allowed, "--output", folder / "clip.mp4"]
        said, own, resident = measure([str(part) for part in command])
        told = re.search(r"to fit into .*: (.*) \(([\d.]+) GB predicted\)", said)
        assert told is not None, said
        predicted = float(told[2])
        cells = [f"{size / GB:.2f} GB" for size in (predicted * GB, own, resident)]
        print(f"| {one} | {allowed} | {told[1]} | {' | '.join(cells)} | {own / GB / predicted:.2f} |", flush=True)
    if made is not None:
        made[1].cleanup()
