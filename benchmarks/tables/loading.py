"""Peak memory of loading: `python -m benchmarks loading` prints the table of docs/memory.md.

Each row is a network of published makes, in fewer and narrower layers, with random weights in a folder of several
files; a process of its own loads it, and the peak of resident memory that this adds (VmHWM of /proc/self/status, which
can be reset, so this needs Linux) is compared with what the loaded network takes. Mapped pages of files count as
resident.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables.resident import forget_peak, peak_bytes, settled_bytes

# By default glibc keeps up to some ten megabytes of freed blocks for later.
_RETURN_FREED_MEMORY = "glibc.malloc.mmap_threshold=131072"

_MMDIT = {"hidden_size": 768, "num_heads": 6, "depth": 8, "depth_single_blocks": 16}
_T5 = {"vocab_size": 4096, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_heads": 16, "num_layers": 24}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 32}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "MMDiT": ("opensora.models.mmdit.MMDiT", _MMDIT),
    "T5": ("transformers.T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "CLIP": ("transformers.CLIPTextModel", _CLIP),
}
PRECISIONS = ("bfloat16", "float32")
ROWS = list(itertools.product(NETWORKS, PRECISIONS, PRECISIONS))  # stored, loaded as


def build(name: str) -> Any:
    """A network with arbitrary weights."""
    path, config = NETWORKS[name]
    module, class_name = path.rsplit(".", 1)
    cls: Any = getattr(importlib.import_module(module), class_name)
    return cls(**config) if name == "MMDiT" else cls(cls.config_class(**config))


def measure(name: str, folder: Path, dtype: str) -> tuple[int, int]:
    """Bytes of the network, and of the worst moment of loading it."""
    import torch

    from opensora.checkpoints.components import load_component
    from opensora.planning.tracing import weight_bytes

    with torch.device("meta"):
        cls = type(build(name))  # what is imported on first use is there afterwards
    before = settled_bytes()
    forget_peak()
    network = load_component(folder, cls, getattr(torch, dtype))
    return weight_bytes(network), peak_bytes() - before


def write(name: str, folder: Path, dtype: str) -> int:
    """Bytes of the files that it is saved as."""
    import torch
    from huggingface_hub import save_torch_state_dict

    network = build(name)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in network.state_dict().items()}
    save_torch_state_dict(tensors, folder, filename_pattern="model{suffix}.safetensors", max_shard_size="100MB")
    config = network.config.to_json_string() if name != "MMDiT" else json.dumps(NETWORKS[name][1])
    (folder / "config.json").write_text(config)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows that hold this text")
    parser.add_argument("--measure", nargs=3, metavar=("NETWORK", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        name, folder, dtype = args.measure
        print(json.dumps(measure(name, Path(folder), dtype)))
        return
    environment = {**os.environ, "GLIBC_TUNABLES": _RETURN_FREED_MEMORY}
    print("| network | stored | loaded as | files | network | peak | peak / network |")
    print("|---|---|---|---:|---:|---:|---:|")
    for name, stored, wanted in ROWS:
        if args.only not in f"{name} {stored} {wanted}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            size = write(name, Path(folder), stored)
            command = [sys.executable, "-m", "benchmarks", "loading", "--measure", name, folder, wanted]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        network, peak = json.loads(result.stdout.splitlines()[-1])
        cells = " | ".join(f"{value / 2**20:,.0f} MB" for value in (size, network, peak))
        print(f"| {name} | {stored} | {wanted} | {cells} | {peak / network:.2f} |", flush=True)
