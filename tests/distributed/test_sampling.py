"""A clip that several ranks share is the clip that one process makes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
from ranks import run_ranks
from tiny_pipeline import make_pipeline, seeded
from tiny_transformers import build
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.pipeline import OpenSoraPipeline

SIZE = VideoSize(11, 24, 16)  # three latent frames of 3 x 2 cells, two patches each: nothing that ranks divide


@dataclass(frozen=True)
class Case:
    """One way to sample."""

    name: str
    kind: str = "flow"
    network: type | None = None
    sampler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    guider: Any = None
    conditioned: bool = False

    def pipeline(self) -> OpenSoraPipeline:
        pipeline = make_pipeline(self.kind)
        if self.network is not None:
            length, width = pipeline.transformer.null_text.shape
            other = build(self.network, in_channels=4, caption_channels=width, model_max_length=length)
            pipeline.register_modules(transformer=other)
        if self.sampler is not None:
            pipeline.use_sampler(self.sampler)
        return pipeline

    def sample(self, pipeline: OpenSoraPipeline, seed: int = 0) -> Tensor:
        options = dict(self.options)
        if self.guider is not None:
            options["guider"] = self.guider()
        if self.conditioned:
            none = FrameConditioning.none(pipeline.autoencoder, SIZE)
            first = torch.randn(none.latents[:, :, :1].shape, generator=torch.Generator().manual_seed(1))
            options["conditioning"] = none.put(first, 0).put(first, 2, strength=0.6)
        size = {"height": SIZE.height, "width": SIZE.width, "num_frames": SIZE.num_frames}
        prompts = ["a red ball moves left", "a blue square"]
        return pipeline(prompts, **size, generator=seeded(seed, seed + 1), output_type="pt", **options).frames


CASES = [
    Case("flow"),
    Case("flow, two channels guided", options={"cfg_channels": [0, 2]}),
    Case("flow, frames conditioned on", conditioned=True),
    Case("flow, negative prompt", options={"negative_prompt": "a red ball"}),
    Case("flow, guided in some steps", guider=lambda: ClassifierFreeGuidance(3.0, start=0.3, stop=0.8)),
    Case("flow, a guider that remembers", guider=lambda: AdaptiveProjectedGuidance(4.0, -0.5)),
    Case("flow, not guided", options={"guidance_scale": 1.0}),
    Case("ancestral", "iddpm"),
    Case("ancestral, all channels guided", "iddpm", options={"cfg_channels": "all"}),
    Case("ancestral, frames conditioned on", "iddpm", conditioned=True),
    Case("ddim", "iddpm", sampler="ddim"),
    Case("dpm-solver++", "iddpm", sampler="dpm-solver++"),
    Case("STDiT", "iddpm", STDiT),
    Case("STDiT2", "iddpm", STDiT2),
    Case("ancestral, a scale for each channel", "iddpm", options={"channel_scales": [7.0, 3.0, 7.0, 1.0]}),
]
# Ranks that are started, and how they share a clip.
SHARED = {
    "two branches": (2, {"guidance": True}),
    "two parts": (2, {}),
    "two branches of two parts": (4, {"guidance": True, "sequence": 2}),
}


# ---- what several processes do --------------------------------------------------------------------------------------


def network_calls(pipeline: OpenSoraPipeline) -> list[tuple[int, ...]]:
    """Shapes of the tokens that the first block is given, as the pipeline goes on."""
    shapes: list[tuple[int, ...]] = []
    block = pipeline.transformer.blocks[0]
    block.register_forward_pre_hook(lambda _block, args: shapes.append(tuple(args[0].shape)))
    return shapes


def share(how: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"clips": []}
    for case in CASES:
        pipeline = case.pipeline()
        pipeline.parallelize(**how)
        shapes = network_calls(pipeline)
        found["clips"].append(case.sample(pipeline))
        found.setdefault("shapes", shapes)
    # Ranks that were given different noise, or none, sample from that of the first.
    pipeline = CASES[7].pipeline()
    pipeline.parallelize(**how)
    found["other seeds"] = CASES[7].sample(pipeline, seed=10 * dist.get_rank())
    torch.manual_seed(dist.get_rank())
    found["no seed"] = pipeline("a red ball", output_type="latent").frames
    found["said"] = said_of_mistakes()
    return found


def said_of_mistakes() -> list[str]:
    said, cached = [], make_pipeline()
    cached.transformer.enable_cache(FirstBlockCacheConfig())
    attempts = [(make_pipeline(), {"sequence": 3}), (make_pipeline(), {"sequence": 0}), (cached, {})]
    for pipeline, how in attempts:
        with pytest.raises(OpenSoraError) as error:
            pipeline.parallelize(**how)
        said.append(str(error.value))
    return said


@pytest.fixture(scope="module", params=SHARED.values(), ids=SHARED)
def ranks(request) -> list[dict[str, Any]]:
    num_ranks, how = request.param
    return run_ranks(num_ranks, share, how)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return {case.name: case.sample(case.pipeline()) for case in CASES}


# ---- and what is expected of them -----------------------------------------------------------------------------------


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_clip_equals_one_process(ranks, alone, case):
    for rank in ranks:
        torch.testing.assert_close(rank["clips"][CASES.index(case)], alone[case.name], atol=1e-4, rtol=1e-3)


@pytest.mark.multi
def test_the_work_is_shared(ranks, request):
    """A rank's network sees one branch of the two videos, or a part of the patches, or both."""
    num_ranks, how = request.node.callspec.params["ranks"]
    parts = how.get("sequence", num_ranks // (2 if how.get("guidance") else 1))
    batch = 2 if how.get("guidance") else 4
    for rank in ranks:
        assert rank["shapes"] == [(batch, 3, -(-2 // parts), 48)] * 4


@pytest.mark.multi
def test_all_sample_from_the_noise_of_the_first(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["other seeds"], ranks[0]["clips"][7])
        torch.testing.assert_close(rank["no seed"], ranks[0]["no seed"])


@pytest.mark.multi
def test_mistakes(ranks):
    for rank in ranks:
        three, none, cached = rank["said"]
        assert f"takes 3 ranks, this run has {len(ranks)}" in three
        assert "over 0" in none
        assert "FirstBlockCache" in cached


def test_one_process_has_no_ranks_to_share_with():
    with pytest.raises(OpenSoraError, match="takes 2 or 3 ranks, this run has 1; start as many with torchrun"):
        make_pipeline().parallelize(guidance=True)
