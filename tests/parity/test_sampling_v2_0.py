"""Sampling of Open-Sora 2.0 against the reference's recorded runs and schedules."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from parity.packing import packed, unpacked
from torch import Tensor
from torch.testing import assert_close

from opensora.conditioning.frames import FrameConditioning
from opensora.denoiser import Denoiser
from opensora.diffusion import flow
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import sinusoid
from opensora.models.guidance import ChannelGuidance, GuidanceRule, GuidanceStep
from opensora.models.guidance_rules import DistilledGuidance, TextImageGuidance, falling_scale, oscillating_scale
from opensora.models.mmdit import MMDiT
from opensora.models.network import VideoTransformer
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.conditioner import TextStates
from opensora.sampling.frames import begin_with

CLIP = ClipConditions(24.0, 16.0, 16.0, 5)
BOTH: Any = ("text", "image")


def packed_condition(known: ChannelConditioning) -> Tensor:
    """The mask, then the latents."""
    latents = known.masked_latents
    mask = known.mask[:, None, :, None, None].expand(-1, 1, -1, *latents.shape[3:])
    return packed(torch.cat([mask.float(), latents], dim=1))


class Toy(VideoTransformer):
    """The fixtures' linear network of packed tokens, which reads known frames in channels and is told the scale."""

    reads_channels = reads_guidance = True

    def __init__(self, fixture: Any) -> None:
        super().__init__()
        self.a, self.b, self.d, self.e, self.g = (fixture[f"in.{name}"] for name in "abdeg")

    def forward(
        self, hidden_states, timestep, *, clip_conditions=None, frame_mask=None, channel_conditioning=None,
        guidance=None, text_context=None,
    ) -> Any:  # fmt: skip
        said = text_context["encoder_hidden_states"].flatten(1).mean(dim=1)[:, None, None]
        tokens = self.a * packed(hidden_states) + self.b * timestep[:, None, None] / 1000 + self.d * said
        tokens = tokens + self.g * guidance
        if channel_conditioning is not None:
            tokens = tokens + self.e * packed_condition(channel_conditioning)[..., : tokens.shape[2]]
        return SimpleNamespace(sample=unpacked(tokens, hidden_states))


def sample(
    fixture: Any,
    rule: GuidanceRule,
    times: Tensor,
    *,
    known: ChannelConditioning | None,
    seen: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Packed result of a run, and how often a clip went through the network; `seen` are latents before some steps."""
    z = fixture["in.z"]
    names = ("text", "null", "unconditional")
    rows = fixture["in.txt"].split(len(z))
    scheduler = RectifiedFlowScheduler(velocity="noise - data")
    scheduler.set_timesteps(sigmas=times[:-1])
    guidance, steps = ChannelGuidance(rule, "all", z.shape[1]), len(scheduler.timesteps)
    denoiser = Denoiser(
        Toy(fixture),
        # The recorded runs have a text of its own for every branch.
        {name: TextStates(rows[k % len(rows)]) for k, name in enumerate(names)},
        CLIP,
        channels=known,
        guidance_scale=rule.describe()["guidance_scale"],
    )
    for i, t in enumerate(scheduler.timesteps):
        if seen is not None and i in seen:
            assert_near(packed(z), seen[i])
        step = GuidanceStep(i, steps, t, conditioned=known is not None)
        predictions = denoiser(guidance.branches(step), z, t, step=i, num_steps=steps)
        z = scheduler.step(guidance.combine(predictions, step), t, z).prev_sample
    return packed(z), denoiser.num_evaluations


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding, which along a guided trajectory grows with the values."""
    assert_close(actual, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(expected.abs().max())))


def known_of(fixture: Any) -> ChannelConditioning:
    return ChannelConditioning(fixture["in.masked_ref"], fixture["in.masks"][:, 0, :, 0, 0].bool())


RULES: dict[str, GuidanceRule] = {
    "i2v_plain": TextImageGuidance(7.5, 3.0),
    "i2v_osci": TextImageGuidance(7.5, 3.0, oscillating=BOTH),
    "i2v_osci_temporal": TextImageGuidance(7.5, 3.0, oscillating=BOTH, image_ramp="past_last_step"),
    "distilled": DistilledGuidance(4.0),
}


