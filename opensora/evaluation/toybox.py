"""How well a model draws what it is told: held-out toy prompts, generated, read by the judge, counted.

Every prompt is a (shape, colour, motion) that no model was trained on. Sample i of a seed always has the same prompt
and the same noise, whatever the batch size and whatever was made before it. Two gates belong to it: the judge on real
clips (does the judge read well?) and on the autoencoder's reconstructions (does the autoencoder keep what has to be
read?).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from opensora.distributed.seeding import generator
from opensora.errors import OpenSoraError
from opensora.evaluation.judge import Judge
from opensora.evaluation.psnr import frame_psnr
from opensora.files import replacing
from opensora.toybox.captions import Language, plain_caption
from opensora.toybox.specs import ATTRIBUTES, EASY_WORLD, ClipSpec, World, sample_specs
from opensora.toybox.world import render

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


class Autoencoder(Protocol):
    """What reconstructs: a `VideoCodec` or anything like it."""

    def encode_video(self, video: Tensor) -> Tensor: ...

    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """One prompt to generate.

    Attributes:
        id: the same for the same seed and place, for ever.
        prompt: what the model is told.
        wanted: attribute -> label that the judge should read.
    """

    id: str
    prompt: str
    wanted: dict[str, str]

    def noise(self) -> torch.Generator:
        """This sample's own source of noise."""
        return generator("evaluate toybox", self.id)


def held_out_samples(n: int, seed: int = 0, world: World = EASY_WORLD, language: Language = "en") -> list[Sample]:
    """The first `n` held-out prompts of a seed, plainly worded; the same clips are asked for in every language."""
    return [
        Sample(f"held_out-{seed}-{i:05d}", plain_caption(spec, language), label_words(spec))
        for i, spec in enumerate(sample_specs(n, seed, world, "held_out"))
    ]


def label_words(spec: ClipSpec) -> dict[str, str]:
    """Attribute -> this clip's label."""
    return {name: getattr(spec, name) for name in ATTRIBUTES}


def share_right(wanted: list[dict[str, str]], read: list[dict[str, str]]) -> dict[str, float]:
    """Share of clips read as wanted, per attribute and for "all" attributes at once; empty without clips."""
    if not wanted:
        return {}
    hits = [{name: w[name] == r[name] for name in ATTRIBUTES} for w, r in zip(wanted, read, strict=True)]
    shares = {name: sum(hit[name] for hit in hits) / len(hits) for name in ATTRIBUTES}
    return shares | {"all": sum(all(hit.values()) for hit in hits) / len(hits)}


@torch.no_grad()
def real_accuracy(
    judge: Judge,
    n: int = 500,
    seed: int = 0,
    world: World = EASY_WORLD,
    change: Callable[[Tensor], Tensor] | None = None,
    size: tuple[int, int, int] = (17, 64, 64),
    batch_size: int = 20,
) -> dict[str, float]:
    """How much of real held-out clips the judge reads right.

    Args:
        judge: reads the clips.
        n: number of clips.
        seed: which clips.
        world: where they come from.
        change: applied to each batch of clips (B, 3, T, H, W) in [-1, 1] before it is read.
        size: (T, H, W).
        batch_size: clips rendered and read at a time.

    Returns:
        Attribute -> share in [0, 1], and "all".
    """
    specs = sample_specs(n, seed, world, "held_out")
    read: list[dict[str, str]] = []
    for start in range(0, n, batch_size):
        video, _ = render(specs[start : start + batch_size], *size, device=judge.device)
        read += judge.read(video if change is None else change(video))
    return share_right([label_words(spec) for spec in specs], read)


def reconstruction_accuracy(
    autoencoder: Autoencoder,
    judge: Judge,
    n: int = 400,
    seed: int = 0,
    world: World = EASY_WORLD,
    size: tuple[int, int, int] = (17, 64, 64),
    batch_size: int = 10,
) -> dict[str, float]:
    """How much of held-out clips the judge still reads right after encoding and decoding: the autoencoder's gate.

    Arguments and result are those of `real_accuracy`.
    """

    def reconstruct(video: Tensor) -> Tensor:
        return autoencoder.decode_latents(autoencoder.encode_video(video), video.shape[2]).float().clamp(-1, 1)

    return real_accuracy(judge, n, seed, world, reconstruct, size, batch_size)


@torch.no_grad()
def reconstruction_psnr(
    autoencoder: Autoencoder,
    n: int = 500,
    seed: int = 0,
    world: World = EASY_WORLD,
    size: tuple[int, int, int] = (17, 64, 64),
    batch_size: int = 10,
) -> float:
    """Mean peak signal-to-noise ratio of the frames of `n` held-out clips after encoding and decoding, in decibels."""
    specs, decibels = sample_specs(n, seed, world, "held_out"), []
    for start in range(0, n, batch_size):
        video, _ = render(specs[start : start + batch_size], *size)
        video = video.to(getattr(autoencoder, "device", "cpu"))
        made = autoencoder.decode_latents(autoencoder.encode_video(video), video.shape[2])
        decibels.append(frame_psnr(made, video).flatten())
    return float(torch.cat(decibels).mean())


def generate(pipeline: "OpenSoraPipeline", samples: list[Sample], **settings: Any) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] for samples, each from its own noise.

    Args:
        pipeline: makes the clips, with its own defaults.
        samples: B of them.
        settings: keywords of the pipeline that differ from its defaults.
    """
    noise = [sample.noise() for sample in samples]
    frames = pipeline([sample.prompt for sample in samples], generator=noise, output_type="pt", **settings).frames
    return frames.transpose(1, 2).float() * 2 - 1


def read_gates(
    judge: Judge, autoencoder: Autoencoder, size: tuple[int, int, int], seed: int, num_clips: int
) -> dict[str, dict[str, float]]:
    """What the judge reads right of real clips, and of the autoencoder's reconstructions of them."""
    return {
        f"real, {num_clips} clips": real_accuracy(judge, num_clips, seed, size=size),
        f"autoencoder, {num_clips} clips": reconstruction_accuracy(autoencoder, judge, num_clips, seed, size=size),
    }


def contact_sheet(clips: Iterable[tuple[str, Tensor]], path: Path, columns: int = 9, scale: int = 2) -> None:
    """Writes clips as rows of frames, each row under its caption.

    Args:
        clips: captions and clips (3, T, H, W) in [-1, 1], all of one size.
        path: the PNG file to write.
        columns: frames shown of each clip, evenly spread.
        scale: pixels of the picture per pixel of a clip.
    """
    from PIL import Image, ImageDraw

    gap, line, rows = 2, 14, list(clips)
    if not rows:
        raise OpenSoraError("a contact sheet of no clips; give at least one")
    height, width = rows[0][1].shape[-2:]
    cell_height, cell_width = height * scale, width * scale
    sheet = Image.new(
        "RGB", (columns * (cell_width + gap) + gap, len(rows) * (cell_height + line + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for row, (text, clip) in enumerate(rows):
        top = gap + row * (cell_height + line + gap)
        pen.text((gap + 1, top), text, fill="black")
        chosen = torch.linspace(0, clip.shape[1] - 1, columns).round().long().tolist()
        for column, frame in enumerate(chosen):
            pixels = ((clip[:, frame].float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image = image.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + column * (cell_width + gap), top + line))
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")
