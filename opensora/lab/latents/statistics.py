"""Figures of latents, channel by channel, gathered clip by clip in memory that does not grow with the clips.

Sums are taken about the mean of the first clip, in float64, so that nothing is lost where a mean is far from zero.

Letters: B clips, C channels, N latent frames, h, w latent cells, K bins, z a latent value, v a channel's share of all
variance.
Paper: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class ChannelFigures:
    """What is known of the latents of some clips.

    Attributes:
        num_clips: how many clips.
        mean, std: per channel, (C,) float64.
        kurtosis: per channel, E((z - mean)^4) / std^4, 3 for a Gaussian; NaN for a channel that never changes.
        covariance: (C, C) float64.
        log_error: standard error of the logarithm of `deviation`, from how much clips differ; infinite for one clip.
        mean_errors, log_errors: likewise, (C,), of `mean` and of the logarithm of `std`.
    """

    num_clips: int
    mean: Tensor
    std: Tensor
    kurtosis: Tensor
    covariance: Tensor
    log_error: float
    mean_errors: Tensor
    log_errors: Tensor

    @property
    def deviation(self) -> float:
        """Of all values of all channels about the mean of them all: what a scaling factor is the inverse of."""
        between = self.mean.var(correction=0)
        return math.sqrt(float(self.std.square().mean() + between))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the deviation of all such clips lies, with a certainty of 95 %."""
        half = 1.96 * self.log_error
        return self.deviation * math.exp(-half), self.deviation * math.exp(half) if math.isfinite(half) else math.inf

    @property
    def eigenvalues(self) -> Tensor:
        """Variances along the principal axes of the channels, (C,), the largest first."""
        return torch.linalg.eigvalsh(self.covariance).clamp_min(0).flip(0)

    @property
    def effective_channels(self) -> float:
        """exp(entropy of v): C where all axes carry the same variance, 1 where one carries it all; 0 without any."""
        values = self.eigenvalues
        if not float(values.sum()):
            return 0.0
        shares = values[values > 0] / values.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))

    def transformed(self, factor: Tensor, offset: Tensor) -> "ChannelFigures":
        """The figures of factor * z + offset, both (C,); errors of logarithms stay those of these latents."""
        return ChannelFigures(
            self.num_clips,
            self.mean * factor + offset,
            self.std * factor.abs(),
            self.kurtosis,
            self.covariance * factor[:, None] * factor[None],
            self.log_error,
            self.mean_errors * factor.abs(),
            self.log_errors,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "num_clips": self.num_clips,
            "deviation": self.deviation,
            "interval": _plain(self.interval),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "kurtosis": _plain(self.kurtosis.tolist()),
            "eigenvalues": self.eigenvalues.tolist(),
            "effective_channels": self.effective_channels,
        }


class ChannelStatistics:
    """Gathers `ChannelFigures`.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._pivot = torch.zeros(channels, dtype=torch.float64)
        self._count = 0
        self._sums = [torch.zeros(channels, dtype=torch.float64) for _ in range(4)]  # of the first to fourth powers
        self._products = torch.zeros(channels, channels, dtype=torch.float64)
        self._clips: list[tuple[int, float, float]] = []  # values, their sum and sum of squares about one number
        # Over clips, of each clip's mean and of its mean square: sum and sum of squares.
        self._means, self._squares = torch.zeros(2, 2, channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Takes in clips (B, C, N, h, w).

        Raises:
            OpenSoraError: values that are no numbers.
        """
        for clip in latents.detach().cpu().double():
            values = clip.flatten(1)
            if not bool(torch.isfinite(values).all()):
                raise OpenSoraError("latents hold NaN or infinite values; the autoencoder or a clip is damaged")
            if not self._count:
                self._pivot = values.mean(dim=1)
            self._count += values.shape[1]
            whole = values - self._pivot.mean()
            self._clips.append((values.numel(), float(whole.sum()), float(whole.square().sum())))
            values = values - self._pivot[:, None]
            for kept, found in ((self._means, values.mean(dim=1)), (self._squares, values.square().mean(dim=1))):
                kept += torch.stack([found, found.square()])
            for power, total in enumerate(self._sums, start=1):
                total += values.pow(power).sum(dim=1)
            self._products += values @ values.T

    def figures(self) -> ChannelFigures:
        """All that was taken in.

        Raises:
            OpenSoraError: nothing was.
        """
        if not self._count:
            raise OpenSoraError("no latents were measured; give at least one clip")
        first, second, third, fourth = (total / self._count for total in self._sums)
        covariance = self._products / self._count - first[:, None] * first[None]
        variance = covariance.diagonal().clamp_min(0)
        central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
        kurtosis = torch.where(variance > 0, central / variance.square(), torch.nan)
        return ChannelFigures(
            len(self._clips),
            self._pivot + first,
            variance.sqrt(),
            kurtosis,
            covariance,
            self._log_error(),
            self._error_over_clips(self._means),
            self._error_over_clips(self._squares) / variance / 2,
        )

    def _error_over_clips(self, sums: Tensor) -> Tensor:
        """Standard error of the mean over clips, (C,), from sum and sum of squares."""
        num = len(self._clips)
        if num < 2:
            return torch.full((self.channels,), math.inf, dtype=torch.float64)
        variance = (sums[1] - sums[0].square() / num) / (num - 1)
        return (variance.clamp_min(0) / num).sqrt()

    def _log_error(self) -> float:
        """Half the relative standard error of the variance, which is a mean over clips."""
        if len(self._clips) < 2:
            return math.inf
        counts, sums, squares = torch.tensor(self._clips, dtype=torch.float64).T
        mean = sums.sum() / counts.sum()
        variances = squares / counts - 2 * mean * sums / counts + mean.square()
        if not float(variances.mean()):
            return math.inf
        return float(variances.std() / math.sqrt(len(self._clips)) / variances.mean() / 2)


class Histogram:
    """Counts values per channel in bins from -reach to reach; reach doubles, and bins are merged, when it must.

    Args:
        channels: C.
        bins: K, a multiple of 4.
    """

    def __init__(self, channels: int, bins: int = 128) -> None:
        self.reach = 0.0
        self.counts = torch.zeros(channels, bins, dtype=torch.int64)

    def add(self, latents: Tensor) -> None:
        """Takes in clips (B, C, N, h, w)."""
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)
        channels, bins = self.counts.shape
        largest = float(values.abs().max())
        if not self.reach:
            self.reach = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
        while largest > self.reach:
            merged = self.counts.unflatten(1, (bins // 2, 2)).sum(dim=2)
            self.counts = torch.nn.functional.pad(merged, (bins // 4, bins // 4))
            self.reach *= 2
        index = ((values / self.reach + 1) * (bins / 2)).long().clamp(0, bins - 1)
        index += bins * torch.arange(channels)[:, None]
        self.counts += torch.bincount(index.flatten(), minlength=channels * bins).reshape(channels, bins)

    def centres(self) -> Tensor:
        """Middle of each bin, (K,)."""
        bins = self.counts.shape[1]
        return (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * self.reach / bins) - self.reach

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"from": -self.reach, "to": self.reach, "counts": self.counts.tolist()}


def _plain(values: Any) -> list[float | None]:
    """JSON knows no NaN and no infinity."""
    return [value if math.isfinite(value) else None for value in values]
