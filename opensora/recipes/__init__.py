"""Complete training configurations, one function each; `opensora train NAME` runs them."""

from collections.abc import Callable

from opensora.errors import OpenSoraError
from opensora.recipes.toybox import toybox, toybox_base, toybox_given, toybox_iddpm, toybox_iddpm_given
from opensora.recipes.toybox_judge import toybox_judge
from opensora.recipes.toybox_vae import toybox_vae_frames, toybox_vae_latents, toybox_vae_pixels
from opensora.settings import nearest_name
from opensora.training.config import Recipe

RECIPES: tuple[Callable[[], Recipe], ...] = (
    toybox_vae_frames,
    toybox_vae_latents,
    toybox_vae_pixels,
    toybox_judge,
    toybox_base,
    toybox,
    toybox_given,
    toybox_iddpm,
    toybox_iddpm_given,
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; dashes count as underscores.

    Raises:
        OpenSoraError: there is none.
    """
    by_name = {function.__name__: function for function in RECIPES}
    if name.replace("-", "_") not in by_name:
        raise OpenSoraError(f"unknown recipe {name!r}{nearest_name(name, by_name)}")
    return by_name[name.replace("-", "_")]()
