"""The published stages of Open-Sora 1.2, and the way there from an image model: rectified flow, many sizes, 2 to 16 s.

Buckets, shares of conditioning frames, rates and steps are those of the released configurations and of the report; the
three stages ran on 96 GPUs, the adaptation on 8. Clips are named by `objective.data.manifest=FILE`.

The adaptation began at PixArt-Sigma and went on in small steps: images of many sizes (20 thousand steps), norms of
queries and keys (18), rectified flow (10), logit-normal times and time shift (33), a smaller epsilon of AdamW (8), the
autoencoder over time and frame rates (25), and then the two that end in videos. `v1_2_adapt_flow` takes the first six
at once; `objective.new_parts`, `objective.diffusion` and `objective.train` make each of them alone.
"""

from opensora.data.bucket_config import BucketConfig
from opensora.data.clips import ManifestClips
from opensora.recipes.debug import debug_recipe, debug_task
from opensora.recipes.published import model_of, published_loop, published_task
from opensora.training.config import Recipe
from opensora.training.diffusion.noise import Flow

PIXART = "pretrained_models/PixArt-Sigma-XL-2-2K-MS.pth"
_MODEL = "opensora-1.2"

DIFFUSION = Flow(times="logit-normal", time_shift=True)
FRAME_MASKS = {
    "random": 0.05,
    "interpolate": 0.005,
    "quarter_random": 0.005,
    "quarter_head": 0.005,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.025,
    "image_head": 0.05,
    "image_tail": 0.025,
    "image_head_tail": 0.025,
}
FRAME_MASKS_STAGE2 = {
    "random": 0.005,
    "interpolate": 0.002,
    "quarter_random": 0.007,
    "quarter_head": 0.002,
    "quarter_tail": 0.002,
    "quarter_head_tail": 0.002,
    "image_random": 0.0,
    "image_head": 0.22,
    "image_tail": 0.005,
    "image_head_tail": 0.005,
}
FRAME_MASKS_STAGE3 = {**FRAME_MASKS_STAGE2, "random": 0.01, "quarter_random": 0.002}

IMAGES: BucketConfig = {
    "144p": {"1": (1.0, 64)},
    "256": {"1": (0.5, 48)},
    "240p": {"1": (0.5, 48)},
    "360p": {"1": (0.5, 18)},
    "512": {"1": (0.5, 18)},
    "480p": {"1": (0.5, 8)},
    "720p": {"1": (0.2, 4)},
    "1024": {"1": (0.2, 4)},
    "1080p": {"1": (0.3, 2)},
    "2048": {"1": (0.3, 1)},
}
STAGE1: BucketConfig = {
    "144p": {
        "1": (1.0, 475),
        "51": (1.0, 51),
        "102": ((1.0, 0.33), 27),
        "204": ((1.0, 0.1), 13),
        "408": ((1.0, 0.1), 6),
    },
    "256": {
        "1": (0.4, 297),
        "51": (0.5, 20),
        "102": ((0.5, 0.33), 10),
        "204": ((0.5, 0.1), 5),
        "408": ((0.5, 0.1), 2),
    },
    "240p": {
        "1": (0.3, 297),
        "51": (0.4, 20),
        "102": ((0.4, 0.33), 10),
        "204": ((0.4, 0.1), 5),
        "408": ((0.4, 0.1), 2),
    },
    "360p": {
        "1": (0.2, 141),
        "51": (0.15, 8),
        "102": ((0.15, 0.33), 4),
        "204": ((0.15, 0.1), 2),
        "408": ((0.15, 0.1), 1),
    },
    "512": {"1": (0.1, 141)},
    "480p": {"1": (0.1, 89)},
    "720p": {"1": (0.05, 36)},
    "1024": {"1": (0.05, 36)},
    "1080p": {"1": (0.1, 5)},
    "2048": {"1": (0.1, 5)},
}


def v1_2_adapt_flow() -> Recipe:
    """An image model learns rectified flow in the latents of the new autoencoder; blocks over time stay as they are."""
    objective = published_task(
        _MODEL,
        ManifestClips(IMAGES),
        DIFFUSION,
        init_from=PIXART,
        new_parts=("qk_norm", "conditions", "temporal_blocks", "last_layer"),
        train="spatial",
    )
    loop = published_loop(25_000, lr=1e-4, ema_decay=0.99, recompute=False, checkpoint_every=500, eps=1e-15)
    return Recipe("v1_2_adapt_flow", objective, loop)


def v1_2_adapt_images() -> Recipe:
    """Blocks over time join, still on images."""
    objective = published_task(_MODEL, ManifestClips(IMAGES), DIFFUSION, init_from=model_of("v1_2_adapt_flow"))
    loop = published_loop(3_000, lr=1e-4, ema_decay=0.99, recompute=False, checkpoint_every=500, eps=1e-15)
    return Recipe("v1_2_adapt_images", objective, loop)


