"""Open-Sora 1.3 against the reference's recorded runs, times and losses: its guidance, known frames and schedule.

The runs go through the denoiser, which leaves out branches that have no weight or that read what another one reads.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.denoiser import Denoiser, predict
from opensora.diffusion.flow import AreaShift, redraw_above
from opensora.diffusion.losses import known_frame_weights
from opensora.diffusion.process import RectifiedFlowProcess
from opensora.models.channel_conditioning import ChannelConditioning
from opensora.models.clip_conditions import ClipConditions
from opensora.models.embeddings import ScalarEmbedder
from opensora.models.guidance import ChannelGuidance, GuidanceStep
from opensora.models.guidance_rules import TextImageGuidance, falling_scale, oscillating_scale
from opensora.models.network import VideoTransformer
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.text.conditioner import TextStates
from opensora.sampling.frames import renoise_known_frames

CLIP = ClipConditions(24.0, 16.0, 16.0, 5)
CFG_SCALE = 4.0
"""The reference's default of both scales."""


class Toy(VideoTransformer):
    """The fixtures' linear network of four latent channels, which reads known frames in channels."""

    reads_channels = True

    def __init__(self, fixture: Any) -> None:
        super().__init__()
        self.a, self.b, self.d, self.e = (fixture[f"in.toy.{name}"].reshape(1, -1, 1, 1, 1) for name in "abde")

    def without_known_frames(self, channels: ChannelConditioning) -> ChannelConditioning:
        return channels.without_latents()

    def forward(
        self, hidden_states, timestep, *, clip_conditions=None, frame_mask=None, channel_conditioning=None,
        text_context=None,
    ) -> Any:  # fmt: skip
        repeat = [channel % hidden_states.shape[1] for channel in range(self.a.shape[1])]
        said = text_context["encoder_hidden_states"].flatten(1).mean(dim=1)[:, None, None, None, None]
        sample = self.a * hidden_states[:, repeat] + self.b * timestep[:, None, None, None, None] / 1000 + self.d * said
        if frame_mask is not None:
            sample = sample + self.e * frame_mask[:, None, :, None, None]
        if channel_conditioning is not None:
            mask = channel_conditioning.mask[:, None, :, None, None].float()
            sample = sample + self.e * (channel_conditioning.masked_latents[:, repeat] + 0.5 * mask)
        return SimpleNamespace(sample=sample)


def states(text: Tensor) -> TextStates:
    return TextStates(text.flatten(1)[:, None])


def sample(
    fixture: Any,
    case: str,
    rule: TextImageGuidance,
    scheduler: RectifiedFlowScheduler,
    steps: int,
    row: int,
    *,
    image: bool,
    sdedit: bool = False,
    null: str = "y_null",
    strength: Tensor | None = None,
    like_image: bool = False,
) -> Tensor:
    """One row of the batch by itself: here one run has one size, the fixture has one per row."""
    one = slice(row, row + 1)
    z, guidance = fixture["in.z"][one], ChannelGuidance(rule, "all", 4)
    texts = {
        "text": states(fixture["in.y"][one]),
        "null": states(fixture[f"in.{null}"].expand(len(fixture["in.z"]), -1, -1, -1)[one]),
    }
    channels = None
    if image:
        mask = fixture["in.z_cond_mask"][one, 0, :, 0, 0].bool()
        channels = ChannelConditioning(fixture["in.z_cond"][one], mask)
    denoiser = Denoiser(Toy(fixture), texts, CLIP, channels=channels)
    size = {name: int(fixture[f"in.{name}"][row]) for name in ("height", "width", "num_frames")}
    size["num_frames"] = 1 if like_image else size["num_frames"]
    scheduler.set_timesteps(steps, **size)
    for i, t in enumerate(scheduler.timesteps):
        frame_mask, noise = None, fixture[f"in.{case}.noise"][i, one] if f"in.{case}.noise" in fixture else None
        if strength is not None:
            z, frame_mask = scheduler.activate_frames(z, t, strength[one], noise=noise)
        if sdedit and channels is not None:
            z = renoise_known_frames(z, channels, scheduler, t, noise=noise)
        told = fixture[f"mid.{case}.model_t"][i, row]
        torch.testing.assert_close(t, told.to(t.dtype), rtol=1e-5, atol=1e-3)
        step = GuidanceStep(i, steps, t, conditioned=image)
        predictions = denoiser(guidance.branches(step), z, t, frame_mask, step=i, num_steps=steps)
        z = scheduler.step(guidance.combine(predictions, step), t, z, frame_mask=frame_mask).prev_sample
    return z


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding, which along a guided trajectory grows with the values."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.abs().max().item()))


