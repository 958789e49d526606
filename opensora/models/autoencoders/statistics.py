"""Shift and scale of a latent space in files of weights, as the published ones have them.

They are figures of the declaration (`LatentSpace`), which stands in the configuration and is what computes. A model
keeps no tensors of them, so no cast, device or offloading can change them: state dicts get them from the declaration,
and what is loaded is held against it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.declared import DeclaredCodec
from opensora.models.autoencoders.latent_space import LatentSpace


class StoredStatistics(DeclaredCodec):
    """A codec whose state dict names `shift` and `scale`, each (1, Z, 1, 1, 1): one number per channel.

    Published files may hold one number for all channels, none at all, or the declared ones in half precision.
    """

    declared_tensors = ("shift", "scale")

    def _declare(self, latent_space: LatentSpace) -> None:
        """The declaration that goes with the weights, when the model is built."""
        _check_per_channel(latent_space, self.latent_channels)
        super()._declare(latent_space)
        self._precisions: dict[str, torch.dtype] = {}  # in which the weights that were loaded have them
        self.register_state_dict_post_hook(_write_statistics)
        self.register_load_state_dict_pre_hook(_read_statistics)

    def set_latent_space(self, latent_space: LatentSpace) -> None:
        """Declares what these weights' latents stand for, after training them."""
        _check_per_channel(latent_space, self.latent_channels)
        if latent_space.declared_by_weights != self._latent_space.declared_by_weights:
            self._precisions = {}
        super().set_latent_space(latent_space)

    def latent_space_of(self, weights: Mapping[str, Tensor]) -> LatentSpace:
        """The checkpoint's own declaration with the figures that stand in stored weights, where those say otherwise."""
        declared = self.latent_space.declared_by_weights
        own: dict[str, Tensor] = dict(
            zip(self.declared_tensors, declared.statistics(self.latent_channels), strict=True)
        )
        found = {name: weights[name].detach().cpu() for name in self.declared_tensors if name in weights}
        found = {name: value for name, value in found.items() if value.shape in ((), own[name].shape)}
        other = {name: value for name, value in found.items() if _precision(value, own[name]) is None}
        figures = {name: _float32_values(value.expand(own[name].shape)) for name, value in other.items()}
        return replace(declared, **figures)

    def check_statistics(self, weights: Mapping[str, Tensor]) -> None:
        """Refuses weights of another latent space than the declared one; under an override, remembers theirs.

        Raises:
            OpenSoraError: naming both values and the two ways out.
        """
        found, space = self.latent_space_of(weights), self.latent_space
        if space.overridden:
            self.set_latent_space(replace(space, replaces=None).overriding(found))
        else:
            space.check_same(found, here="the configuration", there="the weights")
        own = zip(self.declared_tensors, self._own_statistics(), strict=True)
        kinds = {name: _precision(weights[name].detach().cpu(), value) for name, value in own if name in weights}
        self._precisions |= {name: kind for name, kind in kinds.items() if kind is not None}

    @classmethod
    def _load_pretrained_model(cls, model: "StoredStatistics", *args: Any, **kwargs: Any) -> Any:
        """Takes in the two tensors as buffers, which diffusers fills by name, while it loads the weights."""
        for name, value in zip(model.declared_tensors, model._own_statistics(), strict=True):
            model.register_buffer(name, value)
        devices = kwargs.get("device_map")
        if devices is not None and "" not in devices:  # accelerate, which gets it next, asks for every name there is
            devices.update(dict.fromkeys(model.declared_tensors, "cpu"))
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        model.check_statistics({name: model._buffers.pop(name) for name in model.declared_tensors})  # type: ignore[arg-type]
        return loaded

    def _own_statistics(self) -> tuple[Tensor, Tensor]:
        return self.latent_space.declared_by_weights.statistics(self.latent_channels)


def _check_per_channel(latent_space: LatentSpace, channels: int) -> None:
    if any(figures.shape[2] > 1 for figures in latent_space.statistics(channels)):
        raise OpenSoraError(
            "shift or scale has numbers for each latent frame of a chunk, but this autoencoder takes one per channel"
        )


def _write_statistics(model: StoredStatistics, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """As a tensor of the model would be that was loaded and cast: fingerprints of weights are those of their file."""
    for name, value in zip(model.declared_tensors, model._own_statistics(), strict=True):
        state_dict.setdefault(prefix + name, value.to(model._precisions.get(name, value.dtype)).to(model.dtype))


def _read_statistics(
    model: StoredStatistics,
    state_dict: dict[str, Any],
    prefix: str,
    _local_metadata: Any,
    _strict: bool,
    _missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    found = {name: state_dict.pop(prefix + name) for name in model.declared_tensors if prefix + name in state_dict}
    wanted = model._own_statistics()[0].shape
    for name, value in found.items():
        if value.shape not in ((), wanted):
            error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(value.shape)}, expected {tuple(wanted)}")
    if not error_msgs:
        model.check_statistics(found)


def _float32_values(tensor: Tensor) -> tuple[float, ...]:
    """Shortest decimals that stand for the same float32 numbers: 0.34, not 0.3400000035762787."""
    return tuple(float(str(value)) for value in tensor.float().flatten().numpy())


def _precision(found: Tensor, declared: Tensor) -> torch.dtype | None:
    """The precision in which `found` was stored at some time if it is `declared`; None if it is not."""
    found = found.float().expand(declared.shape)
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return next((kind for kind in kinds if torch.equal(found, declared.to(kind).float())), None)
