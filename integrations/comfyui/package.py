"""The package `opensora`, or in words why it cannot be had."""

from types import ModuleType

HOW = "install it as the README of this pack says, or have a server make the clips (nodes `Open-Sora Server`)"


def the_package() -> ModuleType:
    """The package that makes clips.

    Raises:
        RuntimeError: it is not installed, or another project's folder of this name is found in its place.
    """
    try:
        import opensora
    except ImportError as error:
        raise RuntimeError(f"the package `opensora` is not installed where ComfyUI runs ({error}); {HOW}") from None
    if "Engine" not in getattr(opensora, "__all__", ()):
        place = getattr(opensora, "__file__", None) or next(iter(opensora.__path__), "?")
        raise RuntimeError(
            f"the `opensora` that Python finds, {place}, is another project's; "
            f"remove the pack that brings it, then {HOW}"
        )
    return opensora
