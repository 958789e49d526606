"""What is trained: batches that depend on their draw alone, losses that reach every weight, exact resume."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_autoencoder
from tiny_tasks import CLIPS, FAMILY, diffusion_config, family_config, vae_config, write_clips
from torch import Tensor

import opensora
from opensora.data import toybox
from opensora.data.degradation import Degradation
from opensora.data.toybox import CaptionedLatents, OtherLength, ToyboxLatents
from opensora.distributed.seeding import BatchKey
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.recipes.toybox_judge import JudgeTaskConfig
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.text import TrainedText
from opensora.training.task import TrainingSetup, TrainingTask
from opensora.training.trainer import Trainer
from opensora.weights import fingerprint

KINDS = ["flow", "iddpm", "flow with frames", "iddpm with frames", "frames", "latents", "pixels", "judge"]
KINDS += [*FAMILY, "1.3 made worse"]


def make_config(kind: str, folder: Path) -> Any:
    if kind in FAMILY:
        return family_config(kind, write_clips(folder / "clips"), frame_masks={"head": 0.5})
    if kind == "1.3 made worse":
        noisy = {"none": 1.0, "v2v_head_noisy": 1.0, "other_noisy": 1.0}
        clips = write_clips(folder / "clips")
        return family_config("1.3", clips, known_frames=noisy, degradation=Degradation(spatial=0.5, noise=0.5))
    if kind in ("flow", "iddpm"):
        return diffusion_config(kind, folder)
    if kind.endswith(" with frames"):
        lengths = (OtherLength(1, 0.2), OtherLength(8, 0.4))
        data = ToyboxLatents(CLIPS, 6, other_lengths=lengths, num_clips_of_other_lengths=4, batch_size=3)
        return diffusion_config(kind.split()[0], folder, data=data, frame_masks={"head": 0.9})
    if kind == "judge":
        return JudgeTaskConfig(batch_size=2, dim=8)
    return vae_config(kind)


@pytest.fixture(params=KINDS)
def setup(request, tmp_path) -> TrainingSetup:
    return opened(make_config(request.param, tmp_path), tmp_path)


@pytest.fixture
def task(setup) -> TrainingTask:
    return setup.task


def opened(config: Any, folder: Path) -> TrainingSetup:
    setup = config.build("cpu")
    setup.data.open(folder / "cache")
    return setup


def tensors(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        return [tensor for part in batch.values() for tensor in tensors(part)]
    if dataclasses.is_dataclass(batch):
        return [tensor for field in dataclasses.fields(batch) for tensor in tensors(getattr(batch, field.name))]
    return [tensor for part in batch for tensor in tensors(part)] if isinstance(batch, list | tuple) else []


def same(a: Any, b: Any) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_a_batch_depends_on_its_draw_alone(task):
    first = task.prepare(BatchKey(0, 5))
    assert tensors(first)
    task.prepare(BatchKey(0, 6))
    torch.rand(3)
    assert same(first, task.prepare(BatchKey(0, 5)))
    for other in (BatchKey(1, 5), BatchKey(0, 6)):
        assert not same(first, task.prepare(other))


def test_the_loss_is_one_finite_number_a_sample_and_repeats(task):
    key = BatchKey(0, 0)
    batch = task.prepare(key)
    first, second = task.loss(batch, key), task.loss(batch, key)
    size = len(tensors(batch)[0])
    for name, term in first.items():
        assert term.shape == (size,) and torch.isfinite(term).all(), name
        assert torch.equal(term, second[name]), name


def test_every_trainable_weight_is_reached(task):
    """Zero-initialised gates hide some gradients at first, so the weights are moved a little."""
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in task.module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for step in range(3):  # whether a caption is dropped, and with it the null text's gradient, is a matter of luck
        key = BatchKey(0, step)
        terms = task.loss(task.prepare(key), key)
        torch.stack([term.mean() for name, term in terms.items() if not name.startswith("_")]).sum().backward()
    for name, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_names_of_no_matrices_are_names_of_weights(setup):
    assert setup.not_matrices <= {name for name, _ in setup.task.module.named_parameters()}


def run(config: Any, folder: Path, steps: int, stop_after: int | None = None) -> Trainer:
    loop = LoopConfig(steps=steps, precision="fp32", log_every=1, checkpoint_every=2, microbatches=2)
    trainer = Trainer(Recipe("tiny", config, loop), folder)
    if stop_after is not None:

        def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
            trainer.stop_requested = step == stop_after

        trainer.on_step = on_step
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        trainer.run()
    return trainer


@pytest.mark.parametrize("kind", ["flow", "iddpm", "frames", "pixels", "1.1", "1.2", "1.3", "2.0", "2.0-dc"])
def test_two_and_two_steps_are_four_bit_for_bit(kind, tmp_path):
    config = make_config(kind, tmp_path)
    whole = run(config, tmp_path / "whole", 4)
    run(config, tmp_path / "halves", 4, stop_after=2)
    halves = run(config, tmp_path / "halves", 4)
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, halves.module.state_dict()[name]), name
    for name, average in whole.ema.average.items():
        assert torch.equal(average, halves.ema.average[name]), name


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_a_trained_model_is_a_pipeline(kind, tmp_path):
    run(diffusion_config(kind, tmp_path, export_dtype="bfloat16"), tmp_path / "run", 1)
    pipeline = opensora.load_pipeline(tmp_path / "run" / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "run" / "model").rglob("*") if path.is_file()}
    assert len(modes) == 1, "weights can be read by whoever can read the rest"
    assert pipeline.config.trained_on["autoencoder"] == fingerprint(pipeline.autoencoder.state_dict())
    assert pipeline.config.trained_on["latent_space"] == pipeline.autoencoder.latent_space.to_dict()
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red ball", generator=torch.Generator().manual_seed(0), output_type="pt").frames
    assert frames.shape == (1, 5, 3, 16, 24) and torch.isfinite(frames).all()


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_training_goes_on_from_a_trained_model(kind, tmp_path):
    first = run(diffusion_config(kind, tmp_path), tmp_path / "first", 1)
    changes = {"init_from": str(tmp_path / "first" / "model"), "transformer": None, "text": TrainedText()}
    second = diffusion_config("flow", tmp_path, **changes).build("cpu")
    for name, average in first.ema.average.items():
        assert torch.equal(second.task.module.state_dict()[name], average), name


@pytest.mark.parametrize("part", ["autoencoder", "transformer", "text_encoder"])
def test_training_does_not_go_on_from_damaged_weights(part, tmp_path):
    task = diffusion_config("flow", tmp_path).build("cpu").task
    task.export(task.module, tmp_path / "model")
    start = {"init_from": str(tmp_path / "model"), "transformer": None, "text": TrainedText()}
    start |= {"autoencoder": str(tmp_path / "model")}
    path = next((tmp_path / "model" / part).glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("norm.weight") or "conv_in" in name or "t_block" in name)
    save_file({key: weight for key, weight in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(OpenSoraError, match="missing tensors"):
        diffusion_config("flow", tmp_path, **start).build("cpu")
    save_file(weights | {name: weights[name] * torch.nan}, path, {"format": "pt"})
    with pytest.raises(OpenSoraError, match="NaN or infinite"):
        diffusion_config("flow", tmp_path, **start).build("cpu")
    if part == "autoencoder":
        with pytest.raises(OpenSoraError, match="NaN or infinite"):
            vae_config("pixels", autoencoder=None, init_from=str(path.parent)).build("cpu")


def test_stages_of_the_autoencoder_follow_each_other(tmp_path):
    start: dict[str, Any] = {}
    for stage in ("frames", "latents", "pixels"):
        run(vae_config(stage, **start), tmp_path / stage, 1)
        start = {"autoencoder": None, "init_from": str(tmp_path / stage / "model")}
    space = VideoAutoencoder.from_pretrained(tmp_path / "pixels" / "model").latent_space
    assert space.scaling_factor != 1 and space.shift and space.scale


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: diffusion_config("flow", f, autoencoder="gone"), "no autoencoder in gone; train it first"),
        (lambda f: diffusion_config("flow", f, init_from="gone"), "no transformer in gone; train it first"),
        (lambda f: diffusion_config("flow", f, transformer=None), "objective.transformer .* or objective.init_from"),
        (lambda f: diffusion_config("flow", f, text=TrainedText()), "objective.text.options, or objective.init_from"),
        (lambda f: vae_config("latents", init_from=str(f / "gone")), "train the stage before"),
        (lambda f: vae_config("frames", autoencoder=None), "needs objective.init_from or objective.autoencoder"),
        (lambda f: vae_config("latents", autoencoder=NO_TIME), "has no temporal part to train"),
    ],
)
def test_what_is_missing_is_named(make, message, tmp_path):
    with pytest.raises(OpenSoraError, match=message):
        make(tmp_path).build("cpu")


NO_TIME = {"spatial": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}}


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_conditioning_frames_are_clean_and_not_learnt(kind, tmp_path):
    """What the network says of a given frame costs nothing, and it sees such a frame clean."""
    task = opened(diffusion_config(kind, tmp_path, frame_masks={"head": 1.0}), tmp_path).task
    key = BatchKey(0, 0)
    batch = task.prepare(key)
    given = ~batch.frame_mask
    assert given.any(dim=1).all() and batch.frame_mask.any(dim=1).all()
    seen: list[Tensor] = []

    def predicting(error: float):
        def predict(noisy: Tensor, timestep: Tensor, batch: Any) -> Tensor:
            seen.append(noisy)
            channels = 2 * noisy.shape[1]
            prediction = torch.ones(len(noisy), channels, *noisy.shape[2:])
            return prediction + error * given[:, None, :, None, None]

        return predict

    losses = []
    for error in (0.0, 100.0):
        task.predict = predicting(error)
        losses.append(task.loss(batch, key))
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name])
    apart = (seen[0] - batch.clips.latents).abs().amax(dim=(1, 3, 4))
    assert apart[given].max() < 0.1 < apart[batch.frame_mask].min()


def test_lengths_come_in_their_shares(tmp_path):
    lengths = (OtherLength(1, 0.3), OtherLength(14, 0.3))
    data = ToyboxLatents(CLIPS, 6, other_lengths=lengths, num_clips_of_other_lengths=2, batch_size=3)
    task = opened(diffusion_config("flow", tmp_path, data=data), tmp_path).task
    batches = [task.prepare(BatchKey(0, step)) for step in range(60)]
    lengths = [batch.clips.latents.shape[2] for batch in batches]
    # An image, 5 and 14 frames, four to a latent frame.
    assert set(lengths) == {1, 2, 4} and 8 < lengths.count(1) < 30
    for batch in batches:
        rate = 120.0 if batch.clips.latents.shape[2] == 1 else float(CLIPS.fps)
        assert batch.clips.conditions.fps.tolist() == [rate] * 3
    with pytest.raises(OpenSoraError, match=r"1\.2"):
        ToyboxLatents(other_lengths=(OtherLength(1, 1.2),))


# --- encoded once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """How many clips each encoding took; [] while the cache serves."""
    counted: list[int] = []
    encode = toybox.encode_specs

    def counting(specs, *args):
        counted.append(len(specs))
        return encode(specs, *args)

    monkeypatch.setattr(toybox, "encode_specs", counting)
    return counted


def test_encoded_clips_are_reused(tmp_path, encodings):
    autoencoder = make_autoencoder()
    first = CaptionedLatents.load_or_encode(tmp_path, CLIPS, autoencoder, 4)
    again = CaptionedLatents.load_or_encode(tmp_path, CLIPS, autoencoder, 4)
    assert encodings == [4]
    assert torch.equal(first.latents, again.latents) and torch.equal(first.object_mask, again.object_mask)
    assert first.specs == again.specs


@pytest.mark.parametrize("change", ["autoencoder", "clips", "number"])
def test_encoded_clips_of_something_else_are_made_again(change, tmp_path, encodings):
    autoencoder, clips, number = make_autoencoder(), CLIPS, 4
    before = CaptionedLatents.load_or_encode(tmp_path, clips, autoencoder, number)
    if change == "autoencoder":
        with torch.no_grad():
            next(autoencoder.spatial_vae.parameters()).mul_(1.01)
    elif change == "clips":
        clips = dataclasses.replace(clips, width=16)
    else:
        number = 5
    after = CaptionedLatents.load_or_encode(tmp_path, clips, autoencoder, number)
    assert encodings == [4, number]
    assert before.latents.shape != after.latents.shape or not torch.equal(before.latents, after.latents)


def test_a_draw_of_encoded_clips_is_worded_anew(tmp_path):
    latents = CaptionedLatents.load_or_encode(tmp_path, CLIPS, make_autoencoder(), 3)
    drawn = [latents.sample(8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    captions = [words for _, _, words in drawn]
    assert captions[0] == captions[1] and captions[0] != captions[2]
    encoded, object_mask, _ = drawn[0]
    assert encoded.dtype == torch.float32
    assert set(object_mask.unique().tolist()) <= {0.0, 1.0}
    assert object_mask.shape == (8, 1, *encoded.shape[2:])
