"""Checkpoints that are either whole or not there.

A checkpoint is one file, `step-00001000.pt`, written under a temporary name, flushed to disk and renamed, so that a
process killed at any moment leaves the previous one as the newest. It is read with `weights_only=True`.
"""

import os
from pathlib import Path
from typing import Any

import torch

from opensora.errors import OpenSoraError
from opensora.files import replacing


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `state` as the checkpoint of `step` and removes all but the newest `keep`."""
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    killed = folder.glob(".step-*.part")  # what a killed run left half-written
    for old in [*list_checkpoints(folder)[:-keep], *killed]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        OpenSoraError: the file is not a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise OpenSoraError(
            f"{path} cannot be read as a checkpoint ({reason}); delete it to resume from the one before"
        ) from error
