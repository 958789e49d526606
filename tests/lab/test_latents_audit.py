"""Audits: what is said of a bundled autoencoder, of one with the wrong factor, and of published ones in miniature."""

import dataclasses
import json
import math

import pytest
import torch
from published_pipelines import pipeline_of
from tiny_published import network, tiny
from torch import Tensor

from opensora.checkpoints.published_parts import DC_AE_2_0_DECLARED_IN_TRAINING
from opensora.lab.latents.audit import Audit, audit
from opensora.lab.latents.clips import choose_clips
from opensora.lab.latents.encoding import measure_latents, two_parts
from opensora.lab.latents.subject import Subject
from opensora.lab.latents.verdict import normalising
from opensora.lab.latents.wording import lines_of, tables_of
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.joint import JointCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.posterior import Certain


def audited(subject: Subject, codec: VideoCodec, num_clips: int = 12, **size: int) -> Audit:
    chosen = {"num_frames": None, "height": None, "width": None, **size}
    return audit(subject, codec, choose_clips("toybox", subject.size(codec, "toybox", **chosen), num_clips, seed=0))


def saved(codec: VideoCodec, folder) -> tuple[Subject, VideoCodec]:
    """An autoencoder that stands alone."""
    codec.save_pretrained(folder)
    return Subject.find(str(folder)), codec


def said(found: Audit) -> str:
    return "\n".join(lines_of(found))


# --- toybox -----------------------------------------------------------------------------------------------------------


def toybox_audit(factor: float | None = None) -> Audit:
    subject = Subject.find("toybox")
    codec = subject.load()
    if factor is not None:
        codec.override_latent_space(dataclasses.replace(codec.latent_space, scaling_factor=factor))
    return audited(subject, codec, 40)  # whose deviation is good to 2.5 %


@pytest.mark.slow
def test_the_toybox_is_good():
    found = toybox_audit()
    assert [verdict.kind for verdict in found.verdicts] == ["good", "good"]
    assert found.advice.lines == {} and "keep what is declared" in found.advice.keep
    assert found.measured.normalised.deviation == pytest.approx(1, abs=0.08)
    assert abs(found.schedules[0].log_snr) < 0.15 and found.schedules[0].schedule == "this model's"
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_a_wrong_factor_of_the_toybox_is_named_and_so_is_the_one_it_was_trained_with():
    found = toybox_audit(0.13025)
    before, after = found.verdicts
    assert before.kind == "wrong factor"
    assert before.right.factor == pytest.approx(0.232058, rel=0.02)
    assert "was trained with 0.2321" in before.text
    assert "put the factor before them right first" in after.text
    best = max(found.trials, key=lambda trial: trial.decibels)
    assert best.name == "declared by the weights" and best.factor == pytest.approx(0.232058, rel=1e-4)
    assert "leave them their own" in found.advice.keep


# --- two parts, as in 1.2 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like_1_2(tmp_path_factory):
    """A model like 1.2: a 2D part that asks for 0.13025, a temporal part on its latents times 0.18215, then shift and
    scale that make up for it."""
    pipeline = pipeline_of("opensora-1.2")
    codec = pipeline.autoencoder
    parts = two_parts(codec)
    assert parts is not None and codec.latent_space.factor == 0.18215
    clips = list(choose_clips("toybox", sized(codec), 12, seed=0))
    deviation = measure_latents(codec, clips).frames.deviation
    with torch.no_grad():
        for parameter in parts.spatial_vae.module.quant_conv.parameters():
            parameter[:4] *= 1 / 0.13025 / deviation
    own = measure_latents(codec, clips).own
    codec.set_latent_space(normalising(own, codec.latent_space, has_factor=False))
    pipeline.register_to_config(trained_on={"latent_space": codec.latent_space.to_dict()})
    folder = tmp_path_factory.mktemp("like 1.2") / "model"
    pipeline.save_pretrained(folder)
    return folder


def sized(codec):
    return Subject("", None).size(codec, "toybox", 4, 32, 48)


