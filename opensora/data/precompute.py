"""Making a cache: every clip of a manifest in every size that it may be trained at, and every caption, encoded once.

The work is cut into shards beforehand, by rule alone, so any number of processes can share it (each takes its own
shards) and a run that was stopped makes what is missing: a shard is there whole or not at all. Whoever finds all shards
there writes the index, and with it the cache is done. A shard notes what its clips' files held (`file_states`), so that
of a cache that is made again only those are encoded that could not be read before, or were replaced since.

A clip that is longer than what is trained on gives `windows` pieces, whose beginnings are drawn once and for all; where
training reads the clips themselves it draws a new piece each time.

Letters: C latent channels, T latent frames, h, w latent cells, L text tokens, D width of the text.
"""

import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opensora.clip_rows import ClipRow, differences
from opensora.data.buckets import Bucket
from opensora.data.cache import INDEX, MANIFEST, FailedClip, Index, MadeFrom, bucket_key, clip_notes, replaced
from opensora.data.clips import ClipSource, read_clip
from opensora.data.encoding import check_lengths, whole_cells
from opensora.data.file_states import FileState
from opensora.data.shards import ShardReader, noted, read_note, write_shard
from opensora.distributed.seeding import derive_seed
from opensora.errors import OpenSoraError
from opensora.files import remove_left_overs, replacing
from opensora.manifest import read_manifest, write_manifest
from opensora.media.transforms import random_window
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.text.conditioner import TextStates
from opensora.settings import flatten, from_dict, load_settings, save_settings, to_dict

PLAN = "making.json"
_MOST_DIFFERENCES = 5

Progress = Callable[[int, int], None]
EncodeText = Callable[[list[str]], TextStates]
"""Captions -> their text, tokens first where there is a mask."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class LatentShard:
    """Clips of one bucket that are encoded together.

    Attributes:
        name: of the file, below the cache's folder.
        bucket: their size.
        clips: (row, window) of each.
    """

    name: str
    bucket: Bucket
    clips: list[tuple[int, int]]


@dataclass(frozen=True)
class TextShard:
    """Captions that are encoded together; `name` as for latents."""

    name: str
    captions: list[str]


@dataclass(frozen=True)
class Plan:
    """All shards of a cache."""

    latents: list[LatentShard]
    text: list[TextShard]

    @property
    def num_clips(self) -> int:
        return sum(len(shard.clips) for shard in self.latents)

    @property
    def num_captions(self) -> int:
        return sum(len(shard.captions) for shard in self.text)


def hash_of(rows: Sequence[ClipRow]) -> str:
    """SHA-256 of all that a table says, but for the folders that its files are in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.path.name, row.text, row.num_frames, row.height, row.width, row.fps)).encode())
    return digest.hexdigest()


