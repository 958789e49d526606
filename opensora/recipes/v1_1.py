"""The published stages of Open-Sora 1.1: many sizes and lengths, conditioning frames, IDDPM.

Buckets, shares of conditioning frames, rates and steps are those of the released configurations and of the report,
whose runs had 64 GPUs; the model was released without averaging its weights. Every third frame is taken, and the
network is told the file's own frame rate. Clips are named by `objective.data.manifest=FILE`.
"""

from opensora.data.bucket_config import BucketConfig
from opensora.data.clips import ManifestClips
from opensora.recipes.debug import debug_recipe, debug_task
from opensora.recipes.published import model_of, published_loop, published_task
from opensora.training.config import Recipe
from opensora.training.diffusion.noise import IDDPM

PIXART = "pretrained_models/PixArt-XL-2-1024-MS.pth"
_STAGE2, _STAGE3 = "opensora-1.1-stage2", "opensora-1.1-stage3"

FRAME_MASKS = {
    "identity": 0.75,
    "quarter_random": 0.025,
    "quarter_head": 0.025,
    "quarter_tail": 0.025,
    "quarter_head_tail": 0.05,
    "image_random": 0.025,
    "image_head": 0.025,
    "image_tail": 0.025,
    "image_head_tail": 0.05,
}
DIFFUSION = IDDPM(float32_tables=True)


def _clips(buckets: BucketConfig) -> ManifestClips:
    return ManifestClips(buckets, frame_interval=3, told_fps="file")


def v1_1_image() -> Recipe:
    """Images of many sizes, from PixArt-alpha at 1024, with SpeeD's steps."""
    buckets = {
        "256": {"1": (1.0, 256)},
        "512": {"1": (1.0, 80)},
        "480p": {"1": (1.0, 52)},
        "1024": {"1": (1.0, 20)},
        "1080p": {"1": (1.0, 8)},
    }
    objective = published_task(
        _STAGE2,
        _clips(buckets),
        IDDPM(steps="speed", float32_tables=True),
        transformer={"qk_norm": False},
        init_from=PIXART,
        new_parts=("temporal_blocks", "conditions"),
    )
    loop = published_loop(6_000, lr=2e-5, ema_decay=0.0, recompute=True, checkpoint_every=500)
    return Recipe("v1_1_image", objective, loop)


def v1_1_stage1() -> Recipe:
    """Mostly 144p, where motion is learnt; norms of queries and keys join. The last 57 of 81 thousand steps."""
    buckets = {
        "144p": {"1": (0.5, 48), "16": (1.0, 6), "32": (1.0, 3), "96": (1.0, 1)},
        "256": {"1": (0.5, 24), "16": (0.5, 3), "48": (0.5, 1), "64": (0.0, None)},
        "240p": {"16": (0.3, 2), "32": (0.3, 1), "64": (0.0, None)},
        "512": {"1": (0.4, 12)},
        "1024": {"1": (0.3, 3)},
    }
    objective = published_task(
        _STAGE2,
        _clips(buckets),
        DIFFUSION,
        init_from=model_of("v1_1_image"),
        new_parts=("qk_norm",),
        frame_masks=FRAME_MASKS,
    )
    loop = published_loop(57_000, lr=2e-5, ema_decay=0.0, recompute=False, checkpoint_every=500)
    return Recipe("v1_1_stage1", objective, loop)


def v1_1_stage2() -> Recipe:
    """Mostly 240p and 480p."""
    buckets = {
        "144p": {"1": (1.0, 48), "16": (1.0, 17), "32": (1.0, 9), "64": (1.0, 4), "128": (1.0, 1)},
        "256": {"1": (0.8, 254), "16": (0.5, 17), "32": (0.5, 9), "64": (0.5, 4), "128": (0.5, 1)},
        "240p": {"1": (0.1, 20), "16": (0.9, 17), "32": (0.8, 9), "64": (0.8, 4), "128": (0.8, 2)},
        "512": {"1": (0.5, 86), "16": (0.2, 4), "32": (0.2, 2), "64": (0.2, 1), "128": (0.0, None)},
        "480p": {"1": (0.4, 54), "16": (0.4, 4), "32": (0.0, None)},
        "720p": {"1": (0.1, 20), "16": (0.1, 2), "32": (0.0, None)},
        "1024": {"1": (0.3, 20)},
        "1080p": {"1": (0.4, 8)},
    }
    objective = published_task(
        _STAGE2, _clips(buckets), DIFFUSION, init_from=model_of("v1_1_stage1"), frame_masks=FRAME_MASKS
    )
    loop = published_loop(22_000, lr=2e-5, ema_decay=0.0, recompute=True, checkpoint_every=500)
    return Recipe("v1_1_stage2", objective, loop)


def v1_1_stage3() -> Recipe:
    """Mostly 480p and 720p, on better clips."""
    buckets = {
        "144p": {"1": (1.0, 200), "16": (1.0, 36), "32": (1.0, 18), "64": (1.0, 9), "128": (1.0, 4)},
        "256": {"1": (0.8, 200), "16": (0.5, 22), "32": (0.5, 11), "64": (0.5, 6), "128": (0.8, 4)},
        "240p": {"1": (0.8, 200), "16": (0.5, 22), "32": (0.5, 10), "64": (0.5, 6), "128": (0.5, 3)},
        "360p": {"1": (0.5, 120), "16": (0.5, 9), "32": (0.5, 4), "64": (0.5, 2), "128": (0.5, 1)},
        "512": {"1": (0.5, 120), "16": (0.5, 9), "32": (0.5, 4), "64": (0.5, 2), "128": (0.8, 1)},
        "480p": {"1": (0.4, 80), "16": (0.6, 6), "32": (0.6, 3), "64": (0.6, 1), "128": (0.0, None)},
        "720p": {"1": (0.4, 40), "16": (0.6, 3), "32": (0.6, 1), "96": (0.0, None)},
        "1024": {"1": (0.3, 40)},
    }
    objective = published_task(
        _STAGE3, _clips(buckets), DIFFUSION, init_from=model_of("v1_1_stage2"), frame_masks=FRAME_MASKS
    )
    loop = published_loop(4_000, lr=2e-5, ema_decay=0.0, recompute=True, checkpoint_every=500)
    return Recipe("v1_1_stage3", objective, loop)


def v1_1_debug() -> Recipe:
    """All of 1.1 in seconds on a CPU: tiny networks of its classes, drawn clips, conditioning frames."""
    return debug_recipe("v1_1_debug", debug_task(_STAGE3, DIFFUSION, frame_masks=FRAME_MASKS))
