"""Calls of the pipeline against the reference's whole sampling function of Open-Sora 2.0, with a linear network.

The recorded autoencoder is a fake one, linear in cells; what stands here of it makes the reference's latents and
pixels, so that everything between the two is the pipeline's: schedule, known frames, guidance, and what is put back.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.testing import assert_close

from opensora.conditioning.frames import FrameConditioning
from opensora.conditioning.references import place_pieces
from opensora.generation.loops import still_frames
from opensora.geometry import VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.network import VideoTransformer
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.condition_types import frames_of_pieces, placements_of_pieces
from opensora.models.text.conditioner import TextStates
from opensora.pipeline import OpenSoraPipeline

GUIDANCE: dict[str, Any] = {
    "image_guidance_scale": 3.0, "oscillating": ["text", "image"], "image_ramp": "past_last_step",
    "image_ramp_for": "pictures",
}  # fmt: skip


class Toy(VideoTransformer):
    """a x + b t + d mean(text) + g scale + e condition, on packed tokens."""

    reads_channels = reads_guidance = known_frames_alone = True

    @register_to_config
    def __init__(self, in_channels: int = 4, pred_sigma: bool = False, model_max_length: int = 8) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def tell(self, fixture: Any) -> "Toy":
        self.patch = fixture.meta["patch_size"]
        self.a, self.b, self.d, self.e, self.g = (fixture[f"in.{name}"] for name in "abdeg")
        return self

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T, h, w, C p p), channels slowest."""
        cells = latents.unflatten(4, (-1, self.patch)).unflatten(3, (-1, self.patch))
        return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)

    def unpack(self, tokens: Tensor, channels: int) -> Tensor:
        """The inverse."""
        cells = tokens.unflatten(4, (channels, self.patch, self.patch))
        return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def forward(
        self, hidden_states, timestep, *, text_context, clip_conditions=None, frame_mask=None,
        channel_conditioning=None, guidance=None,
    ) -> Any:  # fmt: skip
        every = (slice(None), None, None, None, None)
        said = text_context["encoder_hidden_states"].flatten(1).mean(dim=1)
        tokens = self.a * self.pack(hidden_states) + self.b * timestep[every] / 1000 + self.d * said[every]
        tokens = tokens + self.g * guidance
        if channel_conditioning is not None:
            known = channel_conditioning.masked_latents
            mask = channel_conditioning.mask[:, None, :, None, None].expand_as(known[:, :1]).float()
            tokens = tokens + self.e * self.pack(torch.cat([mask, known], dim=1))[..., : tokens.shape[4]]
        return SimpleNamespace(sample=self.unpack(tokens, hidden_states.shape[1]))


