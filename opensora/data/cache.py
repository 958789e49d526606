"""Latents and text states that were computed before training: what lies in a cache, and whether a run may use it.

A cache is a folder:

    cache.json              what it was made from, which shards it has; written last, so what has it is whole
    manifest.csv            the clips, in the order of their row numbers
    latents/00000.safetensors ...
    text/00000.safetensors ...

A latent shard holds clips of one bucket: `I.mean` and `I.logvar` of the normalised latents (C, T, h, w) of its I-th
clip, and a note that tells each one's row, frame rate and what its file held. A text shard holds `I.states` (L, D), the
states of its I-th caption without padding, and `I.pooled` (P) where networks read a pooled text. Latents only mean
something to a transformer together with the autoencoder and latent space that they were made with, so both are on
record, and a run with others is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.clip_rows import ClipRow
from opensora.data.buckets import Bucket
from opensora.data.file_states import FileState
from opensora.data.shards import ShardReader, noted, read_note
from opensora.errors import OpenSoraError
from opensora.manifest import read_manifest
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.text.conditioner import TextStates
from opensora.settings import load_settings

INDEX, MANIFEST = "cache.json", "manifest.csv"

Stored = Literal["float32", "float16", "bfloat16"]
"""Precisions that tensors can be stored in."""


@dataclass(frozen=True)
class LatentsMadeFrom:
    """What decides the latents of a cache besides the clips.

    Attributes:
        autoencoder: fingerprint of its weights (see `weights.fingerprint`).
        origin: where it came from, in the words of whoever made the cache.
        latent_space: the declaration that was in force, see `LatentSpace`.
        contents: mean and log-variance of the posterior, or the mean alone.
        stored: precision in the files.
        arithmetic: precision that the autoencoder ran in.
    """

    autoencoder: str
    origin: str
    latent_space: dict[str, Any]
    contents: Literal["posterior", "mean"]
    stored: Stored
    arithmetic: str


@dataclass(frozen=True)
class TextMadeFrom:
    """What decides the text states of a cache besides the captions.

    Attributes:
        encoder: fingerprint of its weights, or of those of both encoders.
        origin: where it came from.
        max_tokens: at which captions are cut.
        clean: whether captions were spelled as those of the published models.
        stored: precision in the files.
        arithmetic: precision that the encoder ran in.
    """

    encoder: str
    origin: str
    max_tokens: int
    clean: bool
    stored: Stored
    arithmetic: str


@dataclass(frozen=True)
class MadeFrom:
    """What decides the content of a cache: it is resumed only where all of this is the same.

    Attributes:
        clips: hash of the manifest's rows.
        buckets: their configuration, see `data.buckets`.
        frame_interval: every how manieth frame was taken.
        told_fps: which rate networks are told, see `ManifestClips`.
        windows: pieces taken of every clip.
        seed: of where these begin.
        shard_bytes: how large a shard may become.
        latents: see there.
        text: see there; None for a cache of latents alone.
        scores: whether captions end in the scores of the manifest.
        max_fps, rate_told: see `ManifestClips`.
    """

    clips: str
    buckets: dict[str, Any]
    frame_interval: int
    told_fps: Literal["taken", "file"]
    windows: int
    seed: int
    shard_bytes: int
    latents: LatentsMadeFrom
    text: TextMadeFrom | None
    scores: bool = False
    max_fps: float | None = None
    rate_told: bool | None = None


@dataclass(frozen=True)
class FailedClip:
    """A clip that could not be read when the cache was made, in one size (see `bucket_key`)."""

    row: int
    bucket: str
    path: str
    reason: str


@dataclass(frozen=True)
class Index:
    """The content of `cache.json`.

    Attributes:
        made_from: see there.
        latents, text: names of the shards.
        num_latents, num_captions: how much they hold.
        failed: what they do not hold.
        versions: of the packages that made it.
    """

    made_from: MadeFrom
    latents: list[str]
    text: list[str]
    num_latents: int
    num_captions: int
    failed: list[FailedClip] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedClip:
    """A clip's place in a cache: its shard, its number there, and the rate that networks are told."""

    shard: str
    number: int
    fps: float


