"""Every way in which diffusers moves a pipeline's weights about makes the video that staying makes; all on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipeline import make_pipeline, seeded
from torch import Tensor

from opensora.conditioning.frames import condition
from opensora.geometry import VideoSize
from opensora.pipeline import OpenSoraPipeline

CPU = torch.device("cpu")
NETWORKS = ("text_encoder", "transformer", "autoencoder")


def generate(pipeline: OpenSoraPipeline, **changes: Any) -> Tensor:
    """A guided video, of which the first frame is given."""
    image = 2 * torch.rand(3, 1, 16, 24, generator=torch.Generator().manual_seed(5)) - 1
    conditioning = condition(pipeline.autoencoder, VideoSize(5, 16, 24), image=image)
    return pipeline(
        "a red ball moves left",
        num_inference_steps=2,
        generator=seeded(0),
        conditioning=conditioning,
        output_type="pt",
        **changes,
    ).frames


@pytest.fixture(scope="module")
def expected() -> dict[str | None, Tensor]:
    """The video against the null text, and against a negative prompt."""
    return {negative: generate(make_pipeline(), negative_prompt=negative) for negative in (None, "a blue square")}


def in_groups(*, on_disk: bool = False, **keywords: Any) -> Callable[[OpenSoraPipeline, str], None]:
    def enable(pipeline: OpenSoraPipeline, folder: str) -> None:
        pipeline.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_to_disk_path=folder if on_disk else None, **keywords
        )

    return enable


def one_by_one(pipeline: OpenSoraPipeline, folder: str) -> None:
    """`enable_sequential_cpu_offload`, which gives devices a number, and accelerate knows no CPU with one."""
    accelerate = pytest.importorskip("accelerate")
    for name in NETWORKS:
        network = getattr(pipeline, name)
        accelerate.cpu_offload(network, CPU, offload_buffers=len(network._parameters) > 0)


OFFLOADS: dict[str, Callable[[OpenSoraPipeline, str], None]] = {
    "models": lambda pipeline, _: pipeline.enable_model_cpu_offload(device="cpu"),
    "layers": one_by_one,
    "blocks": in_groups(offload_type="block_level", num_blocks_per_group=1),
    "pairs of blocks": in_groups(offload_type="block_level", num_blocks_per_group=2),
    "leaves": in_groups(offload_type="leaf_level"),
    "blocks on disk": in_groups(offload_type="block_level", num_blocks_per_group=1, on_disk=True),
    "leaves on disk": in_groups(offload_type="leaf_level", on_disk=True),
}


@pytest.mark.parametrize("negative", [None, "a blue square"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_the_same_video(offload, negative, expected, tmp_path):
    pipeline = make_pipeline()
    OFFLOADS[offload](pipeline, str(tmp_path))
    for _ in range(2):
        frames = generate(pipeline, negative_prompt=negative)
        torch.testing.assert_close(frames, expected[negative], rtol=1e-4, atol=1e-5)


def test_every_network_is_brought_in(monkeypatch):
    """Encoding the given frame and decoding bring the autoencoder in, too."""
    accelerate = pytest.importorskip("accelerate")
    pipeline, came = make_pipeline(), []
    names = {id(getattr(pipeline, name)): name for name in NETWORKS}
    bring_in = accelerate.hooks.CpuOffload.pre_forward

    def counted(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        came.append(names[id(module)])
        return bring_in(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", counted)
    pipeline.enable_model_cpu_offload(device="cpu")
    generate(pipeline)
    stages = [name for name, before in zip(came, [None, *came], strict=False) if name != before]
    assert stages == ["autoencoder", "text_encoder", "transformer", "autoencoder"]