def test_denoising_loops(golden):
    fixture = golden("sampling_v2_0_denoise")
    assert set(fixture.under("out")) == set(RULES)
    counted = {}
    for case, rule in RULES.items():
        seen, known = dict(enumerate(fixture.tensors.get(f"mid.{case}.model_img", ()))), known_of(fixture)
        known = None if case == "distilled" else known
        final, counted[case] = sample(fixture, rule, fixture["in.timesteps"], known=known, seen=seen)
        assert_near(final, fixture[f"out.{case}"])
    assert counted == {"i2v_plain": 42, "i2v_osci": 38, "i2v_osci_temporal": 38, "distilled": 14}


def test_distilled_guidance(golden):
    fixture = golden("sampling_v2_0_distilled")
    steps, scale = fixture.meta["steps"], fixture.meta["guidance"]
    times = {"final": fixture["in.timesteps"], "final_noshift": torch.linspace(1, 0, steps + 1, dtype=torch.float64)}
    assert set(fixture.under("out")) == set(times)
    for case, schedule in times.items():
        final, count = sample(fixture, DistilledGuidance(scale), schedule, known=None)
        assert_near(final, fixture[f"out.{case}"])
        assert count == steps * len(fixture["in.z"])


@pytest.mark.parametrize(("known", "expected"), [(False, 80), (True, 110)])
def test_evaluations_of_fifty_steps(golden, known, expected):
    """The reference takes 150 for either."""
    fixture = golden("sampling_v2_0_denoise")
    rule = TextImageGuidance(7.5, 3.0, oscillating=BOTH, image_ramp="past_last_step")
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    assert sample(fixture, rule, times, known=known_of(fixture) if known else None)[1] == expected


def test_every_condition(golden):
    fixture = golden("sampling_v2_0_i2v_modes")
    modes, times = fixture.meta["modes"], fixture["in.timesteps"]
    steps, scale, image_scale = len(times) - 1, fixture.meta["guidance"], fixture.meta["guidance_img"]
    seen = {"oscillation", "temporal_upper"}
    scales = torch.tensor([oscillating_scale(scale, i) for i in range(steps)])
    assert_close(scales.double(), fixture["out.oscillation"].double())
    upper = torch.tensor([falling_scale(image_scale, 1.0, i, steps) for i in range(steps + 1)])
    assert_close(upper.double(), fixture["out.temporal_upper"].double(), rtol=1e-6, atol=1e-6)
    for case, mode in modes.items():
        condition, causal = mode["cond_type"], mode["causal"]
        noise = fixture["in.z"]
        known = known_frames(condition, [fixture["in.ref.0"], fixture["in.ref.1"]], noise, causal=causal)
        shown = known or ChannelConditioning.none(noise)
        assert torch.equal(shown.mask.float(), fixture[f"out.{case}.mask_t"].float())
        condition_of = fixture[f"out.{case}.cond_step0"]
        for row, read in zip(condition_of, (shown, shown, ChannelConditioning.none(noise)), strict=True):
            assert torch.equal(packed_condition(read), row[None])
        oscillating: Any = [kind for kind in BOTH if mode[f"{kind}_osci"]]
        ramp: Any = "past_last_step" if mode["scale_temporal_osci"] and condition.startswith("i2v") else None
        rule = TextImageGuidance(scale, image_scale, oscillating=oscillating, image_ramp=ramp)
        # With nothing known two branches have texts that differ in the recorded run alone.
        final, _ = sample(fixture, rule, times, known=shown, seen={7: fixture[f"mid.{case}.img_step7"]})
        assert_near(final, fixture[f"out.{case}.final"])
        seen |= {f"{case}.{name}" for name in ("mask_t", "cond_step0", "final")}
    assert seen == set(fixture.under("out"))


# --- the schedule -----------------------------------------------------------------------------------------------------


