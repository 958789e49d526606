"""Whether the components of a pipeline are of one model, as far as they tell."""

from collections.abc import Mapping
from typing import Any

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace


def check_time_shift(scheduler: Any, autoencoder: VideoCodec) -> None:
    """A time shift counts latent frames; it must count them as the autoencoder makes them.

    Raises:
        OpenSoraError: they count otherwise.
    """
    if not getattr(scheduler, "use_timestep_transform", False):
        return
    for name in ("temporal_factor", "micro_frame_size"):
        ours, theirs = getattr(scheduler, name), getattr(autoencoder, name)
        if ours != theirs:
            raise OpenSoraError(
                f"the scheduler shifts its timesteps for {name}={ours}, but the autoencoder has {theirs}; "
                f"make the scheduler with {name}={theirs}"
            )


def check_trained_on(trained_on: Mapping[str, Any] | None, autoencoder: Any) -> None:
    """A transformer works on the latents it was trained on, unless a user overrides what they stand for.

    Raises:
        OpenSoraError: the autoencoder makes others.
    """
    if trained_on and "latent_space" in trained_on and not autoencoder.latent_space.overridden:
        wanted = LatentSpace.from_dict(trained_on["latent_space"])
        wanted.check_same(autoencoder.latent_space, here="the transformer's training", there="the autoencoder")
