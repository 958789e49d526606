"""Sources of noise, one for each video, from whatever a call is given."""

from collections.abc import Sequence
from numbers import Integral

import torch

from opensora.errors import OpenSoraError


def generators_per_video(
    generator: torch.Generator | int | Sequence[torch.Generator | int] | None, num_videos: int
) -> list[torch.Generator]:
    """One source of noise per video, so that what a video looks like does not depend on its batch.

    Args:
        generator: one per video; or a single one, used as it is for one video, which seeds one each for several. Seeds
            stand for generators; None draws seeds at random.
        num_videos: how many.

    Raises:
        OpenSoraError: another number of them, or something else.
    """
    if isinstance(generator, Sequence) and not isinstance(generator, str):
        if len(generator) != num_videos:
            raise OpenSoraError(f"got {len(generator)} generators for {num_videos} videos; give one, or one each")
        return [_as_generator(one) for one in generator]
    if generator is None:
        return _seeded_each(None, num_videos)
    single = _as_generator(generator)
    return [single] if num_videos == 1 else _seeded_each(single, num_videos)


def _seeded_each(source: torch.Generator | None, num_videos: int) -> list[torch.Generator]:
    device = "cpu" if source is None else source.device
    seeds = torch.randint(2**32, (num_videos,), generator=source, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def _as_generator(generator: object) -> torch.Generator:
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, Integral) and not isinstance(generator, bool):
        return torch.Generator("cpu").manual_seed(int(generator))
    raise OpenSoraError(f"generator is {generator!r}; expected a torch.Generator or a seed, one or one per video")
