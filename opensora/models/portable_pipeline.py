"""Saved folders of a pipeline, which this package and diffusers both open."""

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.models.families import may_hold_components
from opensora.models.format import LIBRARIES
from opensora.models.portable_config import PortableConfigMixin

_MODULE = "pipeline"  # of a saved folder


class PortablePipelineMixin(PortableConfigMixin):
    """Folders of a pipeline that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens as well.

    diffusers looks for a class of its own by the name in `model_index.json`, or for one in a module of the folder; and
    it takes components from modules alone that were imported before. The module written there does nothing but import
    the class and those of the components, which have to be installed.
    """

    components: Mapping[str, Any]  # of DiffusionPipeline

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As diffusers, and the module."""
        super().save_pretrained(save_directory, **options)  # type: ignore[misc] # of DiffusionPipeline
        cls = type(self)
        modules = sorted({type(part).__module__ for part in self.components.values()})
        imported = "".join(
            f"import {module}\n" for module in modules if module.partition(".")[0] not in (*LIBRARIES, "builtins")
        )
        code = (
            '"""Lets `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` open this folder."""\n\n'
            f'{imported}from {cls.__module__} import {cls.__name__}\n\n__all__ = ["{cls.__name__}"]\n'
        )
        Path(save_directory, f"{_MODULE}.py").write_text(code, encoding="utf-8")

    def to_json_string(self) -> str:
        """The saved configuration, with the module that holds the class."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = [_MODULE, config["_class_name"]]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """As diffusers, but without the module: the class is known here, so no code of the folder is run.

        Components' modules are imported if they may hold components, see `families.may_hold_components`.
        """
        loaded = super().load_config(*args, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        libraries = (value[0] for value in config.values() if isinstance(value, list) and len(value) == 2)
        for library in libraries:
            if isinstance(library, str) and library not in LIBRARIES and may_hold_components(library):
                with contextlib.suppress(ImportError, RecursionError):  # diffusers says what it misses
                    importlib.import_module(library)
        if config.get("_class_name") == [_MODULE, cls.__name__]:
            config["_class_name"] = cls.__name__
        return loaded
