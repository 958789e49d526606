"""`opensora train RECIPE --dry-run`: what a run would take, before anything is loaded, downloaded or trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from opensora.cli.options import FLAG, flag, given_options, option, with_flags
from opensora.errors import OpenSoraError
from opensora.overrides import assignments

if TYPE_CHECKING:
    from opensora.training.config import Recipe

_MFU = 0.4


@dataclass(frozen=True)
class DryRunOptions:
    """What a run would take on which machines; GB are 1024^3 bytes."""

    dry_run: Annotated[bool, FLAG] = False
    """Print memory, work, communication and time of the run, and stop; exit code 2 if it does not fit."""
    world_size: Annotated[int | None, option("N", "1")] = None
    """With --dry-run: processes, one on each device."""
    mfu: Annotated[float | None, option("SHARE", str(_MFU))] = None
    """With --dry-run: share of the device's peak that all computation reaches."""
    price_per_hour: Annotated[float | None, option("PRICE", "none")] = None
    """With --dry-run: what an hour of one device costs, in any currency."""
    json: Annotated[bool, FLAG] = False
    """With --dry-run: print JSON, for programs."""
    settings: Annotated[bool, FLAG] = False
    """Print the recipe's settings as KEY=VALUE, as they can be given, and stop."""

    def check(self) -> None:
        """Raises `OpenSoraError` for an option that needs `--dry-run`, or for an impossible number."""
        without = [flag(name) for name, _ in given_options(self) if name not in ("dry_run", "settings")]
        if without and not self.dry_run:
            raise OpenSoraError(f"{without[0]} goes with --dry-run; training takes the number of ranks from torchrun")
        if self.world_size is not None and self.world_size < 1:
            raise OpenSoraError(f"--world-size is {self.world_size}; give 1 or more")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise OpenSoraError(f"--mfu is {self.mfu:g}; give a share above 0 and up to 1, such as {_MFU}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < float("inf"):
            raise OpenSoraError(f"--price-per-hour is {self.price_per_hour:g}; give 0 or more")

    @property
    def wanted(self) -> bool:
        """Whether to print instead of training."""
        return self.dry_run or self.settings

    def run(self, recipe: "Recipe", folder: Path, device: str | None) -> None:
        """Prints what was asked for.

        Args:
            recipe: what would run.
            folder: where.
            device: a name of `planning.devices`; None for this machine's CPU.

        Raises:
            OpenSoraError: an unknown device, or a run that does not fit on it.
        """
        from opensora.planning.devices import find_device
        from opensora.planning.report import gigabytes
        from opensora.training.plan import TrainingPlan
        from opensora.training.plan_report import advice, describe_plan, plan_lines

        if self.settings:
            print("\n".join(assignments(recipe)))
            return
        plan = TrainingPlan(recipe, find_device(device or "cpu"), self.world_size or 1, self.mfu or _MFU)
        report = describe_plan(plan, recipe, folder, self.price_per_hour)
        if self.json:
            print(with_flags(json.dumps(report, indent=2), self))
        else:
            print("\n".join(line.rstrip() for line in plan_lines(report)))
        if not report["fits"]:
            needs, has = gigabytes(report["memory"]["total"]), gigabytes(plan.device.memory_bytes)
            raise OpenSoraError(f"{recipe.name} does not fit into {has}: a rank needs {needs}; {advice(report)}")
