"""Configurations that can be handed on: what is saved of a model says nothing about the machine it was saved on."""

import json
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.import_utils import is_accelerate_available
from torch import nn


class PortableConfigMixin(ConfigMixin):
    """diffusers' `ConfigMixin`, but for the folder a model was loaded from, which it would save along with the rest."""

    def to_json_string(self) -> str:
        """The saved configuration, without `_name_or_path`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class PortableModelMixin(ModelMixin, PortableConfigMixin):
    """diffusers' `ModelMixin`, whose weights end in the precision that was asked for, with and without accelerate."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **loading: Any) -> Self:
        """Loads a folder or a repository as diffusers does.

        Without accelerate, diffusers takes weights over as they are stored if the first tensor of the model has the
        file's precision; a table in float32 at the front would then leave the whole model in float32.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **loading)
        dtype = loading.get("dtype") or loading.get("torch_dtype")
        cast_by_diffusers = is_accelerate_available() and loading.get("low_cpu_mem_usage", True)
        if isinstance(dtype, torch.dtype) and not cast_by_diffusers:
            nn.Module.to(loaded[0] if isinstance(loaded, tuple) else loaded, dtype)
        return loaded
