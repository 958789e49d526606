import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.checkpoints.components import load_component
from opensora.checkpoints.published_parts import OPENSORA_VAE_1_3
from opensora.checkpoints.wording import describe_latent_space
from opensora.conditioning.frames import condition, encode_in_place
from opensora.conditioning.references import encode_span
from opensora.errors import OpenSoraError
from opensora.geometry import VideoSize
from opensora.models.autoencoders.causal import CausalAttention, CausalVideoAutoencoder, ChunkNorm
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.statistics_v1_3 import STATISTICS
from opensora.models.identify import identify
from opensora.planning.tracing import Tracer

TINY: dict[str, Any] = {
    "latent_channels": 3,
    "filters": 4,
    "channel_multipliers": [1, 2, 2],
    "num_res_blocks": 1,
    "temporal_downsample": [True, True],
    "num_groups": 2,
    "latent_space": {"scaling_factor": 2.0, "shift": [0.1, 0.2, -0.3], "scale": [0.5, 1.5, 2.0]},
}


def make(**options: Any) -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(**{**TINY, **options}).eval().requires_grad_(False)


def clip(num_frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ---- sizes


def test_lengths():
    codec = make()
    assert [codec.latent_frames(n) for n in (1, 17, 33, 49, 113)] == [1, 5, 10, 15, 35]
    assert codec.size_rule().nearest_frames(100) == 97
    with pytest.raises(OpenSoraError, match=r"num_frames 51 must be 1 more than a multiple of 16.*49 or 65"):
        codec.encode_video(clip(51))
    assert [codec.shortest_clip(n) for n in (1, 5, 10)] == [1, 17, 33]
    with pytest.raises(OpenSoraError, match="10 latent frames given for a video of 17 frames, which has 5"):
        codec.decode_latents(torch.zeros(1, 3, 10, 2, 2), 17)
    whole = make(micro_frame_size=None)
    assert [whole.latent_frames(n) for n in (1, 5, 21)] == [1, 2, 6]
    with pytest.raises(OpenSoraError, match=r"20 must be 1 more than a multiple of 4.*17 or 21"):
        whole.latent_frames(20)


def test_chunks_share_a_frame():
    """The first latent frame of a later chunk stands for the frame that the one before it ends with."""
    codec = make()
    spans = [codec.frame_span(k, 33) for k in range(10)]
    assert spans == [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17), (16, 17), (17, 21), (21, 25), (25, 29), (29, 33)]
    assert [codec.frames_before(k, 33) for k in range(11)] == [0, 1, 5, 9, 13, 17, 17, 21, 25, 29, 33]
    assert [codec.chunk_start(frame, 33) for frame in (0, 15, 16, 32)] == [0, 0, 16, 16]
    assert codec.frame_span(0, 1) == (0, 1) and codec.chunk_start(0, 1) == 0
    assert [make(micro_frame_size=None).frame_span(k, 9) for k in range(3)] == [(0, 1), (1, 5), (5, 9)]


@pytest.mark.parametrize(
    "options",
    [{"micro_frame_size": 16}, {"micro_frame_size": 1}, {"temporal_downsample": [True]}, {"micro_batch_size": 0}],
)
def test_options_that_do_not_fit(options):
    with pytest.raises(OpenSoraError, match=next(iter(options))):
        make(**options)


# ---- what it computes


def test_there_and_back():
    codec = make()
    video = clip(33, batch=2)
    latents = codec.encode_video(video)
    assert latents.shape == (2, 3, 10, 2, 2) and latents.dtype == torch.float32
    near(torch.cat([codec.encode_video(one) for one in video.split(1)]), latents)
    decoded = codec.decode_latents(latents, 33)
    assert decoded.shape == video.shape
    posterior = codec.posterior(video)
    raw = codec.encode_raw(video)
    near(codec.latent_space.denormalise(posterior.mean) / 2.0, raw.mean)
    near(posterior.std, raw.std * 2.0 / torch.tensor([0.5, 1.5, 2.0]).view(1, 3, 1, 1, 1))
    drawn = [codec.encode_video(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(codec(video).sample, decoded)
    codec.enable_slicing()
    assert torch.equal(codec.encode_video(video), torch.cat([codec.encode_video(one) for one in video.split(1)]))


def test_chunks_know_nothing_of_each_other_but_the_frame_they_share():
    codec, first, second = make(), clip(33), clip(33)
    second[:, :, 17:] = clip(16, seed=1)
    before, after = codec.encode_video(first), codec.encode_video(second)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:6], after[:, :, 5:6])  # group norm looks ahead within a chunk
    one, other = (codec.decode_latents(part, 17) for part in before.split(5, dim=2))
    joined = codec.decode_latents(before, 33)
    near(joined[:, :, 16], (one[:, :, 16] + other[:, :, 0]) / 2)
    assert torch.equal(joined[:, :, :16], one[:, :, :16]) and torch.equal(joined[:, :, 17:], other[:, :, 1:])


