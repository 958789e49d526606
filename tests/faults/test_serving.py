"""A small campaign of kills of a server's processes; `python -m faults.serving` is the large one."""

from pathlib import Path

import pytest
from faults import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi,
    pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc"),
]


def test_no_job_is_lost_or_made_twice(tmp_path: Path) -> None:
    verdict = serving.run(tmp_path, None, num_jobs=30, num_kills=5, num_workers=1, seed=3, with_model=False)
    assert verdict.faults == []
    assert sum(verdict.kills.values()) == 5 and len(verdict.kills) > 1
