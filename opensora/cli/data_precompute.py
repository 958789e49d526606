"""`opensora data precompute`: latents and text states of a manifest, encoded once before training."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from opensora.cli.options import FLAG, option, refuse_idle
from opensora.cli.parallel import speaking_once
from opensora.cli.progress import Progress, quiet_libraries
from opensora.errors import saying_what_is_kept
from opensora.files import check_writable


@dataclass(frozen=True)
class DataPrecompute:
    """Encode the clips of a manifest, and their captions, once, for a recipe that would encode them at every step.

    Autoencoder, text encoder, sizes and frame interval are the recipe's; settings of it are changed by KEY=VALUE after
    its name, as in training. Under torchrun the processes share the work. A run that was stopped is resumed with what
    is missing. Clips that cannot be read are left out and named.
    """

    # Words of the form KEY=VALUE may stand anywhere.
    SETTINGS: ClassVar[bool] = True

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
    """Name of the recipe."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")
    ] = ()
    """Settings to change, as KEY=VALUE."""
    manifest: Annotated[Path | None, option("FILE", "the recipe's")] = None
    """Table of clips, .csv or .parquet, as opensora data manifest makes it."""
    output: Annotated[Path, option("FOLDER", aliases=["--cache"])] = Path("cache")
    """Folder of the cache; what it holds is resumed."""
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
        from opensora.overrides import apply_overrides
        from opensora.recipes import find_recipe
        from opensora.training.diffusion.precompute import (
            CacheOptions,
            make_cache,
            silent,
            summary,
            task_on_clips,
        )

        options = CacheOptions(**{field.name: getattr(self, field.name) for field in fields(CacheOptions)})
        if not self.text:
            refuse_idle(self, ("text_dtype",), "--no-text leaves the captions alone")
        check_writable(self.output / "cache.json")
        quiet_libraries()
        recipe = find_recipe(self.recipe)
        config = apply_overrides(recipe, self.overrides).objective
        config, clips = task_on_clips(self.recipe, config, self.manifest)
        kept = lambda: f"what {self.output} holds is whole, and the same command makes the rest"  # noqa: E731
        with launched() as launch, speaking_once(launch), saying_what_is_kept(kept):
            device = str(choose_device(self.device))
            index = make_cache(
                self.output,
                config,
                clips,
                options,
                device=device,
                rank=launch.rank,
                num_ranks=launch.num_ranks,
                progress=_shown if launch.rank == 0 else silent,
            )
            if index is not None:
                print("\n".join(summary(self.output, index, config, recipe.objective)))


@contextlib.contextmanager
def _shown(work: str) -> "Iterator[Callable[[int, int], None] | None]":
    with Progress(work) as progress:
        yield progress.update
