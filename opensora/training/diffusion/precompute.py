"""Latents and text states of a manifest, encoded once for a recipe that would encode them at every step."""

import contextlib
import json
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.checkpoints.weights import fingerprint
from opensora.data import precompute
from opensora.data.cache import Index, LatentsMadeFrom, MadeFrom, TextMadeFrom
from opensora.data.clips import ClipSource, ManifestClips
from opensora.data.precompute import EncodeText
from opensora.errors import OpenSoraError
from opensora.settings import to_dict
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.diffusion.text import Captions, TrainedText
from opensora.training.parts import META, build_part

logger = logging.getLogger(__name__)

_MOST_FAILED = 20

StoredDType = Literal["float32", "float16", "bfloat16"]
Told = Callable[[int, int], None] | None


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the clips, and how.

    Attributes:
        contents: mean and variance of a clip, to draw from as training on clips does, or the mean alone.
        latents_dtype: precision of the latents in the files.
        text_dtype: precision of the text states in the files.
        text: keep the captions' states as well.
        windows_per_clip: pieces taken of a clip that is longer than its size asks for, each from a random place.
        seed: chooses these places.
        shard_mb: how large a file may become, in MB.
        workers: threads that read clips while others are encoded.
    """

    contents: Literal["posterior", "mean"] = "posterior"
    latents_dtype: StoredDType = "float16"
    text_dtype: StoredDType = "bfloat16"
    text: bool = True
    windows_per_clip: int = 1
    seed: int = 0
    shard_mb: float = 256
    workers: int = 4

    def __post_init__(self) -> None:
        for name in ("windows_per_clip", "workers"):
            if getattr(self, name) < 1:
                raise OpenSoraError(f"`{name}` is {getattr(self, name)}; give 1 or more")
        if not self.shard_mb > 0:
            raise OpenSoraError(f"`shard_mb` is {self.shard_mb:g}; give more than 0")


@contextlib.contextmanager
def silent(work: str) -> Iterator[Told]:
    """Tells nobody how far the work is."""
    yield None


def make_cache(
    folder: Path,
    config: DiffusionTaskConfig,
    clips: ManifestClips,
    options: CacheOptions,
    *,
    device: str,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[str], AbstractContextManager[Told]] = silent,
) -> Index | None:
    """One process's share of a cache; what the folder holds already is resumed.

    Args:
        folder: of the cache.
        config: of the recipe that will train on it.
        clips: of that recipe.
        options: what is kept, and how.
        device: where the networks work.
        rank: of this process.
        num_ranks: processes that share the work.
        progress: work -> context in which it is done, which gives what is told (done, total).

    Returns:
        The index of the whole cache on the process that ends it, None on the others.

    Raises:
        OpenSoraError: no clip could be read, or the folder holds something else.
    """
    source = ClipSource(clips)
    # The autoencoder is the smaller one and waits on the CPU while text is encoded.
    dtype = getattr(torch, config.frozen_dtype)
    autoencoder = build_part(config.autoencoder, "autoencoder", "cpu", dtype)
    captions = text = None
    text_bytes = 0
    if options.text and not isinstance(config.text, TrainedText):
        meta = DiffusionNetworks(config, META).captions
        captions = Captions(config.text, config.init_from, meta.network, meta.clean, device, meta.dtype)
        encoder = captions.load()
        captions.check_words(row.text for row in source.rows)
        text = TextMadeFrom(
            encoder=fingerprint(encoder.state_dict()),
            origin=describe_origin(config.text.origin),
            max_tokens=captions.max_tokens,
            clean=captions.clean,
            stored=options.text_dtype,
            arithmetic=config.frozen_dtype,
        )
        text_bytes = captions.max_tokens * encoder.config.d_model * getattr(torch, options.text_dtype).itemsize
    made_from = MadeFrom(
        clips=precompute.hash_of(source.rows),
        buckets=clips.buckets,
        frame_interval=clips.frame_interval,
        told_fps=clips.told_fps,
        scores=clips.scores,
        windows=options.windows_per_clip,
        seed=options.seed,
        shard_bytes=round(options.shard_mb * 1e6),
        latents=LatentsMadeFrom(
            autoencoder=fingerprint(autoencoder.state_dict()),
            origin=describe_origin(config.autoencoder),
            latent_space=autoencoder.latent_space.to_dict(),
            contents=options.contents,
            stored=options.latents_dtype,
            arithmetic=config.frozen_dtype,
        ),
        text=text,
    )
    plan = precompute.make_plan(source, made_from, autoencoder, text_bytes)
    precompute.begin(folder, source.rows, made_from)
    share = {"rank": rank, "num_ranks": num_ranks}
    if captions is not None:
        with progress("encoding captions") as on_progress:
            precompute.make_text(folder, plan, encode_with(captions), made_from, **share, progress=on_progress)
        if captions.num_cut:
            logger.warning("%d captions were longer than the model reads, and cut", captions.num_cut)
        del captions
    with progress("encoding clips") as on_progress:
        precompute.make_latents(
            folder,
            plan,
            source,
            autoencoder.to(device),
            made_from,
            **share,
            num_workers=options.workers,
            progress=on_progress,
        )
    index = precompute.finish(folder, plan, made_from)
    if index is not None and index.num_latents == 0:
        first = index.failed[0]
        raise OpenSoraError(f"no clip could be read; the first one: {first.path}: {first.reason}")
    return index


def task_on_clips(name: str, objective: Any, manifest: Path | None) -> tuple[DiffusionTaskConfig, ManifestClips]:
    """The training task of a recipe that trains a diffusion transformer on the clips of a manifest, and these clips.

    Args:
        name: of the recipe.
        objective: the task's settings, of the recipe.
        manifest: to take the place of the recipe's.

    Raises:
        OpenSoraError: it trains something else, or on something else.
    """
    if not isinstance(objective, DiffusionTaskConfig):
        raise OpenSoraError(f"recipe {name} trains no diffusion transformer, so it has no use for a cache of latents")
    if not isinstance(objective.data, ManifestClips):
        raise OpenSoraError(
            f"recipe {name} trains on {type(objective.data).__name__}, not on the clips of a manifest; "
            "give objective.data.type=ManifestClips and its buckets, or another recipe"
        )
    clips = objective.data if manifest is None else replace(objective.data, manifest=manifest)
    if clips.manifest is None:
        raise OpenSoraError("no manifest; name the table of your clips by `manifest`")
    return replace(objective, data=clips), clips


def encode_with(captions: Captions) -> EncodeText:
    """Captions -> states and mask."""

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        text = captions.encode(captions.tokens(texts).to(captions.device))
        assert text.mask is not None and text.pooled is None
        return text.states, text.mask

    return encode


def describe_origin(origin: Any) -> str:
    """Where a network came from, in words."""
    return origin if isinstance(origin, str) else f"untrained, seed {origin.seed}"


def summary(folder: Path, index: Index, config: DiffusionTaskConfig) -> list[str]:
    """What was made, and the settings of the recipe that train on it."""
    size = sum((folder / shard).stat().st_size for shard in (*index.latents, *index.text))
    lines = [f"{folder}: {index.num_latents} clips, {index.num_captions} captions, {size / 1e9:.3g} GB"]
    if index.failed:
        lines.append(f"left out: {len(index.failed)}")
        lines += [f"  {clip.path}: {clip.reason}" for clip in index.failed[:_MOST_FAILED]]
        lines += [f"  and {len(index.failed) - _MOST_FAILED} more"] * (len(index.failed) > _MOST_FAILED)
    settings = to_dict(config)
    data = {"type": "CachedLatents", "folder": str(folder), "batches_in_a_row": settings["data"]["batches_in_a_row"]}
    train: dict[str, Any] = {"data": data}
    if index.made_from.text is not None:
        train["text"] = {**settings["text"], "type": "CachedText"}
    overrides = (shlex.quote(f"objective.{name}={json.dumps(value)}") for name, value in train.items())
    return [*lines, f"train on it with: {' '.join(overrides)}"]