def v1_2_adapt_temporal() -> Recipe:
    """Blocks over time alone, on videos with conditioning frames; sizes are those of the first stage."""
    objective = published_task(
        _MODEL,
        ManifestClips(STAGE1),
        DIFFUSION,
        init_from=model_of("v1_2_adapt_images"),
        train="temporal",
        frame_masks=FRAME_MASKS,
    )
    loop = published_loop(38_000, lr=1e-4, ema_decay=0.99, recompute=True, checkpoint_every=500, eps=1e-15)
    return Recipe("v1_2_adapt_temporal", objective, loop)


def _stage(
    name: str,
    buckets: BucketConfig,
    frame_masks: dict[str, float],
    before: str,
    *,
    steps: int,
    warmup_steps: int,
    scores: bool = False,
) -> Recipe:
    objective = published_task(
        _MODEL,
        ManifestClips(buckets, scores=scores),
        DIFFUSION,
        init_from=model_of(before),
        freeze_text_embedder=True,
        frame_masks=frame_masks,
    )
    loop = published_loop(
        steps,
        lr=1e-4,
        ema_decay=0.99,
        recompute=True,
        checkpoint_every=200,
        eps=1e-15,
        warmup_steps=warmup_steps,
    )
    return Recipe(name, objective, loop)


def v1_2_stage1() -> Recipe:
    """Mostly 240p and 360p."""
    return _stage("v1_2_stage1", STAGE1, FRAME_MASKS, "v1_2_adapt_temporal", steps=30_000, warmup_steps=1000)


def v1_2_stage2() -> Recipe:
    """Mostly 360p and 480p."""
    small = {
        "144p": STAGE1["144p"],
        "256": {**STAGE1["256"], "204": ((0.5, 1.0), 5), "408": ((0.5, 1.0), 2)},
        "240p": {**STAGE1["240p"], "204": ((0.4, 1.0), 5), "408": ((0.4, 1.0), 2)},
    }
    large = {
        "360p": {
            "1": (0.5, 141),
            "51": (0.15, 8),
            "102": ((0.3, 0.5), 4),
            "204": ((0.3, 1.0), 2),
            "408": ((0.5, 0.5), 1),
        },
        "512": {
            "1": (0.4, 141),
            "51": (0.15, 8),
            "102": ((0.2, 0.4), 4),
            "204": ((0.2, 1.0), 2),
            "408": ((0.4, 0.5), 1),
        },
        "480p": {"1": (0.5, 89), "51": (0.2, 5), "102": (0.2, 2), "204": (0.1, 1)},
        "720p": {"1": (0.1, 36), "51": (0.03, 1)},
        "1024": {"1": (0.1, 36), "51": (0.02, 1)},
        "1080p": {"1": (0.01, 5)},
        "2048": {"1": (0.01, 5)},
    }
    return _stage("v1_2_stage2", {**small, **large}, FRAME_MASKS_STAGE2, "v1_2_stage1", steps=23_000, warmup_steps=0)


def v1_2_stage3() -> Recipe:
    """Mostly 720p and 1080p, on better clips, whose captions end in their scores where the table has some."""
    buckets = {
        "144p": {"1": (1.0, 475), "51": (1.0, 51), "102": (1.0, 27), "204": (1.0, 13), "408": (1.0, 6)},
        "256": {"1": (1.0, 297), "51": (0.5, 20), "102": (0.5, 10), "204": (0.5, 5), "408": ((0.5, 0.5), 2)},
        "240p": {"1": (1.0, 297), "51": (0.5, 20), "102": (0.5, 10), "204": (0.5, 5), "408": ((0.5, 0.4), 2)},
        "360p": {"1": (1.0, 141), "51": (0.5, 8), "102": (0.5, 4), "204": (0.5, 2), "408": ((0.5, 0.3), 1)},
        "512": {"1": (1.0, 141), "51": (0.5, 8), "102": (0.5, 4), "204": (0.5, 2), "408": ((0.5, 0.2), 1)},
        "480p": {"1": (1.0, 89), "51": (0.5, 5), "102": (0.5, 3), "204": ((0.5, 0.5), 1), "408": (0.0, None)},
        "720p": {"1": (0.3, 36), "51": (0.2, 2), "102": (0.1, 1), "204": (0.0, None)},
        "1024": {"1": (0.3, 36), "51": (0.1, 2), "102": (0.1, 1), "204": (0.0, None)},
        "1080p": {"1": (0.1, 5)},
        "2048": {"1": (0.05, 5)},
    }
    return _stage(
        "v1_2_stage3", buckets, FRAME_MASKS_STAGE3, "v1_2_stage2", steps=15_000, warmup_steps=1000, scores=True
    )


def v1_2_debug() -> Recipe:
    """All of 1.2 in seconds on a CPU: tiny networks of its classes, drawn clips, conditioning frames."""
    return debug_recipe("v1_2_debug", debug_task(_MODEL, DIFFUSION, frame_masks=FRAME_MASKS))