def test_a_factor_that_the_temporal_part_is_used_to_stays_and_a_new_one_takes_the_right_one(like_1_2):
    subject = Subject.find(str(like_1_2))
    found = audited(subject, subject.load())
    before, after = found.verdicts
    assert (before.place, before.kind) == ("between parts", "wrong factor")
    assert before.right.factor == pytest.approx(0.13025, rel=0.02) and "SDXL: 0.13025" in before.text
    assert "stays with these weights: 1.4 times as large as meant, 0.67 in log-SNR" in before.text
    assert "shift and scale after it" in before.text
    assert (after.place, after.kind) == ("after parts", "good")
    assert f"for the transformer of {like_1_2}" in found.advice.keep
    assert "0.18215 stays" in found.advice.keep
    assert found.advice.lines.keys() == {"temporal part"}
    name, _, figure = found.advice.lines["temporal part"].partition("=")
    assert name == "objective.scaling_factor" and float(figure) == pytest.approx(0.13025, rel=0.02)
    assert found.advice.from_scratch.factor == pytest.approx(0.13025, rel=0.02)


def test_the_factor_between_the_parts_is_measured_where_it_lies(like_1_2):
    subject = Subject.find(str(like_1_2))
    found = audited(subject, subject.load())
    declared, sdxl = (one.figures.deviation for one in found.alternatives[:2])
    assert [one.name for one in found.alternatives[:2]] == ["declared", "SDXL"]
    assert declared == pytest.approx(0.18215 / 0.13025, rel=0.02) and sdxl == pytest.approx(1, rel=0.02)
    trials = {trial.name: trial for trial in found.trials}
    assert trials["declared"].deviation_in == pytest.approx(trials["SDXL"].deviation_in * 0.18215 / 0.13025, rel=1e-4)
    assert trials["declared"].deviation_out != pytest.approx(trials["SDXL"].deviation_out, rel=1e-3)


def test_without_shift_and_scale_the_latents_are_to_be_normalised(like_1_2, tmp_path):
    subject = Subject.find(str(like_1_2))
    codec = subject.load()
    codec.set_latent_space(LatentSpace(0.18215))
    subject, codec = saved(codec, tmp_path / "bare")
    found = audited(subject, codec, num_frames=4, height=32, width=48)
    assert found.verdicts[1].kind == "normalise"
    assert "nothing is known to be trained" in found.advice.keep
    declared = LatentSpace.from_dict(json.loads("{" + found.advice.lines["transformer"] + "}")["latent_space"])
    codec.set_latent_space(declared)
    assert audited(subject, codec, num_frames=4, height=32, width=48).verdicts[1].kind == "good"


# --- one part ---------------------------------------------------------------------------------------------------------


def autoencoder(name: str) -> VideoCodec:
    return pipeline_of(name).autoencoder


def with_deviation(codec: JointCodec, deviation: float, clips: list[Tensor]) -> JointCodec:
    """The codec, its encoder's latents multiplied until they have this deviation."""
    factor, encode = deviation / measure_latents(codec, clips).own.deviation, codec.encode_raw
    codec.encode_raw = lambda video: Certain(encode(video).mode() * factor)
    return codec


def test_1_3_is_measured_against_its_statistics_of_each_channel(tmp_path):
    codec = autoencoder("opensora-1.3")
    subject = Subject("1.3", None)
    clips = list(choose_clips("toybox", subject.size(codec, "toybox", 17, 32, 32), 8, seed=0))
    measured = measure_latents(codec, clips)
    by_hand = codec.latent_space.denormalise(torch.cat([codec.encode_video(clip) for clip in clips]))
    torch.testing.assert_close(measured.own.mean.float(), by_hand.mean(dim=(0, 2, 3, 4)), rtol=1e-3, atol=1e-4)
    assert len(measured.own.mean) == 16
    codec.set_latent_space(normalising(measured.own, codec.latent_space))
    subject, codec = saved(codec, tmp_path / "codec")
    found = audited(subject, codec, 8, num_frames=17, height=32, width=32)
    assert [verdict.kind for verdict in found.verdicts] == ["good"]
    # The same statistics beside another factor: the factor is found that goes with them.
    codec.set_latent_space(dataclasses.replace(codec.latent_space, scaling_factor=0.4))
    (verdict,) = audited(subject, codec, 8, num_frames=17, height=32, width=32).verdicts
    assert verdict.kind == "wrong factor" and verdict.right.factor == pytest.approx(1, rel=0.02)


