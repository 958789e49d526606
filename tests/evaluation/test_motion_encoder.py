"""Motion features: sizes and lengths, what gradients tell, and what the bundled network knows of toy clips."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation import motion_encoder
from opensora.evaluation.motion_encoder import MotionEncoder, gradient_flow, load_motion_encoder, motion_features
from opensora.toybox.specs import World, sample_specs
from opensora.toybox.world import render


@pytest.fixture(scope="module")
def small_encoder() -> MotionEncoder:
    torch.manual_seed(0)
    return MotionEncoder(dim=8, features=16).eval()


@pytest.fixture(scope="module")
def toy_clips() -> Tensor:
    return render(sample_specs(3, 0), 9)[0]


@pytest.mark.parametrize("shape", [(2, 3, 9, 64, 64), (1, 3, 2, 40, 96), (2, 3, 3, 240, 136), (1, 3, 70, 64, 64)])
def test_reads_any_size_and_length(small_encoder: MotionEncoder, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        features = small_encoder(torch.rand(shape) * 2 - 1)
    assert features.shape == (shape[0], 16)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(shape[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 17, 64, 64), (1, 1, 17, 64, 64), (1, 3, 1, 64, 64)])
def test_refuses_what_is_no_batch_of_clips(small_encoder: MotionEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(OpenSoraError, match="the motion encoder got shape"):
        small_encoder(torch.zeros(shape))


def test_long_clips_are_read_in_parts_and_nothing_shows_it(small_encoder: MotionEncoder, monkeypatch) -> None:
    video = torch.rand(1, 3, 12, 64, 64) * 2 - 1
    with torch.no_grad():
        whole = small_encoder(video)
        monkeypatch.setattr(motion_encoder, "_FRAMES_AT_ONCE", 4)
        torch.testing.assert_close(small_encoder(video), whole, atol=1e-4, rtol=0)


def test_saved_and_loaded_it_reads_the_same(small_encoder: MotionEncoder, tmp_path) -> None:
    small_encoder.save_pretrained(tmp_path)
    video = torch.rand(1, 3, 5, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_motion_encoder(tmp_path)(video), small_encoder(video))
    with pytest.raises(OpenSoraError, match="no motion encoder in"):
        load_motion_encoder(tmp_path / "nothing")


@pytest.mark.parametrize(("x", "y"), [(2, 0), (0, -2), (1, 1)])
def test_gradients_tell_where_things_go(x: int, y: int) -> None:
    noise = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    picture = F.interpolate(noise, (96, 96), mode="bicubic") * 0.3
    before, after = picture[..., 16:80, 16:80], picture[..., 16 - y : 80 - y, 16 - x : 80 - x]
    for scale, maps in zip((2, 4), gradient_flow(before, after).split(4, dim=1), strict=True):
        told = maps[:, :2].mean(dim=(0, 2, 3)) * scale
        torch.testing.assert_close(told, torch.tensor([float(x), float(y)]), atol=0.25, rtol=0)
    still = gradient_flow(before, before)
    assert still[:, [0, 1, 3, 4, 5, 7]].abs().max() < 1e-3


def test_features_of_one_clip_do_not_depend_on_those_beside_it(toy_clips: Tensor) -> None:
    together = motion_features(toy_clips)
    assert together.shape == (3, 64)
    torch.testing.assert_close(motion_features(toy_clips[1:2])[0], together[1], atol=1e-3, rtol=0)


def test_the_bundled_network_tells_motions_of_toy_clips_it_never_saw() -> None:
    motions = ("left", "right", "up", "down", "still", "spin")
    known, asked = (sample_specs(n, n, World(motions=motions), "held_out") for n in (60, 30))
    features = [motion_features(render(specs, 9)[0]) for specs in (known, asked)]
    nearest = torch.cdist(features[1], features[0]).topk(5, largest=False).indices
    votes = torch.tensor([motions.index(spec.motion) for spec in known])[nearest].mode(dim=1).values
    right = votes == torch.tensor([motions.index(spec.motion) for spec in asked])
    assert right.float().mean() > 0.9
