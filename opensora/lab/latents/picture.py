"""An audit as one picture: how latents are distributed, how even channels are, and where their power lies."""

from pathlib import Path
from typing import Any

import torch

from opensora.errors import OpenSoraError
from opensora.files import replacing
from opensora.lab.latents.audit import Audit

_GREY, _BLUE, _ORANGE = "0.6", "tab:blue", "tab:orange"


def import_matplotlib() -> Any:
    """matplotlib's figures, which need no screen.

    Raises:
        OpenSoraError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OpenSoraError('a plot needs matplotlib: pip install "opensora[eval]", or leave `plot` out') from None
    return Figure


def draw(audit: Audit, path: Path) -> None:
    """Writes a PNG file, whole or not at all.

    Raises:
        OpenSoraError: matplotlib is not installed, or the file cannot be written.
    """
    figure = import_matplotlib()(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _distribution(axes[0, 0], audit)
    _channels(axes[0, 1], audit)
    _axes(axes[1, 0], audit)
    _spectrum(axes[1, 1], audit)
    kinds = ", ".join(dict.fromkeys(verdict.kind for verdict in audit.verdicts))
    figure.suptitle(f"{audit.name}: {kinds}\n{audit.clips}", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _distribution(axis: Any, audit: Audit) -> None:
    histogram = audit.measured.histogram
    centres, width = histogram.centres(), 2 * histogram.reach / histogram.counts.shape[1]
    density = histogram.counts / histogram.counts.sum(dim=1, keepdim=True) / width
    for channel in density[:32]:
        axis.semilogy(centres, channel.clamp_min(1e-6), color=_GREY, linewidth=0.6)
    axis.semilogy(centres, density.mean(dim=0).clamp_min(1e-6), color=_BLUE, label="latents as declared")
    normal = torch.exp(-centres.square() / 2) / (2 * torch.pi) ** 0.5
    axis.semilogy(centres, normal, color=_ORANGE, linestyle="--", label="standard normal")
    axis.set(title="distribution (thin: channels)", xlabel="value", ylabel="density", ylim=(1e-5, 3))
    reach = float(centres[histogram.counts.sum(dim=0) > 0].abs().max())
    axis.set_xlim(-max(reach, 4.0), max(reach, 4.0))
    axis.legend(fontsize=7)


def _channels(axis: Any, audit: Audit) -> None:
    found = audit.measured.normalised
    axis.errorbar(
        range(len(found.mean)),
        found.mean.numpy(),
        yerr=found.std.numpy(),
        fmt="o",
        markersize=4,
        capsize=3,
        color=_BLUE,
    )
    for level in (-1, 0, 1):
        axis.axhline(level, color=_ORANGE, linestyle="--", linewidth=0.8)
    axis.set(title="mean and deviation as declared (wanted: 0 and 1)", xlabel="channel")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _axes(axis: Any, audit: Audit) -> None:
    found = audit.measured.normalised
    values = found.eigenvalues
    axis.bar(range(1, len(values) + 1), values.numpy(), color=_BLUE)
    axis.axhline(float(values.mean()), color=_ORANGE, linestyle="--", linewidth=0.8)
    axis.set(title=f"variance along principal axes ({found.effective_channels:.1f} effective)", xlabel="axis")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _spectrum(axis: Any, audit: Audit) -> None:
    spectrum = audit.measured.spectrum
    for name, (frequencies, power), colour in (
        ("over space", spectrum.space(), _BLUE),
        ("over time", spectrum.time(), _ORANGE),
    ):
        moving = frequencies > 0
        if moving.any():
            mean = power.mean(dim=0)[moving].clamp_min(1e-12)
            axis.loglog(frequencies[moving], mean, marker=".", color=colour, label=name)
    axis.set(title="power by frequency (white noise: flat)", xlabel="cycles per latent cell or frame")
    if axis.lines:
        axis.legend(fontsize=7)
