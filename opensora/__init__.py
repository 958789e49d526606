"""Open-Sora in Python: text to video with the Open-Sora family of diffusion transformers."""

from opensora.errors import OpenSoraError

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the import, which would be most of what `import opensora` takes
if TYPE_CHECKING:
    from typing import Any

    from opensora.checkpoints.loading import load_pipeline
    from opensora.generation.clip import Clip
    from opensora.generation.engine import Engine
    from opensora.generation.request import ClipRequest
    from opensora.pipeline import OpenSoraPipeline
    from opensora.tuning import tune

__version__ = "0.1.0"
__all__ = ["Clip", "ClipRequest", "Engine", "OpenSoraError", "OpenSoraPipeline", "__version__", "load_pipeline", "tune"]

# Some need torch and diffusers, which `import opensora` and `opensora --help` should not wait for.
_HOMES = {
    "Clip": "opensora.generation.clip",
    "ClipRequest": "opensora.generation.request",
    "Engine": "opensora.generation.engine",
    "OpenSoraPipeline": "opensora.pipeline",
    "load_pipeline": "opensora.checkpoints.loading",
    "tune": "opensora.tuning",
}


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'opensora' has no attribute {name!r}")
