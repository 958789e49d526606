"""Scenes of moving textures: what is drawn moves as it is said to move."""

import torch
import torch.nn.functional as F

from opensora.toybox.textures import CELL_PX, SIDE_PX, draw_scenes


def test_frames_are_the_ones_before_moved_by_the_flow() -> None:
    times = torch.arange(6.0).expand(24, -1)
    video, flow = draw_scenes(24, torch.Generator().manual_seed(0)).render(times)
    assert video.shape == (24, 3, 6, SIDE_PX, SIDE_PX)
    assert flow.shape == (24, 2, 5, SIDE_PX // CELL_PX, SIDE_PX // CELL_PX)
    assert video.abs().max() <= 1

    frames, after = video.transpose(1, 2)[:, :-1].flatten(0, 1), video.transpose(1, 2)[:, 1:].flatten(0, 1)
    moves = F.interpolate(flow.transpose(1, 2).flatten(0, 1), (SIDE_PX, SIDE_PX), mode="bilinear")
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIDE_PX, SIDE_PX], align_corners=False)
    warped = F.grid_sample(after, identity + moves.permute(0, 2, 3, 1) * (2 / SIDE_PX), align_corners=False)
    middle = slice(8, -8)  # what comes in over the edges was not there before

    def error(pictures: torch.Tensor) -> float:
        return float((pictures - frames)[..., middle, middle].abs().mean())

    assert error(warped) < 0.4 * error(after), "edges of blobs are all that a flow of cells may miss"


def test_time_may_stand_still_and_run_backwards() -> None:
    scenes = draw_scenes(4, torch.Generator().manual_seed(1))
    video, flow = scenes.render(torch.tensor([[0.0, 3, 3, 0]]).expand(4, -1))
    torch.testing.assert_close(video[:, :, 0], video[:, :, 3])
    torch.testing.assert_close(video[:, :, 1], video[:, :, 2])
    assert flow[:, :, 1].abs().max() < 1e-4
    assert flow[:, :, 0].abs().max() > 1


def test_scenes_are_those_of_their_seed() -> None:
    times = torch.arange(2.0).expand(3, -1)
    first, again, other = (draw_scenes(3, torch.Generator().manual_seed(seed)).render(times)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1
