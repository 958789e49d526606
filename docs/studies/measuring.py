"""What the studies measure of a model: pictures that come back, errors at a given noise, what the judge reads.

Letters: B clips, C channels, T frames, N latent frames, H, W pixels, h, w latent cells.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from small_world import CLIPS, WORLD
from torch import Tensor

from opensora import OpenSoraPipeline, load_pipeline
from opensora.data.batch import LatentBatch
from opensora.denoiser import predict
from opensora.diffusion.flow import towards_data, velocity_target
from opensora.distributed.seeding import derive_seed, generator
from opensora.evaluation.judge import Judge
from opensora.evaluation.loss import with_text
from opensora.evaluation.psnr import frame_psnr
from opensora.evaluation.toybox import Sample, generate, label_words
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.base import process_of
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import ATTRIBUTES, ClipSpec, sample_specs
from opensora.toybox.world import render


@torch.no_grad()
def reconstruction_psnr(autoencoder: VideoAutoencoder, num_clips: int) -> dict[str, list[float]]:
    """Decibels of new clips: through both parts ("clip"), and through the 2D part alone ("frames")."""
    found: dict[str, list[float]] = {"clip": [], "frames": []}
    for start in range(0, num_clips, 16):
        specs = new_clips(num_clips, "reconstruction")[start : start + 16]
        video, _ = render(specs, CLIPS.num_frames, CLIPS.height, CLIPS.width)
        latents = autoencoder.encode_video(video)
        frames = autoencoder.decode_frames(autoencoder.encode_frames(video).mode())
        for name, decoded in (("clip", autoencoder.decode_latents(latents, CLIPS.num_frames)), ("frames", frames)):
            found[name] += frame_psnr(decoded, video).mean(1).double().tolist()
    return {name: rounded(values, 2) for name, values in found.items()}


@torch.no_grad()
def unexplained_variance(
    pipeline: OpenSoraPipeline, log_snrs: Sequence[float], num_clips: int, batch_size: int = 32
) -> list[list[float]]:
    """Errors of the estimate of clean latents at fixed signal-to-noise ratios, in units of the latents' variance.

    Unlike a loss at fixed times, which depends on the scale of the latents, this compares models of latents of any
    scale: 0 for a perfect estimate, 1 for one that knows nothing but the mean. Of every channel by itself, then
    averaged.

    With latents of deviation d, x_t = (1 - t) x + t e has the log-SNR 2 log((1 - t) d / t), and errors of the velocity
    are 1 / t of those of x.

    Args:
        pipeline: rectified flow.
        log_snrs: natural logarithms of signal variance over noise variance.
        num_clips: new clips.
        batch_size: clips at a time.

    Returns:
        For each log-SNR, that of every clip.
    """
    specs = new_clips(num_clips, "loss")
    latents = []
    for start in range(0, num_clips, batch_size):
        video, _ = render(specs[start : start + batch_size], CLIPS.num_frames, CLIPS.height, CLIPS.width)
        latents.append(pipeline.autoencoder.encode_video(video))
    clean = torch.cat(latents)
    variance = clean.transpose(0, 1).flatten(1).var(dim=1)  # of every channel
    deviation, process = float(variance.mean().sqrt()), process_of(pipeline.scheduler)
    found = []
    for log_snr in log_snrs:
        t = deviation / (deviation + torch.tensor(log_snr / 2).exp())
        errors = []
        for start in range(0, num_clips, batch_size):
            part, chosen = clean[start : start + batch_size], specs[start : start + batch_size]
            noise = torch.stack(
                [
                    torch.randn(part.shape[1:], generator=generator("study", str(log_snr), str(start + row)))
                    for row in range(len(part))
                ]
            )
            captions = [plain_caption(spec) for spec in chosen]
            batch, _ = with_text(pipeline, LatentBatch(part, captions, CLIPS.conditions(len(part)), "study"))
            times = (1000 * t).expand(len(part))
            noisy = process.corrupt(part, noise, times)
            assert batch.text is not None
            answer = predict(pipeline.transformer, noisy, process.timesteps(times), batch.text, batch.conditions)
            wrong = t * (towards_data(answer, "data - noise") - velocity_target(part, noise))
            errors += (wrong.square().mean(dim=(2, 3, 4)) / variance).mean(dim=1).double().tolist()
        found.append(rounded(errors, 4))
    return found


def read_right(
    pipeline: OpenSoraPipeline,
    judge: Judge,
    samples: list[Sample],
    measure: Callable[[Tensor], Any] | None = None,
    **how: Any,
) -> tuple[dict[str, str], list[Any]]:
    """Which attributes the judge reads as they were prompted: attribute -> a character for each sample, 1 or 0.

    Args:
        pipeline: generates.
        judge: reads.
        samples: prompts.
        measure: something else that is to be known of every batch of clips.
        how: keywords of the pipeline.

    Returns:
        What is right, and what `measure` returned.
    """
    marks: dict[str, str] = dict.fromkeys((*ATTRIBUTES, "all"), "")
    measured = []
    for start in range(0, len(samples), 32):
        batch = samples[start : start + 32]
        video = generate(pipeline, batch, **how)
        if measure is not None:
            measured.append(measure(video))
        for sample, read in zip(batch, judge.read(video), strict=True):
            hits = {name: sample.wanted[name] == read[name] for name in ATTRIBUTES}
            for name, hit in (hits | {"all": all(hits.values())}).items():
                marks[name] += "1" if hit else "0"
    return marks, measured


def new_clips(num: int, purpose: str) -> list[ClipSpec]:
    """Clips that nothing was trained on. A sixth are of triples (shape, colour, motion) that nothing was, either."""
    return sample_specs(num, derive_seed("study", purpose), WORLD, "all")


def prompts(num: int) -> list[Sample]:
    """What models are asked for, plainly worded."""
    specs = new_clips(num, "prompts")
    return [Sample(f"study-{i:03d}", plain_caption(spec), label_words(spec)) for i, spec in enumerate(specs)]


def quiet(model: Path) -> OpenSoraPipeline:
    """The pipeline of a trained transformer, without progress bars."""
    pipeline = load_pipeline(str(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
