"""What every codec inherits, shown on one that knows 1, 17, 33, ... frames only, as Open-Sora 1.3's does."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from opensora.conditioning.frames import FrameConditioning, condition, encode_in_place
from opensora.data.batch import BatchShape
from opensora.data.encoding import EncodedClips
from opensora.data.toybox import latent_cells
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.offload_hooks import apply_offload_hooks


class Averages(VideoCodec):
    """The first frame and the means of every four after it, in cells of 2 x 2 pixels; 16k + 1 frames."""

    frame_multiple, frame_offset = 16, 1

    @register_to_config
    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.latent_channels, self.spatial_factor, self.temporal_factor = 3, 2, 4
        self.factor = nn.Parameter(torch.tensor(gain))

    def latent_frames(self, num_frames: int) -> int:
        VideoSize(num_frames, 2, 2).check(self.size_rule())
        return (num_frames - 1) // 4 + 1

    @apply_offload_hooks
    def posterior(self, video: Tensor) -> Posterior:
        self.latent_size((video.shape[2], video.shape[3], video.shape[4]))
        first = F.avg_pool3d(video[:, :, :1], (1, 2, 2))
        others = [F.avg_pool3d(video[:, :, 1:], (4, 2, 2))] if video.shape[2] > 1 else []
        mean = torch.cat([first, *others], dim=2) * self.factor
        return Posterior(mean, torch.full_like(mean, -2.0))

    @apply_offload_hooks
    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        frames = torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
        return F.interpolate(frames / self.factor, scale_factor=(1, 2, 2))


@pytest.fixture
def codec() -> Averages:
    return Averages().requires_grad_(False)


def clip(num_frames: int = 17, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, num_frames, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_lengths_come_from_the_codec(codec):
    rule = codec.size_rule(max_frames=100)
    assert [rule.nearest_frames(n) for n in (1, 9, 16, 24, 26, 99)] == [1, 17, 17, 17, 33, 97]
    assert [rule.frames_from(n) for n in (1, 2, 17, 18)] == [1, 17, 17, 33]
    with pytest.raises(OpenSoraError, match=r"num_frames 20 must be 1 more than a multiple of 16.*17 or 33"):
        VideoSize(20, 4, 4).check(rule)
    with pytest.raises(OpenSoraError, match="17 or 33"):
        codec.encode_video(clip(20))
    assert codec.latent_size((33, 4, 6)) == (9, 2, 3)
    assert [codec.frames_before(k, 17) for k in range(6)] == [0, 1, 5, 9, 13, 17]
    assert codec.chunk_start(16, 17) == 0
    assert [codec.shortest_clip(n) for n in (1, 5, 9)] == [1, 17, 33]
    with pytest.raises(OpenSoraError, match="no clip has 6 latent frames; one of 33 frames has 9"):
        codec.shortest_clip(6)


def test_there_and_back(codec):
    video = clip(batch=2)
    latents = codec.encode_video(video)
    assert torch.equal(codec.encode(video).latent_dist.mode(), latents)
    drawn = [codec.encode_video(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(codec.decode(latents).sample, codec.decode_latents(latents, 17))
    assert torch.equal(codec(video).sample, codec.decode_latents(latents, 17))
    with pytest.raises(OpenSoraError, match="sample=True"):
        codec.encode_video(video, generator=torch.Generator())
    with pytest.raises(NotImplementedError):
        codec.enable_tiling()


def test_saved_and_loaded(codec, tmp_path):
    codec.factor.fill_(3.0)
    codec.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["gain"] == 2.0
    loaded = Averages.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_video(clip()), codec.encode_video(clip()))


def test_frames_are_given_where_they_stand(codec):
    """What is encoded has a length the codec knows, whatever is asked for."""
    video, size = clip(), VideoSize(33, 4, 4)
    start = encode_in_place(codec, video[0, :, :5], 33, 0, 2)
    assert torch.equal(start, codec.encode_video(torch.cat([video[:, :, :5], clip(12)], dim=2))[:, :, :2])
    middle = encode_in_place(codec, video[0, :, :4], 33, 3, 1)
    assert torch.allclose(middle, F.avg_pool3d(video[:, :, :4], (4, 2, 2)) * 2)
    conditioning = condition(codec, size, image=video[0, :, :1], last_image=video[0, :, -1:])
    assert conditioning.strength[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert conditioning.latents.shape == FrameConditioning.none(codec, size).latents.shape


def test_what_an_object_covers(codec):
    mask = torch.zeros(1, 1, 17, 4, 4)
    mask[:, :, 6, :2, :2] = 1
    cells = latent_cells(mask, codec)
    assert cells.shape == (1, 1, 5, 2, 2) and cells.sum() == 1 and cells[0, 0, 2, 0, 0] == 1


class Clips:
    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def shapes(self) -> list[BatchShape]:
        return [BatchShape("a", 1, 1, 4, 4, 0.5), BatchShape("b", 1, self.num_frames, 4, 4, 0.5)]


def test_training_clips_are_of_lengths_it_knows(codec):
    EncodedClips(Clips(17), codec, sample=False)  # type: ignore[arg-type]
    with pytest.raises(OpenSoraError, match=r"num_frames 51 .*49 or 65"):
        EncodedClips(Clips(51), codec, sample=False)  # type: ignore[arg-type]


def test_the_spatial_and_temporal_one_knows_every_length():
    rule = VideoAutoencoder({"block_out_channels": [8, 8], "norm_num_groups": 4}).size_rule(20)
    assert (rule.frame_multiple, rule.frame_offset, rule.max_frames, rule.spatial_multiple) == (1, 0, 20, 2)
