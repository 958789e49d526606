"""Adapters among checkpoints: what one is, which models it fits, and one written anew for another tool."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.adapters.adapter import Adapter, AdapterOrigin, read_adapter
from opensora.adapters.layouts import LAYOUTS, write_adapter
from opensora.adapters.merging import fingerprint_of_layers, fit
from opensora.adapters.names import is_flat
from opensora.adapters.reading import adapter_hash
from opensora.checkpoints.components import build_model
from opensora.checkpoints.published import BUNDLED
from opensora.checkpoints.source import find_part
from opensora.errors import OpenSoraError
from opensora.models.families import network_class
from opensora.settings import nearest_name
from opensora.weights import read_weights

FUSED_KEY = "_fused_adapters"
"""Key of a transformer's configuration: name, hash and scale of each adapter that was merged into it for good."""


@dataclass
class AdapterReport:
    """What an adapter is.

    Attributes:
        path: its file.
        sha256: of the file.
        rank: the largest r.
        strength: alpha / r: the smallest and the largest of all layers.
        stated: where that is stated; None if it is guessed.
        num_layers: layers that it changes.
        num_parameters: values in its tensors.
        origin: what it belongs to; None if it does not say.
        fits: bundled models whose weights it was trained on; of one that does not say, those of its names and sizes.
        notes: what is guessed or contradicted, one line each.
        problems: none: an adapter that is wrong cannot be read.
    """

    path: str
    sha256: str
    rank: int
    strength: tuple[float, float]
    stated: str | None
    num_layers: int
    num_parameters: int
    origin: AdapterOrigin | None
    fits: list[str]
    notes: list[str]
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
    factors = [adapter.factor(layer) for layer in adapter.layers] or [1.0]
    return AdapterReport(
        path=str(adapter.path),
        sha256=adapter_hash(path),
        rank=adapter.rank,
        strength=(min(factors), max(factors)),
        stated=adapter.stated,
        num_layers=len({*adapter.layers, *(name.rpartition(".")[0] for name in adapter.differences)}),
        num_parameters=adapter.num_parameters,
        origin=adapter.origin,
        fits=[name for name, model in BUNDLED.items() if _fits(adapter, model.folder / "transformer")],
        notes=list(adapter.notes),
    )


def record_fused(transformer: Any, adapters: Mapping[Path, float]) -> None:
    """Writes into a transformer's configuration which adapters were merged into it for good, besides those before."""
    if not adapters:
        return
    now = [{"name": p.resolve().name, "sha256": adapter_hash(p), "scale": scale} for p, scale in adapters.items()]
    before = transformer.config.get(FUSED_KEY) or []
    transformer.register_to_config(**{FUSED_KEY: [*before, *now]})


def convert_adapter(
    adapters: Mapping[Path, float], output: Path, layout: str, model: str | Path | None = None
) -> AdapterReport:
    """Writes an adapter in another tool's layout: the same matrices, and the same strength.

    Args:
        adapters: the one adapter (its file or folder) -> what its strength is multiplied by.
        output: what is written, see `write_adapter`; it must not exist yet, or be an empty folder.
        layout: "diffusers", "peft", "kohya" or "comfyui".
        model: whose transformer it is for; None for the one that the adapter itself names.

    Returns:
        The report on what was written.

    Raises:
        OpenSoraError: not one adapter, an unknown layout, an output that is in the way, an adapter of another model, or
            names without dots and no model to tell where they were.
    """
    if layout not in LAYOUTS:
        raise OpenSoraError(f"unknown layout {layout!r} in `to`{nearest_name(layout, LAYOUTS)}")
    if len(adapters) != 1:
        raise OpenSoraError(f"`to` writes one adapter anew, and {len(adapters) or 'none'} is given with `adapter`")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OpenSoraError(f"output {output} exists; name something that does not exist yet")
    [(path, scale)] = adapters.items()
    if not scale:
        raise OpenSoraError(f"{path} at scale 0 changes nothing; give another scale with `adapter`")
    adapter = read_adapter(path)
    adapter.log_notes()
    network = _network_of(adapter, model)
    if network is not None:
        adapter = fit(adapter, network, str(model or adapter.path))
    elif flat := [layer for layer in adapter.layers if is_flat(layer)]:
        raise OpenSoraError(
            f"{path} writes names without dots, such as {flat[0]}; name the model that it is for before the output, so "
            "that its layers tell where they were"
        )
    return inspect_adapter(write_adapter(adapter if scale == 1 else adapter.scaled(scale), output, layout))


def _network_of(adapter: Adapter, model: str | Path | None) -> nn.Module | None:
    """The network that an adapter is for, without weights; None if nobody says."""
    with torch.device("meta"):
        if model is not None:
            return find_part(model, "transformer", on_disk=False).build()
        if adapter.origin is None:
            return None
        cls = network_class("transformer", adapter.origin.class_name)
        return build_model(cls, adapter.origin.config, adapter.path)


def _fits(adapter: Adapter, transformer: Path) -> bool:
    try:
        fitted = fit(adapter, _network_of(adapter, transformer) or nn.Identity(), str(transformer))
    except OpenSoraError:
        return False
    origin = adapter.origin
    return origin is None or origin.fingerprint == fingerprint_of_layers(read_weights(transformer), fitted.layers)
