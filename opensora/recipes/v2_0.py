"""The published stages of Open-Sora 2.0: an MMDiT that reads text by two encoders, known frames beside the noise.

Buckets, shares of conditions and rates are those of the released configurations, for GPUs of 140 GB; steps are the
report's where it tells them (85, 13 and 13 thousand on 224 GPUs, 25 thousand for the deep compression autoencoder), the
others ours. The network was begun from FLUX.1-dev, whose weights are put into its layout as they are read. Clips are
named by `objective.data.manifest=FILE`; they are trained on at 24 frames a second at most, and their captions tell the
rate and, where the table has it, the motion score.
"""

from dataclasses import replace
from typing import Any

from opensora.data.bucket_config import BucketConfig
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxClips
from opensora.recipes.debug import debug_recipe, debug_task
from opensora.recipes.published import model_of, published_loop, published_task
from opensora.training.config import Recipe
from opensora.training.diffusion.noise import Flow

_MODEL, _DC_AE = "opensora-2.0", "opensora-2.0-dc-ae"

DIFFUSION = Flow(time_shift=True, shift_token_px=16, velocity="noise - data", sigma_min=1e-5)
# Published training counts the deep compression autoencoder's tokens as if patches were 2 x 2; sampling does not.
DIFFUSION_DC_AE = Flow(
    time_shift=True, shift_token_px=32, training_token_px=64, velocity="noise - data", sigma_min=1e-5
)
DROP = 0.31622777
"""Share of captions that are dropped, for each of the two encoders by itself: a tenth loses both."""
KNOWN_FRAMES = {"none": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0}
KNOWN_FRAMES_DC_AE = {"none": 1.0, "i2v_head": 7.0}
_IN_PLACE = {"known_frames_alone": False}
FLUX = "pretrained_models/flux1-dev.safetensors"


def _lengths(images: tuple[float, int], batches: tuple[int, ...], keep: float = 1.0, first: int = 5) -> dict[str, Any]:
    """Images, and every fourth length: batch sizes of the lengths to 33, 65, 97 and 129 (or 32, 64, ...)."""
    lengths = {
        length: batch for k, batch in enumerate(batches) for length in range(first + 32 * k, first + 32 * k + 32, 4)
    }
    return {"1": images, **{str(length): (keep, batch) for length, batch in lengths.items()}}


IMAGES: BucketConfig = {"256px": {"1": (1.0, 50)}, "768px": {"1": (0.5, 11)}, "1024px": {"1": (0.5, 7)}}
SMALL: BucketConfig = {
    "256px": _lengths((1.0, 45), (12, 6, 4, 3)),
    "768px": {"1": (0.5, 13)},
    "1024px": {"1": (0.5, 7)},
}
LARGE: BucketConfig = {
    "256px": _lengths((1.0, 130), (14, 10, 7, 6)),
    "768px": _lengths((1.0, 38), (6, 4, 3, 2)),
}
LARGE_I2V: BucketConfig = {
    "256px": _lengths((1.0, 195), (80, 40, 28, 23)),
    "768px": _lengths((0.5, 38), (10, 5, 3, 2), keep=0.5),
}
# Cells of the deep compression autoencoder have 32 pixels a side.
COMPRESSED: BucketConfig = {"768px_32d": _lengths((1.0, 20), (8, 4, 3, 2), first=4)}


def _stage(
    name: str, buckets: BucketConfig, steps: int, lr: float, *, model: str = _MODEL, ranks: int = 1, **options: Any
) -> Recipe:
    """A stage; `ranks` share each clip."""
    objective = published_task(
        model,
        ManifestClips(buckets, max_fps=24, rate_told=True),
        **{"diffusion": DIFFUSION, "drop_text": DROP, "drop_pooled": DROP, **options},
    )
    loop = published_loop(steps, lr=lr, ema_decay=0.0, recompute=True, checkpoint_every=1000, eps=1e-15)
    return Recipe(name, objective, replace(loop, sequence_parallel=ranks))


def v2_0_image() -> Recipe:
    """Images alone, from FLUX.1-dev in the latents of the video autoencoder; frames cannot be shown yet."""
    start = {"init_from": FLUX, "new_parts": ("conditions",), "transformer": {"cond_embed": False}}
    return _stage("v2_0_image", IMAGES, 10_000, 1e-5, **start)


def v2_0_stage1() -> Recipe:
    """Images and clips of 256px, from text alone; published training began at FLUX.1-dev, too."""
    start = {"init_from": FLUX, "new_parts": ("conditions",), "transformer": {"cond_embed": False}}
    return _stage("v2_0_stage1", SMALL, 85_000, 5e-5, **start)


def v2_0_stage1_i2v() -> Recipe:
    """The same sizes, of most of which pictures are shown."""
    start = {"init_from": model_of("v2_0_stage1"), "new_parts": ("conditions",)}
    return _stage("v2_0_stage1_i2v", SMALL, 13_000, 1e-5, known_frames=KNOWN_FRAMES, **start)


def v2_0_stage2() -> Recipe:
    """To 768px, from text alone."""
    start = {"init_from": model_of("v2_0_stage1"), "transformer": {"cond_embed": False}}
    return _stage("v2_0_stage2", LARGE, 13_000, 5e-5, ranks=4, **start)


def v2_0_stage2_i2v() -> Recipe:
    """To 768px, with pictures: the published model."""
    start = {"init_from": model_of("v2_0_stage1_i2v"), "known_frames": KNOWN_FRAMES}
    return _stage("v2_0_stage2_i2v", LARGE_I2V, 13_000, 5e-5, ranks=4, **start)


def v2_0_high_compression() -> Recipe:
    """The published model learns the latents of the deep compression autoencoder."""
    parts = ("first_layer", "conditions", "last_layer")
    start = {"init_from": _MODEL, "new_parts": parts, "known_frames": KNOWN_FRAMES_DC_AE, "diffusion": DIFFUSION_DC_AE}
    return _stage("v2_0_high_compression", COMPRESSED, 25_000, 3e-5, model=_DC_AE, **start)


def v2_0_adapt_i2v() -> Recipe:
    """The published model goes on with pictures and clips of one's own, at 256px."""
    buckets: BucketConfig = {"256px": {str(length): (1.0, 1) for length in (33, 65, 97, 129)}}
    return _stage("v2_0_adapt_i2v", buckets, 2000, 1e-5, init_from=_MODEL, known_frames=KNOWN_FRAMES)


def v2_0_debug() -> Recipe:
    """All of 2.0 in seconds on a CPU: tiny networks of its classes, drawn clips, known frames.

    Of drawn clips there are latents alone, so frames are shown in their place: of other clips, by themselves with
    `objective.transformer.known_frames_alone=true`.
    """
    objective = debug_task(_MODEL, DIFFUSION, _IN_PLACE, known_frames=KNOWN_FRAMES, drop_text=DROP, drop_pooled=DROP)
    return debug_recipe("v2_0_debug", objective)


def v2_0_dc_debug() -> Recipe:
    """The same with the deep compression autoencoder."""
    objective = debug_task(
        _DC_AE,
        DIFFUSION_DC_AE,
        _IN_PLACE,
        clips=ToyboxClips(num_frames=16, height=64, width=64),
        known_frames=KNOWN_FRAMES_DC_AE,
        drop_text=DROP,
        drop_pooled=DROP,
    )
    return debug_recipe("v2_0_dc_debug", objective)