def schedule(steps: int, tokens: int, latent_frames: int, alpha: float | None, *, shift: bool = True) -> Tensor:
    """Noise levels of a run, with the 0 that it ends at, for frames of so many tokens."""
    scheduler = RectifiedFlowScheduler(
        use_timestep_transform=shift, transform="tokens", token_px=16, transform_ratio=alpha, micro_frame_size=None
    )
    num_frames = 4 * latent_frames - 3
    scheduler.set_timesteps(steps, height=16, width=16 * tokens, num_frames=num_frames)
    return scheduler.sigmas


def test_schedules(golden):
    fixture = golden("sampling_v2_0_schedule")
    rows = fixture.meta["sch"]
    seen = {"lin", "osc", "time_shift"}
    for number, row in enumerate(rows):
        assert_close(schedule(*row), fixture[f"out.{number}"], rtol=1e-6, atol=1e-7)
        assert_close(schedule(*row, shift=False), fixture[f"out.{number}.noshift"], rtol=1e-6, atol=1e-7)
        seen |= {f"{number}", f"{number}.noshift"}
    for ratio, expected in zip((0.5, 1.0, 2.5, 9.0), fixture["out.time_shift"], strict=True):
        shifted = flow.time_shift(torch.linspace(0, 1, len(expected)), ratio)
        assert_close(shifted, expected.float(), rtol=1e-5, atol=1e-6)
    tokens = (0, 256, 1000, 3600, 4096, 10000)
    assert_close(lines(tokens), fixture["out.lin"], rtol=1e-6, atol=1e-7)
    scales = [oscillating_scale(7.5, i) for i in range(len(fixture["out.osc"]))]
    assert_close(torch.tensor(scales), fixture["out.osc"])
    assert seen == set(fixture.under("out"))


def lines(tokens: Any) -> Tensor:
    """The ratio of one latent frame."""
    return torch.tensor([flow.token_shift_ratio(number, 1) for number in tokens], dtype=torch.float64)


def test_schedules_of_many_sizes(golden):
    fixture = golden("sampling_v2_0_schedules")
    rows = fixture.meta["rows_steps_seqlen_latentframes_alpha_shift"]
    assert set(fixture.under("out")) == {str(number) for number in range(len(rows))} | {"res_lin", "res_lin_custom"}
    for number, (steps, tokens, frames, alpha, shift) in enumerate(rows):
        ours = schedule(steps, tokens, frames, alpha, shift=shift)
        assert_close(ours, fixture[f"out.{number}"], rtol=1e-6, atol=1e-7)
    assert_close(lines(range(0, 10001, 250)), fixture["out.res_lin"], rtol=1e-6, atol=1e-7)
    custom = [flow.token_shift_ratio(n, 1, line=((100, 0.5), (900, 1.5))) for n in range(0, 2001, 100)]
    assert_close(torch.tensor(custom, dtype=torch.float64), fixture["out.res_lin_custom"], rtol=1e-6, atol=1e-7)


def test_times_that_the_network_is_told(golden):
    fixture = golden("sampling_v2_0_timesteps_bf16")
    rows, kept = fixture.meta["rows_steps_seqlen_latentframes_alpha"], fixture.meta["emb_rows_kept"]
    names = {"dt", "emb_of_bf16", "emb_of_fp32", "schedule", "t1000_bf16", "t_bf16"}
    assert set(fixture.under("out")) == {f"{number}.{name}" for number in range(len(rows)) for name in names}
    for number, row in enumerate(rows):
        expected = {name: fixture[f"out.{number}.{name}"] for name in names}
        levels = schedule(*row)
        assert_close(levels, expected["schedule"], rtol=1e-6, atol=1e-7)
        assert_close(levels.diff(), expected["dt"], rtol=1e-5, atol=1e-6)
        assert torch.equal(levels.bfloat16().float(), expected["t_bf16"].float())
        timesteps = (levels * 1000).float()
        rounded = MMDiT._rounded(SimpleNamespace(bf16_timesteps=True), timesteps)  # type: ignore[arg-type]
        assert torch.equal(rounded, expected["t1000_bf16"].float())
        assert_close(
            sinusoid(rounded, 256)[:kept].bfloat16().float(), expected["emb_of_bf16"].float(), rtol=0, atol=8e-3
        )
        assert_close(sinusoid(timesteps, 256)[:kept], expected["emb_of_fp32"], rtol=0, atol=2e-4)


