"""What blocks that take turns are planned to need, against what a process needs: a 2.0 in miniature, in real bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opensora.geometry import VideoSize
from opensora.models.mmdit import MMDiT
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.planner import Planner
from opensora.planning.stages import Choices, Clip
from opensora.planning.tracing import Tracer
from opensora.weights import cast_weights

SIZE = (33, 128, 128)
MODEL = "opensora-2.0"


def write(folder: Path, depth: int) -> int:
    """A transformer of 2.0, a third as wide, with zeros for weights; returns its bytes."""
    folder.mkdir()
    config: dict[str, Any] = {"hidden_size": 1024, "num_heads": 8, "depth": depth, "depth_single_blocks": depth}
    with torch.device("meta"):
        made = cast_weights(MMDiT(**config), torch.bfloat16)
    tensors = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in made.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "MMDiT", **config}))
    return sum(tensor.nbytes for tensor in tensors.values())


MEASURE = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = json.loads(sys.argv[1])
from benchmarks.tables.resident import forget_peak, peak_bytes, settled_bytes
from opensora.checkpoints.source import ModelSource
from opensora.geometry import VideoSize
from opensora.offloading import BlockStream
from opensora.planning.stages import Choices, Clip, run_stage
streams = []

def take_as_long_as_reading_takes(*_):
    if streams[0]._ahead is not None:
        streams[0]._ahead[1].result()

def build(part):
    if part.name == "transformer":
        network, weights = part.open(torch.bfloat16)
        streams.append(BlockStream(network, weights, "weights"))
        for block in network.blocks:
            block.register_forward_pre_hook(take_as_long_as_reading_takes)
        return network
    if not part.is_network:
        return None if part.name.startswith("tokenizer") else part.load_settings()
    with torch.device("meta"):
        return part.build()

model, folder, size = json.loads(sys.argv[2])
pipeline = ModelSource.find(model, {"transformer": folder}, on_disk=False).pipeline(build)
before = settled_bytes()
streams[0].open()
forget_peak()
run_stage(pipeline, "denoise", Clip(VideoSize(*size)), Choices(torch.bfloat16))
print(peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_a_process_needs_what_was_planned_however_many_blocks_there_are(tmp_path):
    paths = json.dumps([str(Path(__file__).parents[2])])
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072", "OMP_NUM_THREADS": "1"}
    sizes, peaks = [], []
    for depth in (3, 6):
        folder = tmp_path / str(depth)
        sizes.append(write(folder, depth))
        tracer = Tracer()
        meta = meta_pipeline(tracer, MODEL, {"transformer": folder})
        planner = Planner(tracer, meta.pipeline, Clip(VideoSize(*SIZE)))
        _, denoise, _ = planner.stages(Choices(torch.bfloat16, offload="blocks", micro_batch_size=1))
        command = [sys.executable, "-c", MEASURE, paths, json.dumps([MODEL, str(folder), SIZE])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        peaks.append(int(done.stdout.splitlines()[-1]))
        assert sum(denoise.bytes("blocks")) == pytest.approx(peaks[-1], rel=0.15)
    assert sizes[1] > 1.8 * sizes[0] and peaks[1] < 1.1 * peaks[0]