class Cache:
    """A whole cache, opened for reading.

    Args:
        folder: where it lies.

    Attributes:
        index: see there.
        rows: the clips.

    Raises:
        OpenSoraError: there is none, it is not finished, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / INDEX).is_file():
            state = "is not finished" if (folder / MANIFEST).exists() else "holds no cache"
            raise OpenSoraError(f"{folder} {state}: there is no {INDEX}; make it with opensora data precompute")
        self.index = load_settings(Index, folder / INDEX)
        self.rows = read_manifest(folder / MANIFEST, text_required=False).rows
        self._clips: dict[tuple[int, str], list[CachedClip]] = {}
        self._captions: dict[str, tuple[str, int]] = {}
        for shard in self.index.latents:
            path = folder / shard
            note = read_note(path)
            bucket = noted(path, note, "bucket", str)
            for number, clip in enumerate(clip_notes(path, note, len(self.rows))):
                fps = noted(path, clip, "fps", float)
                if not fps > 0:
                    raise OpenSoraError(f"{path} is damaged: its note says that a clip has {fps:g} fps")
                self._clips.setdefault((clip["row"], bucket), []).append(CachedClip(shard, number, fps))
        for shard in self.index.text:
            path = folder / shard
            for number, caption in enumerate(noted(path, read_note(path), "captions", list)):
                self._captions[str(caption)] = (shard, number)
        self._reader = ShardReader(folder)

    def windows(self, row: int, bucket: Bucket) -> list[CachedClip]:
        """What there is of a clip in a size, window by window; nothing of a clip that could not be read."""
        return self._clips.get((row, bucket_key(bucket)), [])

    def bucket_keys(self) -> set[str]:
        """The sizes that there are."""
        return {key for _, key in self._clips}

    def posterior(self, clip: CachedClip) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (C, T, h, w) of the normalised latents, float32; no variance where none was kept."""
        mean = self._reader.read(clip.shard, f"{clip.number}.mean").float()
        if self.index.made_from.latents.contents == "mean":
            return self._checked(clip, mean), None
        logvar = self._reader.read(clip.shard, f"{clip.number}.logvar").float()
        return self._checked(clip, mean), self._checked(clip, logvar, mean.shape)

    def _checked(self, clip: CachedClip, latents: Tensor, shape: torch.Size | None = None) -> Tensor:
        if latents.ndim != 4 or (shape is not None and latents.shape != shape):
            expected = "(C, T, h, w)" if shape is None else tuple(shape)
            raise OpenSoraError(
                f"{self.folder / clip.shard} is damaged: clip {clip.number} has latents of shape "
                f"{tuple(latents.shape)}, expected {expected}; delete it and make the cache again, the rest is kept"
            )
        return latents

    def text(self, captions: Iterable[str]) -> TextStates:
        """The text of captions, L as the longest has.

        Raises:
            OpenSoraError: a caption that the cache was not made with, or a cache without text.
        """
        found = []
        for caption in captions:
            if caption not in self._captions:
                what = f"the caption {caption[:40]!r}" if self.index.text else "text states"
                raise OpenSoraError(f"the cache {self.folder} does not hold {what}; make it again with this text")
            shard, number = self._captions[caption]
            states, pooled = self._reader.read(shard, f"{number}.states")[None].float(), None
            if self._reader.has(shard, f"{number}.pooled"):
                pooled = self._reader.read(shard, f"{number}.pooled")[None].float()
            found.append(TextStates(states, pooled=pooled))
        length = max(text.states.shape[1] for text in found)
        return TextStates.cat([text.padded(length) for text in found])

    # ---- may a run use it?

    def check_files(self) -> None:
        """Refuses latents of files that were replaced since; those that are not here any more cannot be asked.

        Raises:
            OpenSoraError: naming one of them and what to do.
        """
        shards = (read_note(self.folder / shard)["clips"] for shard in self.index.latents)
        if others := {clip["row"]: clip["path"] for clips in shards for clip in clips if replaced(clip, self.rows)}:
            raise OpenSoraError(
                f"the cache {self.folder} was made of other files than lie there now: {len(others)} of "
                f"{len(self.rows)} clips were replaced, such as {next(iter(others.values()))}; run opensora data "
                "precompute again as before, it encodes these alone"
            )

    def check_autoencoder(self, fingerprint: str, latent_space: LatentSpace) -> None:
        """Refuses latents that another autoencoder or another latent space made.

        Args:
            fingerprint: of the run's autoencoder.
            latent_space: in force in the run.

        Raises:
            OpenSoraError: naming both sides and the two ways out.
        """
        made = self.index.made_from.latents
        differences = LatentSpace.from_dict(made.latent_space).differences(latent_space)
        sides = [
            f"{name} is {theirs} in the cache but {ours} in this run" for name, (theirs, ours) in differences.items()
        ]
        what = "another latent space"
        if not sides and made.autoencoder != fingerprint:
            what = "another autoencoder"
            sides = [f"its weights are {made.autoencoder[:12]} in the cache but {fingerprint[:12]} in this run"]
        if sides:
            self._refuse(what, "; ".join(sides), "autoencoder", made.origin)

    def check_text(self, fingerprint: str | None, max_tokens: int, clean: bool) -> None:
        """Refuses text states that another encoder made, or the same one from text cut or spelled otherwise.

        Args:
            fingerprint: of the run's encoder; None where it is not loaded.
            max_tokens: at which this run would cut captions.
            clean: how it would spell them.

        Raises:
            OpenSoraError: naming both sides and the two ways out.
        """
        made = self.index.made_from.text
        if made is None:
            raise OpenSoraError(
                f"the cache {self.folder} holds no text states; make it again with them, or train with "
                "objective.text.type=FrozenText"
            )
        sides = [
            f"{name} is {theirs} in the cache but {ours} in this run"
            for name, theirs, ours in (("max_tokens", made.max_tokens, max_tokens), ("clean", made.clean, clean))
            if theirs != ours
        ]
        if not sides and fingerprint is not None and made.encoder != fingerprint:
            sides = [f"its weights are {made.encoder[:12]} in the cache but {fingerprint[:12]} in this run"]
        if sides:
            self._refuse("another text encoder", "; ".join(sides), "text encoder", made.origin)

    def _refuse(self, what: str, sides: str, part: str, origin: str) -> None:
        raise OpenSoraError(
            f"the cache {self.folder} was made with {what}: {sides}. Make it again with this run's {part} "
            f"(opensora data precompute, another `output`), or train with the {part} that made it ({origin})"
        )


def bucket_key(bucket: Bucket) -> str:
    """How a shard names the size of its clips: length and pixels, whatever the resolution is called."""
    return f"{bucket.num_frames}x{bucket.height}x{bucket.width}"


def clip_notes(path: Path, note: Any, num_rows: int) -> list[dict[str, Any]]:
    """What a shard notes of each of its clips: which row of the table it is, and which window of that, if it was read.

    Raises:
        OpenSoraError: an entry that is none, or of a row that there is not.
    """
    clips = noted(path, note, "clips", list)
    for clip in clips:
        row = noted(path, clip, "row", int)
        if not 0 <= row < num_rows:
            raise OpenSoraError(
                f"{path} is damaged: its note says row {row}, and the table of its cache has {num_rows}"
            )
        if "window" in clip:
            noted(path, clip, "window", int)
    return clips


def replaced(clip: Mapping[str, Any], rows: Sequence[ClipRow]) -> bool:
    """Whether another file lies in the place of one that latents were made of.

    Args:
        clip: what a shard notes of it.
        rows: the clips.
    """
    state = FileState.noted(clip.get("file", {}))
    return state is not None and state.differs_from(rows[clip["row"]].path)
