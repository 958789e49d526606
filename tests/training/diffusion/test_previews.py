"""Held-out clips reach a network as those that are trained on do."""

from pathlib import Path

import pytest
from tiny_pipeline import make_pipeline
from tiny_tasks import write_clips

from opensora.data.batch import BatchKey, DataContext
from opensora.data.clips import ClipSource, ManifestClips
from opensora.data.toybox import ToyboxClips, ToyboxLatents
from opensora.evaluation.held_out import clips_of_model, manifest_portions, toybox_portions
from opensora.training.diffusion.previews import HeldOutLosses, clips_trained_on

BUCKETS = {"64x64": {"5": (1.0, 2)}}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Clips of 12 frames a second, with scores."""
    table = write_clips(tmp_path_factory.mktemp("clips"), num_frames=18)
    first, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{first},aes", *(f"{row},5.25" for row in rows)]) + "\n")
    return table


@pytest.mark.parametrize(("told_fps", "rate"), [("file", 12.0), ("taken", 4.0)])
def test_rates_and_captions_are_those_of_training(told_fps, rate, table) -> None:
    data = ManifestClips(BUCKETS, table, frame_interval=3, told_fps=told_fps, scores=True, num_workers=0)
    clips = HeldOutLosses(table, BUCKETS).clips(3, clips_trained_on(data))
    trained = ClipSource(data).batch(BatchKey(0, 0))
    (held_out, *_) = (portion.load() for portion in manifest_portions(make_pipeline(), clips, 2))
    assert trained.conditions.fps.tolist() == held_out.conditions.fps.tolist() == [rate] * 2
    assert all("aesthetic score: 5.2" in caption for caption in (*trained.captions, *held_out.captions))


def test_a_model_that_was_told_the_rate_of_files_is_told_it_again(table) -> None:
    """Its clips play slower than it is told; without a table that it trains on, that is known of the model alone."""
    assert HeldOutLosses(table, BUCKETS).clips(3, None) == clips_of_model(3, table, BUCKETS, frame_interval=1)
    rates = [
        ClipSource(clips_of_model(interval, table, BUCKETS)).batch(BatchKey(0, 0)).conditions.fps.tolist()
        for interval in (1, 3)
    ]
    assert rates == [[12.0] * 2] * 2


def test_toy_clips_are_told_alike_in_training_in_losses_and_in_sampling(tmp_path) -> None:
    clips, pipeline = ToyboxClips(num_frames=5, height=16, width=24), make_pipeline(frame_interval=3, fps=24.0)
    context = DataContext(pipeline.autoencoder, frame_interval=3, cache=tmp_path)
    trained = ToyboxLatents(clips, num_clips=2, batch_size=2).open(context).batch(BatchKey(0, 0))
    held_out = toybox_portions(pipeline, clips, 2)[0].load()
    assert trained.conditions.fps.tolist() == held_out.conditions.fps.tolist() == [pipeline.config.fps] * 2