def test_statistics_of_each_frame_of_a_chunk_are_taken_as_they_are():
    codec = autoencoder("opensora-1.3")
    clips = list(choose_clips("toybox", Subject("", None).size(codec, "toybox", 17, 32, 32), 3, seed=0))
    raw = codec.latent_space.denormalise(torch.cat([codec.encode_video(clip) for clip in clips])).double()
    by_frame = LatentSpace(
        shift=tuple(tuple(row) for row in raw.mean(dim=(0, 3, 4)).tolist()),
        scale=tuple(tuple(row) for row in raw.std(dim=(0, 3, 4), correction=0).tolist()),
    )
    codec.set_latent_space(by_frame)
    found = measure_latents(codec, clips).normalised
    torch.testing.assert_close(found.mean, torch.zeros(16).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.std, torch.ones(16).double(), rtol=1e-4, atol=0)


def test_hunyuan_of_another_factor_is_told_its_own(tmp_path):
    codec = autoencoder("opensora-2.0")
    subject, codec = saved(codec, tmp_path / "codec")
    clips = list(choose_clips("toybox", subject.size(codec, "toybox", 5, 32, 48), 12, seed=0))
    found = audited(subject, with_deviation(codec, 4 / 0.476986, clips), num_frames=5, height=32, width=48)
    (verdict,) = found.verdicts
    assert verdict.kind == "wrong factor" and verdict.right.factor == pytest.approx(0.476986 / 4, rel=0.02)
    codec.set_latent_space(LatentSpace(4.0))
    found = audited(subject, with_deviation(codec, 1 / 0.476986, clips), num_frames=5, height=32, width=48)
    assert "HunyuanVideo: 0.476986 (multiply)" in found.verdicts[0].text


def test_dc_ae_divides_by_0_493_and_nobody_did(tmp_path):
    subject, codec = saved(autoencoder("opensora-2.0-dc-ae"), tmp_path / "codec")
    clips = list(choose_clips("toybox", subject.size(codec, "toybox", 8, 32, 48), 12, seed=0))
    codec = with_deviation(codec, 0.493, clips)
    found = audited(subject, codec, num_frames=8, height=32, width=48)
    (verdict,) = found.verdicts
    assert verdict.kind == "wrong factor" and verdict.right.convention == "divide"
    assert verdict.right.scaling_factor == pytest.approx(0.493, rel=0.02)
    (note,) = [line for line in said(found).splitlines() if line.startswith("note: DC-AE of 2.0, training")]
    assert "0.493 divides, which multiplies latents by 2.028" in note and "does not apply" in note
    assert '"convention": "divide"' in found.advice.lines["one factor"]
    # Declared as published training declares it, they are right; declared as if it multiplied, four times too small.
    codec.set_latent_space(LatentSpace.from_dict(DC_AE_2_0_DECLARED_IN_TRAINING))
    assert audited(subject, codec, num_frames=8, height=32, width=48).verdicts[0].kind != "wrong factor"
    codec.set_latent_space(LatentSpace(0.493))
    found = audited(subject, codec, num_frames=8, height=32, width=48)
    assert found.verdicts[0].kind == "wrong factor" and "as if it multiplied" in said(found)
    assert found.schedules[0].log_snr == pytest.approx(2 * math.log(0.493**2), abs=0.05)


def test_2d_autoencoders_of_1_1_have_one_place(tmp_path):
    subject, codec = saved(network(tiny("opensora-1.1-stage3").autoencoder), tmp_path / "codec")
    found = audited(subject, codec, num_frames=4, height=32, width=48)
    assert [verdict.place for verdict in found.verdicts] == ["one part"] and not found.trials
    names = [one.name for one in found.alternatives]
    assert names == ["declared", "SDXL", "1 / deviation", "per channel"]
    deviation = {one.name: one.figures.deviation for one in found.alternatives}
    assert deviation["1 / deviation"] == pytest.approx(1) and deviation["per channel"] == pytest.approx(1)
    assert deviation["SDXL"] / deviation["declared"] == pytest.approx(0.13025 / 0.18215)


def test_few_clips_do_not_tell(tmp_path):
    subject, codec = saved(network(tiny("opensora-1.1-stage3").autoencoder), tmp_path / "codec")
    (verdict,) = audited(subject, codec, 1, num_frames=4, height=32, width=48).verdicts
    assert verdict.kind == "cannot tell" and "`num_clips`" in verdict.text


def test_every_row_of_a_table_has_its_columns(like_1_2):
    subject = Subject.find(str(like_1_2))
    tables = list(tables_of(audited(subject, subject.load(), 2)))
    assert len(tables) == 5
    for table in tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}