class Cells(VideoCodec):
    """The recorded autoencoder, whose frames are taken at one pixel a cell."""

    matrix: Tensor

    @register_to_config
    def __init__(self, latent_channels: int, spatial_factor: int, causal: bool) -> None:
        super().__init__()
        self.latent_channels, self.spatial_factor, self.temporal_factor = latent_channels, spatial_factor, 4
        self.frame_multiple, self.frame_offset, self.single_frame = 4, int(causal), True
        self.causal, self.nothing = causal, nn.Parameter(torch.zeros(1))

    def latent_frames(self, num_frames: int) -> int:
        return -(-num_frames // 4)

    def posterior(self, video: Tensor) -> Any:
        raise NotImplementedError

    def encode_video(self, video: Tensor, **_: Any) -> Tensor:
        """Of pixels that are the same all over a cell, (1, 3, T, H, W) -> (1, C, T', h, w)."""
        assert len(video) == 1
        cells = video[0, :, :, :: self.spatial_factor, :: self.spatial_factor]
        first, rest = (cells[:, :1], cells[:, 1:]) if self.causal or cells.shape[1] == 1 else (cells[:, :0], cells)
        means = rest.unflatten(1, (-1, 4)).mean(dim=2) if rest.shape[1] else rest
        frames = torch.cat([first, means], dim=1)
        position = torch.arange(1, frames.shape[1] + 1)[:, None, None]
        return (torch.einsum("kc,cthw->kthw", self.matrix, frames) + 0.1 * cells.mean() * position)[None]

    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        raise NotImplementedError

    def decode_cells(self, latents: Tensor) -> Tensor:
        """(B, C, T', h, w) -> (B, 3, T, h, w)."""
        frames = torch.einsum("kc,bkthw->bcthw", self.matrix, latents)
        if frames.shape[2] == 1:
            return frames
        whole = frames.repeat_interleave(4, dim=2)
        return whole[:, :, 3:] if self.causal else whole


def conditioning_of(codec: Cells, fixture: Any, case: dict[str, Any], size: VideoSize) -> FrameConditioning | None:
    """What a case's files show."""
    kind, names = case["cond"], [name for name in case.get("ref", [""])[0].split(";") if name]
    if kind == "t2v" or not names:
        return None
    cells = [fixture[f"in.video_cells.{name}"] for name in names]
    cells = cells[-1:] if kind == "i2v_tail" else cells  # the only one that is looked at
    factor = codec.spatial_factor
    videos = [video.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for video in cells]
    taken = codec.size_rule().frames_within(frames_of_pieces(kind, videos[0].shape[1]))
    placements = placements_of_pieces(kind, len(videos), 1, codec.latent_frames(taken))
    lengths = [video.shape[1] for video in videos]
    return place_pieces(codec, size, placements, lengths, lambda number, chosen: videos[number][:, chosen])


@pytest.mark.parametrize("kind", ["causal", "dcae"])
def test_calls(golden, kind):
    fixture = golden(f"sampling_v2_0_api_{kind}")
    meta = fixture.meta
    codec = Cells(meta["channel"] if kind == "dcae" else meta["channel"] // 4, meta["ae_spatial"], meta["causal"])
    codec.matrix = fixture["in.ae_W"]
    seen = set()
    for name, case in meta["cases"].items():
        pipe = OpenSoraPipeline(
            transformer=Toy(codec.latent_channels).tell(fixture),
            scheduler=RectifiedFlowScheduler(
                use_timestep_transform=True, transform="tokens", token_px=meta["AE_SPATIAL_COMPRESSION"],
                transform_ratio=case.get("flow_shift"), micro_frame_size=None, velocity="noise - data",
            ),
            autoencoder=codec, text_encoder=None, tokenizer=None, guidance_scale=7.5, known_frames="pictures kept",
            guidance_options=GUIDANCE,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        size = VideoSize(case["frames"], meta["height"], meta["width"])
        conditioning = conditioning_of(codec, fixture, case, size)
        text = TextStates(torch.stack([fixture[f"in.text.t5.{words}"] for words in case["text"]]))
        negatives = case.get("neg", [""] * len(case["text"]))
        negative = TextStates(torch.stack([fixture[f"in.text.t5.{words}"] for words in negatives]))
        noise0 = fixture[f"out.{name}.noise0"]
        shape = (len(text), codec.latent_channels, *codec.latent_size((size.num_frames, size.height, size.width)))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(42))
        assert torch.equal(pipe.transformer.pack(noise).flatten(1, 3), noise0)
        made = pipe(
            prompt_embeds=text, negative_prompt_embeds=negative, conditioning=conditioning, latents=noise,
            height=size.height, width=size.width, num_frames=size.num_frames, num_inference_steps=meta["steps"],
            output_type="latent",
        )  # fmt: skip
        cells = codec.decode_cells(made.frames)
        head, tail = still_frames(pipe, size, [conditioning])
        cells = cells[:, :, head : cells.shape[2] - tail]
        assert cells.shape[2] == case["frames_out"]
        near(cells, fixture[f"out.{name}.x_first_cell"])
        near(cells.mean(dim=(3, 4)), fixture[f"out.{name}.x_mean_hw"])
        seen |= {f"{name}.{what}" for what in ("noise0", "x_first_cell", "x_mean_hw")}
        guided = sum(i < 10 or i % 2 == 0 for i in range(meta["steps"]))
        branches = 2 if conditioning is None else 3
        assert made.num_evaluations == len(text) * (branches * guided + meta["steps"] - guided)
    assert seen == set(fixture.under("out"))


def near(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(expected.abs().max())))