def test_attention_sees_no_later_position():
    attention = make().encoder.mid.attn_1
    attention.norm = torch.nn.Identity()
    first = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[:, :, 1, 0, 1] += 1
    same = (attention(first) == attention(second)).all(dim=1).flatten()
    assert same.tolist() == [True] * 5 + [False] * 3


def test_attention_never_holds_all_scores():
    """Of 4096 positions they would be 64 MB; the kernels that avoid it refuse channels that do not lie side by side."""
    tracer = Tracer()
    with tracer.without_data():
        attention, chunk = CausalAttention(8, 2), torch.zeros(1, 8, 4, 32, 32)
    assert tracer.peak_bytes(lambda: attention(chunk)) < 2**22


def test_memory_of_micro_batches_is_that_of_few_frames():
    """Of what lies between a norm and its convolution, no more than they work on at once is ever there."""
    tracer, peaks = Tracer(), []
    with tracer.without_data():
        codec, latents = make(micro_frame_size=None), torch.zeros(1, 3, 9, 4, 4)
    for size in (None, 4):
        codec.micro_batch_size = size
        peaks.append(tracer.peak_bytes(lambda: codec.decode_raw(latents, 33)))
    assert peaks[1] < 0.7 * peaks[0]


def test_a_norm_of_some_frames_has_the_statistics_of_all():
    norm, chunk = ChunkNorm(2, 4), torch.randn(2, 4, 5, 3, 3) * 3 + 100
    norm.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
    norm.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    statistics = norm.statistics(chunk, 2)
    near(torch.cat([norm(part, statistics) for part in chunk.split(2, dim=2)], dim=2), norm(chunk))


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_micro_batches_change_nothing(size):
    video = clip(33)
    whole, parts = make(micro_batch_size=None), make(micro_batch_size=size)
    near(parts.encode_video(video), whole.encode_video(video))
    latents = whole.encode_video(video)
    near(parts.decode_latents(latents, 33), whole.decode_latents(latents, 33))
    seen = []
    for convolution in (parts.encoder.conv_in.conv, parts.decoder.up[1].block[0].conv1.conv):
        convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    parts.decode_latents(parts.encode_video(video), 33)
    assert max(seen) <= size + 2, "two frames of context come along"


def test_gradients_are_the_same_in_micro_batches_and_recomputed():
    def gradients(**options: Any) -> dict[str, Tensor]:
        codec = make(**options).train().requires_grad_(True)
        if options["micro_batch_size"] == 2:
            codec.enable_gradient_checkpointing()
            assert codec.encoder.down[0][0].gradient_checkpointing
        codec(clip(17)).sample.square().mean().backward()
        return {name: parameter.grad for name, parameter in codec.named_parameters()}

    plain = gradients(micro_batch_size=None)
    assert all(gradient is not None for gradient in plain.values())
    near(gradients(micro_batch_size=2), plain)


# ---- latent space


def test_figures_for_each_latent_frame_of_a_chunk():
    space = LatentSpace(shift=((1.0, 2.0), (3.0, 4.0)), scale=((1.0, 2.0), (4.0, 8.0)))
    latents = torch.full((1, 2, 4, 1, 1), 5.0)
    assert space.normalise(latents).flatten(1).tolist() == [[4, 1.5, 4, 1.5, 0.5, 0.125, 0.5, 0.125]]
    assert torch.equal(space.denormalise(space.normalise(latents)), latents)
    assert space.normalise(latents[:, :, :1]).flatten().tolist() == [4, 0.5], "an image has those of the first"
    with pytest.raises(OpenSoraError, match=r"3 latent frames given.*chunks of 2"):
        space.normalise(latents[:, :, :3])
    assert LatentSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    constant = LatentSpace(shift=(1.0, 3.0), scale=(1.0, 4.0))
    assert not constant.differences(LatentSpace(shift=((1.0, 1.0), (3.0, 3.0)), scale=((1.0, 1.0), (4.0, 4.0))))
    assert set(space.differences(constant)) == {"shift", "scale"}
    with pytest.raises(OpenSoraError, match="as many in each"):
        LatentSpace(shift=((1.0, 2.0), (3.0,)))


