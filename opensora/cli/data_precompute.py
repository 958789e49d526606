"""`opensora data precompute`: latents and text states of a manifest, encoded once before training."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opensora.cli.evaluate import check_count
from opensora.cli.options import FLAG, option
from opensora.cli.parallel import speaking_once
from opensora.cli.progress import Progress
from opensora.errors import OpenSoraError
from opensora.files import check_writable
from opensora.settings import to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.data.cache import Index
    from opensora.data.clips import ManifestClips
    from opensora.data.precompute import EncodeText
    from opensora.training.diffusion.task import DiffusionTaskConfig
    from opensora.training.diffusion.text import Captions

_MOST_FAILED = 20


@dataclass(frozen=True)
class DataPrecompute:
    """Encode the clips of a manifest, and their captions, once, for a recipe that would encode them at every step.

    Autoencoder, text encoder, sizes and frame interval are the recipe's; settings of it are changed by KEY=VALUE after
    its name, as in training. Under torchrun the processes share the work. A run that was stopped goes on with what is
    missing. Clips that cannot be read are left out and named.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
    """Name of the recipe."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")
    ] = ()
    """Settings to change, as KEY=VALUE."""
    manifest: Annotated[Path | None, option("FILE", "the recipe's")] = None
    """Table of clips, .csv or .parquet, as opensora data manifest makes it."""
    output: Annotated[Path, option("FOLDER")] = Path("cache")
    """Folder of the cache; what it holds is gone on with."""
    contents: Literal["posterior", "mean"] = "posterior"
    """What is kept of a clip: mean and variance, to draw from as training on clips does, or the mean alone."""
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Precision of the latents in the files."""
    text_dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Precision of the text states in the files."""
    text: Annotated[bool, FLAG] = True
    """Leave the captions alone; training then encodes them at every step."""
    windows_per_clip: int = 1
    """Pieces taken of a clip that is longer than its size asks for, each from a random place."""
    seed: int = 0
    """Chooses these places."""
    shard_mb: float = 256
    """How large a file may become, in MB."""
    workers: int = 4
    """Threads that read clips while others are encoded."""
    device: Annotated[str | None, option("DEVICE", "an accelerator if there is one")] = None
    """cpu, cuda or mps."""

    def run(self) -> None:
        from opensora.checkpoints.loading import choose_device
        from opensora.distributed.mesh import launched
        from opensora.recipes import find_recipe
        from opensora.settings import apply_overrides

        check_count("--windows-per-clip", self.windows_per_clip)
        if not self.shard_mb > 0:
            raise OpenSoraError(f"--shard-mb is {self.shard_mb:g}; give more than 0")
        check_count("--workers", self.workers)
        check_writable(self.output / "cache.json")
        config = apply_overrides(find_recipe(self.recipe), self.overrides).objective
        config, clips = objective_on_clips(self.recipe, config, self.manifest)
        with launched() as launch, speaking_once(launch):
            self.encode(config, clips, str(choose_device(self.device)), launch.rank, launch.num_ranks)

    def encode(
        self, config: "DiffusionTaskConfig", clips: "ManifestClips", device: str, rank: int, num_ranks: int
    ) -> None:
        """This process's share."""
        import torch

        from opensora.checkpoints.weights import fingerprint
        from opensora.data import precompute
        from opensora.data.cache import LatentsMadeFrom, MadeFrom, TextMadeFrom
        from opensora.data.clips import ClipSource
        from opensora.models.autoencoders.video import VideoAutoencoder
        from opensora.training.diffusion.text import Captions, TrainedText
        from opensora.training.parts import META, build_part

        source = ClipSource(clips)
        # The autoencoder is the smaller one and waits on the CPU while text is encoded.
        dtype = getattr(torch, config.frozen_dtype)
        autoencoder = build_part(config.autoencoder, "autoencoder", VideoAutoencoder, "cpu", dtype)
        captions = text = None
        text_bytes = 0
        if self.text and not isinstance(config.text, TrainedText):
            outline = config.build(META).captions
            captions = Captions(config.text, config.init_from, outline.max_tokens, outline.clean, device, outline.dtype)
            encoder = captions.load()
            captions.check_words(row.text for row in source.rows)
            text = TextMadeFrom(
                encoder=fingerprint(encoder.state_dict()),
                origin=describe_origin(config.text.origin),
                max_tokens=captions.max_tokens,
                clean=captions.clean,
                stored=self.text_dtype,
                arithmetic=config.frozen_dtype,
            )
            text_bytes = captions.max_tokens * encoder.config.d_model * getattr(torch, self.text_dtype).itemsize
        made_from = MadeFrom(
            clips=precompute.hash_of(source.rows),
            buckets=clips.buckets,
            frame_interval=clips.frame_interval,
            told_fps=clips.told_fps,
            scores=clips.scores,
            windows=self.windows_per_clip,
            seed=self.seed,
            shard_bytes=round(self.shard_mb * 1e6),
            latents=LatentsMadeFrom(
                autoencoder=fingerprint(autoencoder.state_dict()),
                origin=describe_origin(config.autoencoder),
                latent_space=autoencoder.latent_space.to_dict(),
                contents=self.contents,
                stored=self.latents_dtype,
                arithmetic=config.frozen_dtype,
            ),
            text=text,
        )
        plan = precompute.make_plan(source, made_from, autoencoder, text_bytes)
        precompute.begin(self.output, source.rows, made_from)
        share = {"rank": rank, "num_ranks": num_ranks}
        if captions is not None:
            with Progress("encoding captions") as progress:
                told = progress.update if rank == 0 else None
                precompute.make_text(self.output, plan, encode_with(captions), made_from, **share, progress=told)
            del captions
        with Progress("encoding clips") as progress:
            told = progress.update if rank == 0 else None
            precompute.make_latents(
                self.output,
                plan,
                source,
                autoencoder.to(device),
                made_from,
                **share,
                num_workers=self.workers,
                progress=told,
            )
        index = precompute.finish(self.output, plan, made_from)
        if index is not None:
            if index.num_latents == 0:
                first = index.failed[0]
                raise OpenSoraError(f"no clip could be read; the first one: {first.path}: {first.reason}")
            print("\n".join(summary(self.output, index, config)))


