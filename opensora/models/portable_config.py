"""Configurations that can be handed on: what is saved of a model says nothing about the machine it was saved on."""

import json

from diffusers.configuration_utils import ConfigMixin


class PortableConfigMixin(ConfigMixin):
    """diffusers' `ConfigMixin`, but for the folder a model was loaded from, which it would save along with the rest."""

    def to_json_string(self) -> str:
        """The saved configuration, without `_name_or_path`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