def test_another_latent_space(tmp_path):
    codec = make()
    raw = codec.encode_raw(clip(17)).mode()
    codec.save_pretrained(tmp_path)
    other = LatentSpace(shift=(1.0,) * 3, scale=(2.0,) * 3)
    loaded = CausalVideoAutoencoder.from_pretrained(tmp_path, override_latent_space=other)
    near(loaded.encode_video(clip(17)), (raw - 1) / 2)
    assert loaded.latent_space.overridden and loaded.latent_space.declared_by_weights == codec.latent_space
    with pytest.raises(OpenSoraError, match="filters given"):
        CausalVideoAutoencoder.from_pretrained(tmp_path, filters=8)


# ---- frames that a clip is conditioned on


def test_frames_in_the_places_that_they_take():
    codec, video = make(), clip(33)
    whole = codec.encode_video(video)
    near(encode_in_place(codec, video[0], 33, 0, 10), whole)
    near(encode_in_place(codec, video[0, :, :17], 33, 0, 5), whole[:, :, :5])
    near(encode_in_place(codec, video[0, :, 16:], 33, 5, 5), whole[:, :, 5:])
    for span in ((0, 5), (5, 10), (7, 9)):
        latents = encode_span(codec, lambda frames: video[0, :, frames], 33, span)
        near(latents[:, slice(*span)], whole[0, :, slice(*span)])
    extended = condition(codec, VideoSize(33, 8, 8), extend=video[0, :, 16:], backwards=True)
    near(extended.latents[:, :, 5:], whole[:, :, 5:])
    assert extended.strength[0].tolist() == [1] * 5 + [0] * 5


# ---- files


def test_saved_and_loaded(tmp_path):
    codec = make()
    codec.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = CausalVideoAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype).requires_grad_(False)
        assert loaded.latent_space == codec.latent_space
        found, expected = loaded.encode_video(clip(17)), codec.encode_video(clip(17))
        assert found.dtype == torch.float32
        assert (found - expected).abs().mean() <= (0 if dtype == torch.float32 else 0.1)


def test_recognised_and_loaded_as_published(tmp_path):
    torch.manual_seed(0)
    codec = CausalVideoAutoencoder(**{**TINY, "filters": 32, "num_groups": 32})
    identity = identify(codec.state_dict())
    assert identity is not None and identity.summary == "autoencoder of Open-Sora 1.3"
    told = ("latent_channels", "filters", "channel_multipliers", "num_res_blocks", "temporal_downsample")
    assert identity.config == {name: codec.config[name] for name in told}
    assert set(identity.unsure) == {"num_groups", "micro_frame_size", "latent_space"}
    save_file(codec.state_dict(), tmp_path / "model.safetensors")
    stored = {
        "model_type": "OpenSoraVAE_V1_3_Pipline",
        "encoder": {"ch": 32},
        "decoder": {"ch": 32},
        "micro_batch_size": 1,
        "normalization": "video",
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(OpenSoraError, match="16 channels"):
        load_component(tmp_path, CausalVideoAutoencoder)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "normalization": None}))
    loaded = load_component(tmp_path, CausalVideoAutoencoder)
    assert loaded.micro_batch_size == 1 and loaded.micro_frame_size == 17
    near(loaded.encode_raw(clip(17)).mean, codec.eval().encode_raw(clip(17)).mean)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "normalization": "image"}))
    with pytest.raises(OpenSoraError, match="normalization is 'image'; known are video, video_5frames"):
        load_component(tmp_path, CausalVideoAutoencoder)


def test_statistics_are_told():
    text = describe_latent_space(LatentSpace.from_dict(STATISTICS["video_5frames"]).to_dict())
    assert "shift -0.3104/-0.1749/-0.139/-0.1123/-0.2143 " in text
    assert OPENSORA_VAE_1_3.config["latent_space"] == STATISTICS["video"]
