"""Whether the components of a pipeline are of one model, as far as they tell, and what else it says of itself."""

import inspect
from collections.abc import Mapping
from typing import Any

from opensora.contents import describe_value
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


def check_distilled_from(distilled_from: Mapping[str, Any] | None) -> None:
    """A distilled model tells in how many steps it learnt to be sampled.

    Raises:
        OpenSoraError: it does not.
    """
    if distilled_from is None:
        return
    steps = distilled_from.get("num_steps") if isinstance(distilled_from, Mapping) else None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OpenSoraError(
            f"distilled_from is {describe_value(distilled_from)}; expected an object whose num_steps is a whole number "
            "of at least 1, or None for a model that was not distilled"
        )


def describe_object(configured: Any) -> dict[str, Any]:
    """Class and configuration of a diffusers object, without the libraries' own notes and other classes' options."""
    known = inspect.signature(type(configured).__init__).parameters
    options = {name: value for name, value in dict(configured.config).items() if name in known}
    return {"class": type(configured).__name__, **options}