# --- layout -----------------------------------------------------------------------------------------------------------


def pack(latents: Tensor, patch: int) -> tuple[Tensor, Any]:
    """The network's own."""
    return MMDiT._pack(SimpleNamespace(patch_size=(1, patch, patch)), latents)  # type: ignore[arg-type]


FRAMES_OF: dict[str, list[tuple[int, int, int, int]]] = {
    "t2v": [],
    "i2v_head": [(0, 0, 0, 1)],
    "i2v_tail": [(-1, -1, -1, 1)],
    "i2v_loop": [(0, 0, 0, 1), (-1, -1, -1, 1)],
    "v2v_head": [(0, 0, 0, 9)],
    "v2v_head_easy": [(0, 0, 0, 17)],
    "v2v_tail": [(-1, -9, -9, 9)],
    "v2v_tail_easy": [(-1, -17, -17, 17)],
}
"""Mode -> reference, its first frame, the clip's first frame, number of frames."""


def known_frames(
    mode: str, references: Sequence[Tensor], noise: Tensor, *, causal: bool = True
) -> ChannelConditioning | None:
    """What a run starts from: every frame generated, and the known ones beside the noise."""
    total = noise.shape[2]
    conditioning = FrameConditioning(torch.zeros_like(noise), torch.ones(1, total))
    for number, source, target, length in FRAMES_OF[mode]:
        reference = references[number] if mode.startswith("i2v") else references[0]
        if length > 1 and not causal:  # an autoencoder whose first latent frame is as long as all others
            length, source, target = length - 1, min(source + 1, 0), min(target + 1, 0)
        conditioning = conditioning.put(reference[None].roll(-source, dims=2)[:, :, :length], target % total)
    sample, strength, known = begin_with(conditioning, noise, in_channels=True)
    assert torch.equal(sample, noise) and strength is None and (known is None) == (mode == "t2v")
    return known


def test_helpers(golden):
    fixture = golden("sampling_v2_0_misc")
    z, seen = fixture["in.z"], {"pack1", "pack2", "unpack2_of_pack2", "img_ids", "txt_ids", "noise_seed42"}
    assert torch.equal(pack(z, 1)[0], fixture["out.pack1"])
    tokens, grid = pack(z, 2)
    assert torch.equal(tokens, fixture["out.pack2"]) and torch.equal(packed(z), tokens)
    assert torch.equal(unpacked(tokens, z), fixture["out.unpack2_of_pack2"])
    assert torch.equal(MMDiT._unpack(SimpleNamespace(patch_size=(1, 2, 2)), tokens, grid, z), z)  # type: ignore[arg-type]
    # Positions are those of the tokens in the order of packing; the text has none.
    positions = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"))[None].float()
    assert torch.equal(pack(positions, 1)[0], fixture["out.img_ids"].float())
    assert not fixture["out.txt_ids"].any()
    drawn = fixture["out.noise_seed42"]
    assert torch.equal(randn_tensor(drawn.shape, generator=torch.Generator().manual_seed(42)), drawn)

    references = [fixture["in.ref0.0"], fixture["in.ref0.1"]]
    noise = torch.randn(fixture["in.zz_shape"].tolist())
    for mode in FRAMES_OF:
        known = known_frames(mode, references, noise) or ChannelConditioning.none(noise)
        assert torch.equal(known.mask.float(), fixture[f"out.cond.{mode}.mask_t"].float())
        seen.add(f"cond.{mode}.mask_t")
        if f"out.cond.{mode}.masked" in fixture:
            assert torch.equal(known.masked_latents, fixture[f"out.cond.{mode}.masked"])
            seen.add(f"cond.{mode}.masked")
    assert seen == set(fixture.under("out"))
