"""One file of weights: the tensors in it under the names that it gives them, whatever kind of file it is.

The kind is told by content, never by the ending of a name. Safetensors and archives of `torch.save` are mapped, so that
a tensor costs memory when it is asked for. Pickles are read by torch's restricted unpickler: nothing in them is run.
Dictionaries within dictionaries become dotted names, as they would in safetensors: `state_dict.blocks.0.weight`.
"""

import argparse
import collections
import contextlib
import io
import pathlib
import pickle
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.contents import check_regular, describe_kind, kind_of, why_unread
from opensora.errors import OpenSoraError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SAFETENSORS = (".safetensors", ".sft")
WEIGHT_SUFFIXES = (*SAFETENSORS, *PICKLES)

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

# What training scripts save beside weights and that is nothing but data.
_HARMLESS = [
    argparse.Namespace,
    types.SimpleNamespace,
    collections.defaultdict,
    collections.deque,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
]
PORTION_BYTES = 64 << 20  # of a mapped file, read before it is mapped anew
_MOST_DEPTH = 16  # of dictionaries within dictionaries


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its shape, and its dtype by torch's name ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of some files under the names in them, each fetched when it is asked for.

    Only the file it comes from is open then. A mapped file occupies memory as far as it has been read, so one that has
    given a portion is mapped anew.

    Args:
        files: of weights, of whatever kind.

    Attributes:
        infos: name -> shape and dtype.

    Raises:
        OpenSoraError: a file is missing or damaged, or a pickle holds more than tensors.
    """

    def __init__(self, files: list[Path]) -> None:
        self._open: tuple[Path, Mapping[str, Tensor]] | None = None
        self._given_bytes = 0
        self._file_of: dict[str, Path] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            found = infos_of(self._opened(file))
            self.infos |= found
            self._file_of |= dict.fromkeys(found, file)

    def _opened(self, file: Path) -> Mapping[str, Tensor]:
        used_up = self._given_bytes >= PORTION_BYTES and is_mapped(file)
        if self._open is None or self._open[0] != file or used_up:
            self._open = None  # let go of one before the next is read
            self._open = (file, open_tensors(file))
            self._given_bytes = 0
        return self._open[1]

    def file_of(self, name: str) -> Path:
        """Where a tensor lies."""
        return self._file_of[name]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._opened(self._file_of[name])[name]
        self._given_bytes += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file.

    Raises:
        OpenSoraError: it cannot be read, is no file of weights, is damaged, or is a pickle that holds more than data.
    """
    return _Safetensors(path) if _is_safetensors(path) else read_pickle(path)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of an opened file's tensors; of a mapped one their data stays on disk."""
    if isinstance(tensors, _Safetensors):
        return tensors.infos()
    return {n: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}


def is_mapped(path: Path) -> bool:
    """Whether a file is read as far as it is asked for: all but pickles of before torch 1.6, and misnamed ones."""
    kind = kind_of(path)
    return kind == "safetensors" or (kind == "torch zip" and path.suffix != ".safetensors")


def _is_safetensors(path: Path) -> bool:
    check_regular(path, "weights")
    kind = kind_of(path)
    if kind in ("torch zip", "pickle"):
        return False
    if kind == "safetensors":
        return True
    if kind in ("unknown", "empty"):
        raise damaged(path, "it is empty" if kind == "empty" else "neither safetensors nor a file of torch.save")
    raise OpenSoraError(f"{path} is {describe_kind(kind)}; expected weights: safetensors, or a file of torch.save")


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of one mapped file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._file = safe_open(path, framework="pt")
            self._names = list(self._file.keys())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            if reason := why_unread(error):
                raise OpenSoraError(f"{self._path} cannot be read: {reason}") from error
            raise damaged(self._path, first_line(error)) from error

    def infos(self) -> dict[str, TensorInfo]:
        with self._errors():
            parts = {name: self._file.get_slice(name) for name in self._names}
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), str(part.get_dtype())))
                for name, part in parts.items()
            }

    def __getitem__(self, name: str) -> Tensor:
        with self._errors():
            return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- pickles ----------------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped where its format allows it (every file since torch 1.6).

    Raises:
        OpenSoraError: it is damaged, holds no tensors, or holds more than data; nothing in it is run.
    """
    tensors = dict(_named_tensors(_load_pickle(path), ""))
    if not tensors:
        raise OpenSoraError(f"{path} holds something else than named tensors; expected a state dict")
    return tensors


def read_numbers(path: Path) -> dict[str, float]:
    """The numbers beside the tensors of a file of `torch.save`, by dotted names; see `read_pickle`."""
    return dict(_named_numbers(_load_pickle(path), ""))


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore", UserWarning)  # torch warns of pickles it then refuses
            if path.suffix == ".safetensors":  # torch believes a name, but not where there is none
                return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except Exception as error:  # on rubbish, the restricted unpickler fails in every way a stack machine can
        raise _refusal(path, error) from error


def _named_numbers(state: Any, prefix: str) -> Iterator[tuple[str, float]]:
    state = vars(state) if isinstance(state, argparse.Namespace) else state
    if not isinstance(state, Mapping) or prefix.count(".") > _MOST_DEPTH:
        return
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value
        elif isinstance(key, str) and not is_of_optimizer(key):
            yield from _named_numbers(value, f"{prefix}{key}.")


def _named_tensors(state: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries within dictionaries, but for what belongs to an optimiser."""
    if not isinstance(state, Mapping) or prefix.count(".") > _MOST_DEPTH:
        return
    for key, value in state.items():
        if not isinstance(key, str) or (isinstance(value, Mapping) and is_of_optimizer(key)):
            continue
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(value, list | tuple) and all(
            isinstance(item, Tensor) for item in value
        ):  # such as `shadow_params`: an average whose names are nowhere
            yield from ((f"{prefix}{key}.{k}", tensor) for k, tensor in enumerate(value))
        else:
            yield from _named_tensors(value, f"{prefix}{key}.")


def is_of_optimizer(segment: str) -> bool:
    """Whether a part of a name says that what follows belongs to an optimiser or a schedule, not to a network."""
    return "optim" in segment.lower() or segment in ("opt", "lr_scheduler", "lr_schedulers", "scaler", "grad_scaler")


def _refusal(path: Path, error: Exception) -> OpenSoraError:
    """Why a pickle was not read, in our words: torch's own advise to read it without any restriction."""
    said = str(error)
    if "TorchScript" in said:
        return OpenSoraError(f"{path} is a TorchScript program, no file of weights; save the state_dict of its network")
    if isinstance(error, pickle.UnpicklingError) and "unsupported" in said.lower() and kind_of(path) != "unknown":
        named = re.search(r"GLOBAL ([\w.]+) was not an allowed global", said)
        what = f" ({named[1]})" if named else ""
        return OpenSoraError(
            f"{path} is a pickle that holds more than tensors{what} and could run code when opened; refused, "
            "ask for the weights as safetensors, or for a file of their state_dict alone"
        )
    reason = first_line(error)
    return damaged(path, "it cannot be unpickled" if "weights" in reason.lower() else reason)


# --- small things -----------------------------------------------------------------------------------------------------


def damaged(path: Path, reason: str) -> OpenSoraError:
    """What is said of a file that cannot be what it seems to be."""
    return OpenSoraError(f"{path} is damaged ({reason}); get it again")


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line; types by their names, as people know them."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"<class '([\w.]+)'>", r"\1", line)
