"""Memory that holds no zeros by chance, for kernels that read what was never written."""

import torch


def forget_memory() -> None:
    """What is allocated next is full of NaN, as far as it is memory that was freed."""
    for size in (1_000, 10_000, 30_000, 100_000, 300_000, 1_000_000):
        torch.full((size,), float("nan"))
