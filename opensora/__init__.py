"""Open-Sora in Python: text to video with the Open-Sora family of diffusion transformers."""

__version__ = "0.1.0"
