"""A small campaign of kills and full disks; `make faults` is the large one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_nothing_is_lost_nothing_left_over_and_what_goes_on_is_the_same():
    """In a process of its own, as forks are for processes that do nothing else yet."""
    campaign = [
        sys.executable,
        "-m",
        "faults.campaign",
        "--moments",
        "24",
        "--sizes",
        "8",
        "--cold",
        "4",
        "--seed",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(campaign, capture_output=True, text=True, timeout=1200, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 lost, 0 left over, 0 different, 0 in other words than one line" in ended.stdout