def test_published_runs(golden):
    fixture = golden("rflow_v1_3_sample")
    steps, scale, image_scale = (fixture.meta[name] for name in ("steps", "cfg_scale", "image_cfg_scale"))
    oscillating: Any = {"oscillating": ("text", "image")}
    rules = {
        "t2v": TextImageGuidance(scale),
        "t2v_osc_flaw": TextImageGuidance(scale, guidance_rescale=0.7, **oscillating),
        "i2v": TextImageGuidance(scale, image_scale),
        "i2v_osc_scale_sdedit": TextImageGuidance(scale, image_scale, image_ramp="to_last_step", **oscillating),
    }
    finals = {name.removesuffix(".final") for name in fixture.under("out") if name.endswith(".final")}
    assert finals == set(rules)
    for case, rule in rules.items():
        for row in range(len(fixture["in.z"])):
            scheduler = RectifiedFlowScheduler(use_timestep_transform=True, transform_frames="after_first")
            image = case.startswith("i2v")
            final = sample(fixture, case, rule, scheduler, steps, row, image=image, sdedit="sdedit" in case)
            assert_near(final, fixture[f"out.{case}.final"][row : row + 1])


def rule_of(init: dict[str, Any], call: dict[str, Any]) -> TextImageGuidance:
    """Guidance by the reference's arguments of constructor and call."""
    scale = call.get("guidance_scale", init.get("cfg_scale", CFG_SCALE))
    everywhere = init.get("use_oscillation_guidance", False)
    kinds: Any = [kind for kind in ("text", "image") if call.get(f"use_oscillation_guidance_for_{kind}", everywhere)]
    return TextImageGuidance(
        scale,
        call.get("image_cfg_scale", scale),
        oscillating=kinds,
        steady_steps=init.get("force_num", 10),
        image_ramp="to_last_step" if init.get("scale_image_weight") else None,
        image_ramp_start=init.get("initial_image_scale", 1.0),
        guidance_rescale=0.7 if init.get("use_flaw_fix") else 0.0,
    )


KNOWN_INIT = {
    "cfg_scale", "num_sampling_steps", "scale_temporal", "use_timestep_transform", "use_flaw_fix", "scale_image_weight",
    "force_num", "initial_image_scale", "use_oscillation_guidance", "use_discrete_timesteps", "transform_scale",
}  # fmt: skip
KNOWN_CALL = {
    "img", "neg", "strength", "image_cfg_scale", "guidance_scale", "use_sdedit", "use_oscillation_guidance_for_image",
    "use_oscillation_guidance_for_text",
}  # fmt: skip


