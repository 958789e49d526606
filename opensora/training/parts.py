"""The networks that a task is made of, each from where the user says: a model's name, a folder, a file.

On torch's meta device networks are built without reading a weight, so that a run can be planned on a machine that holds
none of them: configurations of published models are known.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoints.components import build_model
from opensora.checkpoints.source import Part, find_part
from opensora.models.families import network_class
from opensora.models.format import kind_of_place
from opensora.weights import cast_weights

META = "meta"


@dataclass(frozen=True)
class Untrained:
    """A network of random weights, the same every time: for runs that try the machinery.

    Attributes:
        options: keywords of its class.
        seed: which weights.
        architecture: its class; None for the newest of its kind.
    """

    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    architecture: str | None = None


Origin = str | Path
"""A model's name, the folder of a pipeline, or a network's own folder or file."""


def build_part(origin: Origin | Untrained, name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A network on a device, in evaluation mode and without gradients: one that is used and not trained.

    Args:
        origin: where it comes from.
        name: its place in a pipeline.
        device: where it goes.
        dtype: of its weights.

    Raises:
        OpenSoraError: see `find_part` and `Part.load`.
    """
    if isinstance(origin, Untrained):
        on_device = torch.device(META) if device == META else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), on_device:
            torch.manual_seed(origin.seed)
            cls = network_class(kind_of_place(name), origin.architecture)
            network = build_model(cls, origin.options, Path(f"objective.{name}"))
        cast_weights(network, dtype)
    else:
        part = find_part(origin, name, on_disk=device != META)
        network = meta_model(part, dtype) if device == META else part.load(dtype)
    return network.to(device).requires_grad_(False).eval()


def describe_origin(origin: Origin | Untrained) -> str:
    """Where a network came from, in words."""
    return f"untrained, seed {origin.seed}" if isinstance(origin, Untrained) else str(origin)


def meta_model(part: Part, dtype: torch.dtype = torch.float32) -> Any:
    """The network of a part on the meta device; of its weights, names and shapes are read at most."""
    with torch.device(META):
        return cast_weights(part.build(), dtype)


def find_tokenizer(origin: Origin, place: str = "tokenizer") -> Any:
    """The tokenizer of a model, by its place in a pipeline, or the one in a text encoder's own folder.

    Raises:
        OpenSoraError: there is none.
    """
    return find_part(origin, place).load_settings()
