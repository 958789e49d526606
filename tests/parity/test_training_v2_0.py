"""Training of Open-Sora 2.0 against the reference: known frames, dropped texts, losses, times."""

import random
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from parity.packing import packed, unpacked
from torch import Tensor, nn
from torch.testing import assert_close

from opensora.conditioning.known_frames import draw_kinds, draw_known_ends, known_mask
from opensora.data.batch import ClipBatch, LatentBatch
from opensora.data.encoding import encode_clips, encode_ends
from opensora.diffusion import flow
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.posterior import Posterior
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text.conditioner import TextStates
from opensora.training.ema import EMA

KINDS = {
    "t2v": "none",
    "v2v_head": "v2v_head_32",
    "v2v_tail": "v2v_tail_32",
    "v2v_head_easy": "v2v_head_64",
    "v2v_tail_easy": "v2v_tail_64",
}
"""Names of the reference -> ours, where they differ."""


class Means(VideoCodec):
    """The recorded autoencoder: means of frames and of cells, and a little of the whole clip in every latent."""

    @register_to_config
    def __init__(self, matrix: Any, spatial_factor: int, causal: bool) -> None:
        super().__init__()
        self.latent_channels, self.spatial_factor, self.temporal_factor = len(matrix), spatial_factor, 4
        self.frame_multiple, self.frame_offset, self.single_frame = 4, int(causal), True
        self.matrix, self.nothing = matrix, nn.Parameter(torch.zeros(1))

    def latent_frames(self, num_frames: int) -> int:
        return (num_frames - self.frame_offset) // 4 + self.frame_offset if num_frames > 1 else 1

    def posterior(self, video: Tensor) -> Posterior:
        cells = torch.nn.functional.avg_pool3d(video, (1, self.spatial_factor, self.spatial_factor))
        alone = 1 if cells.shape[2] == 1 else self.frame_offset
        means = cells[:, :, alone:].unflatten(2, (-1, 4)).mean(dim=3) if cells.shape[2] > 1 else cells[:, :, :0]
        frames = torch.cat([cells[:, :, :alone], means], dim=2)
        position = torch.arange(1, frames.shape[2] + 1)[:, None, None]
        latents = torch.einsum("kc,bcthw->bkthw", self.matrix, frames) + 0.1 * video.mean() * position
        return Posterior(latents, torch.zeros_like(latents))

    def decode_latents(self, latents: Tensor, num_frames: int) -> Tensor:
        raise NotImplementedError


def latents_of(codec: Means, video: Tensor) -> LatentBatch:
    """Clip by clip, as the recorded autoencoder looks at a whole clip."""
    clips = [
        encode_clips(ClipBatch(one[None], [""], ClipConditions(24.0, 1.0, 1.0, 1), ""), codec, keep_video=True)
        for one in video
    ]
    whole = torch.cat([clip.latents for clip in clips])
    return LatentBatch(whole, [""] * len(whole), clips[0].conditions, "", video=video)


