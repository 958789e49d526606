"""How sure a mean is: bootstrap intervals (Efron and Tibshirani 1993, chapter 13), paired where the noise is shared.

Clips of one prompt resemble each other, so what is drawn again is whole groups (prompts), not clips; where there is one
group alone, its clips are. The draws depend on nothing but the number of groups, so the same rows have the same
interval on every machine, and two settings that are compared on the same prompts are drawn alike.

Letters: N clips, G groups, R draws.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2_000
_SEED = 20_240_613


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds that its true value lies between, in 95 of 100 experiments.

    Attributes:
        value: the figure, such as a mean; NaN without clips.
        low, high: bounds; NaN where there are too few clips for them, equal to the value for a mean of one clip.
        num_clips: that it was taken over.
    """

    value: float
    low: float
    high: float
    num_clips: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is more than chance."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None, draws: int = DRAWS) -> Interval:
    """The mean of clips with its 95 % interval.

    Args:
        values: (N,); those that are NaN, where a clip had nothing to be measured on, do not count.
        groups: (N,) which clips belong together; None for each by itself.
        draws: R.
    """
    numbers = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(numbers)
    if not kept.any():
        return Interval(np.nan, np.nan, np.nan, 0)
    names = list(range(len(numbers))) if groups is None else list(groups)
    sums, counts = _sums_of_groups(numbers[kept], [name for name, keep in zip(names, kept, strict=True) if keep])
    value = float(sums.sum() / counts.sum())
    drawn = np.random.default_rng(_SEED).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Rounding must not push an interval of equal numbers off its own mean.
    return Interval(value, min(float(low), value), max(float(high), value), int(kept.sum()))


def difference_interval(
    values: Sequence[float], others: Sequence[float], groups: Sequence[Hashable] | None = None, draws: int = DRAWS
) -> Interval:
    """How much more `values` are than `others`, clip by clip: both of the same prompt and the same noise.

    Args:
        values: (N,) of one setting.
        others: (N,) of the other one, in the same order. Pairs of which one is NaN do not count.
        groups: as in `mean_interval`.
        draws: R.
    """
    pairs = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    return mean_interval(pairs.tolist(), groups, draws)


def unpaired_difference_interval(values: Sequence[float], others: Sequence[float], draws: int = DRAWS) -> Interval:
    """How much more the mean of `values` is than that of `others`, which are other clips."""
    rng = np.random.default_rng(_SEED)
    numbers = [np.asarray(some, dtype=np.float64) for some in (values, others)]
    numbers = [some[np.isfinite(some)] for some in numbers]
    if not all(len(some) for some in numbers):
        return Interval(np.nan, np.nan, np.nan, 0)
    means = [some[rng.integers(len(some), size=(draws, len(some)))].mean(axis=1) for some in numbers]
    low, high = np.quantile(means[0] - means[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(numbers[0].mean() - numbers[1].mean())
    return Interval(value, min(float(low), value), max(float(high), value), sum(map(len, numbers)))


def _sums_of_groups(values: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(G,) sum and number of clips of each group; of each clip where they are all of one group."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(numbers) == 1:
        return values, np.ones_like(values)
    which = np.array([numbers[name] for name in groups])
    return np.bincount(which, values), np.bincount(which).astype(np.float64)