def objective_on_clips(name: str, objective: Any, manifest: Path | None) -> "tuple[DiffusionTaskConfig, ManifestClips]":
    """The objective of a recipe that trains a diffusion transformer on the clips of a manifest, and these clips.

    Args:
        name: of the recipe.
        objective: of the recipe.
        manifest: to take the place of the recipe's.

    Raises:
        OpenSoraError: it trains something else, or on something else.
    """
    from opensora.data.clips import ManifestClips
    from opensora.training.diffusion.task import DiffusionTaskConfig

    if not isinstance(objective, DiffusionTaskConfig):
        raise OpenSoraError(f"recipe {name} trains no diffusion transformer, so it has no use for a cache of latents")
    if not isinstance(objective.data, ManifestClips):
        raise OpenSoraError(
            f"recipe {name} trains on {type(objective.data).__name__}, not on the clips of a manifest; "
            "give objective.data.type=ManifestClips and its buckets, or another recipe"
        )
    clips = objective.data if manifest is None else replace(objective.data, manifest=manifest)
    if clips.manifest is None:
        raise OpenSoraError("no manifest; name the table of your clips by --manifest FILE")
    return replace(objective, data=clips), clips


def encode_with(captions: "Captions") -> "EncodeText":
    """Captions -> states and mask."""

    def encode(texts: list[str]) -> "tuple[Tensor, Tensor]":
        tokens, mask = (tensor.to(captions.device) for tensor in captions.tokens(texts))
        return captions.encode(tokens, mask), mask

    return encode


def describe_origin(origin: Any) -> str:
    """Where a network came from, in words."""
    return origin if isinstance(origin, str) else f"untrained, seed {origin.seed}"


def summary(folder: Path, index: "Index", config: "DiffusionTaskConfig") -> list[str]:
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
