"""The queue of a server, against what queueing theory says of queues that it can solve."""

import json
import math

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.planning.serving import DAY_S, forecast, least_workers, workers_needed


def exponential(mean_s: float) -> np.ndarray:
    """Times that are spread like those of a Poisson process: quantiles of the exponential distribution."""
    shares = (np.arange(2000) + 0.5) / 2000
    return -mean_s * np.log1p(-shares)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_worker_with_exponential_times(load: float) -> None:
    """M/M/1: responses are exponential with mean s / (1 - load)."""
    told = forecast(exponential(2.0), clips_per_day=load * DAY_S / 2.0, num_workers=1)
    mean = 2.0 / (1 - load)
    assert told.load == pytest.approx(load, rel=0.01)
    assert told.response_s[0] == pytest.approx(mean * math.log(2), rel=0.1)
    assert told.response_s[1] == pytest.approx(mean * math.log(100), rel=0.15)


def test_several_workers_with_exponential_times() -> None:
    """M/M/c: a clip waits with the probability of Erlang's C formula, and then exponentially."""
    workers, load, mean = 5, 0.8, 1.0
    offered = workers * load
    terms = [offered**k / math.factorial(k) for k in range(workers)]
    last = offered**workers / math.factorial(workers) / (1 - load)
    waits = last / (sum(terms) + last)
    told = forecast(exponential(mean), offered * DAY_S / mean, workers)
    expected = math.log(waits / 0.01) * mean / (workers * (1 - load))
    assert told.wait_s[1] == pytest.approx(expected, rel=0.15)
    assert told.wait_s[0] == pytest.approx(math.log(waits / 0.5) * mean / (workers * (1 - load)), abs=0.1)


def test_equal_times_wait_half_as_long() -> None:
    """Pollaczek and Khinchine: the mean wait grows with the second moment of the times."""
    rate = 0.7 * DAY_S
    equal, spread = forecast(np.ones(10), rate, 1), forecast(exponential(1.0), rate, 1)
    assert equal.wait_s[1] < 0.7 * spread.wait_s[1]


def test_a_worker_with_nothing_to_do_takes_a_moment_to_see_a_clip() -> None:
    rarely = forecast(np.ones(10), clips_per_day=100, num_workers=1, look_s=0.2)
    assert rarely.wait_s[0] == pytest.approx(0.1, rel=0.05)


def test_the_fewest_workers_are_found() -> None:
    service_s = exponential(10.0)
    found = workers_needed(service_s, clips_per_day=20_000, most_s=60)
    assert found.response_s[1] <= 60
    assert found.num_workers > least_workers(service_s, 20_000) - 1
    fewer = found.num_workers - 1
    assert fewer < least_workers(service_s, 20_000) or forecast(service_s, 20_000, fewer).response_s[1] > 60


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="give 12 or more"):
        forecast(np.ones(3), clips_per_day=1e6, num_workers=11)
    with pytest.raises(OpenSoraError, match="making them takes 1 s"):
        workers_needed(np.ones(3), clips_per_day=10, most_s=1)
    for times in (np.array([]), np.array([1.0, 0.0]), np.array([1.0, np.nan])):
        with pytest.raises(OpenSoraError, match="seconds above 0"):
            forecast(times, 10, 1)


def test_the_command_reads_times(tmp_path, capsys) -> None:
    times = tmp_path / "times.txt"
    times.write_text("1.5\n2.5\n\n2\n")
    assert main(["plan", "serving", "--times", str(times), "--workers", "30", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_workers"] == 30 and told["measured_clips"] == 3
    assert told["load"] == pytest.approx(1e6 * 2 / DAY_S / 30)
    assert main(["plan", "serving", "--times", str(times), "--within", "10"]) == 0
    assert "workers for 1,000,000 clips a day" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "3"], "--folder of a server"),
        (["--times", "{file}"], "--within how many seconds"),
        (["--times", "{file}", "--workers", "0"], "--workers is 0"),
        (["--times", "{file}", "--workers", "1", "--clips-per-day", "-3"], "--clips-per-day is -3"),
        (["--times", "missing", "--workers", "1"], "missing"),
        (["--folder", "{folder}", "--workers", "1"], "no folder of a server"),
    ],
)
def test_mistakes_of_the_command_are_one_line(options, words, tmp_path, capsys) -> None:
    (tmp_path / "times.txt").write_text("1\n")
    named = [option.format(file=tmp_path / "times.txt", folder=tmp_path / "none") for option in options]
    assert main(["plan", "serving", *named]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "none").exists()
