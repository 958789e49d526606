"""The published stages of Open-Sora 1.0: clips of one size, IDDPM, from the image model PixArt-alpha at 512x512.

Rates, batch sizes a GPU and steps are those of the released configurations and of the table of released weights, which
were trained on 64 GPUs. Clips are named by `objective.data.manifest=FILE`.
"""

from typing import Any

from opensora.data.clips import ManifestClips
from opensora.recipes.debug import debug_recipe, debug_task
from opensora.recipes.published import model_of, published_loop, published_task
from opensora.training.config import Recipe
from opensora.training.diffusion.noise import IDDPM

PIXART = "pretrained_models/PixArt-XL-2-512x512.pth"
_256, _512 = "opensora-1.0-hq-16x256x256", "opensora-1.0-hq-16x512x512"


def _square_clips(side: int, num_frames: int, batch_size: int, frame_interval: int = 3) -> ManifestClips:
    return ManifestClips({f"{side}x{side}": {str(num_frames): (1.0, batch_size)}}, frame_interval=frame_interval)


def v1_0_16x256x256() -> Recipe:
    """First stage: 16 frames of 256x256, on 366 thousand clips."""
    objective = published_task(
        _256, _square_clips(256, 16, 8), IDDPM(), init_from=PIXART, new_parts=("temporal_blocks",)
    )
    loop = published_loop(80_000, lr=2e-5, ema_decay=0.9999, recompute=True, checkpoint_every=1000)
    return Recipe("v1_0_16x256x256", objective, loop)


def v1_0_16x256x256_hq() -> Recipe:
    """The same on 20 thousand better clips."""
    objective = published_task(_256, _square_clips(256, 16, 8), IDDPM(), init_from=model_of("v1_0_16x256x256"))
    loop = published_loop(24_000, lr=2e-5, ema_decay=0.9999, recompute=True, checkpoint_every=1000)
    return Recipe("v1_0_16x256x256_hq", objective, loop)


def v1_0_16x512x512() -> Recipe:
    """16 frames of 512x512, on the better clips; the last of the released ones."""
    objective = published_task(_512, _square_clips(512, 16, 2), IDDPM(), init_from=model_of("v1_0_16x256x256_hq"))
    loop = published_loop(20_000, lr=2e-5, ema_decay=0.9999, recompute=False, checkpoint_every=500)
    return Recipe("v1_0_16x512x512", objective, loop)


def v1_0_64x512x512() -> Recipe:
    """64 frames of 512x512, two apart (as in the report; the configuration has three). Its steps were not published."""
    lasting: dict[str, Any] = {"input_size": [64, 64, 64], "time_scale": 2 / 3}
    objective = published_task(
        _512,
        _square_clips(512, 64, 4, frame_interval=2),
        IDDPM(),
        transformer=lasting,
        init_from=model_of("v1_0_16x512x512"),
    )
    objective.defaults.update(num_frames=64, frame_interval=2)
    loop = published_loop(20_000, lr=2e-5, ema_decay=0.9999, recompute=True, checkpoint_every=250)
    return Recipe("v1_0_64x512x512", objective, loop)


def v1_0_debug() -> Recipe:
    """All of 1.0 in seconds on a CPU: tiny networks of its classes, drawn clips."""
    transformer = {"input_size": [5, 8, 8], "space_scale": 0.5}
    return debug_recipe("v1_0_debug", debug_task(_256, IDDPM(), transformer))
