"""Where a command runs: the device asked for, or the one rule for when none is."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(name: str | None) -> "torch.device":
    """The device of that name; for None an accelerator if there is one, else the CPU.

    Raises:
        OpenSoraError: no such device, or it is absent here.
    """
    import torch

    from opensora.checkpoints.loading import resolve_device

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return resolve_device(name or accelerator or "cpu")
