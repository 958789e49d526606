"""`opensora plan serving`: how long clips will wait, and how many workers that takes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from opensora.cli.options import FLAG, check_count, option
from opensora.contents import read_text
from opensora.errors import OpenSoraError


@dataclass(frozen=True)
class PlanServing:
    """Predict how long clips wait in the queue of `opensora serve`, and how many workers keep that short.

    Times come from a server that has made clips of the kind on the machines in question, or from a file.
    """

    folder: Annotated[Path | None, option("FOLDER")] = None
    """Of a server: the times of clips that it made."""
    store: Annotated[str | None, option("URL", "SQLite in the folder")] = None
    """Where that server keeps its jobs."""
    times: Annotated[Path | None, option("FILE")] = None
    """Seconds that clips took, one a line, in place of a server."""
    clips_per_day: Annotated[float, option("N", "1000000")] = 1e6
    """That are asked for."""
    workers: Annotated[int | None, option("N", "as many as --within asks for")] = None
    """That make them."""
    within: Annotated[float | None, option("SECONDS")] = None
    """99 of 100 clips are there so soon after they were asked for."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        """Prints the forecast."""
        if (self.workers is None) == (self.within is None):
            raise OpenSoraError("say how many --workers there are, or --within how many seconds clips must be there")
        import numpy as np

        from opensora.planning.serving import forecast, workers_needed
        from opensora.server.settings import IDLE_S

        service_s = np.array(self._service_s())
        if self.within is not None:
            told = workers_needed(service_s, self.clips_per_day, self.within, IDLE_S)
        else:
            assert self.workers is not None
            check_count("--workers", self.workers)
            told = forecast(service_s, self.clips_per_day, self.workers, IDLE_S)
        if self.json:
            print(json.dumps({**asdict(told), "clips_per_day": self.clips_per_day, "measured_clips": len(service_s)}))
            return
        print(f"{len(service_s)} clips were measured: {service_s.mean():.3g} s each, at most {service_s.max():.3g} s")
        print(f"{told.num_workers:,} workers for {self.clips_per_day:,.0f} clips a day: {told.load:.0%} of their time")
        for name, (half, nearly_all) in (("begun", told.wait_s), ("there", told.response_s)):
            print(f"{name:<6} half of the clips within {half:.3g} s, 99 of 100 within {nearly_all:.3g} s")

    def _service_s(self) -> list[float]:
        if (self.folder is None and self.store is None) == (self.times is None):
            raise OpenSoraError("give --folder of a server that has made clips, or --times FILE")
        if self.times is not None:
            return _read_times(self.times)
        from opensora.server.settings import ServerSettings
        from opensora.server.store import existing_store

        store = existing_store(ServerSettings((self.folder or Path()).absolute(), store=self.store))
        done = store.jobs(states=["completed"], limit=100_000)
        times = [job.finished_at - job.started_at for job in done if job.finished_at and job.started_at]
        store.close()
        if not times:
            raise OpenSoraError(f"the server of {self.folder or self.store} has made no clip yet; let it make some")
        return times


def _read_times(path: Path) -> list[float]:
    times = []
    for number, line in enumerate(read_text(path, "the file of times").split("\n"), 1):
        try:
            times += [float(line)] if line.strip() else []
        except ValueError:
            raise OpenSoraError(f"{path}: line {number} is {line!r}, expected seconds") from None
    return times
