"""Names of an adapter's tensors, as the tools of the field write them, and the layers of a network that they mean.

A name says three things: which wrapper or tool it comes from (`base_model.model.`, `diffusion_model.`, `lora_unet_`),
which layer it changes, and what it is of that change. Layers are found by their names without wrappers and with
underscores for dots, which is all that kohya's files keep of them; the network's own names decide what was meant.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from opensora.errors import OpenSoraError

Role = Literal["A", "B", "alpha", "weight", "bias", "B bias"]
"""A and B of a low-rank pair; alpha of its layer; what is added to a weight or a bias as it is; a bias behind B."""

ALPHA_OF_LAYER = ".alpha"
"""How names end that hold the alpha of one layer."""

# PEFT puts the name of an adapter after the matrix: `lora_A.default.weight`.
_MATRIX = r"(?:\.(?P<adapter>[^.]+))??(?:\.weight)?$"
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("B bias", re.compile(r"^(?P<layer>.+)\.(?:lora_B|lora_up)(?:\.(?P<adapter>[^.]+))?\.bias$")),
    ("A", re.compile(r"^(?P<layer>.+?)(?:\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)" + _MATRIX)),
    ("B", re.compile(r"^(?P<layer>.+?)(?:\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)" + _MATRIX)),
    ("alpha", re.compile(r"^(?P<layer>.+)\.alpha$")),
    ("weight", re.compile(r"^(?P<layer>.+)\.(?:diff|w_norm)$")),
    ("bias", re.compile(r"^(?P<layer>.+)\.(?:diff_b|b_norm)$")),
)

_OTHER_METHODS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "magnitudes of DoRA"),
    (re.compile(r"\.hada_"), "LoHa (Hadamard products)"),
    (re.compile(r"\.lokr_"), "LoKr (Kronecker products)"),
    (re.compile(r"\.lora_mid\b"), "LoCon with a third matrix (Tucker)"),
    (re.compile(r"\.lora_embedding_[AB]\b"), "LoRA of embeddings"),
    (re.compile(r"\.(oft_|boft_|oft_diag|rescale\b)"), "OFT"),
    (re.compile(r"\.(ia3_l|on_input\b)"), "IA3"),
    (re.compile(r"\.(vera_lambda|hra_|[ab][12]\.weight$|glora_)"), "another method than LoRA"),
)

_AVERAGES = {"ema", "ema_model", "ema_state_dict", "swa", "shadow", "average"}

# What libraries and training frameworks wrap a network in, wherever that stands in a name.
_WRAPPERS = {
    *("base_model", "model", "module", "modules", "transformer", "unet", "diffusion_model", "denoiser", "dit", "net"),
    *("network", "state_dict", "pipe", "pipeline", "lora", "adapter", "processor", *_AVERAGES),
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
_FLAT_WRAPPERS = re.compile(
    r"^(?:lora_unet|lora_transformer|lora_dit|lora_diffusion_model|lora_model|lora|lycoris|base_model|model|module"
    r"|transformer|unet|diffusion_model|_?orig_mod|dit)_+(?=.)"
)
_LONGEST_NAME = 500
_TEXT_ENCODER = re.compile(r"^(?:lora_te\d?_|text_encoder(_\d)?[._]|te\d?[._])")


@dataclass(frozen=True)
class TensorName:
    """What the name of a tensor says.

    Attributes:
        layer: what it belongs to, without wrappers; of kohya's files with underscores for dots.
        role: what it is.
        adapter: PEFT's name of the adapter, if it is there.
    """

    layer: str
    role: Role
    adapter: str | None = None


def parse_name(name: str) -> TensorName | None:
    """What the name of a tensor says; None for one that is no part of a low-rank adapter."""
    if len(name) > _LONGEST_NAME:
        return None
    for role, pattern in _ROLES:
        if match := pattern.match(name):
            groups = match.groupdict()
            return TensorName(without_wrappers(groups["layer"]), role, groups.get("adapter"))
    return None


def without_doubles(names: Iterable[str]) -> list[str]:
    """The names that count: where averaged matrices lie beside those that they are an average of, the averaged ones."""
    names = list(names)
    averaged = [name for name in names if not _AVERAGES.isdisjoint(name.split("."))]
    others = set(map(parse_name, names)) - {None} if len(averaged) < len(names) else set()
    is_average_of_all = averaged and others == set(map(parse_name, averaged)) and 2 * len(averaged) == len(names)
    return averaged if is_average_of_all else names


def other_method(name: str) -> str | None:
    """The method of adapting that a tensor of this name belongs to, if it is known and not LoRA."""
    return next((what for pattern, what in _OTHER_METHODS if pattern.search(name)), None)


def is_part_of_adapter(name: str) -> bool:
    """Whether tensors of this name are in files of adapters and in no others."""
    told = parse_name(name)
    return other_method(name) is not None or (told is not None and told.role in ("A", "B", "weight", "bias"))


def is_of_text_encoder(layer: str) -> bool:
    """Whether it is a layer of a text encoder."""
    return _TEXT_ENCODER.match(layer) is not None


def is_flat(layer: str) -> bool:
    """Whether the dots of a layer's name were replaced by underscores, so that a network has to say where they were."""
    return "." not in layer and re.search(r"_\d+_", layer) is not None


def without_wrappers(layer: str) -> str:
    """A layer's name without what its network was wrapped in."""
    if is_of_text_encoder(layer):
        return layer
    kept = ".".join(part for part in layer.split(".") if part not in _WRAPPERS) or layer
    return kept if "." in kept else _without_flat_wrappers(kept)


def _without_flat_wrappers(layer: str) -> str:
    while match := _FLAT_WRAPPERS.match(layer):
        layer = layer[match.end() :]
    return layer


class LayerNames:
    """The layers of a network by any name that a file may give them.

    Args:
        names: of the network's modules.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[str]] = {}
        for name in names:
            if name:
                self._names.setdefault(_key(name), []).append(name)

    def find(self, layers: Iterable[str]) -> dict[str, str | None]:
        """Layer as it is written -> the network's name of it; None for one that it does not have.

        Where none is known, whatever stands before all of them alike is what the network was wrapped in.

        Raises:
            OpenSoraError: several layers could be meant.
        """
        keys = {layer: _key(layer) for layer in layers}
        found = {layer: self._find(key, layer) for layer, key in keys.items()}
        if any(found.values()):
            return found
        words = [key.split("_") for key in keys.values()]
        alike = sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False)))
        for skipped in range(1, alike + 1):
            below = {layer: self._find("_".join(key.split("_")[skipped:]), layer) for layer, key in keys.items()}
            if all(below.values()):
                return below
        return found

    def _find(self, key: str, layer: str) -> str | None:
        found = self._names.get(key, [])
        if layer in found:
            return layer
        if len(found) > 1:
            raise OpenSoraError(f"{layer} may be {' or '.join(found)}; give a file whose names have dots")
        return found[0] if found else None


def _key(layer: str) -> str:
    """What the names of one layer have in common, whoever wrote them."""
    return _without_flat_wrappers(without_wrappers(layer).replace(".", "_"))
