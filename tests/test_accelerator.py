"""What runs on the CPU runs on an accelerator, to the same result within the rounding of its arithmetic."""

import copy
import shutil

import pytest
import torch
from tiny_pipeline import make_autoencoder, make_pipeline, make_transformer, seeded
from tiny_tasks import diffusion_config

import opensora
from opensora.models.clip_conditions import ClipConditions
from opensora.training.config import LoopConfig, Recipe
from opensora.training.trainer import Trainer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPT = "a small red ball rolls left"


def assert_near(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Mean error within a share of the mean size."""
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    assert found.shape == expected.shape and torch.isfinite(found).all()
    assert (found - expected).abs().mean() < relative * expected.abs().mean()


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_a_pipeline_makes_the_same_clip(kind):
    pipeline = make_pipeline(kind)
    expected = pipeline(PROMPT, generator=seeded(0), output_type="pt").frames
    latents = pipeline(PROMPT, generator=seeded(0), output_type="latent").frames
    pipeline = pipeline.to(DEVICE)
    # Noise comes from the CPU generator, so a seed means the same clip on both.
    found = pipeline(PROMPT, generator=seeded(0), output_type="latent").frames
    assert found.device.type == DEVICE and found.dtype == torch.float32
    assert_near(found, latents, 1e-2)
    frames = pipeline(PROMPT, generator=seeded(0), output_type="pt").frames
    assert frames.device.type == "cpu"
    assert_near(frames, expected, 1e-2)


def test_a_saved_pipeline_is_loaded_in_bfloat16(tmp_path):
    made = make_pipeline("flow")
    made.save_pretrained(tmp_path)
    pipeline = opensora.load_pipeline(tmp_path, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == torch.bfloat16 and pipeline.device.type == DEVICE
    found = pipeline(PROMPT, generator=seeded(0), output_type="pt").frames
    assert_near(found, made(PROMPT, generator=seeded(0), output_type="pt").frames, 0.1)


def test_the_transformer_in_bfloat16_is_near_float32():
    model = make_transformer()
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "frame_mask": torch.tensor([[True, True], [False, True]]),
    }
    sizes = {"clip_conditions": ClipConditions(fps=8.0, height=32.0, width=48.0, num_frames=2.0)}
    with torch.no_grad():
        expected = model(**arguments, **sizes).sample
        moved = {name: value.to(DEVICE) for name, value in arguments.items()}
        found = copy.deepcopy(model).to(DEVICE)(**moved, **sizes).sample
        half = model.to(DEVICE, torch.bfloat16)(**moved, **sizes).sample
    assert_near(found, expected, 1e-3)
    assert_near(half, expected, 0.05)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-2), (torch.bfloat16, 0.1)])
def test_the_autoencoder_decodes_and_encodes(dtype, relative):
    autoencoder = make_autoencoder()
    torch.manual_seed(0)
    latents, video = torch.randn(2, 4, *autoencoder.latent_size((20, 16, 24))), torch.rand(2, 3, 20, 16, 24) * 2 - 1
    with torch.no_grad():
        decoded, encoded = autoencoder.decode_latents(latents, 20), autoencoder.encode_video(video)
        autoencoder.to(DEVICE, dtype)
        found = autoencoder.decode_latents(latents.to(DEVICE), 20)
        assert found.dtype == torch.float32 and found.device.type == DEVICE
        assert_near(found, decoded, relative)
        assert_near(autoencoder.encode_video(video.to(DEVICE)), encoded, relative)


@pytest.mark.parametrize("kind", ["flow", "iddpm"])
def test_training_starts_as_on_the_cpu_and_goes_on(kind, tmp_path):
    losses: dict[str, list[float]] = {}
    for device in ("cpu", DEVICE):
        loop = LoopConfig(steps=4, precision="fp32", log_every=1, checkpoint_every=2)
        figures = losses.setdefault(device, [])
        trainer = Trainer(
            Recipe("tiny", diffusion_config(kind, tmp_path), loop),
            tmp_path / f"run-{len(losses)}",
            device,
            on_step=lambda _step, _steps, now, figures=figures: figures.append(now["loss"]),
        )
        trainer.run()
    on_cpu, on_device = (torch.tensor(values) for values in list(losses.values())[:2])
    torch.testing.assert_close(on_device, on_cpu, rtol=0.02, atol=0)


def test_training_in_mixed_precision_resumes(tmp_path):
    config = diffusion_config("flow", tmp_path)
    recipe = Recipe("tiny", config, LoopConfig(steps=3, precision="bf16", checkpoint_every=2))
    Trainer(recipe, tmp_path / "run", DEVICE).run()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    resumed = Trainer(recipe, tmp_path / "run", DEVICE)
    assert resumed.step == 2
    resumed.run()
    assert all(torch.isfinite(weight).all() for weight in resumed.module.state_dict().values())
