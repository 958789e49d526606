"""The picture that a clip begins with, made by a text-to-image pipeline before the clip's model is loaded.

Open-Sora 2.0 makes clips from text in this way too: an image model draws better pictures than a video model, which then
moves them. The picture is a file beside the clip, and from then on an image like any other: its clip is made again
without the pipeline that drew it.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.errors import OpenSoraError, is_out_of_memory
from opensora.files import replacing
from opensora.generation.request import ClipRequest, ImageOrigin
from opensora.media.write import frames_folder

if TYPE_CHECKING:
    import torch

    from opensora.checkpoints.image_pipelines import ImagePipeline

_DEFAULT_SIDE_PX = 512  # of a pipeline that does not say what it was trained for


def first_image_path(path: Path) -> Path:
    """Where the picture lies: `clip.mp4` -> `clip.first.png`, `frames/%04d.png` -> `frames.first.png`."""
    return frames_folder(path).with_suffix(".first.png")


def draw_first_images(
    source: "ImagePipeline",
    requests: Sequence[ClipRequest],
    paths: Sequence[Path],
    shape: tuple[int, int],
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    offload: bool = False,
) -> Iterator[ClipRequest]:
    """Draws a picture for each clip from its own prompt and seed, and writes it; the pipeline is gone afterwards.

    Args:
        source: draws them.
        requests: of the clips, separated from their JSON objects; of a long video the first loop's text is shown.
        paths: of the pictures.
        shape: height and width of the clips, whose aspect ratio the pictures have.
        device, dtype, offload: see `ImagePipeline.open`.

    Yields:
        The requests, with their picture.

    Raises:
        OpenSoraError: files that are missing or damaged, not enough memory, or a place that cannot be written.
    """
    import torch

    options = dict(source.model.options) if source.model else {}
    sha256, pipeline = source.hash(), source.open(device, dtype, offload=offload)
    height, width = image_size(shape, side_px=source.model.side_px if source.model else None, pipeline=pipeline)
    try:
        for request, path in zip(requests, paths, strict=True):
            generator = torch.Generator("cpu").manual_seed(request.seed)
            with torch.no_grad():
                picture = pipeline(
                    request.texts()[0], height=height, width=width, generator=generator, **options
                ).images[0]
            with replacing(path) as temporary:
                picture.convert("RGB").save(temporary, format="PNG")
            origin = ImageOrigin(source.name_alone, sha256, source.class_name, height, width, options)
            yield replace(request, image=path, image_origin=origin)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OpenSoraError(
            f"out of memory for a picture of {height}x{width} by {source.name}; try `offload`"
        ) from error
    finally:
        del pipeline
        gc.collect()
        if device.type != "cpu":
            torch.accelerator.empty_cache()


def image_size(shape: tuple[int, int], *, side_px: int | None, pipeline: Any) -> tuple[int, int]:
    """Height and width of pictures of an aspect ratio, with as many pixels as the pipeline draws best.

    Args:
        shape: height and width of that ratio.
        side_px: of a square picture; None for what the pipeline was trained for.
        pipeline: of diffusers.
    """
    factor = getattr(pipeline, "vae_scale_factor", 8)
    side_px = side_px or _trained_side(pipeline, factor)
    multiple = 2 * factor  # transformers take patches of two latent cells
    height, width = (side_px * math.sqrt(shape[i] / shape[1 - i]) for i in (0, 1))
    return max(round(height / multiple), 1) * multiple, max(round(width / multiple), 1) * multiple


def _trained_side(pipeline: Any, factor: int) -> int:
    """Pixels; of an unequal size the root of their number."""
    network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    cells = getattr(pipeline, "default_sample_size", None)
    cells = cells or getattr(getattr(network, "config", None), "sample_size", None)
    if isinstance(cells, list | tuple) and len(cells) == 2:
        cells = round(math.sqrt(cells[0] * cells[1]))
    return cells * factor if isinstance(cells, int) else _DEFAULT_SIDE_PX
