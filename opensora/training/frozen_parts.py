"""The weights of a module that are not trained: told from others, and, as checkpoints lack them, written beside a run.

See `containers.runs`.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from opensora.containers.runs import ABOUT, FROZEN_WEIGHTS, FrozenParts
from opensora.settings import save_settings
from opensora.weights import fingerprint


def fingerprint_of_frozen(module: nn.Module) -> str:
    """What tells the weights of a module that are not trained from others."""
    return fingerprint({name: p for name, p in module.named_parameters() if not p.requires_grad})


def save_frozen_part(
    module: nn.Module, folder: Path, *, trained: list[str], origins: Mapping[str, str] | None = None
) -> None:
    """Writes what is not trained of a module that is, and what its checkpoints hold.

    Args:
        module: of the task.
        folder: where; the parts beside it are written by others.
        trained: networks in it, by their place in a pipeline.
        origins: network that is not written at all -> where it can be found.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    frozen = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        if not parameter.requires_grad:
            frozen[name] = parameter.detach().cpu().contiguous()
    if frozen:
        save_file(frozen, folder / FROZEN_WEIGHTS)
    parameters = {*first.values(), *tied}
    buffers = [name for name in module.state_dict() if name not in parameters]
    save_settings(FrozenParts(trained, buffers, tied, dict(origins or {})), folder / ABOUT)