def make_plan(
    source: ClipSource, made_from: MadeFrom, autoencoder: VideoCodec, text_bytes: int, null_prompt: str | None = None
) -> Plan:
    """Which shards a cache will have.

    Args:
        source: the clips.
        made_from: how the cache is made.
        autoencoder: tells how large latents are.
        text_bytes: the most that a caption takes; 0 for a cache without text.
        null_prompt: a text that is encoded besides, because it stands for none in training; None for no such text.

    Raises:
        OpenSoraError: no clip is ever in a bucket, or one is of a length that the autoencoder cannot encode.
    """
    check_lengths(autoencoder, (bucket.num_frames for bucket in source.buckets.buckets if bucket.batch_size))
    by_bucket: dict[int, list[tuple[int, int]]] = {}
    captions: dict[str, None] = {} if null_prompt is None else {null_prompt: None}
    for number, row in enumerate(source.rows):
        for bucket in source.buckets.possible(row.num_frames, row.height, row.width, made_from.frame_interval):
            length = source.buckets.buckets[bucket].num_frames * made_from.frame_interval
            windows = min(made_from.windows, max(1, row.num_frames - length))
            by_bucket.setdefault(bucket, []).extend((number, window) for window in range(windows))
            captions[row.text] = None
    if not by_bucket:
        raise OpenSoraError("no clip is in any bucket, so there is nothing to encode; opensora data plan tells more")
    latents: list[LatentShard] = []
    for number in sorted(by_bucket):
        bucket = source.buckets.buckets[number]
        for clips in _cut(by_bucket[number], made_from.shard_bytes // _latent_bytes(bucket, made_from, autoencoder)):
            latents.append(LatentShard(f"latents/{len(latents):05d}.safetensors", bucket, clips))
    text = [] if text_bytes == 0 else _cut(list(captions), made_from.shard_bytes // text_bytes)
    return Plan(latents, [TextShard(f"text/{i:05d}.safetensors", part) for i, part in enumerate(text)])


def _latent_bytes(bucket: Bucket, made_from: MadeFrom, autoencoder: VideoCodec) -> int:
    """What a clip of a bucket takes."""
    factor, stored = autoencoder.spatial_factor, getattr(torch, made_from.latents.stored)
    cells = (bucket.height // factor) * (bucket.width // factor) * autoencoder.latent_frames(bucket.num_frames)
    copies = 2 if made_from.latents.contents == "posterior" else 1
    return copies * autoencoder.latent_channels * cells * stored.itemsize


def begin(folder: Path, rows: Sequence[ClipRow], made_from: MadeFrom) -> None:
    """Makes the folder, or proves that what it holds is to become the same cache.

    Raises:
        OpenSoraError: another cache, or a table of the user's, is there; names what differs.
    """
    path = folder / PLAN
    for place in (folder, folder / "latents", folder / "text"):
        if place.is_dir():
            remove_left_overs(place)
    if path.exists():
        before, now = flatten(to_dict(load_settings(MadeFrom, path))), flatten(to_dict(made_from))
        changed = [
            f"{k} is {now.get(k)} (was {before.get(k)})"
            for k in before | now
            if before.get(k) != now.get(k) and k != "clips"
        ]
        if before["clips"] != now["clips"]:
            clips = differences(read_manifest(folder / MANIFEST, text_required=False).rows, rows)
            changed += clips[:_MOST_DIFFERENCES] or ["its clips"]
            changed += [f"{len(clips) - _MOST_DIFFERENCES} more"] * (len(clips) > _MOST_DIFFERENCES)
        if changed:
            raise OpenSoraError(
                f"{folder} holds a cache that was made otherwise: {', '.join(changed)}; use what it was made with, "
                "or another `output`"
            )
        return
    table = folder / MANIFEST
    with replacing(table) as temporary:
        mine = temporary.with_name(MANIFEST)
        write_manifest(mine, rows, relative=True, folder=folder)
        if table.exists() and table.read_bytes() != mine.read_bytes():
            raise OpenSoraError(f"{folder} holds a {MANIFEST} that is not of a cache; choose another `output`")
        mine.replace(temporary)
    save_settings(made_from, path)


@torch.no_grad()
def make_latents(
    folder: Path,
    plan: Plan,
    source: ClipSource,
    autoencoder: VideoCodec,
    made_from: MadeFrom,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 4,
    progress: Progress | None = None,
) -> None:
    """Makes this rank's share of the latent shards that are not there yet.

    Args:
        folder: of the cache.
        plan: all shards.
        source: the clips.
        autoencoder: encodes them, where it is and in its own precision.
        made_from: how the cache is made.
        rank, num_ranks: whose share.
        num_workers: threads that read clips while others are encoded.
        progress: called with (clips done, clips in all) of this share.
    """
    stored = getattr(torch, made_from.latents.stored)
    with_variance = made_from.latents.contents == "posterior"

    def load(item: tuple[Bucket, tuple[int, int]]) -> _Read | FailedClip:
        bucket, (number, window) = item
        row, interval = source.rows[number], made_from.frame_interval
        seed = derive_seed(made_from.seed, "window", number, bucket_key(bucket), window)
        length = bucket.num_frames * (interval if bucket.num_frames > 1 else 1)
        first, _ = random_window(length, row.num_frames, random.Random(seed))
        try:
            video = read_clip(row, bucket, interval, random.Random(seed))
            return _Read(number, window, first, video, FileState.of(row.path))
        except (OpenSoraError, OSError) as error:
            return FailedClip(number, bucket_key(bucket), row.path.as_posix(), str(error))

    def encode(read: list[_Read], bucket: Bucket) -> Iterator[dict[str, Tensor]]:
        video = torch.stack([clip.video for clip in read])
        video = whole_cells(video, autoencoder.spatial_factor).to(autoencoder.device)
        posterior = autoencoder.posterior(video)
        means, logvars = posterior.mean.to(stored).cpu(), posterior.logvar.to(stored).cpu()
        for mean, logvar in zip(means, logvars, strict=True):
            yield {"mean": mean, "logvar": logvar}

    is_whole = functools.partial(_holds_what_is_there, folder, source.rows)
    with ThreadPoolExecutor(max(1, num_workers)) as readers:
        for shard in _share(plan.latents, rank, num_ranks, lambda shard: len(shard.clips), is_whole, progress):
            kept = _kept(folder, shard, source.rows)
            made: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Tensor]]] = {}
            failed: list[FailedClip] = []
            missing = [(shard.bucket, clip) for clip in shard.clips if clip not in kept]
            loaded = _ahead(readers, load, missing, 2 * num_workers)
            for batch in _batches(loaded, shard.bucket.batch_size):
                read = [clip for clip in batch if not isinstance(clip, FailedClip)]
                failed += [clip for clip in batch if isinstance(clip, FailedClip)]
                for clip, tensors in zip(read, encode(read, shard.bucket) if read else (), strict=True):
                    row = source.rows[clip.row]
                    if not all(tensor.isfinite().all() for tensor in tensors.values()):
                        reason = f"its latents are no {made_from.latents.stored} numbers"
                        failed.append(FailedClip(clip.row, bucket_key(shard.bucket), row.path.as_posix(), reason))
                        continue
                    fps = float(source.conditions([clip.row], shard.bucket).fps)
                    path = Path(os.path.relpath(row.path, folder)).as_posix()
                    note = {"row": clip.row, "window": clip.window, "path": path, "first_frame": clip.first_frame}
                    note |= {"fps": fps, "file": clip.file.to_note()}
                    made[clip.row, clip.window] = note, tensors if with_variance else {"mean": tensors["mean"]}
            found = [(kept | made)[clip] for clip in shard.clips if clip in kept or clip in made]
            tensors = {f"{i}.{name}": tensor for i, (_, parts) in enumerate(found) for name, tensor in parts.items()}
            size = {"num_frames": shard.bucket.num_frames, "height": shard.bucket.height, "width": shard.bucket.width}
            note = {"bucket": bucket_key(shard.bucket), "label": shard.bucket.label, **size}
            note |= {"clips": [clip for clip, _ in found], "failed": [to_dict(clip) for clip in failed]}
            write_shard(folder / shard.name, tensors, note)


