"""Long work says how far it is and how long it will still take, where there is no terminal for a bar."""

import pytest

from opensora.cli import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_estimate_counts_from_the_first_item_and_not_from_before(clock, capsys):
    bar = progress.Progress("reading clips")
    clock[0] += 600  # a folder is listed
    bar.update(2, 1_000)
    assert capsys.readouterr().err == "", "two of them say nothing of the others"
    clock[0] += 20
    bar.update(202, 1_000)
    assert capsys.readouterr().err == "reading clips: 202 of 1000, 80 s left\n"


def test_work_that_goes_on_counts_what_it_did_itself(clock, capsys):
    bar = progress.Progress("clips")
    bar.update(500, 1_000)
    clock[0] += 30
    bar.update(600, 1_000)
    assert capsys.readouterr().err == "clips: 600 of 1000, 120 s left\n"
