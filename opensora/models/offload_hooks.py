"""Weights that diffusers or accelerate keep elsewhere while their module does not work, seen from the module's side.

Both bring weights in when `forward` is called. An autoencoder is never called so: its ways in are `encode`, `decode`
and their like.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import _get_group_onload_device, _is_group_offload_enabled
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])
_GROUP_OFFLOADING = "group_offloading"


def apply_offload_hooks(method: _Method) -> _Method:
    """Decorate a method other than `forward` that computes: the module's weights are there while it runs.

    To diffusers' `apply_forward_hook`, which does so where whole models are offloaded, this adds groups of layers. Such
    methods may call each other; each brings in what the one before has sent away.
    """
    whole_models = apply_forward_hook(method)

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registry = getattr(self, "_diffusers_hook", None)
        group = registry.get_hook(_GROUP_OFFLOADING) if isinstance(registry, HookRegistry) else None
        if group is None:
            return whole_models(self, *args, **kwargs)
        args, kwargs = group.pre_forward(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        finally:
            group.post_forward(self, None)

    return wrapper  # type: ignore


def execution_device(module: nn.Module) -> torch.device:
    """Where a network computes: the device that its weights are on, or are brought to when it does."""
    if _is_group_offload_enabled(module):
        return torch.device(_get_group_onload_device(module))
    for submodule in module.modules():
        device = getattr(getattr(submodule, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def merge_tied_layers(module: nn.Module) -> None:
    """Make one layer of those that share their weights, such as the two token embeddings of a T5 encoder.

    Group offloading would put the weight into two groups, and write the second one to disk after the first has sent its
    data away.
    """
    first: dict[tuple[Any, ...], nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            weights = tuple(child.parameters(recurse=False))
            if weights and not list(child.children()):
                parent.register_module(name, first.setdefault((type(child), *map(id, weights)), child))
