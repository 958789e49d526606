"""Few steps and no guidance: the guided path of a model, learnt by a copy of it.

What is exported samples in as few evaluations as it has steps. `objective.few_steps.num_steps` says how many these are;
fewer are learnt best from a student of more, as `distill_toybox_two` does.
"""

from dataclasses import replace

from opensora.data.clips import ManifestClips
from opensora.data.toybox import OtherLength
from opensora.recipes.published import published_loop, published_task
from opensora.recipes.toybox import BILINGUAL, FEWER_FRAME_MASKS, FLOW_DEFAULTS
from opensora.recipes.toybox_vae import RUNS
from opensora.recipes.v1_2 import DIFFUSION, FRAME_MASKS_STAGE3
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.few_steps import FewSteps
from opensora.training.diffusion.noise import Flow
from opensora.training.diffusion.previews import JudgedPrompts
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig

_V1_2 = "opensora-1.2"


def _toybox(teacher: str, few_steps: FewSteps) -> DiffusionTaskConfig:
    """Clips are asked for their captions, and for frames to condition on: few of them do."""
    lengths = (OtherLength(1, 0.03), OtherLength(18, 0.05), OtherLength(34, 0.05))
    data = replace(
        BILINGUAL, chinese=0.5, num_clips=1_200, other_lengths=lengths, num_clips_of_other_lengths=150, batch_size=12
    )
    return DiffusionTaskConfig(
        data=data,
        diffusion=Flow(),
        autoencoder="toybox",
        text=FrozenText("toybox"),
        init_from=teacher,
        teacher=teacher,
        few_steps=few_steps,
        frame_masks=FEWER_FRAME_MASKS,
        drop_text=0.0,
        frozen_dtype="bfloat16",
        preview=JudgedPrompts(),
        defaults=FLOW_DEFAULTS,
    )


def _toybox_loop(steps: int) -> LoopConfig:
    optimizer = OptimizerConfig(muon_lr=0.006, lr=3e-4, warmup_steps=5, decay=0.9)
    return LoopConfig(steps=steps, ema_decay=0.97, log_every=5, checkpoint_every=10, optimizer=optimizer)


def distill_toybox() -> Recipe:
    """The bundled model in four evaluations in place of forty, of a path of twelve guided steps."""
    objective = _toybox("toybox", FewSteps(num_steps=4, teacher_steps=12))
    return Recipe("distill_toybox", objective, _toybox_loop(120))


def distill_toybox_two() -> Recipe:
    """Half as many steps, of the student of four."""
    objective = _toybox(str(RUNS / "distill_toybox" / "model"), FewSteps(num_steps=2, teacher_steps=4))
    return Recipe("distill_toybox_two", objective, _toybox_loop(120))


def distill_v1_2() -> Recipe:
    """Open-Sora 1.2 in four evaluations in place of sixty, on pictures and clips of 480p and 720p."""
    buckets = {
        "480p": {"1": (1.0, 16), "51": (0.5, 1), "102": (0.5, 1)},
        "720p": {"1": (0.3, 8), "51": (0.2, 1)},
    }
    objective = published_task(
        _V1_2,
        ManifestClips(buckets),
        DIFFUSION,
        init_from=_V1_2,
        teacher=_V1_2,
        few_steps=FewSteps(num_steps=4, teacher_steps=28),
        frame_masks=FRAME_MASKS_STAGE3,
        drop_text=0.0,
        freeze_text_embedder=True,
    )
    loop = published_loop(5_000, lr=2e-5, ema_decay=0.99, recompute=True, checkpoint_every=200, warmup_steps=100)
    return Recipe("distill_v1_2", objective, loop)
