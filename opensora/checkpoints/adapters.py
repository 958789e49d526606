"""Low-rank adapters (LoRA, Hu et al., 2021): what fine-tuning adds to a transformer's weights, in a file of its own.

An adapter holds two small matrices for each linear layer that it changes, A (r, in) and B (out, r). It is merged into
the weights while they are read, W + scale * alpha / r * B A, in float32 and before they are cast, so that the network
runs as fast as without it and nothing has to know of it. At scale 0 it is left out: the base is what it was, to the
bit.

The file is that of diffusers and PEFT, `pytorch_lora_weights.safetensors`: names such as
`transformer.spatial_blocks.0.attn.qkv.lora_A.weight`, and PEFT's configuration as metadata. Ours stands beside it:
which network it belongs to (class, sizes, and a hash of the weights that it changes) and how it was trained. An adapter
changes no network but its own.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.checkpoints.published import BUNDLED
from opensora.checkpoints.weights import fingerprint, first_line, read_weights
from opensora.errors import OpenSoraError
from opensora.files import replacing

ADAPTER_FILE = "pytorch_lora_weights.safetensors"

_PREFIX = "transformer."  # diffusers' name of the network that an adapter is for
_PEFT_KEY = "lora_adapter_metadata"  # diffusers' key of PEFT's configuration
_OUR_KEY = "opensora"
_NAME = re.compile(r"^(?P<layer>.+)\.lora_(?P<which>[AB])\.weight$")


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter belongs to and where it comes from.

    Attributes:
        base: name of the model it was trained on.
        class_name: of the transformer.
        config: its keywords.
        fingerprint: of the weights that the adapter changes, as they were, see `weights.fingerprint`.
        training: how it was trained, as plain values.
    """

    base: str
    class_name: str
    config: dict[str, Any]
    fingerprint: str
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    Attributes:
        path: its file.
        layers: name of a linear layer -> A (r, in) and B (out, r).
        factors: name of a linear layer -> alpha / r.
        origin: None for a file that does not say; such an adapter fits by shape alone.
    """

    path: Path
    layers: dict[str, tuple[Tensor, Tensor]]
    factors: dict[str, float]
    origin: AdapterOrigin | None

    @property
    def rank(self) -> int:
        """The largest r."""
        return max(len(a) for a, _ in self.layers.values())

    @property
    def num_parameters(self) -> int:
        """Values in all matrices."""
        return sum(a.numel() + b.numel() for a, b in self.layers.values())

    def delta(self, layer: str) -> Tensor:
        """What it adds to a layer's weight at scale 1, (out, in) float32."""
        a, b = self.layers[layer]
        return self.factors[layer] * (b.float() @ a.float())


# --- files ------------------------------------------------------------------------------------------------------------


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or the file of that name in a folder.

    Raises:
        OpenSoraError: nothing there.
    """
    path = Path(path).expanduser()
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.is_file():
        raise OpenSoraError(f"{file} is missing; expected an adapter, {ADAPTER_FILE} or the folder that holds it")
    return file


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's folder, or a file whose tensors are those of an adapter."""
    path = Path(path).expanduser()
    if path.is_dir():
        return (path / ADAPTER_FILE).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return any(".lora_" in name for name in file.keys())
    return False


