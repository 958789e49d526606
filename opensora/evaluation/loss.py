"""The held-out loss suite: what a model's training loss is at fixed timesteps, size by size, on clips it never saw.

A training loss wanders with the timesteps and noise that a step happens to draw. Here both are fixed: every clip is
corrupted at the same ten timesteps, each time with noise of its own that is always the same, so two figures differ only
if the weights do. Sizes and lengths are kept apart, because a loss means little across them. All models of the family
are measured alike, rectified flow on its velocity, discrete-time diffusion on its squared error and its bound.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, n timesteps.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora.checkpoints.sources import model_hash
from opensora.data.batch import LatentBatch
from opensora.diffusion import flow, gaussian
from opensora.diffusion.losses import training_losses
from opensora.distributed.seeding import generator
from opensora.errors import OpenSoraError
from opensora.evaluation.results import check_same_settings
from opensora.files import replacing
from opensora.models.clip_conditions import ClipConditions
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.cleaning import clean_text
from opensora.models.text.encoders import encode_prompts

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

NUM_TIMESTEPS = 10


@dataclass
class LossResults:
    """What the suite found; the content of its results file.

    Attributes:
        settings: what was measured, and how; a run resumes only on equal settings.
        timesteps: n of them, the same for every clip.
        losses: size -> clip by clip, in order, n losses each.
    """

    settings: dict[str, Any]
    timesteps: list[float]
    losses: dict[str, list[list[float]]] = field(default_factory=dict)

    def table(self) -> dict[str, list[float]]:
        """Size -> mean over its clips at each timestep, and last the mean of these."""
        rows: dict[str, list[float]] = {}
        for label, clips in self.losses.items():
            means = torch.tensor(clips, dtype=torch.float64).mean(dim=0)
            rows[label] = [*means.tolist(), float(means.mean())]
        return rows

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        means = {label: row[-1] for label, row in self.table().items()}
        content = {"settings": self.settings, "timesteps": self.timesteps, "mean": means, "losses": self.losses}
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def resume(self, path: Path) -> None:
        """Takes over the clips that `path` already holds.

        Raises:
            OpenSoraError: `path` is not a results file, or one of other settings.
        """
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            settings, timesteps = content["settings"], content["timesteps"]
            losses = {
                str(label): [list(map(float, clip)) for clip in clips] for label, clips in content["losses"].items()
            }
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise OpenSoraError(f"{path} is not a results file of this evaluation; choose another --output") from error
        mine, theirs = {**self.settings, "timesteps": self.timesteps}, {**settings, "timesteps": timesteps}
        check_same_settings(path, mine, theirs)
        self.losses = losses


@dataclass(frozen=True)
class Portion:
    """Clips of one size that are measured together.

    Attributes:
        label: their size.
        first: clips of this size that came before, which decides their noise.
        count: how many they are.
        load: makes the batch; not called for clips that were measured already.
    """

    label: str
    first: int
    count: int
    load: Callable[[], LatentBatch]


def held_out_losses(
    pipeline: "OpenSoraPipeline", batches: Iterable[LatentBatch], num_timesteps: int = NUM_TIMESTEPS, seed: int = 0
) -> dict[str, float]:
    """The suite's means, for watching a run: size -> loss over all timesteps and all clips of that size.

    Args:
        pipeline: what is measured.
        batches: held-out clips, the same ones in the same order each time.
        num_timesteps: n.
        seed: of the noise.
    """
    results = LossResults({}, fixed_timesteps(pipeline.scheduler, num_timesteps))
    for batch in batches:
        known = results.losses.setdefault(batch.label, [])
        known += batch_losses(pipeline, batch, results.timesteps, len(known), seed).tolist()
    return {label: row[-1] for label, row in results.table().items()}


def measure(
    pipeline: "OpenSoraPipeline",
    portions: Sequence[Portion],
    results: LossResults,
    output: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LossResults:
    """Adds the losses of all clips that `results` lacks.

    Args:
        pipeline: what is measured.
        portions: the clips; those of one size in the order of their `first`.
        results: filled in place.
        output: results file, rewritten after every portion.
        seed: of the noise.
        progress: called with (clips done, clips in all).

    Returns:
        `results`.
    """
    done, total = 0, sum(portion.count for portion in portions)
    for portion in portions:
        known = results.losses.setdefault(portion.label, [])
        if len(known) < portion.first + portion.count:
            losses = batch_losses(pipeline, portion.load(), results.timesteps, portion.first, seed)
            known += losses[len(known) - portion.first :].tolist()
            if output is not None:
                results.save(output)
        done += portion.count
        if progress is not None:
            progress(done, total)
    return results


def fixed_timesteps(scheduler: Any, n: int = NUM_TIMESTEPS) -> list[float]:
    """`n` timesteps from clean to noise, evenly spaced: 0 to N for rectified flow, whole steps 0 to N - 1 otherwise.

    Raises:
        OpenSoraError: fewer than two, or a scheduler that nothing is trained with.
    """
    if n < 2:
        raise OpenSoraError(f"{n} timesteps asked for; give 2 or more")
    if isinstance(scheduler, RectifiedFlowScheduler):
        return torch.linspace(0, scheduler.num_train_timesteps, n, dtype=torch.float64).tolist()
    if isinstance(scheduler, IDDPMScheduler):
        return torch.linspace(0, scheduler.num_train_timesteps - 1, n, dtype=torch.float64).round().tolist()
    raise OpenSoraError(
        f"no training loss for a {type(scheduler).__name__}; the suite knows RectifiedFlowScheduler and IDDPMScheduler"
    )


def describe(pipeline: "OpenSoraPipeline", model: str, seed: int) -> dict[str, Any]:
    """What decides the outcome besides the clips: the weights, the noise, and the arithmetic."""
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    weights = model_hash(model)
    return {"model": model, "weights": weights, "seed": seed, "dtype": dtype, "device": pipeline.device.type}


@torch.no_grad()
def batch_losses(
    pipeline: "OpenSoraPipeline", batch: LatentBatch, timesteps: Sequence[float], first: int, seed: int
) -> Tensor:
    """Losses of every clip at every timestep, (B, n) float64 on the CPU.

    Args:
        pipeline: what is measured.
        batch: the clips.
        timesteps: see `fixed_timesteps`.
        first: clips of this size that came before, which decides the noise.
        seed: of the noise.
    """
    device, network = pipeline.device, pipeline.transformer
    clean = batch.latents.to(device, torch.float32)
    states, mask = text_of(pipeline, batch)
    clip = ClipConditions(batch.fps.to(device), batch.height.to(device), batch.width.to(device), batch.num_frames)
    columns = []
    for i, timestep in enumerate(timesteps):
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator(seed, "held-out loss", batch.label, first + row, i))
                for row in range(len(clean))
            ]
        ).to(device)

        def predict(noisy: Tensor, t: float = timestep) -> Tensor:
            steps = torch.full((len(noisy),), t, device=device)
            return network(noisy.to(network.dtype), steps, states, mask, clip_conditions=clip).sample.float()

        columns.append(loss_at(pipeline.scheduler, timestep, clean, noise, predict).double().cpu())
    return torch.stack(columns, dim=1)


def loss_at(
    scheduler: Any, timestep: float, clean: Tensor, noise: Tensor, predict: Callable[[Tensor], Tensor]
) -> Tensor:
    """The unweighted training loss of every clip at one timestep, (B,)."""
    if isinstance(scheduler, RectifiedFlowScheduler):
        noisy = flow.interpolate(clean, noise, timestep / scheduler.num_train_timesteps)
        return flow.masked_mse(predict(noisy), flow.velocity_target(clean, noise))
    tables = scheduler.train_tables.to(clean.device)
    t = torch.full((len(clean),), int(timestep), device=clean.device)
    noisy = gaussian.q_sample(tables, clean, t, noise)
    return training_losses(
        tables,
        predict(noisy),
        clean=clean,
        noisy=noisy,
        noise=noise,
        t=t,
        prediction_type=scheduler.prediction_type,
        variance_type=scheduler.variance_type,
    ).loss


def text_of(pipeline: "OpenSoraPipeline", batch: LatentBatch) -> tuple[Tensor, Tensor]:
    """Text states (B, L, D) and mask (B, L) of a batch: those it brings, or its captions encoded."""
    place = {"device": pipeline.device, "dtype": pipeline.transformer.dtype}
    if batch.text_states is not None and batch.text_mask is not None:
        return batch.text_states.to(**place), batch.text_mask.to(pipeline.device)
    clean = clean_text if pipeline.config.clean_prompts else str
    captions = [clean(caption) for caption in batch.captions]
    length = pipeline.transformer.null_text.shape[0]
    return encode_prompts(pipeline.tokenizer, pipeline.text_encoder, captions, length, **place)
