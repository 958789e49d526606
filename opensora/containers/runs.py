"""A training run as a model: `runs/x` is its finished model or its newest checkpoint, `runs/x@400` that of step 400.

A run's folder holds `recipe.json`, `checkpoints/step-00000400/`, at its end `model/`, and from its beginning `frozen/`:
what a checkpoint lacks of a model, that is configurations, networks that are not trained, and `weights.safetensors`,
the part that is not trained of what is. A checkpoint's averaged weights with these are the model at that step.
"""

import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora.containers.tensors import StoredTensors, TensorInfo
from opensora.contents import check_access, read_json, read_object
from opensora.distributed.checkpoint import WholeTensors, list_checkpoints
from opensora.errors import OpenSoraError
from opensora.settings import from_dict

RECIPE = "recipe.json"
HISTORY = "history.json"
CHECKPOINTS = "checkpoints"
MODEL = "model"
FROZEN_PARTS = "frozen"
FROZEN_WEIGHTS = "weights.safetensors"
ABOUT = "about.json"

_STEP = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenParts:
    """What `frozen/about.json` says.

    Attributes:
        trained: networks that checkpoints hold, by their place in a pipeline.
        buffers: names of tensors of these that are no parameters.
        tied: name of a parameter that stands in two places -> its first name, under which it is kept.
        origins: network that is neither in checkpoints nor in `frozen/` -> where it came from.
    """

    trained: list[str]
    buffers: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / RECIPE).is_file() and ((folder / CHECKPOINTS).is_dir() or (folder / MODEL).is_dir())


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return _STEP.fullmatch(path.name) is not None and (path / "index.json").is_file()


def resolve_run(path: Path) -> Path:
    """The folder of the model or of the checkpoint that a run stands for; a path that is no run is returned as it is.

    Args:
        path: "runs/x", "runs/x@400", "runs/x@latest", "runs/x@model". What exists under a name with "@" in it is
            itself.

    Raises:
        OpenSoraError: the run has no such checkpoint; names those there are. Or it has none at all.
    """
    check_access(path)
    if os.path.lexists(path):
        return _newest(path) if is_run(path) else path
    name, at, which = path.name.rpartition("@")
    check_access(path.with_name(name) if at and name else path)
    run = path.with_name(name) if at and name else path
    if run == path or not is_run(run):
        return path
    checkpoints = {int(step[1]): found for found in list_checkpoints(run / CHECKPOINTS) if (step := _step_of(found))}
    if which == MODEL and (run / MODEL).is_dir():
        return run / MODEL
    if which == "latest" and checkpoints:
        return checkpoints[max(checkpoints)]
    if which.isdecimal() and int(which) in checkpoints:
        return checkpoints[int(which)]
    steps = ", ".join(map(str, sorted(checkpoints))) or "none"
    model = f"; its finished model is {run}@{MODEL}" if (run / MODEL).is_dir() else ""
    raise OpenSoraError(f"{run} has no checkpoint {which!r}; it has those of steps {steps}{model}")


def read_history(run: Path) -> list[dict[str, Any]]:
    """What happened to a run, oldest first: settings that changed, models that were exported, each at a step.

    Raises:
        OpenSoraError: the file is damaged.
    """
    path = run / HISTORY
    entries = read_json(path) if path.is_file() else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise OpenSoraError(f"{path} is no list of what happened to the run; give back the file, or remove it")
    return entries


def frozen_folder(checkpoint: Path) -> Path:
    """The folder of what a checkpoint lacks of a model.

    Raises:
        OpenSoraError: its run has none.
    """
    folder = checkpoint.parent.parent / FROZEN_PARTS
    if not (folder / ABOUT).is_file():
        raise OpenSoraError(
            f"{checkpoint} is not a whole model, and what it lacks is not in {folder}; the run's command with "
            f"loop.steps={int(checkpoint.name[5:])} writes the model of a run that ends there"
        )
    return folder


def read_about(checkpoint: Path) -> FrozenParts:
    """What the parts are that a checkpoint lacks."""
    path = frozen_folder(checkpoint) / ABOUT
    return from_dict(FrozenParts, read_object(path), where=str(path))


def described_in(path: Path, kind: str | None) -> Path:
    """The `config.json` of a network at a path: of a checkpoint's, the one in its run's frozen parts."""
    if not is_checkpoint(path):
        return path / "config.json"
    folder = path.parent.parent / FROZEN_PARTS
    of_part = folder / (kind or "") / "config.json"
    return of_part if of_part.is_file() else folder / "config.json"


class RunTensors(Mapping[str, Tensor]):
    """The averaged weights of a checkpoint, with all that belongs to them and is not trained.

    Args:
        checkpoint: its folder.

    Attributes:
        infos: name -> shape and dtype; names begin with a network's place in the pipeline where there are several.
    """

    def __init__(self, checkpoint: Path) -> None:
        about, folder = read_about(checkpoint), frozen_folder(checkpoint)
        self._trained = WholeTensors(checkpoint)
        names = {name.removeprefix("average/"): name for name in self._trained if name.startswith("average/")}
        names |= {name: f"module/{name}" for name in about.buffers if f"module/{name}" in self._trained}
        names |= {name: names[first] for name, first in about.tied.items() if first in names}
        self._frozen = StoredTensors([folder / FROZEN_WEIGHTS]) if (folder / FROZEN_WEIGHTS).is_file() else {}
        self._names = names
        of_frozen = self._frozen.infos if isinstance(self._frozen, StoredTensors) else {}
        self.infos: dict[str, TensorInfo] = {n: info for n, info in of_frozen.items() if n not in names}
        for name, there in names.items():
            shape, dtype = self._trained.shape_of(there)
            self.infos[name] = TensorInfo(shape, str(dtype).removeprefix("torch."))

    @property
    def files(self) -> list[Path]:
        """All files that something is read from."""
        found = {file for there in self._names.values() for file in self._trained.files_of(there)}
        if isinstance(self._frozen, StoredTensors):
            found |= {self._frozen.file_of(name) for name in self._frozen}
        return sorted(found)

    def __getitem__(self, name: str) -> Tensor:
        return self._trained[self._names[name]] if name in self._names else self._frozen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _newest(run: Path) -> Path:
    """The finished model of a run, or its newest checkpoint if that is newer."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    newest = max((int(step[1]) for path in checkpoints if (step := _step_of(path))), default=-1)
    exported = [entry["exported"] for entry in read_history(run) if isinstance(entry.get("exported"), int)]
    if (run / MODEL).is_dir() and (not exported or exported[-1] >= newest):
        _say_once(f"{run}: taking its finished model{f', of step {exported[-1]}' if exported else ''}")
        return run / MODEL
    if newest < 0:
        raise OpenSoraError(f"{run} is a run without a checkpoint yet; train it further first")
    _say_once(f"{run}: taking the averaged weights of its newest checkpoint, of step {newest}")
    return run / CHECKPOINTS / f"step-{newest:08d}"


def _step_of(path: Path) -> re.Match[str] | None:
    return _STEP.fullmatch(path.name) if is_checkpoint(path) else None


@functools.lru_cache(maxsize=256)
def _say_once(line: str) -> None:
    """A run is found again and again, for its header and for its data."""
    logger.warning("%s", line)
