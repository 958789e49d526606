"""What the scripts of Open-Sora 1.3 and 2.0 call the ways to show a model frames, as mask strategies say it.

`i2v_head` begins with the first frame of the first reference, `i2v_tail` ends with the last one of the last reference,
`i2v_loop` does both. `v2v_head` begins with several, `v2v_tail` ends with several; `*_easy` shows twice as many. In a
long video the first loop begins so, and the last loop ends so.

Open-Sora 1.3 counts in latent frames of references that were encoded whole, 2.0 in frames: each of its pieces is
encoded alone. In 1.3, `i2v_loop` with two references ends with the first latent frame of the second one.
"""

from typing import Literal, get_args

from opensora.errors import OpenSoraError
from opensora.models.text.prompts import FramePlacement

ConditionType = Literal["v2v_head", "i2v_head", "i2v_loop", "i2v_tail", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"]
OF_2_0_ALONE = ("v2v_tail", "v2v_head_easy", "v2v_tail_easy")
FORMER_NAMES = {"v2v_head_half": "v2v_head_easy", "v2v_tail_half": "v2v_tail_easy"}
"""What comments in the scripts of 2.0 call two of them, which these do not know by that name."""
V2V_LATENTS = 5
"""Latent frames that `v2v_head` takes in 1.3 unless it is said otherwise: one chunk of the autoencoder."""
V2V_FRAMES, V2V_EASY_FRAMES = 33, 65
"""Frames that 2.0 takes."""


def check_condition_type(condition_type: str, num_references: int) -> None:
    """Refuses what no model knows.

    Raises:
        OpenSoraError: an unknown type, or another number of references than it takes.
    """
    if _present_name(condition_type) not in get_args(ConditionType):
        known = ", ".join(get_args(ConditionType))
        raise OpenSoraError(f"unknown condition type {condition_type!r}; known are {known}")
    most = 2 if condition_type == "i2v_loop" else 1
    if not 1 <= num_references <= most:
        expected = "1 or 2 references" if most == 2 else "1 reference"
        raise OpenSoraError(f"{condition_type} takes {expected}, got {num_references}; name them by `reference_path`")


def former_name(condition_type: str | None) -> list[str]:
    """A note where a condition type goes by a name that the code does not have."""
    known = FORMER_NAMES.get(condition_type or "")
    return [f"{condition_type} is called {known} by the code of 2.0"] if known else []


def placements_of(
    condition_type: str, num_references: int, num_loops: int = 1, num_frames: int = V2V_LATENTS
) -> list[FramePlacement]:
    """Which latent frames of which reference go where in 1.3.

    Args:
        condition_type: one of `ConditionType`.
        num_references: 1 or 2.
        num_loops: of the video.
        num_frames: latent frames of `v2v_head`.

    Raises:
        OpenSoraError: see `check_condition_type`, or one that 1.3 does not know.
    """
    check_condition_type(condition_type, num_references)
    if _present_name(condition_type) in OF_2_0_ALONE:
        known = ", ".join(name for name in get_args(ConditionType) if name not in OF_2_0_ALONE)
        raise OpenSoraError(f"{condition_type} is a condition type of Open-Sora 2.0; this model knows {known}")
    last, placements = num_loops - 1, []
    if condition_type != "i2v_tail":
        placements.append(FramePlacement(length=num_frames if condition_type == "v2v_head" else 1))
    if condition_type in ("i2v_tail", "i2v_loop"):
        of_second = num_references == 2
        placements.append(FramePlacement(last, int(of_second), 0 if of_second else -1, -1))
    return placements


def placements_of_pieces(
    condition_type: str, num_references: int, num_loops: int = 1, num_latents: int = 1
) -> list[FramePlacement]:
    """Which frames of which reference go where in 2.0.

    Args:
        condition_type: one of `ConditionType`.
        num_references: 1 or 2.
        num_loops: of the video.
        num_latents: latent frames of `v2v_*`, see `frames_of_pieces`.

    Raises:
        OpenSoraError: see `check_condition_type`.
    """
    check_condition_type(condition_type, num_references)
    length = num_latents if condition_type.startswith("v2v") else 1
    placements = []
    if "head" in condition_type or condition_type == "i2v_loop":
        placements.append(FramePlacement(length=length))
    if "tail" in condition_type or condition_type == "i2v_loop":
        placements.append(FramePlacement(num_loops - 1, num_references - 1, -length, -length, length))
    return placements


def frames_of_pieces(condition_type: str, num_frames: int) -> int:
    """Frames of a reference of `num_frames` that `v2v_*` takes in 2.0: of a short one no more than it has."""
    is_long = _present_name(condition_type).endswith("_easy") and num_frames >= V2V_EASY_FRAMES
    return min(V2V_EASY_FRAMES if is_long else V2V_FRAMES, num_frames)


def _present_name(condition_type: str) -> str:
    return FORMER_NAMES.get(condition_type, condition_type)