def test_what_is_known_of_a_clip(golden):
    """Frames are encoded by themselves. The reference shows parts of the whole clip's latents to the deep compression
    autoencoder's network where more than pictures are known, which know what follows; no published training did."""
    fixture, seen = golden("visual_condition_v2_0"), set()
    for name, expected in fixture.under("out").items():
        if name.startswith("random") or ".pad" in name:
            continue
        clip, what = name.split(".", 1)
        codec = Means(fixture["in.ae_W"], fixture.meta["sp"], clip[0] == "c")
        clips = latents_of(codec, fixture[f"in.{clip}.x"])
        if what == "x_0":
            assert_close(clips.latents, expected, rtol=0, atol=1e-5)
            seen.add(name)
            continue
        mode = what.removesuffix(".cond")
        size, _, num_latents = clips.latents.shape[:3]
        ends = draw_known_ends(
            {KINDS.get(mode, mode): 1.0}, size, num_latents, random.Random(0),
            lambda frames, codec=codec: codec.latent_frames(codec.size_rule().frames_from(frames)),
        )  # fmt: skip
        mask = known_mask(ends, num_latents)[:, None, :, None, None].float()
        assert torch.equal(mask.expand_as(expected[:, :1]), expected[:, :1]), name
        shown = mask * encode_ends(clips, [(end.head, end.tail) for end in ends], codec)
        if clip[0] == "u" and mode.startswith("v2v"):
            assert_close(mask * clips.latents, expected[:, 1:], rtol=0, atol=1e-5)
            assert not mask.any() or not torch.allclose(shown, expected[:, 1:], atol=1e-3)
        else:
            assert_close(shown, expected[:, 1:], rtol=0, atol=1e-5)
        seen.add(name)
    # Training in the published configurations never moves a clip so that a latent frame holds a picture alone.
    assert set(fixture.under("out")) - seen == {"random.mask_t"} | {n for n in fixture.under("out") if ".pad." in n}


def test_how_often_frames_are_known(golden):
    fixture = golden("visual_condition_v2_0")
    weights = {
        KINDS.get(name, name): fixture.meta["random_weights"][name]
        for name in ("t2v", "i2v_head", "i2v_loop", "i2v_tail")
    }
    expected = fixture["out.random.mask_t"]
    drawn = draw_known_ends(weights, len(expected), 2, random.Random(fixture.meta["seed"]), lambda frames: frames)
    assert torch.equal(known_mask(drawn, 2).float(), expected.float())
    assert draw_kinds(weights, 6, random.Random(fixture.meta["seed"])).count("i2v_loop") == 2


def test_a_step(golden):
    fixture = golden("train_v2_0")
    clean, patch = fixture["in.x_0"], 2
    noise, prediction = (unpacked(fixture[f"in.{name}"], clean) for name in ("x_1", "pred"))
    _, _, num_latents, rows, columns = clean.shape
    process = RectifiedFlowProcess(
        time_shift=flow.TokenShift(8 * patch), velocity="noise - data", sigma_min=fixture.meta["sigma_min"]
    )
    drawn = torch.sigmoid(fixture["in.t_normal"])
    t = flow.TokenShift(8 * patch)(drawn, 8 * rows, 8 * columns, 1, num_latents)
    assert_close(t, fixture["out.t"], rtol=1e-5, atol=1e-6)
    noisy = process.corrupt(clean, noise, t * 1000)
    assert_close(packed(noisy), fixture["out.x_t"], rtol=1e-5, atol=1e-6)

    def losses(frame_mask: Tensor | None = None, answer: Tensor = prediction) -> Tensor:
        return process.losses(answer, clean=clean, noisy=noisy, noise=noise, t=t, frame_mask=frame_mask)["velocity"]

    assert not losses(answer=unpacked(fixture["out.v_t"], clean)).any()
    assert_close(losses().mean(), fixture["out.loss_plain"], rtol=1e-5, atol=1e-6)
    for name in ("masks", "masks2"):
        known = fixture[f"in.{name}"].flatten(2).amax(dim=2).bool()
        loss = losses(known_pictures_left_out(known)).mean()
        assert_close(loss, fixture[f"out.loss_masked{name.removeprefix('masks')}"], rtol=1e-5, atol=1e-6)
    # Dropped text is the null text: a row of it for every number below the share.
    dropped = torch.where(fixture["in.drop_uniform"][:, None, None] < 0.5, fixture["in.null_txt"], fixture["in.txt"])
    assert torch.equal(dropped, fixture["out.dropped_p0.5"])
    names = {"t", "x_t", "v_t", "loss_plain", "loss_masked", "loss_masked2", "dropped_p0.5"}
    assert names == set(fixture.under("out"))


def known_pictures_left_out(known: Tensor) -> Tensor:
    """Which frames count, (B, T): not a first or a last one that is known, where no frame between is."""
    counts = torch.ones_like(known)
    for row, frames in zip(counts, known, strict=True):
        if not frames[1:-1].any():
            row[0], row[-1] = ~frames[0], ~frames[-1]
    return counts


