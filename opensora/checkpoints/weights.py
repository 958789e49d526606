"""Weights: read from files that hold nothing but tensors, and put into models without a gap.

Safetensors, whole or in shards, or pickles that the restricted unpickler accepts. Files are mapped, not read at once:
`StoredWeights` fetches a tensor when it is asked for, `load_weights` copies portion by portion, so that a model needs
little more memory than its own. What is missing, damaged, unexpected, of another shape, NaN or infinite is an error
that names the file and the tensor.
"""

import contextlib
import hashlib
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opensora.errors import OpenSoraError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
EMA_FILE = "ema.pt"

# In the order in which they are looked for: diffusers' own, then those of transformers.
_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
_PORTION_BYTES = 1 << 30

logger = logging.getLogger(__name__)


# --- files ------------------------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of one network: the path itself, or a folder's file or shards.

    Of a folder of a training run, which keeps its weights in a subfolder `model`, the moving average `ema.pt` beside
    that is taken if there is one; a log line says so.

    Raises:
        OpenSoraError: nothing there, no weights in it, a missing shard, or several files to choose from.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise OpenSoraError(f"{path} is missing; expected a file of weights, or a folder that holds them")
    if (path / "model").is_dir():
        if not (path / EMA_FILE).is_file():
            return weight_files(path / "model")
        logger.warning("%s: taking the moving average, %s, not the weights in model/", path, EMA_FILE)
        return [path / EMA_FILE]
    for name in _NAMES:
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
        if (path / name).is_file():
            return [path / name]
    for suffixes in ((".safetensors",), PICKLES):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
        if len(found) > 1:
            names = _some([file.name for file in found])
            raise OpenSoraError(f"{path} holds several files of weights ({names}); keep one, or name it")
        if found:
            return found
    raise OpenSoraError(f"{path} holds no weights; expected {_NAMES[0]} or {_NAMES[1]}, or a .bin, .pt or .pth file")


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


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of some files, each fetched when it is asked for; only the file it comes from is open then.

    A mapped file occupies memory as far as it has been read, so one that has given a portion is mapped anew.

    Args:
        files: safetensors or pickles.

    Raises:
        OpenSoraError: a file is missing or damaged, or a pickle holds more than tensors.
    """

    def __init__(self, files: list[Path]) -> None:
        self._open: tuple[Path, Mapping[str, Tensor]] | None = None
        self._given_bytes = 0
        self._file_of = {name: file for file in files for name in self._opened(file)}

    def _opened(self, file: Path) -> Mapping[str, Tensor]:
        used_up = self._given_bytes >= _PORTION_BYTES and _is_mapped(file)
        if self._open is None or self._open[0] != file or used_up:
            self._open = None  # let go of one before the next is read
            self._open = (file, _Safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
            self._given_bytes = 0
        return self._open[1]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._opened(self._file_of[name])[name]
        self._given_bytes += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """All tensors of one component, from a file or from its folder; see `weight_files`.

    Raises:
        OpenSoraError: no weights, a shard or file is missing or damaged, or a pickle holds more than tensors.
    """
    return StoredWeights(weight_files(path))


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
            raise _damaged(self._path, error) from error

    def __getitem__(self, name: str) -> Tensor:
        with self._errors():
            return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_mapped(file: Path) -> bool:
    """Whether a file is read as far as it is asked for: all but pickles of before torch 1.6."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _damaged(path: Path, error: Exception) -> OpenSoraError:
    return OpenSoraError(f"{path} is damaged ({first_line(error)}); get it again")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped where its format allows it (every file since torch 1.6); see `unwrap`.

    Raises:
        OpenSoraError: it is damaged, or holds anything else; nothing in it is run.
    """
    try:
        with warnings.catch_warnings():  # torch warns of pickles it then refuses
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
    except Exception as error:  # on rubbish, the restricted unpickler fails in every way a stack machine can
        refused = isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower()
        if refused and _begins_as_pickle(path):
            raise OpenSoraError(
                f"{path} is a pickle that holds more than tensors and could run code when opened; refused, "
                "ask for the weights as safetensors"
            ) from error
        raise _damaged(path, error) from error
    tensors = unwrap(state)
    if tensors is None:
        raise OpenSoraError(f"{path} holds something else than named tensors; expected a state dict")
    return tensors


def _begins_as_pickle(path: Path) -> bool:
    """Whether it is a pickle at all, bare or in the archive that torch makes; rubbish is refused by chance."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def unwrap(state: Any) -> dict[str, Tensor] | None:
    """The named tensors within what training scripts save: the moving average if there is one, else the network.

    Names that all begin with "module." (networks saved by a distributed run) lose that.

    Returns:
        None for anything that holds no state dict.
    """
    for name in ("ema", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            return unwrap(state[name])
    if not isinstance(state, Mapping) or not state:
        return None
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        return None
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


# --- into models ------------------------------------------------------------------------------------------------------


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in this precision, but for the modules that it wants to keep in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if kept.isdisjoint(name.split(".")):
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into a model, which keeps its own dtype and device; every tensor must find its place.

    Args:
        model: to be filled.
        weights: name -> tensor, of any floating dtype.
        source: what to call them in an error.

    Raises:
        OpenSoraError: NaN or infinite values, or missing, unexpected or mis-shaped tensors, each named.
    """
    own = dict(model.state_dict())
    missing, unexpected = set(own), []
    for portion in _portions(weights):
        bad = [name for name, tensor in portion.items() if tensor.is_floating_point() and not _all_finite(tensor)]
        if bad:
            raise OpenSoraError(f"{source}: NaN or infinite values in {_some(bad)}; the file is damaged, get it again")
        try:
            result = model.load_state_dict(portion, strict=False)
        except OpenSoraError:
            raise
        except RuntimeError as error:
            shapes = [
                f"{name} is {tuple(tensor.shape)} but the model has {tuple(own[name].shape)}"
                for name, tensor in weights.items()
                if name in own and tensor.shape != own[name].shape
            ]
            reason = f"mis-shaped tensors: {_some(shapes)}" if shapes else first_line(error)
            raise OpenSoraError(f"{source}: {reason}; weights and configuration are of two different models") from error
        missing &= set(result.missing_keys)
        unexpected += result.unexpected_keys
        portion.clear()  # lets go of the file before it is mapped anew
    # Tied weights are stored once: a name without an entry of its own is filled if its memory was.
    filled = {own[name].data_ptr() for name in weights if name in own}
    left = [name for name in own if name in missing and own[name].data_ptr() not in filled]
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in
                (("missing tensors", left), ("unexpected tensors", unexpected)) if names]  # fmt: skip
    if problems:
        raise OpenSoraError(f"{source}: {', '.join(problems)}; weights and configuration are of two different models")


def _portions(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Weights in groups of about a gigabyte; one at least, be it empty."""
    portion: dict[str, Tensor] = {}
    size = 0
    for name in weights:
        portion[name] = weights[name]
        size += portion[name].nbytes
        if size >= _PORTION_BYTES:
            yield portion
            portion, size = {}, 0
    yield portion


# --- small things -----------------------------------------------------------------------------------------------------


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of weights and buffers, as hexadecimal digits.

    Values count as float32, so a network has the fingerprint of the bfloat16 file it was loaded from.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OpenSoraError: it is missing, not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OpenSoraError(f"{path} is missing; the model's folder is incomplete, get it again") from error
    except (OSError, ValueError) as error:
        raise OpenSoraError(f"{path} is not readable JSON ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise OpenSoraError(f"{path} holds a {type(values).__name__}; expected an object")
    return values


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
