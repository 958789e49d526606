"""An audit as tables of words, for people."""

from collections.abc import Iterator
from dataclasses import dataclass

from opensora.lab.latents.audit import Alternative, Audit
from opensora.lab.latents.signal_to_noise import ScheduleShift
from opensora.lab.latents.verdict import Place, log_snr_offset
from opensora.models.autoencoders.latent_space import LatentSpace

_MOST_CHANNELS = 16
_PLACES: dict[Place, str] = {
    "one part": "latents",
    "between parts": "frame latents, between the 2D part and the temporal part",
    "after parts": "latents, after the temporal part",
}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it.
        head: of the columns.
        rows: as many cells each.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(audit: Audit) -> Iterator[Table]:
    """All figures that people read; a report has more."""
    yield _channels(audit)
    for place, title in _PLACES.items():
        rows = tuple(_alternative(one) for one in audit.alternatives if one.place == place)
        if rows:
            head = ("declaration", "factor", "deviation", "of channels", "means to", "log-SNR off by")
            yield Table(f"{title}, under other declarations", head, rows)
    if audit.trials:
        rows = tuple(
            (
                one.name,
                f"{one.factor:.4g}",
                f"{one.deviation_in:.3g}",
                f"{one.deviation_out:.3g}",
                f"{one.decibels:.2f}",
            )
            for one in audit.trials
        )
        head = ("factor before the temporal part", "factor", "deviation in", "out", "there and back, dB")
        yield Table("what the temporal part makes of other factors", head, rows)
    rows = tuple(_schedule(shift) for shift in audit.schedules)
    head = ("schedule", "median log-SNR", "with these latents", "the same as")
    yield Table("what these latents are to training", head, rows)


def lines_of(audit: Audit) -> Iterator[str]:
    """What the figures come to: verdicts, notes and advice."""
    figures, spectrum = audit.measured.normalised, audit.measured.spectrum
    told = [f"{figures.effective_channels:.1f} of {len(figures.mean)} channels carry what there is"]
    if (slope := spectrum.slope()) is not None:
        told.append(f"power over space falls as f^{slope:.1f} (white noise 0, pictures about -2)")
    if (still := spectrum.still()) is not None:
        told.append(f"{100 * still:.0f} % of the variance stands still")
    yield "; ".join(told)
    for verdict in audit.verdicts:
        yield f"{_PLACES[verdict.place]}: {verdict.kind}: {verdict.text}"
    yield from (f"note: {note}" for note in audit.notes)
    yield f"with these weights: {audit.advice.keep}"
    if audit.advice.lines:
        yield "in a training from scratch:"
        yield from (f"  {what}: {line}" for what, line in audit.advice.lines.items())


def describe_factor(space: LatentSpace) -> str:
    """A factor in its convention."""
    return f"{'' if space.convention == 'multiply' else '1/'}{space.scaling_factor:.4g}"


def _channels(audit: Audit) -> Table:
    measured = audit.measured
    own, found = measured.own, measured.normalised
    rows: list[tuple[str, ...]] = [
        (
            str(channel),
            f"{own.mean[channel]:.3f}",
            f"{own.std[channel]:.3f}",
            f"{found.mean[channel]:.3f}",
            f"{found.std[channel]:.3f}",
            f"{found.kurtosis[channel]:.1f}",
            f"{found.eigenvalues[channel]:.3f}",
        )
        for channel in range(min(len(own.mean), _MOST_CHANNELS))
    ]
    if more := len(own.mean) - len(rows):
        rows.append((f"and {more} more", *("",) * 6))
    head = ("channel", "mean", "deviation", "mean as declared", "deviation as declared", "kurtosis", "eigenvalue")
    return Table(f"{audit.name}: {audit.clips}", head, tuple(rows))


def _alternative(one: Alternative) -> tuple[str, ...]:
    figures, factor = one.figures, describe_factor(one.space)
    deviation = figures.deviation
    return (
        one.name,
        "-" if one.place == "after parts" else factor,
        f"{deviation:.3g}",
        f"{float(figures.std.min()):.2f} to {float(figures.std.max()):.2f}",
        f"{float(figures.mean.abs().max()):.2f}",
        f"{round(log_snr_offset(deviation), 2) + 0.0:+.2f}" if deviation else "-",
    )


def _schedule(shift: ScheduleShift) -> tuple[str, ...]:
    if shift.steps is None:
        same = f"a further time shift by {shift.time_shift:.3g}"
    else:
        moved = (f"{step} {'beyond' if by is None else f'{by:+.0f}'}" for step, by in shift.steps.items())
        same = f"steps {', '.join(moved)}"
    return shift.schedule, f"{shift.expected:.2f}", f"{shift.found:.2f}", same
