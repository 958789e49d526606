"""What users of diffusers' pipelines expect of every pipeline, under the names that they know."""

import inspect
from typing import Any, Self

from torch import nn

from opensora.errors import OpenSoraError
from opensora.models.offload_hooks import merge_tied_layers


class HabitsMixin:
    """Aliases, and pipelines made of other pipelines."""

    autoencoder: Any
    config: Any
    offloader: Any
    to: Any

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

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Raises:
            OpenSoraError: the transformer's weights are not kept between calls, so that an adapter would be lost.
        """
        if self.offloader is not None and self.offloader.reads_again("transformer"):
            raise OpenSoraError(
                "the transformer is read from its files whenever it is needed, without what was loaded beside it; "
                "give the adapter to load_pipeline(adapters=...)"
            )
        super().load_lora_weights(*args, **kwargs)  # type: ignore[misc] # of diffusers' loader

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
