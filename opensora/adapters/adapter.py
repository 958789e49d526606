"""Low-rank adapters (LoRA, Hu et al., 2021): what fine-tuning adds to a transformer's weights, in a file of its own.

An adapter holds two small matrices for each layer that it changes, A (r, in) and B (out, r): W + alpha / r * B A. Files
of diffusers, PEFT, kohya and ComfyUI are read by the same function (`names`, `strength`). Ours, which are diffusers',
also say which network they belong to (class, sizes, and a hash of the weights that they change) and how they were
trained. An adapter changes no network but its own.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.adapters.names import TensorName, is_of_text_encoder, other_method, parse_name, without_doubles
from opensora.adapters.reading import PEFT_CONFIG, StoredAdapter, read_stored
from opensora.adapters.strength import find_strength, json_of, statements_of
from opensora.containers.tensors import first_line
from opensora.errors import OpenSoraError

logger = logging.getLogger(__name__)

ORIGIN_KEY = "opensora"
"""Key of a file's metadata under which its origin lies."""


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
        layers: name of a layer -> A (r, in, ...) and B (out, r, ...); of a convolution A is its kernel.
        alphas: name of a layer -> what B A is multiplied by, times its r.
        differences: name of a parameter -> what is added to it as it is.
        origin: None for a file that does not say; such an adapter fits by names and shapes alone.
        stated: where its strength is stated; None where it is guessed.
        notes: what is guessed or contradicted, a sentence each.
    """

    path: Path
    layers: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]
    differences: dict[str, Tensor] = field(default_factory=dict)
    origin: AdapterOrigin | None = None
    stated: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest r; 0 for one that holds differences alone."""
        return max((len(a) for a, _ in self.layers.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Values in all tensors."""
        pairs = [tensor for pair in self.layers.values() for tensor in pair]
        return sum(tensor.numel() for tensor in [*pairs, *self.differences.values()])

    def factor(self, layer: str) -> float:
        """alpha / r of a layer."""
        return self.alphas[layer] / len(self.layers[layer][0])

    def delta(self, layer: str) -> Tensor:
        """What it adds to a layer's weight at scale 1, in the weight's shape, float32."""
        a, b = self.layers[layer]
        product = b.float().flatten(1) @ a.float().flatten(1)
        return (self.factor(layer) * product).unflatten(1, a.shape[1:])

    def log_notes(self) -> None:
        """Says what is guessed or contradicted, for those who use it without looking at `notes`."""
        for note in self.notes:
            logger.warning("%s: %s", self.path, note)

    def scaled(self, scale: float) -> "Adapter":
        """One that acts at scale 1 as this one does at `scale`."""
        alphas = {layer: scale * alpha for layer, alpha in self.alphas.items()}
        return replace(self, alphas=alphas, differences={n: scale * t.float() for n, t in self.differences.items()})


def read_adapter(path: str | Path) -> Adapter:
    """Reads an adapter from its file or folder, in the layout of diffusers, PEFT, kohya or ComfyUI.

    Raises:
        OpenSoraError: it is missing or damaged, holds anything but parts of LoRA, or values that are not finite.
    """
    return understand(read_stored(path))


def understand(stored: StoredAdapter) -> Adapter:
    """What is stored, as an adapter. Names are those of the file without wrappers; a network's are found by `fit`.

    Raises:
        OpenSoraError: see `read_adapter`.
    """
    file = stored.path
    parts = _sorted_parts(stored)
    layers = {layer: _pair(file, layer, found) for layer, found in parts.items() if "A" in found or "B" in found}
    tensors = [(layer, tensor) for layer, found in parts.items() for tensor in found.values()]
    for layer, tensor in tensors:
        if not tensor.is_floating_point() and tensor.numel() != 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise OpenSoraError(f"{file}: {layer} holds values of {kind}; expected a floating point type")
        if not torch.isfinite(tensor.float()).all():  # which is not known of eight bits
            raise OpenSoraError(f"{file}: NaN or infinite values in {layer}; the adapter is damaged, get it again")
    alphas = {layer: _alpha(file, layer, found["alpha"]) for layer, found in parts.items() if "alpha" in found}
    try:
        statements = statements_of(str(file), stored.metadata, stored.config, PEFT_CONFIG)
        strength = find_strength({layer: len(a) for layer, (a, _) in layers.items()}, alphas, statements)
    except OpenSoraError as error:
        raise OpenSoraError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    differences = {f"{layer}.{r}": found[r] for layer, found in parts.items() for r in ("weight", "bias") if r in found}
    for layer, found in parts.items():
        if "B bias" in found:
            factor = strength.alphas[layer] / len(layers[layer][0])
            differences[f"{layer}.bias"] = factor * found["B bias"].float()
    origin = _origin(file, json_of(str(file), stored.metadata, ORIGIN_KEY))
    notes = strength.notes
    if len(without_doubles(stored.tensors)) < len(stored.tensors):
        notes = ("it holds averaged matrices beside those that they are an average of; took the averaged ones", *notes)
    return Adapter(file, layers, strength.alphas, differences, origin, strength.stated, notes)


def _sorted_parts(stored: StoredAdapter) -> dict[str, dict[str, Tensor]]:
    """Layer -> role -> tensor, of a file that holds nothing else."""
    file = stored.path
    told = {name: parse_name(name) for name in without_doubles(stored.tensors)}
    strangers = [name for name, meaning in told.items() if meaning is None]
    named = {name: meaning for name, meaning in told.items() if meaning is not None}
    if strangers:
        raise _refuse_strangers(stored, strangers, len(named))
    if not any(meaning.role != "alpha" for meaning in named.values()):
        raise OpenSoraError(f"{file} holds no matrices; expected an adapter")
    adapters = sorted({meaning.adapter for meaning in named.values() if meaning.adapter})
    if len(adapters) > 1:
        raise OpenSoraError(f"{file} holds several adapters ({', '.join(adapters)}); expected one, save each alone")
    _refuse_text_encoders(file, named)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, meaning in named.items():
        found = parts.setdefault(meaning.layer, {})
        if meaning.role in found:
            raise OpenSoraError(
                f"{file} holds {meaning.role} of {meaning.layer} twice, once as {name}; expected it once"
            )
        found[meaning.role] = stored.tensors[name]
    for layer, found in parts.items():
        if "A" not in found and ("alpha" in found or "B bias" in found) and "B" not in found:
            raise OpenSoraError(f"{file}: {layer} has {', '.join(found)} and no matrices; the adapter is damaged")
    return parts


def _refuse_strangers(stored: StoredAdapter, strangers: list[str], num_known: int) -> OpenSoraError:
    methods = Counter(what for name in strangers if (what := other_method(name)) is not None)
    if methods:
        what, count = methods.most_common(1)[0]
        example = next(name for name in strangers if other_method(name) == what)
        return OpenSoraError(
            f"{stored.path} holds {what} ({count} tensors, such as {example}), which is not supported; expected LoRA"
        )
    if not num_known:
        return OpenSoraError(f"{stored.path} holds no adapter but other tensors, such as {strangers[0]}; expected LoRA")
    shape = tuple(stored.tensors[strangers[0]].shape)
    more = f", one of {len(strangers)} tensors that are no part of LoRA" if len(strangers) > 1 else ""
    return OpenSoraError(
        f"{stored.path} holds {strangers[0]} of shape {shape}{more}; an adapter holds matrices named "
        "LAYER.lora_A.weight and .lora_B.weight, or .lora_down and .lora_up"
    )


def _refuse_text_encoders(file: Path, named: Mapping[str, TensorName]) -> None:
    of_text = [name for name, meaning in named.items() if is_of_text_encoder(meaning.layer)]
    if of_text:
        raise OpenSoraError(
            f"{file} changes a text encoder ({len(of_text)} of {len(named)} tensors, such as {of_text[0]}), which is "
            "not supported; expected an adapter of the transformer alone"
        )


def _pair(file: Path, layer: str, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a layer, whose shapes belong together."""
    if "A" in found and "B" in found:
        a, b = found["A"], found["B"]
        if a.ndim == b.ndim >= 2 and len(a) == b.shape[1] >= 1 and all(size == 1 for size in b.shape[2:]):
            return a, b
    shapes = ", ".join(f"lora_{name} {tuple(found[name].shape)}" for name in ("A", "B") if name in found)
    raise OpenSoraError(f"{file}: {layer} has {shapes}; expected lora_A (r, in) and lora_B (out, r)")


def _alpha(file: Path, layer: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise OpenSoraError(f"{file}: alpha of {layer} has shape {tuple(tensor.shape)}, expected one number")
    value = float(tensor)
    if not math.isfinite(value):
        raise OpenSoraError(f"{file}: alpha of {layer} is {value}, expected a number")
    return value


def _origin(file: Path, values: Mapping[str, Any]) -> AdapterOrigin | None:
    if not values:
        return None
    try:
        origin = AdapterOrigin(**values)
    except TypeError as error:
        raise OpenSoraError(f"{file}: what it says of its origin is not understood ({first_line(error)})") from error
    kinds = {"base": str, "class_name": str, "config": dict, "fingerprint": str, "training": dict}
    for name, kind in kinds.items():
        if not isinstance(getattr(origin, name), kind):
            raise OpenSoraError(f"{file}: what it says of its origin is not understood ({name} is no {kind.__name__})")
    return origin