def test_all_modes(golden):
    fixture = golden("rflow_v1_3_modes")
    modes = fixture.meta["modes"]
    assert {f"{name}.final" for name in modes} == {name for name in fixture.under("out") if name.endswith(".final")}
    for case, mode in modes.items():
        init, call = mode["init"], mode.get("call", {})
        assert set(init) <= KNOWN_INIT and set(call) <= KNOWN_CALL
        for row in range(len(fixture["in.z"])):
            scheduler = RectifiedFlowScheduler(
                use_discrete_timesteps=init.get("use_discrete_timesteps", False),
                use_timestep_transform=init.get("use_timestep_transform", False),
                transform_scale=init.get("transform_scale", 1.0),
                transform_frames="after_first",
            )
            final = sample(
                fixture, case, rule_of(init, call), scheduler, init["num_sampling_steps"], row,
                image=call.get("img", False), sdedit=call.get("use_sdedit", False),
                null="y_neg" if call.get("neg") else "y_null",
                strength=fixture["in.mask"] if call.get("strength") else None,
                like_image=not init.get("scale_temporal", True),
            )  # fmt: skip
            assert_near(final, fixture[f"out.{case}.final"][row : row + 1])


def test_scales_of_steps_and_frames(golden):
    fixture = golden("rflow_v1_3_modes")
    seen = {name for name in fixture.under("out") if name.endswith(".final")}
    for number, (scale, steady, start, steps) in enumerate(fixture.meta["tables_gs_forcenum_initial_steps"]):
        oscillating = [oscillating_scale(scale, i, steady) for i in range(steps)]
        falling = [falling_scale(scale, start, i, steps - 1) for i in range(steps)]
        rule = TextImageGuidance(1.0, scale, image_ramp="to_last_step", image_ramp_start=start)
        per_frame = fixture[f"out.table{number}.per_frame"]
        like = torch.zeros(1, 1, per_frame.shape[1], 1, 1)
        frames = [rule.image_scale(GuidanceStep(i, steps, 0.0, conditioned=True), like) for i in range(steps)]
        tables = {
            "oscillation": torch.tensor(oscillating),
            "upper_decr": torch.tensor(falling),
            "upper_incr": torch.tensor(falling[::-1]),
            "per_frame": torch.stack([torch.as_tensor(scales).expand(like.shape)[0, 0] for scales in frames]),
        }
        for name, table in tables.items():
            expected = fixture[f"out.table{number}.{name}"]
            torch.testing.assert_close(table.reshape(expected.shape), expected)
            seen.add(f"table{number}.{name}")
    assert seen == set(fixture.under("out"))


def test_helpers(golden):
    fixture = golden("rflow_v1_3_sample")
    # dyn_thr is a helper that the reference never calls.
    assert {name for name in fixture.under("out") if not name.endswith(".final")} == {"flaw", "osc", "dyn_thr"}
    cond, v = fixture["in.flaw.pred_cond"], fixture["in.flaw.v"]
    # At scale 2 the guided prediction is 2 c - u.
    predictions = {"text": cond, "null": 2 * cond - v}
    rescaled = TextImageGuidance(2.0, guidance_rescale=0.7).combine(predictions, GuidanceStep(0, 1, 0.0))
    assert_near(rescaled, fixture["out.flaw"])
    steps = range(fixture["out.osc"].shape[1])
    ours = [[oscillating_scale(7.5, i, steady) for i in steps] for steady in (10, 0, 5)]
    torch.testing.assert_close(torch.tensor(ours), fixture["out.osc"])


@pytest.mark.parametrize(
    ("steps", "conditioned", "expected"),
    [(30, False, 50), (30, True, 70), (50, False, 80), (50, True, 110)],
)
def test_evaluations_of_the_published_settings(steps, conditioned, expected):
    """1.3 in 30 steps took 60 and 90 evaluations, 2.0 in 50 steps 150."""
    rule = TextImageGuidance(7.5, 3.0, oscillating=("text", "image"))
    needed = [rule.branches(GuidanceStep(i, steps, 0.0, conditioned)) for i in range(steps)]
    assert sum(map(len, needed)) == expected


# --- times ------------------------------------------------------------------------------------------------------------


