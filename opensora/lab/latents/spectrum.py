"""Power of latents by frequency: over space in rings around zero, over time frame by frame.

Noise in which every value is drawn by itself has power 1 per unit of variance at every frequency (white). Pictures have
more of it the slower they change, about as f^-2; a diffusion model then finds coarse structure under noise that hides
fine structure already, and latents that are whiter than pictures have their content in details.

Space is windowed (Hann), because a latent does not go on at its edges where it began; time is not, for it has few
frames.

Letters: B clips, C channels, N latent frames, h, w latent cells, f frequency in cycles per latent cell or frame.
"""

from typing import Any

import torch
from torch import Tensor

LEAST_CELLS = 4
"""Of the shorter side, and of frames, for a spectrum to say anything."""


class PowerSpectrum:
    """Gathers the power of clips of one size.

    Args:
        size: (N, h, w) of the latents.
        channels: C.
    """

    def __init__(self, size: tuple[int, int, int], channels: int) -> None:
        frames, height, width = size
        self.frames, self.side = frames, min(height, width)
        self._clips = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._time = torch.zeros(channels, frames // 2 + 1, dtype=torch.float64)
        self._space = torch.zeros(channels, self.side // 2, dtype=torch.float64)
        window = torch.hann_window(height + 2, periodic=False, dtype=torch.float64)[1:-1, None]
        self._window = window * torch.hann_window(width + 2, periodic=False, dtype=torch.float64)[1:-1]
        rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
        ring = (self.side * (rows.square() + columns.square()).sqrt()).round().long()
        self._rings = torch.stack([(ring == number).double() for number in range(1, self.side // 2 + 1)])

    def add(self, latents: Tensor) -> None:
        """Takes in clips (B, C, N, h, w)."""
        values = latents.detach().cpu().double()
        self._clips += len(values)
        self._mean += values.mean(dim=(2, 3, 4)).sum(dim=0)
        if self.has_time:
            power = torch.fft.rfft(values, dim=2, norm="ortho").abs().square()
            self._time += power.mean(dim=(3, 4)).sum(dim=0)
        if self.has_space:
            window = self._window
            centred = values - (values * window).sum(dim=(3, 4), keepdim=True) / window.sum()
            power = torch.fft.fft2(centred * window).abs().square().mean(dim=2).sum(dim=0) / window.square().sum()
            self._space += torch.einsum("chw,rhw->cr", power, self._rings) / self._rings.sum(dim=(1, 2))

    @property
    def has_space(self) -> bool:
        """Whether latents are large enough for a spectrum over space."""
        return self.side >= LEAST_CELLS

    @property
    def has_time(self) -> bool:
        """Whether latents are long enough for a spectrum over time."""
        return self.frames >= LEAST_CELLS

    def space(self) -> tuple[Tensor, Tensor]:
        """Frequencies (F,) from the slowest to 1/2, and power (C, F); both empty where `has_space` is false."""
        if not self.has_space:
            return torch.empty(0), torch.empty(len(self._mean), 0)
        frequencies = torch.arange(1, self.side // 2 + 1, dtype=torch.float64) / self.side
        return frequencies, self._space / self._clips

    def time(self) -> tuple[Tensor, Tensor]:
        """Frequencies (F,) from 0 to 1/2, and power (C, F), the channels' means left out; empty likewise."""
        if not self.has_time:
            return torch.empty(0), torch.empty(len(self._mean), 0)
        power = self._time / self._clips
        power[:, 0] -= self.frames * (self._mean / self._clips).square()
        return torch.fft.rfftfreq(self.frames, dtype=torch.float64), power

    def slope(self) -> float | None:
        """p of power ~ f^p over space, mean of the channels: 0 for white noise, about -2 for pictures.

        None where there are too few frequencies, or no power, to draw a line through.
        """
        frequencies, power = self.space()
        mean = power.mean(dim=0)
        if len(frequencies) < 3 or not bool((mean > 0).all()):
            return None
        x, y = frequencies.log(), mean.log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())

    def still(self) -> float | None:
        """Share of the variance that does not change over time; None where there is no spectrum over time."""
        power = self.time()[1].sum(dim=0)
        if not self.has_time or not float(power.sum()):
            return None
        twice = torch.full_like(power, 2.0)  # a frequency and its negative
        twice[0] = 1.0
        if self.frames % 2 == 0:
            twice[-1] = 1.0
        return float(power[0] / (power * twice).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told: dict[str, Any] = {}
        for name, (frequencies, power) in (("space", self.space()), ("time", self.time())):
            told[name] = {"frequencies": frequencies.tolist(), "power": power.tolist()}
        return {**told, "slope": self.slope(), "still": self.still()}