def save_adapter(
    folder: Path, layers: Mapping[str, tuple[Tensor, Tensor]], peft_config: Mapping[str, Any], origin: AdapterOrigin
) -> Path:
    """Writes an adapter, whole or not at all.

    Args:
        folder: where `ADAPTER_FILE` goes.
        layers: name of a linear layer -> A and B.
        peft_config: PEFT's configuration as plain values, `r` and `lora_alpha` among them.
        origin: what it belongs to.
    """
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in layers.items():
        for which, matrix in (("A", a), ("B", b)):
            tensors[f"{_PREFIX}{layer}.lora_{which}.weight"] = matrix.detach().cpu().contiguous()
    metadata = {
        "format": "pt",
        _PEFT_KEY: json.dumps({_PREFIX + key: value for key, value in peft_config.items()}, sort_keys=True),
        _OUR_KEY: json.dumps(asdict(origin), sort_keys=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ADAPTER_FILE) as partial:
        save_file(tensors, partial, metadata)
    return folder / ADAPTER_FILE


def read_adapter(path: str | Path) -> Adapter:
    """Reads an adapter from its file or folder.

    Raises:
        OpenSoraError: it is missing or damaged, holds anything but pairs of matrices, or values that are not finite.
    """
    file = adapter_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{file} is not a readable adapter ({first_line(error)}); expected safetensors") from error
    layers = _pairs(file, tensors)
    for layer, pair in layers.items():
        if not all(torch.isfinite(matrix).all() for matrix in pair):
            raise OpenSoraError(f"{file}: NaN or infinite values in {layer}; the adapter is damaged, get it again")
    peft, ours = (_read_json(file, metadata, key) for key in (_PEFT_KEY, _OUR_KEY))
    factors = {layer: _factor(file, layer, len(a), peft) for layer, (a, _) in layers.items()}
    try:
        origin = AdapterOrigin(**ours) if ours else None
    except TypeError as error:
        raise OpenSoraError(f"{file}: what it says of its origin is not understood ({first_line(error)})") from error
    return Adapter(file, layers, factors, origin)


def adapter_hash(path: str | Path) -> str:
    """SHA-256 of an adapter's file."""
    return hashlib.sha256(adapter_file(path).read_bytes()).hexdigest()


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A and B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name.removeprefix(_PREFIX))
        if match is None or tensor.ndim != 2:
            raise OpenSoraError(
                f"{file} holds {name} of shape {tuple(tensor.shape)}; an adapter holds matrices named "
                f"{_PREFIX}LAYER.lora_A.weight and .lora_B.weight"
            )
        found.setdefault(match["layer"], {})[match["which"]] = tensor
    if not found:
        raise OpenSoraError(f"{file} holds no matrices; expected an adapter")
    for layer, pair in found.items():
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]:
            shapes = ", ".join(f"lora_{which} {tuple(matrix.shape)}" for which, matrix in sorted(pair.items()))
            raise OpenSoraError(f"{file}: {layer} has {shapes}; expected lora_A (r, in) and lora_B (out, r)")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _read_json(file: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        values = json.loads(metadata.get(key, "{}"))
    except ValueError as error:
        raise OpenSoraError(f"{file}: its metadata {key!r} is not JSON; the adapter is damaged") from error
    if not isinstance(values, dict):
        raise OpenSoraError(f"{file}: its metadata {key!r} is not an object; the adapter is damaged")
    return values


def _factor(file: Path, layer: str, rank: int, peft: Mapping[str, Any]) -> float:
    """alpha / r of a layer; 1 where the file does not say, as PEFT's users take it."""
    alpha = {**peft, **{k.removeprefix(_PREFIX): v for k, v in peft.items()}}.get("lora_alpha", rank)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise OpenSoraError(f"{file}: lora_alpha is {alpha!r}, expected a number")
    kinds = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
    unknown = [kind for kind in kinds if peft.get(_PREFIX + kind) or peft.get(kind)]
    if unknown:
        raise OpenSoraError(f"{file} was trained with {unknown[0]}, which is not supported; expected plain LoRA")
    return alpha / rank


# --- into weights -----------------------------------------------------------------------------------------------------


class AdaptedWeights(Mapping[str, Tensor]):
    """The weights of a transformer with adapters merged into them, each tensor when it is asked for.

    Args:
        model: the transformer that they are for; its shapes are all that is looked at.
        stored: its weights, under its names.
        adapters: adapters and their scales; those of scale 0 are left out.
        source: what to call the weights in an error.

    Raises:
        OpenSoraError: an adapter of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, Tensor],
        adapters: Sequence[tuple[Adapter, float]],
        source: str,
    ) -> None:
        self._stored = stored
        self._adapters = [(adapter, scale) for adapter, scale in adapters if scale]
        for adapter, _ in adapters:
            check_fits(adapter, model, stored, source)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        layer = name.removesuffix(".weight")
        for adapter, scale in self._adapters:
            if name.endswith(".weight") and layer in adapter.layers:
                tensor = tensor.float() + scale * adapter.delta(layer)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def check_fits(adapter: Adapter, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises `OpenSoraError` if an adapter was not made for a network of these sizes and weights.

    Args:
        adapter: the adapter.
        model: the network; its shapes are all that is looked at.
        weights: of the network, under its names.
        source: what to call them in an error.
    """
    origin, name = adapter.origin, type(model).__name__
    belongs = "" if origin is None else f"; it was trained on {origin.base}"
    if origin is not None and origin.class_name != name:
        raise OpenSoraError(f"{adapter.path} is an adapter of a {origin.class_name}, {source} is a {name}{belongs}")
    own = dict(model.named_modules())
    for layer, (a, b) in adapter.layers.items():
        module = own.get(layer)
        if not isinstance(module, nn.Linear):
            raise OpenSoraError(f"{adapter.path} changes {layer}, which {source} does not have{belongs}")
        if (module.out_features, module.in_features) != (len(b), a.shape[1]):
            raise OpenSoraError(
                f"{adapter.path} changes {layer} of size {(len(b), a.shape[1])}, in {source} it has "
                f"{(module.out_features, module.in_features)}{belongs}"
            )
    if origin is not None and origin.fingerprint != fingerprint_of_layers(weights, adapter.layers):
        raise OpenSoraError(
            f"{adapter.path} was trained on other weights of {origin.base} than those of {source}; "
            "give the model that it was trained on"
        )


def fingerprint_of_layers(weights: Mapping[str, Tensor], layers: Mapping[str, Any]) -> str:
    """What tells the base of an adapter from another: a hash of the weights that it changes."""
    return fingerprint({f"{layer}.weight": weights[f"{layer}.weight"] for layer in layers})


# --- what it is -------------------------------------------------------------------------------------------------------


@dataclass
class AdapterReport:
    """What an adapter is.

    Attributes:
        path: its file.
        sha256: of the file.
        rank: the largest r.
        num_layers: linear layers that it changes.
        num_parameters: values in its matrices.
        origin: what it belongs to; None if it does not say.
        fits: bundled models whose weights it was trained on.
        problems: none: an adapter that is wrong cannot be read.
    """

    path: str
    sha256: str
    rank: int
    num_layers: int
    num_parameters: int
    origin: AdapterOrigin | None
    fits: list[str]
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_adapter(path: str | Path) -> AdapterReport:
    """Looks at an adapter.

    Raises:
        OpenSoraError: see `read_adapter`.
    """
    adapter = read_adapter(path)
    return AdapterReport(
        path=str(adapter.path),
        sha256=adapter_hash(path),
        rank=adapter.rank,
        num_layers=len(adapter.layers),
        num_parameters=adapter.num_parameters,
        origin=adapter.origin,
        fits=[name for name, model in BUNDLED.items() if _was_trained_on(adapter, model.folder / "transformer")],
    )


def _was_trained_on(adapter: Adapter, transformer: Path) -> bool:
    weights = read_weights(transformer)
    if adapter.origin is None or not all(f"{layer}.weight" in weights for layer in adapter.layers):
        return False
    return adapter.origin.fingerprint == fingerprint_of_layers(weights, adapter.layers)