def test_times_of_float32_and_of_bfloat16(golden):
    """We compute ratios exactly; those of the reference's scripts, which are in bfloat16, are an option."""
    fixture = golden("rflow_v1_3_timesteps_bf16")
    seen = set()
    for number, (height, width, num_frames) in enumerate(fixture["in.sizes_h_w_numframes"].tolist()):
        size = {"height": height, "width": width, "num_frames": num_frames}
        for scale in fixture.meta["scales"]:
            for name in ("fp32", "bf16"):
                scheduler = RectifiedFlowScheduler(
                    use_timestep_transform=True, transform_frames="after_first", transform_scale=scale,
                    transform_bf16=name == "bf16",
                )  # fmt: skip
                case = f"{number}.{name}.scale{scale:g}"
                exact: Any = {"rtol": 0, "atol": 0} if name == "bf16" else {"rtol": 1e-6, "atol": 0}
                ratio = torch.tensor([scheduler.time_shift.ratio(**size)])
                torch.testing.assert_close(ratio, fixture[f"out.{case}.ratio"], **exact)
                scheduler.set_timesteps(fixture.meta["steps"], **size)
                torch.testing.assert_close(scheduler.timesteps, fixture[f"out.{case}.t"], rtol=1e-6, atol=1e-4)
                assert fixture[f"out.{case}.t_dtype_is_fp32"] == (scheduler.timesteps.dtype == torch.float32)
                seen |= {f"{case}.{what}" for what in ("ratio", "t", "t_dtype_is_fp32")}
    told, weights = fixture["in.t"], fixture.under("sd")
    embedder = ScalarEmbedder(len(weights["mlp.2.bias"]))
    embedder.load_state_dict(weights)
    torch.testing.assert_close(embedder(told, torch.float32), fixture["out.t_emb.fp32"], rtol=1e-4, atol=2e-5)
    embedder.bfloat16()
    for name, values in (("fp32_t", told), ("bf16_t", told.bfloat16())):
        half = embedder(values, torch.bfloat16).float()
        torch.testing.assert_close(half, fixture[f"out.t_emb.bf16_model_{name}"], rtol=0, atol=3e-2)
        seen.add(f"t_emb.bf16_model_{name}")
    assert seen | {"t_emb.fp32"} == set(fixture.under("out"))


# --- training ---------------------------------------------------------------------------------------------------------

FLOW = RectifiedFlowProcess()


