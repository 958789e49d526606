"""The autoencoder of Open-Sora 1.2 in its parts: encoding and decoding over time, encoding and decoding frames."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.cases.layers import fill
from benchmarks.comparison import OURS, PLAIN, Comparison, Run, Setting
from benchmarks.plain.frame_autoencoder import FrameAutoencoder as PlainFrameAutoencoder
from benchmarks.plain.temporal_autoencoder import TemporalAutoencoder as PlainTemporalAutoencoder
from opensora.checkpoints.published import PUBLISHED
from opensora.models.autoencoders.frames import FrameAutoencoder
from opensora.models.autoencoders.temporal import TemporalAutoencoder

RELEASED = PUBLISHED["opensora-1.2"].parts["autoencoder"].config
CHUNK, MICRO_BATCH = RELEASED["micro_frame_size"], RELEASED["micro_batch_size"]
SPATIAL = {name: RELEASED["spatial"][name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")}


@dataclass(frozen=True)
class AutoencoderSize:
    """What is encoded and decoded.

    Attributes:
        height, width: of latents.
        frames: decoded by the 2D part.
        temporal, spatial: changes to the released configuration.
    """

    height: int
    width: int
    frames: int = MICRO_BATCH
    temporal: dict[str, Any] = field(default_factory=dict)
    spatial: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "144p": AutoencoderSize(18, 32),
    "240p": AutoencoderSize(30, 53),
    "tiny": AutoencoderSize(
        *(4, 6, 2),
        temporal={"filters": 8, "num_res_blocks": 1, "num_groups": 4},
        spatial={"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    ),
}


def comparisons(setting: Setting) -> Iterator[Comparison]:
    size, dtype = SIZES[setting.size], getattr(torch, setting.dtype)
    torch.manual_seed(0)
    yield from _over_time(size, dtype)
    yield from _of_frames(size, dtype)


def _over_time(size: AutoencoderSize, dtype: torch.dtype) -> Iterator[Comparison]:
    """One chunk."""
    config = {name: value for name, value in RELEASED["temporal"].items() if name != "type"} | size.temporal
    ours, plain = _alike(TemporalAutoencoder(**config), PlainTemporalAutoencoder(**config), dtype)
    frames = torch.randn(1, 4, CHUNK, size.height, size.width, dtype=dtype)
    latents = torch.randn(1, 4, ours.latent_frames(CHUNK), size.height, size.width, dtype=dtype)

    of = f"{CHUNK} frames of {size.height}x{size.width} latents"
    yield _against_plain(f"encoding over time, {of}", partial(ours.encode, frames), partial(plain.encode, frames))
    yield _against_plain(
        f"decoding over time, {of}", partial(ours.decode, latents, CHUNK), partial(plain.decode, latents, CHUNK)
    )


def _of_frames(size: AutoencoderSize, dtype: torch.dtype) -> Iterator[Comparison]:
    """One micro batch."""
    config = SPATIAL | size.spatial
    ours = FrameAutoencoder(config)
    _, plain = _alike(ours.module, PlainFrameAutoencoder(**config), dtype)
    latents = torch.randn(1, 4, size.frames, size.height, size.width, dtype=dtype)
    height, width = size.height * ours.spatial_factor, size.width * ours.spatial_factor
    video = torch.randn(1, 3, size.frames, height, width, dtype=dtype)

    yield _against_plain(
        f"encoding {size.frames} frames of {height}x{width} pixels",
        partial(ours.encode, video, MICRO_BATCH),
        partial(plain.encode, video, MICRO_BATCH),
    )
    yield _against_plain(
        f"decoding {size.frames} frames of {size.height}x{size.width} latents",
        partial(ours.decode, latents, MICRO_BATCH),
        partial(plain.decode, latents, MICRO_BATCH),
    )


def _against_plain(name: str, ours: Run, plain: Run) -> Comparison:
    return Comparison(name, {OURS: ours, PLAIN: plain}, [(OURS, PLAIN)], counted=(OURS, PLAIN))


def _alike(ours: Any, plain: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Both with the same weights."""
    fill(ours)
    plain.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), plain.to(dtype).eval()
