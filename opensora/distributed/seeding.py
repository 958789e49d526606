"""Random draws that depend on where the run is, never on how it got there.

Every draw of a run comes from a generator made of a key such as (seed, "batch", rank, step, microbatch), so a resumed
run repeats an uninterrupted one bit for bit and two ranks never draw alike.
"""

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for `key`; equal keys give equal seeds, on every machine and in every process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))
