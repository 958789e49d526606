"""The largest numbers that are meant seriously, one for each kind, and the check of a number against its limit.

Whatever comes from a file or a user is held against its limit before any work is done for it: a small file must not
fill the memory, nor keep a machine busy for days.
"""

import re
from typing import Any

from opensora.contents import describe_value, shown, shown_number
from opensora.errors import OpenSoraError

FRAMES = 100_000
"""Of a clip: more than an hour."""
SIDE_PX = 32_768
"""Of a frame: four times 8K."""
LOOPS = 10_000
"""Of a long video."""
CLIPS = 1_000_000
"""Of one command."""
STEPS = 10_000
"""Of a sampler."""
LAYERS = 1_000
"""Of a network, or of one level of it."""
TRAIN_TIMESTEPS = 100_000
"""Of a noise process."""
TRAINING_STEPS = 100_000_000
"""Of a run: three years at a second each."""
NETWORK_SIZE = 2**24
"""Any other size of a network: channels, tokens, words."""
WORKERS = 1_024
"""Processes of one machine."""
THREADS = 128
"""Of one process: few machines have as many cores, and no small network gains by more."""
RANKS = 1_000_000
"""Processes on all machines."""
SEED = 2**63 - 1
"""Of random numbers: what torch takes."""
PROMPT_CHARACTERS = 50_000
"""Of one prompt: a hundred times what any model here reads."""

_MOST_DIGITS = 20
# What a whole number counts, by its name; the first that fits.
_BY_NAME: tuple[tuple[str, int], ...] = (
    (r"timesteps", TRAIN_TIMESTEPS),
    (r"inference_steps", STEPS),
    (r"^steps$|_steps$|_every$", TRAINING_STEPS),
    (r"frames|frame_size|frame_interval|frame_alignment", FRAMES),
    (r"depth|layers|blocks", LAYERS),
    (r"height|width|nominal_size|sample_size|input_size|patch_size", SIDE_PX),
    (r"workers|prefetch", WORKERS),
    (r"num_clips|num_prompts|batch_size|microbatches|keep_checkpoints", CLIPS),
    (r"^seed$", SEED),
)

# The least of those that are counted, likewise; others may be anything up to their limit.
_LEAST_BY_NAME: tuple[tuple[str, int], ...] = (
    (r"depth|layers|res_blocks", 0),
    (r"patch_size|hidden_size|_heads|d_model|d_kv|d_ff|filters|widths|vocab_size|position_embeddings|_sq_size", 1),
    (r"^(in|out|latent|caption|pooled|block_out|cond)_channels", 1),
)


def least_of(name: str) -> int | None:
    """The least that a whole number in a file may be, likewise."""
    own = name.rpartition(".")[2]
    return next((least for pattern, least in _LEAST_BY_NAME if re.search(pattern, own)), None)


def most_of(name: str) -> int | None:
    """The limit of a number in a file, by the last part of its name; None where the name tells of no kind."""
    own = name.rpartition(".")[2]
    return next((most for pattern, most in _BY_NAME if re.search(pattern, own)), None)


def check_count(name: str, value: Any, most: int, least: int = 1) -> int:
    """A whole number from a file or a user, held against the limit of its kind before any work is done for it.

    Args:
        name: of the number, for the message: a field in backticks, or a field and its file.
        value: what was given.
        most: the largest that is meant seriously.
        least: the smallest.

    Raises:
        OpenSoraError: no whole number, or outside of the range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise OpenSoraError(f"{name} is {describe_value(value)}, expected a whole number from {least} to {most:,}")
    if not least <= value <= most:
        raise OpenSoraError(f"{name} is {shown_number(value)}, expected a whole number from {least} to {most:,}")
    return value


def parse_count(name: str, digits: str, most: int, least: int = 1) -> int:
    """The same of a number in digits, of which there may be millions.

    Raises:
        OpenSoraError: as `check_count`.
    """
    if len(digits) > _MOST_DIGITS:
        raise OpenSoraError(f"{name} is {shown(digits, 24)}, expected a whole number from {least} to {most:,}")
    return check_count(name, int(digits), most, least)
