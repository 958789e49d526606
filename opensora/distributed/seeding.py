"""Random draws that depend on where the run is, never on how it got there.

Every draw of a run comes from a generator made of a key such as (seed, "noise", position), so a resumed run repeats an
uninterrupted one bit for bit, two ranks never draw alike, and a step of two ranks draws what a step of two microbatches
on one rank draws.
"""

import hashlib
from dataclasses import dataclass

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for `key`; equal keys give equal seeds, on every machine and in every process."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


@dataclass(frozen=True)
class BatchKey:
    """One batch's place in a run: the only source of its randomness.

    Attributes:
        seed: of the run.
        position: batches that the run drew before this one, those of all ranks and microbatches counted. With R ranks
            that each have data of their own and M microbatches a step, rank r's microbatch m of a step is R * m + r
            after the step's first.
        step: optimiser steps done before this batch.
    """

    seed: int
    position: int
    step: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose ("clips", "noise", ...) of this batch."""
        return generator(self.seed, purpose, self.position)