def test_losses_of_known_pictures(golden):
    fixture = golden("train_v2_0_masks")
    meta, patch = fixture.meta, 2
    frames, rows, columns = meta["frames"], meta["H"], meta["W"]
    like = torch.zeros(3, fixture["in.pred"].shape[2] // patch**2, frames, rows, columns)
    prediction, velocity = (unpacked(fixture[f"in.{name}"], like) for name in ("pred", "v_t"))
    assert torch.equal(packed(prediction), fixture["in.pred"])
    process = RectifiedFlowProcess(velocity="noise - data")

    def loss(counts: Tensor | None) -> Tensor:
        """Of clean latents 0 and the velocity for noise."""
        terms = process.losses(
            prediction, clean=torch.zeros_like(velocity), noisy=velocity, noise=velocity, t=torch.zeros(3),
            frame_mask=counts,
        )  # fmt: skip
        return terms["velocity"].mean()

    assert_close(loss(None), fixture["out.loss_none"], rtol=1e-5, atol=1e-6)
    for name in meta["mask_frames"]:
        counts = known_pictures_left_out(fixture[f"in.masks.{name}"].bool())
        assert_close(loss(counts), fixture[f"out.loss.{name}"], rtol=1e-5, atol=1e-6)


def test_times(golden):
    """Ours are float32. The reference draws and shifts in bfloat16, whose steps are 1/128 of a time at most."""
    fixture = golden("train_v2_0_masks")
    for k, alpha in enumerate(fixture.meta["alphas"]):
        t = flow.FixedShift(alpha)(torch.sigmoid(fixture[f"in.{k}.t_normal"]), 1, 1, 1)
        assert_close(t, fixture[f"out.{k}.t_fp32"], rtol=1e-5, atol=1e-6)
        assert_close(t, fixture[f"out.{k}.t_bf16"].float(), rtol=2**-7, atol=0)


def test_dropped_texts(golden):
    fixture = golden("train_v2_0_masks")
    p = fixture.meta["dropout_p"]
    text = TextStates(fixture["in.txt"], pooled=fixture["in.vec"])
    null = TextStates(fixture["in.null_txt"], pooled=fixture["in.null_vec"])
    left = text.replaced(null, fixture["in.drop_uniform_txt"] < p, fixture["in.drop_uniform_vec"] < p)
    assert torch.equal(left.states, fixture["out.txt_dropped"])
    assert left.pooled is not None and torch.equal(left.pooled, fixture["out.vec_dropped"])


def test_averages(golden):
    fixture = golden("train_v2_0_masks")
    before, weights, after = (fixture.under(name) for name in ("in.ema", "in.model", "out.ema"))

    def module(tensors: dict[str, Tensor]) -> nn.Module:
        layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
        layers.load_state_dict(tensors)
        layers[1].bias.requires_grad_(False)
        return layers

    average = EMA(module(before), decay=fixture.meta["ema_decay"], warmup=False)
    average.update(module(weights), 0)
    for name, expected in after.items():
        assert_close(average.average.get(name, before[name]), expected)


def test_texts_are_lengthened_by_what_ranks_need_and_ours_are_not(golden_json):
    """The reference appends padding, which takes part in attention, until ranks divide all tokens; ours pad what each
    of them holds, and leave the padding out."""
    for case, pad_tokens in golden_json("sizes_v2_0")["seq_align_pad_tokens"].items():
        video, most, ranks = map(int, case.split("|"))
        assert pad_tokens == -(video + most) % ranks
    for case, expected in golden_json("text_seq_align_v2_0").items():
        video, most, ranks = map(int, case.split("|"))
        assert expected["attention_mask"] is None
        assert expected["text_tokens"] == most + expected["pad_tokens"] == most + -(video + most) % ranks
