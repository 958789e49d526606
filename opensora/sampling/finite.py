"""Numbers that are none, found where they arise: between two networks of a run."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opensora.errors import OpenSoraError


def check_finite(values: Tensor, what: str) -> None:
    """Refuses what would become a black clip.

    Args:
        values: handed from one network to the next; what is traced for a plan has no values.
        what: they are, for the message.

    Raises:
        OpenSoraError: one of them is NaN or infinite.
    """
    if values.is_meta or isinstance(values, FakeTensor) or not values.numel():
        return
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(values)):  # which keep NaN, and take no memory
        raise OpenSoraError(f"{what} hold NaN or infinite values; run in float32, or check the weights and the input")
