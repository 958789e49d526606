"""The published stages of Open-Sora 1.3: 16 latent channels, windows in time, known frames beside the noise.

Buckets, shares of conditions, rates and warm-up are those of the released configurations, which train for so many
epochs of data that was not released; steps are the report's 70 thousand, spread over the stages by us. The network was
first adapted from an image model of 4 latent channels. Clips are named by `objective.data.manifest=FILE`.

One of the reference's experiments has no recipe: clips of 17k frames, without windows and without normalised latents.
"""

from typing import Any

from opensora.conditioning.known_frames import Drop
from opensora.data.bucket_config import BucketConfig
from opensora.data.clips import ManifestClips
from opensora.data.degradation import Degradation
from opensora.recipes.debug import debug_recipe, debug_task
from opensora.recipes.published import model_of, published_loop, published_task
from opensora.recipes.v1_2 import PIXART
from opensora.training.config import Recipe
from opensora.training.diffusion.noise import Flow

_MODEL = "opensora-1.3"

DIFFUSION = Flow(times="logit-normal", time_shift=True, shift_frames="after_first")
DROPS: dict[Drop, float] = {"both": 0.05, "text": 0.05, "frames": 0.05}
KNOWN_FRAMES = {
    "none": 8.0,
    "i2v_head": 2.0,
    "i2v_tail": 2.0,
    "i2v_loop": 2.0,
    "v2v_head": 1.0,
    "v2v_tail": 1.0,
    "other": 1.0,
}
KNOWN_FRAMES_I2V = {
    "i2v_head": 5.0,
    "i2v_tail": 2.0,
    "i2v_loop": 2.0,
    "v2v_head": 1.0,
    "v2v_head_noisy": 2.0,
    "v2v_tail": 1.0,
    "other": 1.0,
    "none": 2.0,
}

IMAGES: BucketConfig = {
    "360p": {"1": (1.0, 8)},
    "480p": {"1": (0.3, 4)},
    "720p": {"1": (0.2, 2)},
    "1080p": {"1": (1.0, 1)},
    "2048": {"1": (0.7, 1)},
}
SMALL: BucketConfig = {
    "360p": {"1": (1.0, 60), "49": (1.0, 5), "65": (1.0, 3), "81": (1.0, 3), "97": (1.0, 2), "113": (1.0, 2)}
}
LARGE: BucketConfig = {
    "720p": {"1": (1.0, 30), "49": (1.0, 2), "65": (1.0, 1), "81": (1.0, 1), "97": (1.0, 1), "113": (1.0, 1)}
}
CLIPS: BucketConfig = {
    "360p": {"49": (1.0, 10), "65": (1.0, 7), "81": (1.0, 6), "97": (1.0, 5), "113": (1.0, 4)},
    "720p": {"49": (0.25, 2), "65": (0.25, 1), "81": (0.25, 1), "97": (0.25, 1), "113": (0.25, 1)},
}


def v1_3_adapt() -> Recipe:
    """An image model of 4 latent channels learns those of the new autoencoder; blocks over time stay the identity."""
    objective = published_task(
        _MODEL,
        ManifestClips(IMAGES),
        DIFFUSION,
        init_from=PIXART,
        new_parts=("qk_norm", "conditions", "temporal_blocks"),
        train="spatial",
    )
    loop = published_loop(20_000, lr=1e-4, ema_decay=0.99, recompute=True, checkpoint_every=500)
    return Recipe("v1_3_adapt", objective, loop)


def _stage(
    name: str,
    buckets: BucketConfig,
    before: str,
    *,
    steps: int,
    warmup_steps: int,
    lr: float = 1e-4,
    decay: float = 0.0,
    microbatches: int = 1,
    known_frames: dict[str, float] | None = None,
    degradation: Degradation | None = None,
) -> Recipe:
    options: dict[str, Any] = {"known_frames": known_frames, "drop_of_known": DROPS} if known_frames else {}
    options |= {"degradation": degradation} if degradation else {}
    objective = published_task(_MODEL, ManifestClips(buckets), DIFFUSION, init_from=model_of(before), **options)
    loop = published_loop(
        steps,
        lr=lr,
        ema_decay=0.99,
        recompute=True,
        checkpoint_every=200,
        eps=1e-15,
        warmup_steps=warmup_steps,
        microbatches=microbatches,
        decay=decay,
    )
    return Recipe(name, objective, loop)


def v1_3_stage1() -> Recipe:
    """Images and clips of 360p, from text alone."""
    return _stage("v1_3_stage1", SMALL, "v1_3_adapt", steps=40_000, warmup_steps=0, decay=1.0, microbatches=4)


def v1_3_stage1_hq() -> Recipe:
    """The same sizes, better clips, of half of which frames are shown."""
    return _stage(
        "v1_3_stage1_hq",
        SMALL,
        "v1_3_stage1",
        steps=10_000,
        warmup_steps=1000,
        decay=1.0,
        microbatches=2,
        known_frames=KNOWN_FRAMES,
    )


def v1_3_stage1_noise() -> Recipe:
    """The same sizes; clips are made worse before they are encoded, and the way to the good ones is learnt."""
    return _stage(
        "v1_3_stage1_noise", SMALL, "v1_3_stage1_hq", steps=10_000, warmup_steps=100, degradation=Degradation()
    )


def v1_3_stage2() -> Recipe:
    """720p."""
    return _stage(
        "v1_3_stage2",
        LARGE,
        "v1_3_stage1_hq",
        steps=10_000,
        warmup_steps=1000,
        lr=5e-5,
        microbatches=2,
        known_frames=KNOWN_FRAMES,
    )


def v1_3_adapt_i2v() -> Recipe:
    """Clips alone, of most of which frames are shown."""
    return _stage(
        "v1_3_adapt_i2v", CLIPS, "v1_3_stage1_hq", steps=10_000, warmup_steps=1000, known_frames=KNOWN_FRAMES_I2V
    )


def v1_3_debug() -> Recipe:
    """All of 1.3 in seconds on a CPU: tiny networks of its classes, drawn clips, known frames."""
    objective = debug_task(
        _MODEL,
        DIFFUSION,
        {"kernel_size": [2, 2, -1]},
        known_frames=KNOWN_FRAMES,
        drop_of_known=DROPS,
    )
    return debug_recipe("v1_3_debug", objective)
