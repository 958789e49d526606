"""Low-rank adaptation (LoRA, Hu et al., 2021): small matrices beside frozen weights, trained in their place by PEFT.

A linear layer W learns W + alpha / r * B A, with A (r, in) drawn at random and B (out, r) zero at first, so that a run
begins at the base. Only A and B are trained, averaged, kept in checkpoints and exported. A run may also begin at an
adapter that is there, whatever tool wrote it: its layers, ranks and alphas are taken over. The base may lie in eight
bits meanwhile, as in QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), which has four.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora.adapters.adapter import Adapter, AdapterOrigin, read_adapter
from opensora.adapters.layouts import peft_config, write_adapter
from opensora.adapters.merging import fingerprint_of_layers, fit, fit_to_weights
from opensora.adapters.reading import ADAPTER_FILE, adapter_hash
from opensora.errors import OpenSoraError
from opensora.models.families import format_of
from opensora.models.transformer import SpaceTimeTransformer

logger = logging.getLogger(__name__)

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
        init_adapter: file or folder of an adapter to begin with, of any layout that is read. Rank, alpha and layers are
            its own then; a log line says so where `rank`, `alpha` or `targets` say otherwise.
        base_dtype: how the weights of the base lie in memory, None for float32: "int8" keeps the linear layers of its
            blocks in eight bits (see `models.int8`) and takes a quarter of their memory; the adapter stays in float32.
            The base is rounded after it was read, so what is exported belongs to the base as it is.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    preserve: float = 0.0
    init_adapter: str | None = None
    base_dtype: Literal["int8"] | None = None

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
        OpenSoraError: peft is not installed, no layer is meant, or the adapter to begin with is of another network.
    """
    start = None if config.init_adapter is None else _read_start(transformer, config)
    chosen = peft_config(start) if start is not None else _fresh(transformer, config)
    try:
        import peft
    except ImportError as error:
        raise OpenSoraError("training an adapter needs peft; install it with: pip install 'opensora[train]'") from error
    transformer.requires_grad_(False)
    transformer.add_adapter(peft.LoraConfig(**{**chosen, "lora_dropout": config.dropout}), _ADAPTER)
    for layer, pair in adapter_layers(transformer).items():
        for parameter, value in zip(pair, start.layers[layer] if start is not None else (), strict=False):
            if not parameter.is_meta:
                parameter.data.copy_(value)


def _fresh(transformer: SpaceTimeTransformer, config: LoRAConfig) -> dict[str, Any]:
    alpha = config.rank if config.alpha is None else config.alpha
    return {"r": config.rank, "lora_alpha": alpha, "target_modules": config.layers_of(transformer)}


def _read_start(transformer: SpaceTimeTransformer, config: LoRAConfig) -> Adapter:
    """The adapter that a run begins with, under the transformer's names."""
    adapter, name = read_adapter(str(config.init_adapter)), type(transformer).__name__
    weights = transformer.state_dict()
    without_data = any(weight.is_meta for weight in weights.values())
    fitted = fit(adapter, transformer, name) if without_data else fit_to_weights(adapter, transformer, weights, name)
    if fitted.differences:
        raise OpenSoraError(
            f"{adapter.path} changes biases or whole weights, such as {next(iter(fitted.differences))}, beside which "
            "nothing is trained; give an adapter of low-rank matrices alone to objective.train.init_adapter"
        )
    adapter.log_notes()
    for note in _differences(transformer, config, fitted):
        logger.warning("%s: %s", adapter.path, note)
    return fitted


def _differences(transformer: SpaceTimeTransformer, config: LoRAConfig, start: Adapter) -> list[str]:
    """What the settings say otherwise than the adapter that a run begins with."""
    chosen = peft_config(start)
    notes = []
    if config.rank != chosen["r"] or "rank_pattern" in chosen:
        notes.append(f"its rank {chosen['r']} is trained, not objective.train.rank={config.rank}")
    alpha = config.rank if config.alpha is None else config.alpha
    if alpha != chosen["lora_alpha"] or "alpha_pattern" in chosen:
        notes.append(f"its alpha {chosen['lora_alpha']:g} is used, not objective.train.alpha={alpha:g}")
    if set(config.layers_of(transformer)) != set(start.layers):
        notes.append(f"its layers are trained ({len(start.layers)}), not those of objective.train.targets")
    return notes


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


def base_fingerprint(transformer: SpaceTimeTransformer) -> str:
    """What tells the weights beside an adapter from others, see `fingerprint_of_layers`."""
    layers, stored = adapter_layers(transformer), transformer.state_dict()
    return fingerprint_of_layers({f"{name}.weight": stored[f"{name}.base_layer.weight"] for name in layers}, layers)


def export_adapter(
    transformer: SpaceTimeTransformer,
    config: LoRAConfig,
    folder: Path,
    *,
    base: str,
    training: Mapping[str, Any],
    fingerprint: str | None = None,
) -> Path:
    """Writes the adapter of a transformer as the file that `load_pipeline(adapters=...)` and diffusers read.

    Args:
        transformer: after `add_adapter`.
        config: what it was added with.
        folder: where.
        base: name of the model that it was trained on.
        training: how, as plain values.
        fingerprint: of that model's weights, see `base_fingerprint`; None for those that lie beside the adapter.
    """
    layers = adapter_layers(transformer)
    origin = AdapterOrigin(
        base=base,
        class_name=type(transformer).__name__,
        config={key: value for key, value in dict(transformer.config).items() if not key.startswith("_")},
        fingerprint=base_fingerprint(transformer) if fingerprint is None else fingerprint,
        training={**training, **_start_of(config)},
    )
    in_float32 = {name: (a.to(torch.float32), b.to(torch.float32)) for name, (a, b) in layers.items()}
    modules: dict[str, Any] = {name: transformer.get_submodule(name) for name in layers}
    alphas = {name: module.lora_alpha[_ADAPTER] for name, module in modules.items()}
    return write_adapter(Adapter(folder / ADAPTER_FILE, in_float32, alphas, origin=origin), folder)


def _start_of(config: LoRAConfig) -> dict[str, Any]:
    """What an adapter says of the one that its training began with: its name, and a hash of it."""
    if config.init_adapter is None:
        return {}
    path = Path(config.init_adapter).expanduser()
    return {"init_adapter": {"name": path.resolve().name, "sha256": adapter_hash(path)}}
