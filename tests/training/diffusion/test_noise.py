"""Noise processes in the words of a recipe."""

import torch
from tiny_pipeline import make_autoencoder

from opensora.training.diffusion.noise import Flow


def test_a_fixed_shift_makes_up_for_latents_of_another_scale() -> None:
    """Latents three times as large, their times shifted by three: the signal-to-noise ratio of each draw stays."""

    def signal_to_noise(flow: Flow, deviation: float, size: float) -> torch.Tensor:
        _, process = flow.build(make_autoencoder())
        generator = torch.Generator().manual_seed(0)
        t = process.draw_times(100, height=size, width=size, num_frames=5, generator=generator) / 1000
        return (1 - t) * deviation / t

    for size in (32.0, 512.0):
        shifted = signal_to_noise(Flow(time_shift=True, shift_ratio=3.0), 3.0, size)
        torch.testing.assert_close(shifted, signal_to_noise(Flow(), 1.0, size), rtol=1e-4, atol=0)


def test_sampling_has_the_fixed_shift_of_training() -> None:
    scheduler, _ = Flow(time_shift=True, shift_ratio=3.0).build(make_autoencoder())
    scheduler.set_timesteps(4, height=64, width=64, num_frames=5)
    # t' = r t / (1 + (r - 1) t) of 1, 3/4, 1/2, 1/4
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 900.0, 750.0, 500.0]))