def losses_of(
    fixture: Any,
    t: Tensor,
    *,
    known: Tensor | None = None,
    shown: Tensor | None = None,
    dropped: str = "keep",
    weight: float = 1.0,
    frame_mask: Tensor | None = None,
    clean: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """What a prediction costs, (B,).

    Args:
        fixture: with clips, noise and text.
        t: times.
        known: frames (T,) that are shown in channels.
        shown: what they show; None for the clips.
        dropped: of text and known frames, in the reference's words: "text" drops the frames, "cond" the text.
        weight: of known frames.
        frame_mask: frames that are generated, of which the reference leaves telling the network to others.
        clean: that noise is added to; None for the clips.
        target: that is predicted, likewise.
    """
    clips, noise, y = (fixture[f"in.{name}"] for name in ("x_start", "noise", "y"))
    clean, target = clips if clean is None else clean, clips if target is None else target
    channels = None
    if known is not None:
        channels = ChannelConditioning(clips if shown is None else shown, known.expand(len(clips), -1))
        channels = channels.without_latents() if dropped in ("text", "null") else channels
    text = fixture["in.y_embedding"].expand_as(y) if dropped in ("cond", "null") else y
    noisy = FLOW.corrupt(clean, noise, t, frame_mask)
    prediction = predict(Toy(fixture), noisy, t, {"encoder_hidden_states": text}, CLIP, None, channels)
    weights = None if known is None else known_frame_weights(channels.mask, weight)  # type: ignore[union-attr]
    return FLOW.losses(
        prediction, clean=target, noisy=noisy, noise=noise, t=t, frame_mask=frame_mask, weights=weights
    )["velocity"]  # fmt: skip


def test_losses_with_known_frames(golden):
    fixture = golden("rflow_v1_3_losses")
    known = torch.zeros(fixture["in.x_start"].shape[2], dtype=torch.bool)
    known[fixture.meta["mask_index"]] = True
    for name, expected in fixture.under("out").items():
        dropped, _, weight = name.removesuffix(".loss").partition(".w")
        if dropped == "plain":
            actual = losses_of(fixture, fixture["in.t"])
        else:
            assert dropped in ("both", "null", "cond", "text")
            actual = losses_of(fixture, fixture["in.t"], known=known, dropped=dropped, weight=float(weight))
        assert_near(actual, expected)


def test_losses_of_augmented_clips_and_noisy_references(golden):
    fixture = golden("rflow_v1_3_extra")
    t, better, count = fixture["in.loss_t"], fixture["in.x_gt"], fixture["in.x_start"].shape[2]
    frames = torch.arange(count)
    disabled = torch.where((t > 500)[:, None, None, None, None], better, fixture["in.x_start"])
    ours = {
        "x_gt": losses_of(fixture, t, target=better),
        "x_gt_disable500": losses_of(fixture, t, target=better, clean=disabled),
        "emptyidx": losses_of(fixture, t),
        "framemask": losses_of(fixture, t, frame_mask=fixture["in.mask"].bool()),
    }
    for dropped in ("keep", "text", "cond", "null"):
        noisy = {"known": frames < 2, "shown": fixture["in.x_noisy_ref"]}
        ours[f"noisyref_{dropped}"] = losses_of(fixture, t, dropped=dropped, **noisy)
        ours[f"tail_w0.25_{dropped}"] = losses_of(fixture, t, dropped=dropped, known=frames == count - 1, weight=0.25)
    expected = {name.removeprefix("loss."): loss for name, loss in fixture.under("out").items() if "loss." in name}
    assert set(ours) == set(expected)
    for name, loss in expected.items():
        assert_near(ours[name], loss)


def test_times_to_train_on(golden):
    fixture = golden("rflow_v1_3_extra")
    seed, sizes, t = fixture.meta["seed"], fixture.meta["sizes_h_w_numframes"], fixture["in.t"] / 1000
    shift, seen = AreaShift(frames="after_first"), set()
    for number, (height, width, num_frames) in enumerate(sizes):
        ratio = fixture[f"out.{number}.ratio"]
        ours = torch.full_like(ratio, shift.ratio(height, width, num_frames))
        torch.testing.assert_close(ours, ratio, rtol=1e-5, atol=0)
        seen.add(f"{number}.ratio")
        for threshold in (0.9, 0.95):
            times = shift(t, height, width, num_frames)
            uniform = f"in.{number}.over{threshold}.uniform"
            assert (uniform in fixture) == (num_frames > 1)
            if num_frames > 1:
                times = redraw_above(times, threshold, fixture[uniform])
            torch.testing.assert_close(times * 1000, fixture[f"out.{number}.over{threshold}"], rtol=1e-4, atol=2e-3)
            seen.add(f"{number}.over{threshold}")
    processes = {
        "discrete": RectifiedFlowProcess(times="discrete"),
        "logit": RectifiedFlowProcess(times="logit-normal"),
        "logit_shift": RectifiedFlowProcess(times="logit-normal", time_shift=shift),
        "uniform_shift": RectifiedFlowProcess(time_shift=shift),
    }
    height, width, num_frames = sizes[0]
    for name, process in processes.items():
        generator = torch.Generator().manual_seed(seed)
        expected = fixture[f"out.draw.{name}"]
        drawn = process.draw_times(
            len(expected), height=height, width=width, num_frames=num_frames, generator=generator
        )  # fmt: skip
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-3)
        seen.add(f"draw.{name}")
    assert seen == {name for name in fixture.under("out") if not name.startswith("loss.")}
