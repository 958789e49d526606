"""Latents and text states of a manifest, encoded once for a recipe that would encode them at every step."""

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from opensora.conditioning.known_frames import takes_pixels, without_noise
from opensora.contents import shown
from opensora.data import precompute
from opensora.data.cache import Cache, Index, LatentsMadeFrom, MadeFrom, TextMadeFrom
from opensora.data.cached import CachedLatents
from opensora.data.clips import ClipSource, ManifestClips
from opensora.data.precompute import EncodeText
from opensora.errors import OpenSoraError
from opensora.models.text.conditioner import TextStates
from opensora.sampling.finite import check_finite
from opensora.training.diffusion.config import DiffusionTaskConfig
from opensora.training.diffusion.networks import DiffusionNetworks, shown_in_place
from opensora.training.diffusion.text import (
    CachedText,
    Captions,
    FrozenText,
    TrainedText,
    describe_origins,
    fingerprint_of_encoders,
    origins_of,
)
from opensora.training.parts import META, build_part, describe_origin
from opensora.weights import fingerprint

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
        encoders = captions.load()
        captions.check_words(row.text for row in source.rows)
        text = TextMadeFrom(
            encoder=fingerprint_of_encoders(encoders),
            origin=describe_origins(origins_of(config.text, captions.network)),
            max_tokens=captions.max_tokens,
            clean=captions.clean,
            stored=options.text_dtype,
            arithmetic=config.frozen_dtype,
        )
        most = captions.conditioner.blank_states(1, META, getattr(torch, options.text_dtype))
        text_bytes = most.states.nbytes + (0 if most.pooled is None else most.pooled.nbytes)
    made_from = MadeFrom(
        clips=precompute.hash_of(source.rows),
        buckets=clips.buckets,
        frame_interval=clips.frame_interval,
        told_fps=clips.told_fps,
        scores=clips.scores,
        max_fps=clips.max_fps,
        rate_told=clips.rate_told,
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
    null = None if captions is None else captions.null_prompt
    plan = precompute.make_plan(source, made_from, autoencoder, text_bytes, null)
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

    def encode(texts: list[str]) -> TextStates:
        text = captions.encode(captions.tokens(texts).to(captions.device))
        check_finite(text.states, f"the text states of {shown(', '.join(map(repr, texts)), 160)}")
        return text

    return encode


def summary(folder: Path, index: Index, config: DiffusionTaskConfig, recipe: Any) -> list[str]:
    """What was made, and the options that train a recipe on it; `config` is the recipe's task as it was changed."""
    size = sum((folder / shard).stat().st_size for shard in (*index.latents, *index.text))
    lines = [f"{folder}: {index.num_latents} clips, {index.num_captions} captions, {size / 1e9:.3g} GB"]
    if index.failed:
        lines.append(f"left out: {len(index.failed)}")
        lines += [f"  {clip.path}: {clip.reason}" for clip in index.failed[:_MOST_FAILED]]
        lines += [f"  and {len(index.failed) - _MOST_FAILED} more"] * (len(index.failed) > _MOST_FAILED)
    settings = f"--cache {shlex.quote(str(folder))}"
    if DiffusionNetworks(config, META).known_alone:
        settings += f" {shlex.quote(shown_in_place(config))}"
    in_a_row = getattr(config.data, "batches_in_a_row", None)  # no part of a cache
    if in_a_row not in (None, getattr(recipe.data, "batches_in_a_row", CachedLatents.batches_in_a_row)):
        settings += f" objective.data.batches_in_a_row={in_a_row}"
    return [*lines, f"train on it with: {settings}"]


def on_cache(name: str, objective: Any, folder: Path) -> DiffusionTaskConfig:
    """The training task of a recipe, on what `make_cache` wrote.

    Its latents take the place of the clips, and its text states, if it has any, that of a frozen text encoder.

    Args:
        name: of the recipe.
        objective: the task's settings, of the recipe.
        folder: of the cache.

    Raises:
        OpenSoraError: it trains something else, or there is no cache.
    """
    if not isinstance(objective, DiffusionTaskConfig):
        raise OpenSoraError(f"recipe {name} trains no diffusion transformer, so it has no use for `cache`")
    data, text = CachedLatents(folder), objective.text
    if isinstance(objective.data, ManifestClips | CachedLatents):
        data = replace(data, batches_in_a_row=objective.data.batches_in_a_row)
    if isinstance(text, FrozenText) and Cache(folder).index.made_from.text is not None:
        text = CachedText(text.origin, text.exported, text.origin_2)
    if takes_pixels(objective.known_frames):
        logger.warning("what lies in a cache has no noise in its pixels: all known frames are shown without")
    return replace(objective, data=data, text=text, known_frames=without_noise(objective.known_frames))
