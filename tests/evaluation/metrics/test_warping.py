"""What only moves costs nothing; what changes costs as much as it changes; a cut has nothing in common."""

import pytest
import torch
from known_clips import boil, flicker, pan
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.warping import Warping
from opensora.evaluation.optical_flow import optical_flow


def found(video: Tensor) -> dict[str, float]:
    return {name: float(figure) for name, figure in Warping().measure(video, fps=24.0).items()}


def test_a_still_clip_has_no_error():
    figures = found(pan(0.0))
    assert figures.pop("warping_error_levels") < 1e-3  # a picture drawn from itself: float32
    assert figures == {"hidden_share": 0.0, "most_hidden_share": 0.0}


def test_a_pan_costs_nothing_but_the_columns_that_leave():
    figures = found(pan(3.0))
    unmoved = float((pan(3.0)[:, :, 1:] - pan(3.0)[:, :, :-1]).abs().mean()) * 127.5
    assert figures["warping_error_levels"] < 0.03 * unmoved
    assert figures["hidden_share"] == pytest.approx(3 / 64, abs=0.03)


def test_flicker_on_a_pan_costs_what_it_is():
    assert found(flicker(pan(3.0), 8.0))["warping_error_levels"] == pytest.approx(8.0, rel=0.1)


def test_boiling_costs_more_the_more_of_it_there_is():
    errors = [found(boil(pan(1.0), levels))["warping_error_levels"] for levels in (0, 4, 8)]
    assert errors[0] + 2 < errors[1] < errors[2] / 1.5


def test_a_cut_has_nothing_in_common():
    video = torch.cat([pan(1.0, num_frames=5), pan(1.0, num_frames=5, seed=9)], dim=2)
    figures = found(video)
    assert figures["most_hidden_share"] > 0.6
    assert found(video[:, :, :5])["most_hidden_share"] < 0.1


def test_flow_is_right_to_a_tenth_of_a_pixel():
    for speed in (0.25, 1.0, 3.0):
        flow = optical_flow(pan(speed, num_frames=2)[0]).forward[0, 8:-8, 8:-8]
        assert float((flow - torch.tensor([speed, 0.0])).norm(dim=-1).mean()) < 0.1


def test_frames_too_small_for_the_flow_are_refused():
    with pytest.raises(OpenSoraError, match="16x16 or more, got 12x40"):
        found(torch.zeros(1, 3, 3, 12, 40))


def test_a_missing_opencv_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(OpenSoraError, match=r"opencv-python-headless.*extra `eval`"):
        found(pan(0.5, num_frames=2))
