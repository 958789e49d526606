"""What users of diffusers' pipelines expect of every pipeline, under the names that they know."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from opensora.adapters.adapter import Adapter, read_adapter, understand
from opensora.adapters.layouts import PREFIX, lora_state, peft_config
from opensora.adapters.merging import fit
from opensora.adapters.reading import StoredAdapter
from opensora.errors import OpenSoraError
from opensora.models.offload_hooks import merge_tied_layers


class HabitsMixin:
    """Aliases, and pipelines made of other pipelines."""

    autoencoder: Any
    config: Any
    load_lora_into_transformer: Any
    lora_state_dict: Any
    offloader: Any
    to: Any
    transformer: Any

    @property
    def vae(self) -> Any:
        """The autoencoder, by the name that it has in other pipelines."""
        return self.autoencoder

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; layers that share their weights become one, or a group would send another's weights away."""
        for part in self.networks.values():
            if isinstance(part, nn.Module):
                merge_tied_layers(part)
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc] # of DiffusionPipeline

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """As in diffusers, for adapters in the layout of diffusers, PEFT, kohya or ComfyUI.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, tensors by name, or a repository on the Hub.
            adapter_name: what to call it; None for one that is free.
            hotswap: take the place of the adapter of that name.
            **options: `weight_name` and `subfolder`, and diffusers' own for repositories.

        Raises:
            OpenSoraError: what is no adapter, or not of this transformer; or the transformer's weights are not kept
                between calls, so that an adapter would be lost.
        """
        if self.offloader is not None and self.offloader.reads_again("transformer"):
            raise OpenSoraError(
                "the transformer is read from its files whenever it is needed, without what was loaded beside it; "
                "give the adapter to load_pipeline(adapters=...)"
            )
        low_memory = {k: options.pop(k) for k in ("low_cpu_mem_usage",) if k in options}
        adapter = fit(self._read_lora(pretrained_model_name_or_path_or_dict, options), self.transformer, "the pipeline")
        if adapter.differences:
            raise OpenSoraError(
                f"{adapter.path} changes biases or whole weights, such as {next(iter(adapter.differences))}, which "
                "cannot lie beside the network; give it to load_pipeline(adapters=...), which merges it"
            )
        adapter.log_notes()
        self.load_lora_into_transformer(
            lora_state(adapter),
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata={PREFIX + key: value for key, value in peft_config(adapter).items()},
            _pipeline=self,
            hotswap=hotswap,
            **low_memory,
        )

    def _read_lora(self, source: Any, options: dict[str, Any]) -> Adapter:
        """What is to be loaded: off the disk, or from where diffusers finds it."""
        places = [options.get(name) for name in ("subfolder", "weight_name")]
        path = Path(source, *filter(None, places)).expanduser() if isinstance(source, str | Path) else None
        if path is not None and (path.exists() or isinstance(source, Path)):
            return read_adapter(path)
        if isinstance(source, Mapping):
            return understand(StoredAdapter(Path("the adapter"), source))
        tensors, config = self.lora_state_dict(source, **options, return_lora_metadata=True)
        metadata = {"lora_adapter_metadata": json.dumps(config)} if config else {}
        return understand(StoredAdapter(Path(str(source)), tensors, metadata))

    def enable_vae_tiling(self) -> None:
        """Encode and decode frames in overlapping tiles, in less memory; see the autoencoder's `enable_tiling`."""
        self.autoencoder.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Frames whole again."""
        self.autoencoder.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Encode and decode the clips of a batch one by one; the result is the same."""
        self.autoencoder.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """All clips of a batch at once again."""
        self.autoencoder.disable_slicing()

    @property
    def components(self) -> dict[str, Any]:
        """Components and the model's defaults: `OpenSoraPipeline(**pipe.components)` is the same model again."""
        networks = self.networks
        known = set(inspect.signature(type(self).__init__).parameters) - set(networks)
        return {**networks, **{name: value for name, value in dict(self.config).items() if name in known}}

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:
        """A pipeline of this class that shares another one's networks, with the model's defaults.

        Args:
            pipeline: made of the same components.
            **changes: components or defaults to take the place of its own, and `torch_dtype`.

        Raises:
            OpenSoraError: components are missing.
        """
        dtype = changes.pop("torch_dtype", None)
        known = inspect.signature(cls.__init__).parameters
        parts = {name: part for name, part in pipeline.components.items() if name in known} | changes
        if missing := [name for name in cls.needed_components() if name not in parts]:
            raise OpenSoraError(f"a {type(pipeline).__name__} has no {', '.join(missing)}; give them as well, by name")
        made = cls(**parts)
        for name in ("offloader", "sequential_guidance", "ranks", "_turn"):  # how its networks are run
            if hasattr(pipeline, name):
                setattr(made, name, getattr(pipeline, name))
        return made if dtype is None else made.to(dtype)

    @classmethod
    def needed_components(cls) -> list[str]:
        """Names of the components that none of these pipelines can be without."""
        parameters = inspect.signature(cls.__init__).parameters
        return [n for n, p in parameters.items() if n != "self" and p.default is inspect.Parameter.empty]

    @property
    def networks(self) -> dict[str, Any]:
        """The components alone, by name."""
        return super().components  # type: ignore[misc] # of DiffusionPipeline
