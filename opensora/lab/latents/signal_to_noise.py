"""What it does to training and sampling that latents are larger or smaller than their noise process expects.

Clean latents of deviation a, where 1 is expected, leave a ** 2 as much signal beside the noise at every time: the
logarithm of the signal-to-noise ratio (log-SNR) is off by 2 ln a, in all schedules alike.

For rectified flow that is a shift of time. At time t the ratio of data to noise is a (1 - t) / t, which is that of
right latents at t' with t' / (1 - t') = (t / (1 - t)) / a: the time shift by 1 / a (`diffusion.flow.time_shift`). Too
large latents are trained as if time were shifted towards data, and a model's own shift r acts as r / a.

For discrete-time diffusion it moves every step to the one of right latents with the same log-SNR; at the end of the
schedule there may be none, and the signal never drowns as it should.

Letters: a deviation of the latents, t time, r time shift, N steps.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from opensora.diffusion import flow, gaussian
from opensora.diffusion.process import GaussianProcess, NoiseProcess, RectifiedFlowProcess
from opensora.distributed.seeding import generator

_DRAWS = 20_001
_ASKED = (0.1, 0.5, 0.9)
"""Parts of a discrete schedule at which the offset is told."""


@dataclass(frozen=True)
class ClipSize:
    """What time shifts go by: frames, height and width in pixels, latent frames."""

    num_frames: int
    height: int
    width: int
    num_latents: int


@dataclass(frozen=True)
class ScheduleShift:
    """What latents of some deviation are to a schedule.

    Attributes:
        schedule: its name.
        log_snr: by how much all log-SNRs are off, 2 ln a.
        expected, found: median log-SNR of the times that are trained on, with latents of deviation 1 and with these.
        time_shift: the time shift that right latents would be trained with to the same effect; None for discrete time.
        steps: step -> how many steps later the same log-SNR is found with right latents (negative: earlier; None where
            the schedule has none); None for rectified flow.
    """

    schedule: str
    log_snr: float
    expected: float
    found: float
    time_shift: float | None = None
    steps: dict[int, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def training_schedules() -> dict[str, NoiseProcess]:
    """How models of the family are trained: name -> process."""
    area, after = flow.AreaShift(), flow.AreaShift(frames="after_first")
    return {
        "flow, uniform": RectifiedFlowProcess(times="uniform"),
        "flow, discrete": RectifiedFlowProcess(times="discrete"),
        "flow, logit-normal": RectifiedFlowProcess(times="logit-normal"),
        "flow, logit-normal, shift of 1.2": RectifiedFlowProcess(times="logit-normal", time_shift=area),
        "flow, logit-normal, shift of 1.3": RectifiedFlowProcess(times="logit-normal", time_shift=after),
        "flow, logit-normal, shift of 2.0": RectifiedFlowProcess(times="logit-normal", time_shift=flow.TokenShift()),
        "IDDPM, linear": GaussianProcess(gaussian.make_tables(gaussian.linear_betas(1000))),
    }


def schedule_shifts(deviation: float, schedules: Mapping[str, NoiseProcess], size: ClipSize) -> list[ScheduleShift]:
    """What latents are to each schedule, for clips of one size.

    Args:
        deviation: a, positive.
        schedules: name -> process.
        size: of the clips.
    """
    return [_shift_of(name, process, deviation, size) for name, process in schedules.items()]


def equivalent_time_shift(deviation: float) -> float:
    """The time shift of right latents that is the same to rectified flow as latents of deviation a: 1 / a."""
    return 1.0 / deviation


def equivalent_step(process: GaussianProcess, step: int, deviation: float) -> float | None:
    """The step, a real number, at which right latents have the log-SNR of these; None beyond either end."""
    kept = process.tables.alphas_cumprod.double()
    curve = (kept / (1 - kept)).log()  # it falls
    wanted = curve[step] + 2 * math.log(deviation)
    if not curve[-1] <= wanted <= curve[0]:
        return None
    after = max(1, int((curve > wanted).sum()))
    before = after - 1
    return before + float((curve[before] - wanted) / (curve[before] - curve[after]))


def log_snr(process: NoiseProcess, t: Tensor) -> Tensor:
    """2 ln (signal / noise) of latents of deviation 1, float64."""
    signal, noise = process.rates(t)
    return 2 * (signal.double() / noise.double()).log()


def _shift_of(name: str, process: NoiseProcess, deviation: float, size: ClipSize) -> ScheduleShift:
    times = process.draw_times(
        _DRAWS,
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_latents=size.num_latents,
        generator=generator("log-SNR", name),
    )
    off, expected = 2 * math.log(deviation), float(log_snr(process, times).median())
    if not isinstance(process, GaussianProcess):
        return ScheduleShift(name, off, expected, expected + off, equivalent_time_shift(deviation))
    steps: dict[int, float | None] = {}
    for part in _ASKED:
        step = round(part * (len(process.tables) - 1))
        found = equivalent_step(process, step, deviation)
        steps[step] = None if found is None else found - step
    return ScheduleShift(name, off, expected, expected + off, steps=steps)
