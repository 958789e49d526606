"""Low-rank adaptation (LoRA, Hu et al., 2021): small matrices beside frozen weights, trained in their place by PEFT.

A linear layer W learns W + alpha / r * B A, with A (r, in) drawn at random and B (out, r) zero at first, so that a run
begins at the base. Only A and B are trained, averaged, kept in checkpoints and exported.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.adapters import AdapterOrigin, fingerprint_of_layers, save_adapter
from opensora.errors import OpenSoraError
from opensora.models.families import format_of
from opensora.models.transformer import SpaceTimeTransformer

_ADAPTER = "default"  # PEFT's name of the only one


@dataclass(frozen=True)
class LoRAConfig:
    """What is trained beside the frozen transformer.

    Attributes:
        rank: r, columns of B.
        alpha: what B A is multiplied by, times r; None for r, that is, by 1.
        targets: parts of the names of the linear layers that get an adapter, such as "attn.qkv" or "spatial_blocks";
            what a transformer lacks is left out. None for those of its family: attention and MLP of every block.
        dropout: of the adapters' inputs.
        preserve: weight of the mean absolute difference that the adapter makes to predictions. It is a threshold: what
            the clips would have changed by less than half of it stays as it was (soft thresholding), so a look is
            learnt where it is, and the rest stays. It takes a forward pass more.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    preserve: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OpenSoraError(f"rank of LoRA is {self.rank}; give 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise OpenSoraError(f"alpha of LoRA is {self.alpha:g}; give a number above 0")
        if not 0 <= self.dropout < 1:
            raise OpenSoraError(f"dropout of LoRA is {self.dropout:g}; give a share from 0 to 1")
        if not self.preserve >= 0:
            raise OpenSoraError(f"preserve of LoRA is {self.preserve:g}; give 0 or more")

    def layers_of(self, transformer: nn.Module) -> list[str]:
        """Names of the linear layers that get an adapter.

        Raises:
            OpenSoraError: there is none.
        """
        linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        targets = format_of(type(transformer)).lora_targets if self.targets is None else self.targets
        chosen = [name for name in linear if any(f".{target}." in f".{name}." for target in targets)]
        if not chosen:
            ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise OpenSoraError(
                f"LoRA's targets {', '.join(targets) or '(none)'} name no linear layer of this "
                f"{type(transformer).__name__}; it has {', '.join(ends)}"
            )
        return chosen


def add_adapter(transformer: SpaceTimeTransformer, config: LoRAConfig) -> None:
    """Freezes a transformer and puts an adapter beside its layers, which alone has gradients then.

    Raises:
        OpenSoraError: peft is not installed, or no layer is meant.
    """
    layers = config.layers_of(transformer)
    try:
        import peft
    except ImportError as error:
        raise OpenSoraError("training an adapter needs peft; install it with: pip install 'opensora[train]'") from error
    transformer.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # its annotation says int, its arithmetic takes any number
        lora_dropout=config.dropout,
        target_modules=layers,
    )
    transformer.add_adapter(options, _ADAPTER)


@contextlib.contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """Within it the transformer computes what it did before `add_adapter`."""
    layers: list[Any] = [module for module in transformer.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.set_scale(_ADAPTER, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1)


def adapter_layers(transformer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a linear layer -> A (r, in) and B (out, r) of the adapter beside it."""
    return {
        name: (module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight)  # type: ignore[index]
        for name, module in transformer.named_modules()
        if hasattr(module, "lora_A") and _ADAPTER in module.lora_A  # type: ignore[operator]
    }


def export_adapter(
    transformer: SpaceTimeTransformer, config: LoRAConfig, folder: Path, *, base: str, training: Mapping[str, Any]
) -> Path:
    """Writes the adapter of a transformer as the file that `load_pipeline(adapters=...)` and diffusers read.

    Args:
        transformer: after `add_adapter`.
        config: what it was added with.
        folder: where.
        base: name of the model that it was trained on.
        training: how, as plain values.
    """
    layers = adapter_layers(transformer)
    stored = transformer.state_dict()
    weights = {f"{name}.weight": stored[f"{name}.base_layer.weight"] for name in layers}
    origin = AdapterOrigin(
        base=base,
        class_name=type(transformer).__name__,
        config={key: value for key, value in dict(transformer.config).items() if not key.startswith("_")},
        fingerprint=fingerprint_of_layers(weights, layers),
        training=dict(training),
    )
    peft_config = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(layers),
    }
    return save_adapter(
        folder, {n: (a.to(torch.float32), b.to(torch.float32)) for n, (a, b) in layers.items()}, peft_config, origin
    )