@dataclass(frozen=True)
class _Read:
    """A piece of a clip that is to be encoded: video (3, T, H, W), and what its file holds."""

    row: int
    window: int
    first_frame: int
    video: Tensor
    file: FileState


@torch.no_grad()
def make_text(
    folder: Path,
    plan: Plan,
    encode: EncodeText,
    made_from: MadeFrom,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> None:
    """Makes this rank's share of the text shards that are not there yet; arguments as for `make_latents`."""
    assert made_from.text is not None
    stored = getattr(torch, made_from.text.stored)
    is_whole = functools.partial(_is_whole, folder)
    for shard in _share(plan.text, rank, num_ranks, lambda shard: len(shard.captions), is_whole, progress):
        tensors: dict[str, Tensor] = {}
        number = 0
        for captions in _batches(iter(shard.captions), batch_size):
            text = encode(captions).to("cpu", stored)
            for k in range(len(captions)):
                length = None if text.mask is None else int(text.mask[k].sum())
                tensors[f"{number}.states"] = text.states[k, :length].clone()
                if text.pooled is not None:
                    tensors[f"{number}.pooled"] = text.pooled[k].clone()
                number += 1
        write_shard(folder / shard.name, tensors, {"captions": shard.captions})


def finish(folder: Path, plan: Plan, made_from: MadeFrom) -> Index | None:
    """Writes the index if all shards are there; None if others are still being made."""
    names = [shard.name for shard in (*plan.latents, *plan.text)]
    if not all((folder / name).exists() for name in names):
        return None
    notes = [read_note(folder / shard.name) for shard in plan.latents]
    latents = [shard.name for shard in plan.latents]
    index = Index(
        made_from=made_from,
        latents=latents,
        text=[shard.name for shard in plan.text],
        num_latents=sum(len(noted(folder / n, note, "clips", list)) for n, note in zip(latents, notes, strict=True)),
        num_captions=plan.num_captions,
        failed=[from_dict(FailedClip, clip, str(folder)) for note in notes for clip in note.get("failed", [])],
        versions={name: version(name) for name in ("opensora", "torch", "diffusers", "transformers", "av")},
    )
    save_settings(index, folder / INDEX)
    return index


# --- shares, batches, reading ahead -----------------------------------------------------------------------------------


def _share(
    shards: Sequence[Any],
    rank: int,
    num_ranks: int,
    size: Callable[[Any], int],
    is_whole: Callable[[Any], bool],
    progress: Progress | None,
) -> Iterator[Any]:
    """A rank's shards that are not there yet, or not whole."""
    mine = shards[rank::num_ranks]
    done, total = 0, sum(map(size, mine))
    for shard in mine:
        if not is_whole(shard):
            yield shard
        done += size(shard)
        if progress is not None:
            progress(done, total)


def _is_whole(folder: Path, shard: LatentShard | TextShard) -> bool:
    """Whether a shard is there, and not damaged."""
    return _note_of(folder / shard.name) is not None


def _holds_what_is_there(folder: Path, rows: Sequence[ClipRow], shard: LatentShard) -> bool:
    """Whether a shard of latents is whole, lacks no clip that could not be read, and no file was replaced since."""
    note = _note_of(folder / shard.name)
    clips = _clips_of(folder / shard.name, note, rows)
    return note is not None and not note.get("failed") and bool(clips) and not any(replaced(c, rows) for c in clips)


def _kept(
    folder: Path, shard: LatentShard, rows: Sequence[ClipRow]
) -> dict[tuple[int, int], tuple[dict[str, Any], dict[str, Tensor]]]:
    """(row, window) -> note and tensors of the clips of a shard that is there, and whose files were not replaced."""
    path, reader, kept = folder / shard.name, ShardReader(folder), {}
    for number, clip in enumerate(_clips_of(path, _note_of(path), rows)):
        if "window" in clip and not replaced(clip, rows):
            names = [name for name in ("mean", "logvar") if reader.has(shard.name, f"{number}.{name}")]
            kept[clip["row"], clip["window"]] = (
                clip,
                {name: reader.read(shard.name, f"{number}.{name}") for name in names},
            )
    return kept


def _clips_of(path: Path, note: dict[str, Any] | None, rows: Sequence[ClipRow]) -> list[dict[str, Any]]:
    """What a shard notes of its clips; nothing if it is not there, or damaged."""
    try:
        return [] if note is None else clip_notes(path, note, len(rows))
    except OpenSoraError:
        return []


def _note_of(path: Path) -> dict[str, Any] | None:
    try:
        return read_note(path) if path.exists() else None
    except OpenSoraError:
        return None


def _cut(items: list[T], count: int) -> list[list[T]]:
    count = max(1, count)
    return [items[start : start + count] for start in range(0, len(items), count)]


def _batches(items: Iterable[T], count: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(readers: ThreadPoolExecutor, load: Callable[[T], R], items: Sequence[T], ahead: int) -> Iterator[R]:
    """What `load` returns for the items, in order, with some of the next ones under way."""
    waiting = [readers.submit(load, item) for item in items[:ahead]]
    for item in [*items[ahead:], *[None] * len(waiting)]:
        if item is not None:
            waiting.append(readers.submit(load, item))
        yield waiting.pop(0).result()
