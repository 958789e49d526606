"""Adapters as they lie on disk: which file of a folder is one, its tensors, and what is said beside them."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.adapters.names import ALPHA_OF_LAYER, is_part_of_adapter
from opensora.adapters.strength import stated_among
from opensora.containers.runs import FROZEN_PARTS, RunTensors, is_checkpoint, resolve_run
from opensora.containers.tensors import WEIGHT_SUFFIXES, StoredTensors, first_line, read_numbers
from opensora.contents import check_regular, describe_kind, kind_of, read_object
from opensora.errors import OpenSoraError
from opensora.models.format import RenamedWeights

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_PEFT_NAME = ".default."  # of the only adapter beside a network in training
_FILES = (ADAPTER_FILE, "pytorch_lora_weights.bin")  # of diffusers
_PEFT_FILES = (PEFT_FILE, "adapter_model.bin")


@dataclass(frozen=True)
class StoredAdapter:
    """What is stored of an adapter.

    Attributes:
        path: file of its tensors.
        tensors: under the names that the file gives them.
        metadata: of a safetensors file.
        config: PEFT's configuration beside the file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or the only one in a folder, or in a folder of that.

    Raises:
        OpenSoraError: nothing there, or several.
    """
    path = resolve_run(Path(path).expanduser())
    if not path.is_dir():
        if not path.exists():
            raise OpenSoraError(f"{path} is missing; expected an adapter: a file of LoRA, or the folder that holds it")
        check_regular(path, "adapter")
        return path
    found = _adapters_in(path) or [
        file for below in sorted(path.iterdir()) if below.is_dir() for file in _adapters_in(below)
    ]
    if not found:
        raise OpenSoraError(f"{path} holds no adapter; expected {ADAPTER_FILE}, or {PEFT_FILE} and {PEFT_CONFIG}")
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found[:4]) + (", ..." if len(found) > 4 else "")
        raise OpenSoraError(f"{path} holds {len(found)} adapters ({names}); name one of them")
    return found[0]


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a file whose tensors are those of an adapter, or a folder that holds one or more of them."""
    path = resolve_run(Path(path).expanduser())
    if is_checkpoint(path):
        return _begun_with(path).is_file()
    return bool(_adapters_in(path)) if path.is_dir() else _holds_adapter(path)


def read_stored(path: str | Path) -> StoredAdapter:
    """Opens an adapter; its tensors are read when they are asked for.

    Raises:
        OpenSoraError: it is missing, damaged, or no file of tensors.
    """
    if is_checkpoint(run := resolve_run(Path(path).expanduser())):
        return _read_checkpoint(run)
    file = adapter_file(path)
    kind, expected = kind_of(file), "expected safetensors, or a file of torch.save"
    if kind not in ("safetensors", "torch zip", "pickle"):
        raise OpenSoraError(f"{file} is not a readable adapter: it is {describe_kind(kind)}; {expected}")
    try:
        tensors: Mapping[str, Tensor] = StoredTensors([file])
        if kind == "safetensors":
            metadata = _metadata(file)
        else:
            numbers = read_numbers(file)
            tensors = {**tensors, **_alphas_among(numbers, tensors)}
            metadata = stated_among(numbers)
    except (OpenSoraError, SafetensorError, OSError) as error:
        reason = first_line(error).removeprefix(f"{file} ")
        raise OpenSoraError(f"{file} is not a readable adapter: it {reason}") from error
    return StoredAdapter(file, tensors, metadata, _config_of(file))


def adapter_hash(path: str | Path) -> str:
    """SHA-256 of an adapter's file; where PEFT's configuration lies beside it, of both."""
    if is_checkpoint(run := resolve_run(Path(path).expanduser())):
        files = [*RunTensors(run).files, _begun_with(run)]
    else:
        file = adapter_file(path)
        files = [file, _config_file(file)]
    digest = hashlib.sha256()
    for part in files:
        if part.is_file():
            with part.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _begun_with(checkpoint: Path) -> Path:
    """The adapter that a run began with: beside its checkpoints, with all that is said of it."""
    return checkpoint.parent.parent / FROZEN_PARTS / ADAPTER_FILE


def _read_checkpoint(checkpoint: Path) -> StoredAdapter:
    """The averaged adapter of a run's checkpoint."""
    if not _begun_with(checkpoint).is_file():
        raise OpenSoraError(f"{checkpoint} is a checkpoint of no adapter; give it as the model, or as a part of one")
    begun, averages = read_stored(_begun_with(checkpoint)), RunTensors(checkpoint)
    names = {name.replace(_PEFT_NAME, "."): name for name in averages}
    return replace(begun, path=checkpoint, tensors=RenamedWeights(averages, names))


def _config_file(file: Path) -> Path:
    """Where PEFT's configuration would lie; a file that is not PEFT's has none."""
    return file.with_name(PEFT_CONFIG if file.name in _PEFT_FILES else f".{PEFT_CONFIG}.none")


def _config_of(file: Path) -> dict[str, Any] | None:
    config = _config_file(file)
    return read_object(config) if config.is_file() else None


def _alphas_among(numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that are the alpha of a layer, as the tensors that they are in other files."""
    layers = {name.rpartition(".lora")[0] for name in tensors}
    return {n: torch.tensor(v) for n, v in numbers.items() if n.removesuffix(ALPHA_OF_LAYER) in layers}


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _adapters_in(folder: Path) -> list[Path]:
    """The adapters in a folder: by the names that libraries give them, else by what the files hold."""
    named = [
        next((folder / name for name in names if (folder / name).is_file()), None) for names in (_FILES, _PEFT_FILES)
    ]
    if any(named):
        return [file for file in named if file is not None]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    return [file for file in files if _holds_adapter(file)]


def _holds_adapter(file: Path) -> bool:
    with contextlib.suppress(OpenSoraError, SafetensorError, OSError):
        return file.is_file() and any(map(is_part_of_adapter, StoredTensors([file])))
    return False
