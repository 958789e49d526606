"""Whether conditioning frames survive, and whether the rest of a clip still shows what the prompt says.

Held-out clips of the toybox are rendered; a model is conditioned on some of their frames and their captions. Two things
are read off what it makes: how far the conditioning frames are from what the autoencoder alone makes of them (PSNR),
and what the judge sees in the clip. Editing is read otherwise: the caption names another colour than the clip's, and
the judge tells which one it sees, and whether everything else stayed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora.conditioning.frames import FrameConditioning, condition
from opensora.distributed.seeding import generator
from opensora.evaluation.judge import Judge
from opensora.evaluation.toybox import label_words, share_right
from opensora.geometry import VideoSize
from opensora.pipeline import OpenSoraPipeline
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import COLOURS, EASY_WORLD, ClipSpec, sample_specs
from opensora.toybox.world import render

EDIT_STRENGTHS = (0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Way:
    """One way of giving frames.

    Attributes:
        name: what it is called in a table.
        num_frames: of the clip that is made.
        kept: the first and one past the last of the conditioning frames, for each run of them.
        give: (autoencoder, clip (3, T, H, W), size) -> the frames it gives.
    """

    name: str
    num_frames: int
    kept: tuple[tuple[int, int], ...]
    give: Callable[..., FrameConditioning]


WAYS = (
    Way("first frame", 17, ((0, 1),), lambda vae, clip, size: condition(vae, size, image=clip[:, :1])),
    Way(
        "first and last frame",
        18,
        ((0, 1), (17, 18)),
        lambda vae, clip, size: condition(vae, size, image=clip[:, :1], last_image=clip[:, -1:]),
    ),
    Way("first 5 frames", 17, ((0, 5),), lambda vae, clip, size: condition(vae, size, extend=clip[:, :5])),
    Way(
        "first 17 of 34 frames",
        34,
        ((0, 17),),
        lambda vae, clip, size: condition(vae, size, extend=clip[:, :17], condition_frames=5),
    ),
    Way(
        "last 17 of 34 frames",
        34,
        ((17, 34),),
        lambda vae, clip, size: condition(vae, size, extend=clip[:, 17:], backwards=True),
    ),
)


@dataclass(frozen=True)
class Survival:
    """What became of one way of giving frames.

    Attributes:
        way: its name.
        worst_psnr: dB, of the clip whose conditioning frames came out farthest from the autoencoder's reconstruction of
            them; None where frames are edited.
        read: attribute -> share of the clips in which the judge reads what the prompt says.
    """

    way: str
    worst_psnr: float | None
    read: dict[str, float]

    @property
    def decibels(self) -> str:
        """The worst, as text; empty where no frame is to survive."""
        return "" if self.worst_psnr is None else f"{self.worst_psnr:.0f}"


@torch.no_grad()
def conditioning_frames_survive(
    pipeline: OpenSoraPipeline, judge: Judge, way: Way, num_clips: int, seed: int = 0, batch_size: int = 20
) -> Survival:
    """Generates `num_clips` held-out clips conditioned on frames in this `way`, and reads them."""
    specs = sample_specs(num_clips, seed, EASY_WORLD, "held_out")
    size = VideoSize(way.num_frames, pipeline.config["height"], pipeline.config["width"])
    psnr, read = [], []
    for start in range(0, num_clips, batch_size):
        batch = specs[start : start + batch_size]
        clips, _ = render(batch, way.num_frames, size.height, size.width, pipeline.device)
        conditioning = _join([way.give(pipeline.autoencoder, clip, size) for clip in clips])
        video = _generate(pipeline, batch, size, conditioning, seed, start)
        for first, end in way.kept:
            psnr.append(_psnr(video[:, :, first:end], _reconstructed(pipeline, conditioning, size, first, end)))
        read += judge.read(video.to(judge.device))
    return Survival(way.name, float(torch.cat(psnr).min()), share_right([label_words(spec) for spec in specs], read))


@torch.no_grad()
def edits_follow(
    pipeline: OpenSoraPipeline, judge: Judge, strength: float, num_clips: int, seed: int = 0, batch_size: int = 20
) -> dict[str, float]:
    """Clips edited towards another colour: the share in which the judge reads it, and in which it reads the rest."""
    specs = sample_specs(num_clips, seed, EASY_WORLD, "held_out")
    wanted = [_recoloured(spec) for spec in specs]
    size = VideoSize(17, pipeline.config["height"], pipeline.config["width"])
    read = []
    for start in range(0, num_clips, batch_size):
        clips, _ = render(specs[start : start + batch_size], 17, size.height, size.width, pipeline.device)
        conditioning = _join([condition(pipeline.autoencoder, size, edit=clip, strength=strength) for clip in clips])
        video = _generate(pipeline, wanted[start : start + batch_size], size, conditioning, seed, start)
        read += judge.read(video.to(judge.device))
    return share_right([label_words(spec) for spec in wanted], read)


def survivals(
    pipeline: OpenSoraPipeline,
    judge: Judge,
    num_clips: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Survival]:
    """Every way of giving frames, and every strength of editing."""
    total, found = len(WAYS) + len(EDIT_STRENGTHS), []
    tell = progress or (lambda done, total: None)
    for way in WAYS:
        tell(len(found), total)
        found.append(conditioning_frames_survive(pipeline, judge, way, num_clips, seed))
    for strength in EDIT_STRENGTHS:
        tell(len(found), total)
        read = edits_follow(pipeline, judge, strength, num_clips, seed)
        found.append(Survival(f"edited to another colour, strength {strength}", None, read))
    return found


def _generate(
    pipeline: OpenSoraPipeline,
    specs: list[ClipSpec],
    size: VideoSize,
    conditioning: FrameConditioning,
    seed: int,
    start: int,
) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1], each from its own noise."""
    noise = [generator("evaluate given frames", seed, start + i) for i in range(len(specs))]
    output = pipeline(
        [plain_caption(spec) for spec in specs],
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        conditioning=conditioning,
        generator=noise,
        output_type="pt",
    )
    return output.frames.transpose(1, 2) * 2 - 1


def _reconstructed(
    pipeline: OpenSoraPipeline, conditioning: FrameConditioning, size: VideoSize, first: int, end: int
) -> Tensor:
    """Frames first .. end as the autoencoder alone decodes them: from their latents, and nothing after them."""
    latents, autoencoder = conditioning.latents, pipeline.autoencoder
    frames = [autoencoder.frames_before(k, size.num_frames) for k in range(latents.shape[2] + 1)]
    begin = autoencoder.chunk_start(first, size.num_frames)
    start = next(k for k, before in enumerate(frames) if before >= begin)
    decoded = autoencoder.decode_latents(latents[:, :, start : frames.index(end)], end - begin)
    return decoded[:, :, first - begin :].clamp(-1, 1).cpu()


def _psnr(video: Tensor, expected: Tensor) -> Tensor:
    """(B,) dB for pixels in [-1, 1]; at most 100."""
    error = (video.cpu() - expected).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(4 / error.clamp_min(4 * 10 ** (-100 / 10)))).clamp_max(100.0)


def _join(conditioning: list[FrameConditioning]) -> FrameConditioning:
    return FrameConditioning(
        torch.cat([one.latents for one in conditioning]), torch.cat([one.strength for one in conditioning])
    )


def _recoloured(spec: ClipSpec) -> ClipSpec:
    """The same clip in a colour from the other end of the list."""
    names = list(COLOURS)
    return replace(spec, colour=names[(names.index(spec.colour) + math.ceil(len(names) / 2)) % len(names)])
