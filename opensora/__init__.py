"""Open-Sora in Python: text to video with the Open-Sora family of diffusion transformers."""

from typing import TYPE_CHECKING, Any

from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.checkpoints.loading import load_pipeline
    from opensora.pipeline import OpenSoraPipeline

__version__ = "0.1.0"
__all__ = ["OpenSoraError", "OpenSoraPipeline", "__version__", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Both need torch and diffusers, which `import opensora` and `opensora --help` should not wait for.
    if name == "load_pipeline":
        from opensora.checkpoints.loading import load_pipeline

        return load_pipeline
    if name == "OpenSoraPipeline":
        from opensora.pipeline import OpenSoraPipeline

        return OpenSoraPipeline
    raise AttributeError(f"module 'opensora' has no attribute {name!r}")
