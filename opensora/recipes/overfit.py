"""Eight clips learnt by heart: the first thing to try with clips of one's own.

Whatever is broken between a folder of clips and a generated one shows here in minutes, on any machine; what cannot
learn eight clips will not learn more. `docs/training.py` runs it from beginning to end.
"""

from dataclasses import replace

from opensora.data.clips import ManifestClips
from opensora.recipes.debug import debug_task
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.text import CachedText, FrozenText
from opensora.training.optimizer import OptimizerConfig

AUTOENCODER = RUNS / "vae_small_stage3" / "model"


def overfit() -> Recipe:
    """A small transformer of 1.2's class on a cache of eight clips of 17 frames; the text encoder has random weights.

    The cache is made by `opensora data precompute overfit --manifest FILE`, from clips that are a frame longer or more.
    """
    debug = debug_task(
        "opensora-1.2",
        Flow(times="logit-normal", time_shift=True),
        {"hidden_size": 192, "depth": 4, "num_heads": 4},
        drop_text=0.0,
    )
    assert isinstance(debug.text, FrozenText)
    sampling = {"height": 80, "width": 128, "num_inference_steps": 30, "guidance_scale": 1.0, "scores": None}
    objective = replace(
        debug,
        data=ManifestClips({"80x128": {"17": (1.0, 8)}}, batches_in_a_row=1),
        autoencoder=str(AUTOENCODER),
        text=CachedText(debug.text.origin),
        defaults={**debug.defaults, **sampling},
    )
    optimizer = OptimizerConfig(muon_lr=0.01, lr=1e-3, warmup_steps=20, decay=0.5)
    loop = LoopConfig(steps=900, ema_decay=0.99, log_every=5, checkpoint_every=100, optimizer=optimizer)
    return Recipe("overfit", objective, loop)
