"""What the published runs have in common: released parts, AdamW at a constant rate, averages of constant decay."""

from typing import Any

from opensora.checkpoints.published import PUBLISHED
from opensora.data.clips import ManifestClips
from opensora.recipes.toybox_vae import RUNS
from opensora.training.config import LoopConfig
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.text import FrozenText
from opensora.training.optimizer import OptimizerConfig


def model_of(run: str) -> str:
    """Where `opensora train` leaves the model of a run."""
    return str(RUNS / run / "model")


def published_task(
    model: str,
    data: ManifestClips,
    diffusion: Flow | IDDPM,
    *,
    transformer: dict[str, Any] | None = None,
    **options: Any,
) -> DiffusionTaskConfig:
    """Training of a published model's transformer on clips, with its autoencoder and T5 as they were released.

    Args:
        model: its name.
        data: the clips.
        diffusion: the corruption.
        transformer: keywords that differ from the published ones.
        options: more of `DiffusionTaskConfig`.
    """
    released = PUBLISHED[model]
    return DiffusionTaskConfig(
        data=data,
        diffusion=diffusion,
        autoencoder=model,
        text=FrozenText(model, exported=False),
        architecture=released.transformer.class_name.rpartition(".")[2],  # type: ignore[arg-type]
        transformer={**released.transformer.config, **(transformer or {})},
        frozen_dtype="bfloat16",
        export_dtype="float32",
        **{"defaults": dict(released.defaults), **options},
    )


def published_loop(
    steps: int,
    *,
    lr: float,
    ema_decay: float,
    recompute: bool,
    checkpoint_every: int,
    eps: float = 1e-8,
    warmup_steps: int = 0,
    microbatches: int = 1,
    decay: float = 0.0,
) -> LoopConfig:
    """The reference's loop: bf16, gradients clipped at 1, AdamW without decay of weights, seed 42."""
    optimizer = OptimizerConfig(
        matrices="adamw", lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0, warmup_steps=warmup_steps, decay=decay
    )
    return LoopConfig(
        steps=steps,
        microbatches=microbatches,
        seed=42,
        precision="bf16",
        activation_checkpointing="full" if recompute else "none",
        ema_decay=ema_decay,
        ema_warmup=False,
        max_grad_norm=1.0,
        log_every=10,
        checkpoint_every=checkpoint_every,
        optimizer=optimizer,
    )
