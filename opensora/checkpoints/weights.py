"""Weights: read from files that hold nothing but tensors, and put into models without a gap.

Safetensors, whole or in shards, or a pickle that the restricted unpickler accepts. What is missing, damaged,
unexpected, of another shape, NaN or infinite is an error that names the file and the tensor.
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opensora.errors import OpenSoraError

_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Copy weights into a model, which keeps its own dtype and device; every tensor must find its place.

    Args:
        model: to be filled.
        weights: name -> tensor, of any floating dtype.
        source: what to call them in an error.

    Raises:
        OpenSoraError: NaN or infinite values, or missing, unexpected or mis-shaped tensors, each named.
    """
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not _all_finite(tensor)]
    if bad:
        raise OpenSoraError(f"{source}: NaN or infinite values in {_some(bad)}; the file is damaged, get it again")
    own = dict(model.state_dict())
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
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
    # Tied weights are stored once: a name without an entry of its own is filled if its memory was.
    filled = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in filled]
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in
                (("missing tensors", missing), ("unexpected tensors", unexpected)) if names]  # fmt: skip
    if problems:
        raise OpenSoraError(f"{source}: {', '.join(problems)}; weights and configuration are of two different models")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of one component, from one file or from shards.

    Raises:
        OpenSoraError: no weights, a shard or file is missing or damaged, or a pickle holds more than tensors.
    """
    for stem in _WEIGHT_NAMES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(read_object(index).get("weight_map", {}).values()))
            return {name: tensor for shard in shards for name, tensor in _read_safetensors(folder / shard).items()}
        if (folder / f"{stem}.safetensors").is_file():
            return _read_safetensors(folder / f"{stem}.safetensors")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if len(pickles) > 1:
        raise OpenSoraError(f"{folder} holds several files of weights ({_some([p.name for p in pickles])}); keep one")
    if pickles:
        return read_pickle(pickles[0])
    raise OpenSoraError(f"{folder} holds no weights; expected {_WEIGHT_NAMES[0]}.safetensors or model.safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise OpenSoraError(f"{path} is missing; the model's folder is incomplete, get it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{path} is damaged ({first_line(error)}); get it again") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle.

    Raises:
        OpenSoraError: it is damaged, or holds anything else; nothing in it is run.
    """
    try:
        with warnings.catch_warnings():  # torch warns of pickles it then refuses
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on rubbish, the restricted unpickler fails in every way a stack machine can
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise OpenSoraError(
                f"{path} is a pickle that holds more than tensors and could run code when opened; refused, "
                "ask for the weights as safetensors"
            ) from error
        raise OpenSoraError(f"{path} is damaged ({first_line(error)}); get it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise OpenSoraError(f"{path} holds something else than named tensors; expected a state dict")
    return dict(state)


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
