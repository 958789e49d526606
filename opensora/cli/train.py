"""`opensora train`: run a recipe, or see what it would do."""

import contextlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from opensora.cli.dry_run import DryRunOptions
from opensora.cli.options import option
from opensora.cli.parallel import speaking_once
from opensora.cli.progress import Bar, quiet_libraries
from opensora.files import owned
from opensora.limits import THREADS, check_count

if TYPE_CHECKING:
    from opensora.training.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe; a run that was interrupted is resumed from its last checkpoint.

    `torchrun --nproc-per-node 8 -m opensora.cli.main train RECIPE` trains on eight devices, and likewise on many nodes.
    Settings of the recipe are changed by KEY=VALUE after its name, such as loop.steps=100; `--settings` lists them all.
    """

    # Words of the form KEY=VALUE may stand anywhere.
    SETTINGS: ClassVar[bool] = True

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
    """Name of the recipe."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")
    ] = ()
    """Settings to change, as KEY=VALUE."""
    output: Annotated[Path | None, option("FOLDER", "runs/RECIPE")] = None
    """Folder of the run. What it holds is resumed."""
    cache: Annotated[Path | None, option("FOLDER", "none")] = None
    """Latents and text states that opensora data precompute made for this recipe, in place of its clips."""
    device: Annotated[str | None, option("DEVICE", "an accelerator if there is one")] = None
    """cpu, cuda or mps. With --dry-run also h100-80g and others."""
    threads: Annotated[int | None, option("N", "all cores")] = None
    """CPU threads. Bit-for-bit resumption needs the same number."""
    plan: tyro.conf.OmitArgPrefixes[Annotated[DryRunOptions, tyro.conf.arg(name="plan")]] = field(
        default_factory=DryRunOptions
    )

    def run(self) -> None:
        from opensora.distributed.mesh import launched

        self.plan.check()
        with launched() as launch, speaking_once(launch):
            self.run_rank(is_first=launch.rank == 0)

    def run_rank(self, is_first: bool) -> None:
        """One of the ranks, of which the first shows how far all of them are."""
        import torch

        from opensora.checkpoints.loading import choose_device
        from opensora.overrides import apply_overrides
        from opensora.recipes import find_recipe
        from opensora.training.diffusion.precompute import on_cache
        from opensora.training.interrupts import stopping_between_steps
        from opensora.training.trainer import Trainer

        if self.threads is not None:
            torch.set_num_threads(check_count("`threads`", self.threads, THREADS))
        quiet_libraries()
        recipe = find_recipe(self.recipe)
        if self.cache is not None:
            recipe = replace(recipe, objective=on_cache(recipe.name, recipe.objective, self.cache))
        recipe = apply_overrides(recipe, self.overrides)
        folder = self.output or Path("runs") / recipe.name
        if self.plan.wanted:
            if is_first:
                self.plan.run(recipe, folder, self.device)
            return
        device = str(choose_device(self.device))
        nothing = contextlib.nullcontext()
        with owned(folder) if is_first else nothing, Progress() if is_first else nothing as progress:
            trainer = Trainer(recipe, folder, device, on_step=progress.update if progress else None)
            if progress:
                progress.start(trainer, folder)
            with stopping_between_steps(trainer):
                model = trainer.run()
        if is_first:
            if trainer.skipped_steps:
                print(f"{trainer.skipped_steps} of {trainer.step} steps were skipped: their gradients were not finite")
            print(f"model: {model}")


class Progress(Bar):
    """A bar with the loss and an estimate of the time left; plain lines where there is no terminal."""

    lines_every = 100  # steps

    def __init__(self) -> None:
        super().__init__("preparing", "MofNComplete", "TimeElapsed", "TimeRemaining", stderr=False)
        self.first_step, self.started = 0, time.monotonic()

    def start(self, trainer: "Trainer", folder: Path) -> None:
        lines = [f"resuming {folder} at step {trainer.step}"] if trainer.step else []
        for line in (*lines, *trainer.notes):  # as it is: paths may look like markup
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.show(trainer.step, trainer.loop.steps)
        self.first_step, self.started = trainer.step, time.monotonic()

    def update(self, step: int, steps: int, figures: dict[str, float]) -> None:
        loss = f"{figures['loss']:.4f}"
        self.show(step, steps, f"training, loss {loss}")
        if self.bar.disable and (step % self.lines_every == 0 or step == steps):
            step_s = (time.monotonic() - self.started) / (step - self.first_step)
            print(f"step {step} of {steps}: loss {loss}, {step_s:.2f} s a step, {step_s * (steps - step):.0f} s left")
