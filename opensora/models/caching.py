"""Step caches of diffusers on space-time transformers: which modules they hook, and that they hook some.

FirstBlockCache and MagCache run along a list named `blocks`. PyramidAttentionBroadcast (Zhao et al., 2024) and
TaylorSeer (Liu et al., 2025) look modules up by their names, and say nothing where a name fits none.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from opensora.errors import OpenSoraError

_ATTENTION_KINDS = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class CacheIdentifiers:
    """Names by which caches find the modules of one network, where a configuration names none.

    Attributes:
        spatial, temporal: regular expressions found in the names of the attention modules along either axis.
        layers: regular expression that is the whole name of what TaylorSeer predicts.
        blocks: the same, of whole blocks, which TaylorSeer's lite mode skips.
        last_layer: the same, of what its lite mode predicts instead.
    """

    spatial: str = r"[.]attn$"
    temporal: str = r"[.]attn_temp$"
    layers: str = r"((spatial|temporal)_)?blocks[.][0-9]+[.](attn|attn_temp|mlp)"
    blocks: str = r"((spatial|temporal)_)?blocks[.][0-9]+"
    last_layer: str = r"final_layer"


class _BlocksInOrder(nn.Module):
    """All blocks of a model as one list, for caches that look for a list named `blocks` and run along it."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def apply_cache(model: nn.Module, blocks: Iterable[nn.Module], config: Any, identifiers: CacheIdentifiers) -> None:
    """Hook a cache into a model.

    Args:
        model: the network.
        blocks: its blocks in the order in which they run.
        config: of FirstBlockCache, MagCache, PyramidAttentionBroadcast or TaylorSeer.
        identifiers: of the model's modules, for what `config` leaves at diffusers' defaults.

    Raises:
        OpenSoraError: a cache of other models, or identifiers that fit no module.
    """
    if isinstance(config, FirstBlockCacheConfig):
        apply_first_block_cache(_BlocksInOrder(blocks), config)
    elif isinstance(config, MagCacheConfig):
        apply_mag_cache(_BlocksInOrder(blocks), config)
    elif isinstance(config, PyramidAttentionBroadcastConfig):
        apply_pyramid_attention_broadcast(model, _broadcast_config(model, config, identifiers))
    elif isinstance(config, TaylorSeerCacheConfig):
        apply_taylorseer_cache(model, _taylorseer_config(model, config, identifiers))
    else:
        raise OpenSoraError(
            f"{type(config).__name__} does not work with {type(model).__name__}; use FirstBlockCacheConfig, "
            "MagCacheConfig, PyramidAttentionBroadcastConfig or TaylorSeerCacheConfig"
        )


def _broadcast_config(
    model: nn.Module, config: PyramidAttentionBroadcastConfig, identifiers: CacheIdentifiers
) -> PyramidAttentionBroadcastConfig:
    """The configuration with the model's names in place of diffusers' defaults; every kind asked for must fit some."""
    ours: dict[str, Any] = {}
    for kind in ("spatial", "temporal"):
        field = f"{kind}_attention_block_identifiers"
        if getattr(config, field) == getattr(PyramidAttentionBroadcastConfig, field):
            ours[field] = (getattr(identifiers, kind),)
    config = replace(config, **ours)

    asked = [kind for kind in _ATTENTION_KINDS if getattr(config, f"{kind}_attention_block_skip_range") is not None]
    asked = asked or ["spatial"]  # as diffusers does, with a warning
    missing = set(asked)
    for name, module in model.named_modules():
        if isinstance(module, AttentionModuleMixin):
            kinds = ("cross",) if getattr(module, "is_cross_attention", False) else ("spatial", "temporal")
            fitting = [kind for kind in kinds if kind in asked and _fits(config, kind, name)]
            missing -= set(fitting[:1])  # the first that fits takes a module
    if missing:
        field = f"{min(missing)}_attention_block_identifiers"
        raise OpenSoraError(
            f"{field} {list(getattr(config, field))} fit no module of {type(model).__name__} that is left for them; "
            "leave them out for the model's own, or give regular expressions found in names of attention modules"
        )
    return config


def _fits(config: PyramidAttentionBroadcastConfig, kind: str, name: str) -> bool:
    return any(re.search(identifier, name) for identifier in getattr(config, f"{kind}_attention_block_identifiers"))


def _taylorseer_config(
    model: nn.Module, config: TaylorSeerCacheConfig, identifiers: CacheIdentifiers
) -> TaylorSeerCacheConfig:
    """The configuration with the model's names where it has none, and lite mode spelled in these names."""
    if config.use_lite_mode:
        config = replace(
            config,
            use_lite_mode=False,
            skip_predict_identifiers=[identifiers.blocks],
            cache_identifiers=[identifiers.last_layer],
        )
    elif not config.cache_identifiers:
        config = replace(config, cache_identifiers=[identifiers.layers])
    patterns = [*(config.cache_identifiers or []), *(config.skip_predict_identifiers or [])]
    # A list of modules never runs itself, so that a cache of it would never act.
    names = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    if not any(re.fullmatch(pattern, name) for pattern in patterns for name in names):
        raise OpenSoraError(
            f"the identifiers {patterns} fit no module of {type(model).__name__}; leave them out for the model's own, "
            "or give regular expressions of whole module names"
        )
    return config
