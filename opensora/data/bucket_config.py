"""The configuration of buckets: resolutions, lengths, chances and batch sizes; which sizes resolutions stand for.

See `data.buckets` for what becomes of them.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from opensora import limits
from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.geometry import aspect_table, num_pixels, resolution_names
from opensora.limits import check_count, parse_count
from opensora.pixel_grid import GRID_PX, height_to_width, training_grid_sizes
from opensora.settings import nearest_name

BucketConfig = dict[str, dict[str, Any]]
"""Resolution -> frames, as text -> (keep, batch size); keep is a chance, or a pair of them."""

_BY_PIXELS = re.compile(r"([1-9]\d{0,4})px(?:_([1-9]\d{0,2})d)?(?:_ar([\d.]+:[\d.]+))?")


def sizes_of(resolution: str) -> dict[float, tuple[int, int]]:
    """{height / width: (height, width)}."""
    if (size := _single_size(resolution)) is not None:
        return {size[0] / size[1]: size}
    return _sizes_by_pixels(resolution) if follows_pixels(resolution) else aspect_table(resolution)


def pixels_of(resolution: str) -> int:
    """The area that a resolution stands for."""
    if (size := _single_size(resolution)) is not None:
        return size[0] * size[1]
    return num_pixels(resolution.split("_")[0] if follows_pixels(resolution) else resolution)


def landscape(resolution: str) -> tuple[int, int]:
    """The size nearest to 16:9."""
    sizes = sizes_of(resolution)
    return sizes[min(sizes, key=lambda ratio: abs(ratio - 9 / 16))]


def follows_pixels(resolution: str) -> bool:
    """Whether a resolution is a square's side in pixels, as in Open-Sora 2.0: `256px`, `768px_32d`, `512px_ar1:1`."""
    return _BY_PIXELS.fullmatch(resolution) is not None


def _sizes_by_pixels(resolution: str) -> dict[float, tuple[int, int]]:
    match = _BY_PIXELS.fullmatch(resolution)
    assert match is not None
    sizes = training_grid_sizes(int(match[1]) ** 2, int(match[2] or GRID_PX))
    if match[3] is not None:
        if match[3] not in sizes:
            raise OpenSoraError(f"buckets have {resolution}, whose aspect ratio is none of {', '.join(sizes)}")
        sizes = {match[3]: sizes[match[3]]}
    return {height_to_width(name): size for name, size in sizes.items()}


def _single_size(resolution: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resolution)
    if not match:
        return None
    height, width = (parse_count(f"a side of the size {shown(resolution)}", s, limits.SIDE_PX) for s in match.groups())
    return height, width


def checked_names(config: Mapping[str, Any]) -> list[str]:
    """The resolutions of a configuration.

    Raises:
        OpenSoraError: none, an unknown one, or both kinds, which are drawn by different rules.
    """
    if not config:
        raise OpenSoraError('no buckets; give at least one resolution, such as {"240p": {"51": [1.0, 2]}}')
    for name, lengths in config.items():
        if name not in resolution_names() and _single_size(name) is None and not follows_pixels(name):
            near = nearest_name(name, resolution_names())
            raise OpenSoraError(
                f"buckets have the unknown resolution {name!r}{near}, or a size such as 256x256 or 256px"
            )
        if not isinstance(lengths, Mapping) or not lengths:
            raise OpenSoraError(f"buckets of {name} are {lengths!r}, expected {{frames: [keep, batch size]}}")
    by_pixels = [name for name in config if follows_pixels(name)]
    if by_pixels and len(by_pixels) < len(config):
        other = next(name for name in config if name not in by_pixels)
        raise OpenSoraError(f"buckets have {by_pixels[0]} and {other}; give resolutions by pixels alone, or none")
    return list(config)


def lengths_of(resolution: str, lengths: Mapping[Any, Any]) -> list[tuple[int, float, float | None, int]]:
    """(frames, keep, considered, batch size), by descending frames; considered is None where `keep` is no pair.

    Raises:
        OpenSoraError: something that is no number of frames, no chance or no batch size.
    """
    found = []
    for frames, rule in lengths.items():
        where = f"bucket {resolution} {frames}"
        if not re.fullmatch(r"[1-9]\d*", str(frames)):
            raise OpenSoraError(f"{where}: {frames!r} is no number of frames, expected a whole number, 1 or more")
        num_frames = parse_count(f"{where}: the number of frames", str(frames), limits.FRAMES)
        if not isinstance(rule, (list, tuple)) or len(rule) != 2:
            raise OpenSoraError(f"{where} is {rule!r}, expected [keep, batch size]")
        keep, batch_size = rule
        is_pair = isinstance(keep, (list, tuple))
        chances = keep if is_pair else [keep]
        if is_pair and (len(keep) != 2 or num_frames == 1):
            raise OpenSoraError(f"{where} has keep {keep!r}, expected one chance{' or two' * (num_frames > 1)}")
        if not all(isinstance(c, (int, float)) and not isinstance(c, bool) and 0 <= c <= 1 for c in chances):
            raise OpenSoraError(f"{where} has keep {keep!r}, expected a chance from 0 to 1")
        if batch_size is None and chances[0] == 0:
            batch_size = 0
        elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OpenSoraError(f"{where} has batch size {batch_size!r}, expected a whole number, 1 or more")
        check_count(f"{where}: the batch size", batch_size, limits.CLIPS, least=0)
        considered = None if not is_pair else 1.0 - chances[1] if follows_pixels(resolution) else float(chances[1])
        found.append((num_frames, float(chances[0]), considered, batch_size))
    repeated = [frames for frames, count in Counter(entry[0] for entry in found).items() if count > 1]
    if repeated:
        raise OpenSoraError(f"bucket {resolution} {repeated[0]} is given twice; give it once")
    return sorted(found, key=lambda entry: entry[0], reverse=True)
