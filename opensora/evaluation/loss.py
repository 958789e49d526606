"""The held-out loss suite: what a model's training loss is at fixed timesteps, size by size, on clips it never saw.

A training loss wanders with the timesteps and noise that a step happens to draw. Here both are fixed: every clip is
corrupted at the same ten timesteps, each time with noise of its own that is always the same, so two figures differ only
if the weights do. Sizes and lengths are kept apart, because a loss means little across them. All models of the family
are measured alike, rectified flow on its velocity, discrete-time diffusion on its squared error and its bound.

Letters: B clips, C latent channels, T latent frames, h, w latent cells, L text tokens, n timesteps.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora.checkpoints.source import ModelSource
from opensora.data.batch import LatentBatch
from opensora.denoiser import predict
from opensora.diffusion.process import NoiseProcess
from opensora.distributed.seeding import generator
from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.metric import Figure
from opensora.evaluation.results import Results, check_same_settings
from opensora.models.schedulers.base import process_of
from opensora.models.text.cleaning import clean_text

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

SUITE, NUM_TIMESTEPS = "loss", 10
_TELLS = "Training loss of clips of this size, mean of fixed timesteps."


@dataclass
class LossResults:
    """What the suite found.

    Attributes:
        settings: what was measured, and how; a run resumes only on equal settings.
        timesteps: n of them, the same for every clip.
        losses: size -> clip by clip, in order, n losses each.
        cut_captions: of clips measured by this process, those whose captions were longer than the model reads.
    """

    settings: dict[str, Any]
    timesteps: list[float]
    losses: dict[str, list[list[float]]] = field(default_factory=dict)
    cut_captions: int = 0

    def table(self) -> dict[str, list[float]]:
        """Size -> mean over its clips at each timestep, and last the mean of these."""
        rows: dict[str, list[float]] = {}
        for label, clips in self.losses.items():
            means = torch.tensor(clips, dtype=torch.float64).mean(dim=0)
            rows[label] = [*means.tolist(), float(means.mean())]
        return rows

    def means(self) -> dict[str, float]:
        """Size -> loss over all timesteps and all clips of that size."""
        return {label: row[-1] for label, row in self.table().items()}

    def results(self) -> Results:
        """As the content of a file: a sample for each clip, which tells its losses, and a figure for each size."""
        settings = {**self.settings, "timesteps": self.timesteps}
        names = {label: f"loss_{label.replace(' ', '_')}" for label in self.losses}
        samples: list[dict[str, Any]] = []
        for label, clips in self.losses.items():
            for number, losses in enumerate(clips):
                sample = f"{label} {number}"
                found = {names[label]: sum(losses) / len(losses), "losses": losses}
                samples.append({"id": sample, "group": sample, "size": label, **found})
        figures = {name: Figure(name, "", _TELLS, "lower") for name in names.values()}
        return Results(SUITE, settings, figures, samples)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        self.results().save(path)

    def resume(self, path: Path) -> None:
        """Takes over the clips that `path` already holds.

        Raises:
            OpenSoraError: `path` is not a results file of this suite, or one of other settings.
        """
        if not path.exists():
            return
        kept = Results.read(path)
        if kept.suite != SUITE:
            raise OpenSoraError(f"{path} holds results of {kept.suite}, not of {SUITE}; choose another `output`")
        check_same_settings(path, self.results().settings, kept.settings)
        losses: dict[str, list[list[float]]] = {}
        try:
            for sample in kept.samples:
                losses.setdefault(str(sample["size"]), []).append([float(loss) for loss in sample["losses"]])
        except (KeyError, TypeError, ValueError) as error:
            raise OpenSoraError(f"{path} is damaged: a sample lacks its losses; choose another `output`") from error
        if any(len(clip) != len(self.timesteps) for clips in losses.values() for clip in clips):
            raise OpenSoraError(f"{path} is damaged: a sample lacks some of its losses; choose another `output`")
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
) -> LossResults:
    """The suite's losses, for watching a run.

    Args:
        pipeline: what is measured.
        batches: held-out clips, the same ones in the same order each time.
        num_timesteps: n.
        seed: of the noise.
    """
    results = new_results(pipeline, {}, num_timesteps)
    for batch in batches:
        known = results.losses.setdefault(batch.label, [])
        batch, num_cut = with_text(pipeline, batch)
        results.cut_captions += num_cut
        known += batch_losses(pipeline, batch, num_timesteps, len(known), seed).tolist()
    return results


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
            batch, num_cut = with_text(pipeline, portion.load())
            results.cut_captions += num_cut
            losses = batch_losses(pipeline, batch, len(results.timesteps), portion.first, seed)
            known += losses[len(known) - portion.first :].tolist()
            if output is not None:
                results.save(output)
        done += portion.count
        if progress is not None:
            progress(done, total)
    return results


def new_results(
    pipeline: "OpenSoraPipeline", settings: dict[str, Any], num_timesteps: int = NUM_TIMESTEPS
) -> LossResults:
    """No losses yet, at timesteps that lie evenly between clean and noise.

    Raises:
        OpenSoraError: fewer than two timesteps, or a scheduler that nothing is trained with.
    """
    return LossResults(settings, process_of(pipeline.scheduler).fixed_timesteps(num_timesteps).double().tolist())


def describe(pipeline: "OpenSoraPipeline", model: str, seed: int) -> dict[str, Any]:
    """What decides the outcome besides the clips: the weights, the noise, and the arithmetic."""
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    weights = ModelSource.find(model).hash()
    return {"model": model, "weights": weights, "seed": seed, "dtype": dtype, "device": pipeline.device.type}


@torch.no_grad()
def batch_losses(pipeline: "OpenSoraPipeline", batch: LatentBatch, num_timesteps: int, first: int, seed: int) -> Tensor:
    """Losses of every clip at every timestep, (B, n) float64 on the CPU.

    Args:
        pipeline: what is measured.
        batch: the clips, with their text, see `with_text`.
        num_timesteps: n.
        first: clips of this size that came before, which decides the noise.
        seed: of the noise.
    """
    device, network = pipeline.device, pipeline.transformer
    clean = batch.latents.to(device, torch.float32)
    assert batch.text is not None
    text, clip = batch.text, batch.conditions.to(device)
    process = process_of(pipeline.scheduler).to(device)

    def ask(noisy: Tensor, timestep: Tensor) -> Tensor:
        return predict(network, noisy, timestep.to(device), text, clip)

    columns = []
    for i, t in enumerate(process.fixed_timesteps(num_timesteps)):
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator(seed, "held-out loss", batch.label, first + row, i))
                for row in range(len(clean))
            ]
        ).to(device)
        columns.append(loss_at(process, t, clean, noise, ask).double().cpu())
    return torch.stack(columns, dim=1)


def loss_at(
    process: NoiseProcess, t: Tensor, clean: Tensor, noise: Tensor, ask: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The unweighted training loss of every clip at one time, (B,).

    Args:
        process: how the network was trained.
        t: the time, one of `NoiseProcess.fixed_timesteps`.
        clean, noise: (B, C, T, h, w).
        ask: the network, of noisy latents and the timesteps (B,) it is told.
    """
    t = t.expand(len(clean))
    noisy = process.corrupt(clean, noise, t)
    prediction = ask(noisy, process.timesteps(t))
    terms = process.losses(prediction, clean=clean, noisy=noisy, noise=noise, t=t)
    return torch.stack([term for name, term in terms.items() if not name.startswith("_")]).sum(dim=0)


@torch.no_grad()
def with_text(pipeline: "OpenSoraPipeline", batch: LatentBatch) -> tuple[LatentBatch, int]:
    """The batch with its text on the device: those it brings, or its captions encoded, cut as in training.

    Returns:
        The batch, and how many of its captions were longer than the model reads.
    """
    device, dtype, conditioner = pipeline.device, pipeline.transformer.dtype, pipeline.text_conditioner
    if batch.text is not None:
        return replace(batch, text=batch.text.to(device, dtype)), 0
    conditioner.check_words([caption for caption in batch.captions if caption.strip()])  # training reads empty ones
    captions = [clean_text(caption) if pipeline.config.clean_prompts else caption for caption in batch.captions]
    tokens = conditioner.tokenize(captions, cut=True)
    return replace(batch, text=conditioner.encode_tokens(tokens).to(device, dtype)), tokens.num_cut
