"""Weights: read from files that hold nothing but tensors, and put into models without a gap.

Safetensors, whole or in shards, or pickles that the restricted unpickler accepts. Files are mapped, not read at once:
`StoredWeights` fetches a tensor when it is asked for, `load_weights` copies portion by portion, so that loading a model
takes its own memory and a portion more. What is missing, damaged, unexpected, of another shape, NaN or infinite is an
error that names the file and the tensor.
"""

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.containers.files import split_choice, weight_files
from opensora.containers.quantized import dequantize, find_scales, is_quantized
from opensora.containers.runs import RunTensors, is_checkpoint, resolve_run
from opensora.containers.tensors import PORTION_BYTES, StoredTensors, TensorInfo, first_line
from opensora.containers.wrappers import choose_network
from opensora.errors import OpenSoraError
from opensora.models.format import Kind

logger = logging.getLogger(__name__)


# --- stored ----------------------------------------------------------------------------------------------------------


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of one network in some files, each fetched when it is asked for.

    Names are the network's own, see `containers.wrappers`; eight-bit weights are turned into numbers, see
    `containers.quantized`.

    Args:
        stored: under the names that files give them.
        source: what to call them.
        kind: of the network, where there are several.
        which: of several, see `containers.wrappers.choose_network`.

    Attributes:
        infos: name -> shape, and the dtype that it is stored in.

    Raises:
        OpenSoraError: a file is missing or damaged, a pickle holds more than tensors, or several networks are meant.
    """

    def __init__(
        self, stored: StoredTensors | RunTensors, source: str, kind: Kind | None = None, which: str | None = None
    ) -> None:
        self._stored = stored
        self._names: Mapping[str, str] = {}
        self._scales: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        if not self._stored:
            return
        network, notes = choose_network(self._stored.infos, source, kind, which)
        for note in notes:
            _say_once(f"{source}: {note}")
        infos = {name: self._stored.infos[there] for name, there in network.names.items()}
        self._scales, how = find_scales(infos)
        self._names = network.names
        self.infos = {name: info for name, info in infos.items() if name not in how}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        tensor, scale = self._stored[self._names[name]], self._scales.get(name)
        if not is_quantized(self.infos[name]) or (scale is None and not tensor.is_floating_point()):
            return tensor
        return dequantize(tensor, None if scale is None else self._stored[self._names[scale]], name)

    def read_as(self, name: str) -> torch.dtype:
        """The dtype that a tensor has when it is read."""
        stored = getattr(torch, self.infos[name].dtype, None)
        if not isinstance(stored, torch.dtype) or name in self._scales:
            return torch.float32
        return torch.float32 if is_quantized(self.infos[name]) and stored.is_floating_point else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


@functools.lru_cache(maxsize=256)
def _say_once(line: str) -> None:
    """Files are opened again and again, for their header and for their data."""
    logger.warning("%s", line)


def read_weights(path: Path, kind: Kind | None = None) -> StoredWeights:
    """All tensors of one component, from a file or from its folder; see `weight_files`.

    Args:
        path: file or folder; a run or its checkpoint, see `containers.runs`; "FILE@WHICH" for one of several networks
            in a file, see `containers.wrappers.choose_network`.
        kind: of the network wanted; None for the only one there is.

    Raises:
        OpenSoraError: no weights, a shard or file is missing or damaged, or a pickle holds more than tensors.
    """
    path, which = split_choice(resolve_run(path))
    if is_checkpoint(path):
        return StoredWeights(RunTensors(path), str(path), kind, which)
    files = weight_files(path)
    return StoredWeights(StoredTensors(files), str(files[0]), kind, which)


def read_header(path: Path, kind: Kind | None = None) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a file or in a component's folder; their data stays on disk.

    Raises:
        OpenSoraError: nothing there, a damaged file, or a pickle that holds more than tensors.
    """
    return check_header(read_weights(path, kind), path)


def check_header(stored: StoredWeights, path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of weights.

    Raises:
        OpenSoraError: there are none.
    """
    if not stored.infos:
        raise OpenSoraError(f"{path} holds no tensors at all; get it again")
    return stored.infos


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


def make_room(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Puts new weights of the same shapes in the place of modules' own: not initialised, or on "meta" without data.

    What is shared stays so. Tables that a model computes (buffers) are left alone.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if weight not in made:
                made[weight] = nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
            module._parameters[name] = made[weight]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into a model, which keeps its own dtype and device; every tensor must find its place.

    Args:
        model: to be filled; what of it lies on torch's meta device is left out.
        weights: name -> tensor, of any floating dtype.
        source: what to call them in an error.

    Raises:
        OpenSoraError: NaN or infinite values, or missing, unexpected or mis-shaped tensors, each named.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    missing, unexpected = set(own), []
    for portion in _portions(weights):
        if coded := coded_weights(own, portion):
            raise OpenSoraError(f"{source}: {coded}")
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


def coded_weights(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """What is wrong with weights that are whole numbers where the network has others; "" if nothing is."""
    coded = [n for n, t in stored.items() if n in own and own[n].is_floating_point() > t.is_floating_point()]
    if not coded:
        return ""
    dtype = str(stored[coded[0]].dtype).removeprefix("torch.")
    return (
        f"{_some(coded)} hold {dtype}, quantised in a way that is not read; get the weights in bfloat16, float16 or "
        "float8"
    )


def _portions(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Weights in groups of `PORTION_BYTES` or one tensor; one group at least, be it empty."""
    portion: dict[str, Tensor] = {}
    size = 0
    for name in weights:
        portion[name] = weights[name]
        size += portion[name].nbytes
        if size >= PORTION_BYTES:
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


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
