"""How far two sets of clips are from each other, on their features, and how much that depends on which clips they are.

A distance says nothing of any one clip: the sets may hold other clips, in any order, and in other numbers. What it can
see is what the features tell apart, and nothing else. Features of one clip are one row; several clips cut from one
video are not independent, and make an interval narrower than it ought to be.

Letters: N, M clips of the two sets, D width of their features.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.intervals import Interval

Distance = Callable[[Tensor, Tensor], float]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians that fit two sets best: |mean|² + tr(S + S' - 2 (S S')^½).

    On Inception features of frames it is FID (Heusel et al., 2017), on I3D features of clips FVD (Unterthiner et al.,
    2018). With S = AᵀA and S' = BᵀB the trace of the root is the sum of the singular values of A Bᵀ. So no matrix is
    put to the root, and sets with fewer clips than features need no regularisation: nothing is added to S.

    Small sets give too large values, by about a constant / N; sets of fewer clips than D mostly measure that. So
    compare only figures of equally many clips, or use `kernel_distance`.

    Args:
        a, b: features (N, D) and (M, D), two clips or more each.

    Returns:
        0 or more, in the square of the features' unit.

    Raises:
        OpenSoraError: the features are no two sets of the same width, or not finite.
    """
    a, b = _checked(a, b)
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(shift + root_a.square().sum() + root_b.square().sum() - 2 * common))


def _covariance_root(features: Tensor) -> Tensor:
    """A of at most D rows such that AᵀA is the covariance of (N, D) features."""
    centred = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    return torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred


def kernel_distance(a: Tensor, b: Tensor, degree: int = 3, offset: float = 1.0) -> float:
    """Squared maximum mean discrepancy (Gretton et al., 2012), unbiased, with the kernel (x·y / D + offset) ** degree.

    Cubic with offset 1 it is the kernel inception distance (Binkowski et al., 2018), which compares the means of all
    products of up to three features. Quadratic with offset 0 it is the kernel of JEDi (Luo et al., 2024), which
    compares products of two alone, and so cannot tell features from their negatives.

    Unbiased: the mean over many small sets is the distance of what they were drawn from. Sets drawn from the same
    source therefore give values below zero about as often as above.

    Args:
        a, b: features (N, D) and (M, D), two clips or more each; about one in size, for the cube grows fast.
        degree: 1 or more.
        offset: 0 or more.

    Returns:
        The distance; may be negative.

    Raises:
        OpenSoraError: the features are no two sets of the same width, or not finite.
    """
    a, b = _checked(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + offset).pow(degree)

    def mean_of_pairs(x: Tensor) -> Tensor:
        products = kernel(x, x)
        return (products.sum() - products.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def estimate(distance: Distance, a: Tensor, b: Tensor, draws: int = 200, seed: int = 0) -> Interval:
    """A distance and how far other clips from the same sources would move it.

    The interval comes from random halves of each set, drawn without putting back. They vary about as much as whole
    sets do (Shao and Wu, 1989), and hold no clip twice, which both distances here would mistake for agreement. Halves
    vary around their own mean, so the bias of small sets is neither in the width nor taken off the value.

    Args:
        distance: such as `frechet_distance` and `kernel_distance`.
        a, b: features (N, D) and (M, D); the interval needs four clips or more of each.
        draws: number of halves.
        seed: of the halves.
    """
    value = distance(a, b)
    if min(len(a), len(b)) < 4:
        return Interval(value, math.nan, math.nan, len(a))
    generator = torch.Generator().manual_seed(seed)
    return _around(value, [distance(_half(a, generator), _half(b, generator)) for _ in range(draws)], len(a))


def diversity(features: Tensor, prompts: Sequence[Hashable], draws: int = 200, seed: int = 0) -> Interval:
    """How much clips of the same prompt differ: the mean distance of two of them, averaged over prompts.

    Args:
        features: (N, D).
        prompts: N prompts, or anything else that tells them apart; those of a single clip count for nothing.
        draws, seed: see `estimate`; here it is the prompts of which halves are taken, four or more.

    Returns:
        Euclidean distance, in the features' unit; 0 if every prompt gives the same clip again.

    Raises:
        OpenSoraError: no prompt has two clips, or prompts and features are not equally many.
    """
    if len(features) != len(prompts):
        raise OpenSoraError(f"diversity got {len(features)} clips and {len(prompts)} prompts; give one prompt a clip")
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    several = [members for members in rows.values() if len(members) > 1]
    if not several:
        raise OpenSoraError("diversity compares clips of the same prompt; make two or more clips of some prompt")
    distances = torch.stack([torch.pdist(features[members].double()).mean() for members in several])
    value = float(distances.mean())
    if len(distances) < 4:
        return Interval(value, math.nan, math.nan, len(features))
    generator = torch.Generator().manual_seed(seed)
    return _around(value, [float(_half(distances, generator).mean()) for _ in range(draws)], len(features))


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features in float64 on the CPU.

    Raises:
        OpenSoraError: they are not (N, D) and (M, D) with two clips or more each, or hold what is no number.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise OpenSoraError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give (N, D) and (M, D)"
        )
    if min(len(a), len(b)) < 2:
        raise OpenSoraError(f"sets of {len(a)} and {len(b)} clips cannot be compared; give two clips or more each")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise OpenSoraError("features hold NaN or infinite numbers; leave out the clips that they come from")
    return a.double().cpu(), b.double().cpu()


def _half(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A random half of the rows, none of them twice."""
    return rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 2].to(rows.device)]


def _around(value: float, halves: list[float], num_clips: int) -> Interval:
    """The interval of a value, from how halves spread around their mean."""
    spread = torch.tensor(halves, dtype=torch.float64)
    low, high = (spread - spread.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, value + low, value + high, num_clips)
