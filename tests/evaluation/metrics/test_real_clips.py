"""Figures of real clips move as they must, step by step, while the clips are made worse in known ways."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from known_clips import DECEIVED, MOVES, WORSE, Move, real_clip
from torch import Tensor

from opensora.evaluation.metrics.catalogue import METRICS, measure_all
from opensora.evaluation.metrics.fidelity import FIGURES, fidelity
from opensora.evaluation.metrics.metric import Metric

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def windows(real_clips: list[Path]) -> dict[str, Tensor]:
    """Name -> 17 frames; distorted copies of others are left out."""
    return {path.name: real_clip(path) for path in real_clips if "distorted" not in path.name}


def metric_of(figure: str) -> Metric:
    return next(metric for metric in METRICS if figure in [one.name for one in metric.figures])


@functools.cache
def measured(measure: Metric | None, worse: str, video: Tensor) -> list[dict[str, Tensor]]:
    """All figures of a metric, or of fidelity to the clip as it was, for each strength; moves of several read them."""
    clips = WORSE[worse].clips(video)
    return [fidelity(clip, video) if measure is None else measure_all(clip, 25.0, [measure]) for clip in clips]


def figures_of(move: Move, video: Tensor) -> list[float]:
    """One for each strength."""
    metric = None if move.figure in [figure.name for figure in FIGURES] else metric_of(move.figure)
    return [float(figures[move.figure]) for figures in measured(metric, move.worse, video)]


@pytest.mark.parametrize("move", (*MOVES, *DECEIVED), ids=lambda move: f"{move.figure} {move.way} by {move.worse}")
def test_a_figure_moves_with_every_step(windows: dict[str, Tensor], move: Move):
    sign = 1 if move.way == "rises" else -1
    for name in move.names(windows):
        found = figures_of(move, windows[name])
        assert all(sign * (after - before) > 0 for before, after in itertools.pairwise(found)), f"{name}: {found}"


def test_every_metric_has_three_ways_to_move():
    for figures in (*(metric.figures for metric in METRICS), FIGURES):
        names = [figure.name for figure in figures]
        assert len({move.worse for move in MOVES if move.figure in names}) >= 3, names


def test_flicker_is_measured_in_levels(windows: dict[str, Tensor]):
    for name, video in windows.items():
        found = float(
            measure_all(WORSE["flicker"].how(video, 16.0), 25.0, [metric_of("flicker_levels")])["flicker_levels"]
        )
        # What was there before adds to it or takes from it.
        assert math.isnan(found) if name.startswith("carphone") else 13 < found < 17, f"{name}: {found}"


def test_twice_the_speed_is_twice_the_motion(windows: dict[str, Tensor]):
    """Of clips that go on steadily; a camera that shakes does not go twice as far in two frames."""
    for name in ("bigbuckbunny.mp4", "cityCC0.mpg"):
        slow, fast = windows[name], windows[name][:, :, ::2]
        speeds = [
            float(measure_all(video, 25.0, [metric_of("motion_px_per_s")])["motion_px_per_s"]) for video in (slow, fast)
        ]
        assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.15), name


def test_a_cut_stands_out(windows: dict[str, Tensor]):
    metrics = [metric_of("largest_step"), metric_of("most_hidden_share")]
    whole = {name: measure_all(video, 25.0, metrics) for name, video in windows.items()}
    for one, other in itertools.pairwise(windows):
        cut = torch.cat([windows[one][:, :, :8], windows[other][:, :, :9]], dim=2)
        figures = measure_all(cut, 25.0, metrics)
        for figure in ("largest_step", "most_hidden_share"):
            assert float(figures[figure]) > 2 * max(float(whole[name][figure]) for name in (one, other)), (one, other)
