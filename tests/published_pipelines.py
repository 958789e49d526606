"""What the tests of pipelines share: one of each kind, calls of it, and how results compare."""

from typing import Any

import pytest
import tiny_published
import tiny_two_encoders
import torch
from tiny_pipeline import seeded
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.pipeline import OpenSoraPipeline

PROMPT = "a red ball"
OTHER = "rain in the hills"
NEGATIVE = "a blue cube"
PIPELINES: dict[str, tuple[str, str | None]] = {
    "1.0, ancestral": ("opensora-1.0-hq-16x256x256", None),
    "1.0, DPM-Solver++": ("opensora-1.0-hq-16x256x256", "dpm-solver++"),
    "1.1, DDIM": ("opensora-1.1-stage3", "ddim"),
    "1.1, DPM-Solver++": ("opensora-1.1-stage3", "dpm-solver++"),
    "1.2, flow": ("opensora-1.2", None),
    "1.3, flow": ("opensora-1.3", None),
    "2.0, flow": ("opensora-2.0", None),
    "2.0, DC-AE": ("opensora-2.0-dc-ae", None),
}


def pipeline_of(name: str, sampler: str | None = None, **defaults: Any) -> OpenSoraPipeline:
    """A published model in memory, in miniature."""
    made_by = tiny_two_encoders if name in tiny_two_encoders.NAMES else tiny_published
    return made_by.pipeline_of(name, sampler, **defaults)


def sample(pipe: OpenSoraPipeline, prompt: Any = PROMPT, seed: int = 1, **options: Any) -> Any:
    return pipe(prompt, **{"generator": seeded(seed), "output_type": "latent"} | options).frames


def equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def near(actual: Tensor, expected: Tensor) -> None:
    """Up to rounding, which a sampler may enlarge where latents are large."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def refusal(pipe: OpenSoraPipeline, prompt: Any = PROMPT, **options: Any) -> str:
    """Why a call is refused, which is said in one line."""
    with pytest.raises(OpenSoraError) as error:
        sample(pipe, prompt, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
