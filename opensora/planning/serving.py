"""How long clips wait in a queue, and how many workers keep that short.

Requests come as they like (a Poisson process), workers take them in the order they came, and each takes as long as one
of the times that were measured, drawn at random. The wait of every request follows from that of those before it (Kiefer
and Wolfowitz, 1955: a request begins when it is there and one of the workers is free), so nothing is approximated: a
long day of the queue is played through.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from opensora.errors import OpenSoraError

DAY_S = 86_400.0
NUM_CLIPS, WARM_UP = 100_000, 2_000
"""Of a day that is played through; the first find an empty queue and do not count."""
MOST_WORKERS = 100_000


@dataclass(frozen=True)
class QueueForecast:
    """A queue as it will be.

    Attributes:
        num_workers: processes that make clips.
        load: share of their time that they work; at 1 and beyond the queue grows for ever.
        wait_s: half of the clips, and 99 of 100, wait no longer until they are begun;
        response_s: and no longer until they are there.
    """

    num_workers: int
    load: float
    wait_s: tuple[float, float]
    response_s: tuple[float, float]


def forecast(
    service_s: np.ndarray, clips_per_day: float, num_workers: int, look_s: float = 0.0, seed: int = 0
) -> QueueForecast:
    """What becomes of a queue.

    Args:
        service_s: seconds that clips took, as they were measured; some dozens at least tell of the slow ones.
        clips_per_day: that are asked for.
        num_workers: at work.
        look_s: a worker that has nothing to do looks into the queue so often.
        seed: of the day.

    Raises:
        OpenSoraError: no times, or such as cannot be; more clips than the workers can make.
    """
    _check(service_s, clips_per_day)
    load = clips_per_day / DAY_S * float(service_s.mean()) / num_workers
    if load >= 1:
        raise OpenSoraError(
            f"{num_workers} workers make {num_workers * DAY_S / service_s.mean():,.0f} clips a day, "
            f"but {clips_per_day:,.0f} are asked for; give {least_workers(service_s, clips_per_day)} or more"
        )
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(DAY_S / clips_per_day, NUM_CLIPS))
    took = random.choice(service_s, NUM_CLIPS)
    until_seen = random.uniform(0, look_s, NUM_CLIPS)
    waits = _waits(arrivals, took, until_seen, num_workers)[WARM_UP:]
    responses = waits + took[WARM_UP:]
    return QueueForecast(num_workers, load, _percentiles(waits), _percentiles(responses))


def workers_needed(
    service_s: np.ndarray, clips_per_day: float, most_s: float, look_s: float = 0.0, seed: int = 0
) -> QueueForecast:
    """The fewest workers with which 99 of 100 clips are there within `most_s` seconds of being asked for.

    Raises:
        OpenSoraError: as `forecast`; or making the clips alone takes longer.
    """
    _check(service_s, clips_per_day)
    alone = float(np.percentile(service_s, 99))
    if alone >= most_s:
        raise OpenSoraError(
            f"99 of 100 clips are to be there within {most_s:g} s, but making them takes {alone:.3g} s; allow more"
        )
    few = least_workers(service_s, clips_per_day)
    many = few
    while forecast(service_s, clips_per_day, many, look_s, seed).response_s[1] > most_s:
        few, many = many + 1, many * 2
        if many > MOST_WORKERS:
            raise OpenSoraError(f"more than {MOST_WORKERS:,} workers would be needed; allow more than {most_s:g} s")
    while few < many:
        middle = (few + many) // 2
        if forecast(service_s, clips_per_day, middle, look_s, seed).response_s[1] > most_s:
            few = middle + 1
        else:
            many = middle
    return forecast(service_s, clips_per_day, many, look_s, seed)


def least_workers(service_s: np.ndarray, clips_per_day: float) -> int:
    """Workers with which the queue does not grow for ever."""
    return math.floor(clips_per_day / DAY_S * float(service_s.mean())) + 1


def _waits(arrivals: np.ndarray, took: np.ndarray, until_seen: np.ndarray, num_workers: int) -> np.ndarray:
    free = [0.0] * num_workers  # when each worker is, the first one first
    waits = np.empty(len(arrivals))
    clips = zip(arrivals.tolist(), took.tolist(), until_seen.tolist(), strict=True)
    for number, (arrival, seconds, unseen) in enumerate(clips):
        begin = max(arrival + unseen, free[0])  # who has just finished takes the next at once
        heapq.heapreplace(free, begin + seconds)
        waits[number] = begin - arrival
    return waits


def _percentiles(seconds: np.ndarray) -> tuple[float, float]:
    half, nearly_all = np.percentile(seconds, (50, 99))
    return float(half), float(nearly_all)


def _check(service_s: np.ndarray, clips_per_day: float) -> None:
    if not len(service_s) or not np.isfinite(service_s).all() or (service_s <= 0).any():
        raise OpenSoraError("measured times are seconds above 0, one for each clip; none or others were given")
    if not 0 < clips_per_day < math.inf:
        raise OpenSoraError(f"`clips_per_day` is {clips_per_day:g}, expected a number above 0")
