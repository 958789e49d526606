"""Which files hold the weights of a network: one, the shards that an index names, what a training framework wrote.

Nothing is opened here but indexes.
"""

import logging
import os
import re
from pathlib import Path

from opensora.containers.runs import RunTensors, is_checkpoint, resolve_run
from opensora.containers.tensors import PICKLES, SAFETENSORS
from opensora.contents import check_regular, describe_kind, kind_of, read_object
from opensora.errors import OpenSoraError

EMA_FILE = "ema.pt"

# In the order in which they are looked for: diffusers' own, then those of transformers.
_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.\w+")
_DEEPSPEED = "mp_rank_00_model_states.pt"
_OTHERS = (".gguf", ".msgpack", ".h5", ".onnx", ".ckpt.index", ".distcp", ".zip", ".tar", ".gz", ".7z")

logger = logging.getLogger(__name__)


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of one network: the path itself, or a folder's file or shards.

    Of a folder of a training run, which keeps its weights in a subfolder `model`, the moving average `ema.pt` beside
    that is taken if there is one; a log line says so.

    Raises:
        OpenSoraError: nothing there, no weights in it, a missing shard, or several files to choose from.
    """
    path = resolve_run(path)
    if is_checkpoint(path):
        return RunTensors(path).files
    if not os.path.lexists(path):
        raise OpenSoraError(f"{path} is missing; expected a file of weights, or a folder that holds them")
    if not path.is_dir():
        check_regular(path, "weights")
        return _shards(path) if path.name.endswith(_INDEX) else [path]
    try:
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise OpenSoraError(f"the folder {path} cannot be read: {error.strerror or error}") from None
    if (path / "model").is_dir():
        if not (path / EMA_FILE).is_file():
            return weight_files(path / "model")
        logger.warning("%s: taking the moving average, %s, not the weights in model/", path, EMA_FILE)
        return [path / EMA_FILE]
    for name in _NAMES:
        if (path / f"{name}{_INDEX}").is_file():
            return _shards(path / f"{name}{_INDEX}")
        if (path / name).is_file():
            return [path / name]
    if len(indexes := [file for file in inside if file.name.endswith(_INDEX)]) == 1:
        return _shards(indexes[0])
    if deepspeed := _deepspeed_files(path, inside):
        return deepspeed
    for suffixes in (SAFETENSORS, PICKLES):
        found = [file for file in inside if file.suffix in suffixes and file.is_file()]
        if len(found) > 1 and not _are_all_shards(path, found):
            names = ", ".join(file.name for file in found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise OpenSoraError(f"{path} holds several files of weights ({names}); keep one, or name it")
        if found:
            return found
    raise _none(path, inside)


def split_choice(path: Path) -> tuple[Path, str | None]:
    """`FILE@WHICH` -> the file, and which of the networks in it; a path that exists as it stands means itself."""
    name, at, which = path.name.rpartition("@")
    if not at or not name or os.path.lexists(path) or not os.path.lexists(path.with_name(name)):
        return path, None
    return path.with_name(name), which


def is_there(path: Path) -> bool:
    """Whether there is such a file, folder or checkpoint of a run, see `split_choice` and `resolve_run`."""
    return split_choice(resolve_run(path))[0].exists()


def _shards(index: Path) -> list[Path]:
    found = read_object(index).get("weight_map")
    named = list(found.values()) if isinstance(found, dict) else []
    if not named or not all(isinstance(name, str) and name for name in named):
        raise OpenSoraError(f"{index} names no files of weights; it is damaged, get it again")
    names = sorted(set(named))
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise OpenSoraError(
            f"{index} names {outside[0]}, which is outside of its folder; expected names of files in the folder, "
            "put the weights there"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        what = f"{index.parent / missing[0]} is missing"
        raise OpenSoraError(f"{what}, {len(missing)} of {len(names)} files of weights are; get them again")
    return [index.parent / name for name in names]


def _are_all_shards(path: Path, found: list[Path]) -> bool:
    """Whether several files are one network in shards, whose index is not there."""
    matches = [_SHARD.fullmatch(file.name) for file in found]
    if None in matches or len({(m["stem"], m["count"]) for m in matches if m}) > 1:
        return False
    count = next(int(m["count"]) for m in matches if m)
    if count != len(found):
        missing = count - len(found)
        raise OpenSoraError(
            f"{path} holds {len(found)} of {count} files of weights, {missing} are missing; get them again"
        )
    return True


def _deepspeed_files(path: Path, inside: list[Path]) -> list[Path]:
    """Of a checkpoint of DeepSpeed, or of the folder of several, the file with the module."""
    latest = path / "latest"
    if latest.is_file() and latest.stat().st_size < 256:
        newest = path / latest.read_text(errors="replace").strip()
        if newest.is_dir() and newest.parent == path:
            return weight_files(newest)
    states = [file for file in inside if file.name.endswith("model_states.pt")]
    if states and [file.name for file in states] != [_DEEPSPEED]:
        raise OpenSoraError(
            f"{path} is a checkpoint of DeepSpeed in {len(states)} shards; put it together first with the script that "
            "DeepSpeed wrote beside it: python zero_to_fp32.py . weights.bin"
        )
    return states


def _none(path: Path, inside: list[Path]) -> OpenSoraError:
    expected = f"expected {_NAMES[0]} or {_NAMES[1]}, or a .bin, .pt or .pth file"
    if any(file.suffix == ".distcp" for file in inside):
        return OpenSoraError(
            f"{path} is a checkpoint of torch.distributed.checkpoint; write it as one file first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt"
        )
    other = next((file for file in inside if file.name.endswith(_OTHERS) and file.is_file()), None)
    if other is not None:
        return OpenSoraError(f"{path} holds no weights but {other.name}, {describe_kind(kind_of(other))}; {expected}")
    return OpenSoraError(f"{path} holds no weights; {expected}")
