"""`opensora train RECIPE --dry-run`: what a run would take, before anything is loaded, downloaded or trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from opensora.cli.options import FLAG, flag, given_options, option
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.training.config import Recipe


@dataclass(frozen=True)
class DryRunOptions:
    """What a run would take on which machines; GB are 1024^3 bytes."""

    dry_run: Annotated[bool, FLAG] = False
    """Print memory, work, communication and time of the run, and stop; exit code 2 if it does not fit."""
    world_size: Annotated[int | None, option("N", "1")] = None
    """With --dry-run: processes, one on each device."""
    mfu: Annotated[float | None, option("SHARE", "0.4")] = None
    """With --dry-run: share of the device's peak that the run reaches."""
    price_per_hour: Annotated[float | None, option("PRICE", "none")] = None
    """With --dry-run: what an hour of one device costs, in any currency."""
    json: Annotated[bool, FLAG] = False
    """With --dry-run: print JSON, for programs."""

    def check(self) -> None:
        """Raises `OpenSoraError` for an option that needs `--dry-run`, or for an impossible number."""
        without = [flag(name) for name, _ in given_options(self) if name != "dry_run"]
        if without and not self.dry_run:
            raise OpenSoraError(f"{without[0]} goes with --dry-run; training takes the number of ranks from torchrun")
        if self.world_size is not None and self.world_size < 1:
            raise OpenSoraError(f"--world-size is {self.world_size}; give 1 or more")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise OpenSoraError(f"--mfu is {self.mfu:g}; give a share above 0 and up to 1, such as 0.4")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise OpenSoraError(f"--price-per-hour is {self.price_per_hour:g}; give 0 or more")

    def run(self, recipe: "Recipe", folder: Path, device: str | None) -> None:
        """Prints the plan.

        Args:
            recipe: what would run.
            folder: where.
            device: a name of `planning.devices`, or a torch device; None for the CPU.

        Raises:
            OpenSoraError: an unknown device, or a run that does not fit on it.
        """
        describe(recipe, folder, "cpu")


def describe(recipe: "Recipe", folder: Path, device: str) -> None:
    """Prints the recipe's settings, the parameters it trains and where it would start."""
    import json

    from opensora.settings import to_dict
    from opensora.distributed.checkpoint import list_checkpoints

    module = recipe.objective.build(device).module
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    print(json.dumps(to_dict(recipe), indent=2))
    print(f"parameters: {trained:,} trained, {frozen:,} frozen")
    for name, child in module.named_children():
        print(f"  {name}: {sum(p.numel() for p in child.parameters()):,}")
    checkpoints = list_checkpoints(folder / "checkpoints")
    start = f"resume from {checkpoints[-1].name}" if checkpoints else "start at step 0"
    print(f"run: {folder}, {recipe.loop.steps} steps, {start}")
