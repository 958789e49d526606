"""Passes over many tokens in pieces that stay in the cache of a CPU.

A norm in float32 and a rotation pass over their input some eight times, and write as much as they read. Of 28 MB, the
queries of a width of 1152 at 240p and 51 frames, each pass goes to memory; of a megabyte none does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

VALUES = 2**18
"""Of a piece: a megabyte in float32."""
_IN_WHOLE: ContextVar[bool] = ContextVar("opensora_in_whole", default=False)


@contextmanager
def in_whole() -> Iterator[None]:
    """Within it nothing is done in pieces: for plans for accelerators, which are made with tensors of a CPU."""
    token = _IN_WHOLE.set(True)
    try:
        yield
    finally:
        _IN_WHOLE.reset(token)


def is_whole() -> bool:
    """Whether this is within `in_whole`."""
    return _IN_WHOLE.get()


def in_cache(work: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """`work(states)`, which keeps shape and bits of every row (N, d), for a few rows at a time.

    Args:
        work: on (some, N, d).
        states: (B, H, N, d).
    """
    is_eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if states.device.type != "cpu" or not is_eager or is_whole() or states.numel() < 2 * VALUES:
        return work(states.flatten(0, 1)).view(states.shape)
    rows, made = states.flatten(0, 1), torch.empty_like(states, memory_format=torch.contiguous_format)
    size = max(1, VALUES // (states.shape[-2] * states.shape[-1]))
    for piece, place in zip(rows.split(size), made.flatten(0, 1).split(size), strict=True):
        place.copy_(work(piece))
    return made


def is_hooked(layer: nn.Module) -> bool:
    """Whether something does more at every call, such as bringing weights in."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
