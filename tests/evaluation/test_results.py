"""Results of evaluations: one format of file, and what changed from one to another beyond chance."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opensora.errors import OpenSoraError
from opensora.evaluation.changes import Bounds, changes, num_shared
from opensora.evaluation.intervals import Interval
from opensora.evaluation.metrics.metric import Figure
from opensora.evaluation.results import Results, check_same_settings

RIGHT = Figure("right", "", "Share that is right.", "higher")
FLICKER = Figure("flicker", "levels of 255", "How much it flickers.", "lower")
MOTION = Figure("motion", "px/frame", "How much moves.")
DISTANCE = Figure("distance", "", "How far from real clips.", "lower")


def results(values: np.ndarray | list, first: int = 0, name: str = "suite", **shift: float) -> Results:
    """Three figures of clips, two clips a prompt, each the same number plus a shift."""
    samples = [
        {"id": f"clip {number}", "group": f"prompt {number // 2}", "prompt": "a ball"}
        | {figure: float(value) + shift.get(figure, 0.0) for figure in ("right", "flicker", "motion")}
        for number, value in enumerate(values, start=first)
    ]
    return Results(name, {"model": "toybox"}, {f.name: f for f in (RIGHT, FLICKER, MOTION)}, samples)


NUMBERS = np.random.default_rng(0).normal(5, 1, 200)


def test_a_file_holds_what_was_found(tmp_path: Path) -> None:
    made = results([1.0, 3.0, 5.0])
    made.samples[1]["flicker"] = math.nan
    made.sets["distance"] = (DISTANCE, Interval(0.5, 0.25, math.nan, 3))
    made.save(tmp_path / "results.json")
    assert "NaN" not in (tmp_path / "results.json").read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["figures"]["right"]["value"] == 3 and content["figures"]["right"]["better"] == "higher"
    assert content["figures"]["flicker"]["clips"] == 2 and content["samples"][1]["flicker"] is None
    read = Results.read(tmp_path)  # a folder is as good as its file
    assert read.settings == made.settings and read.suite == "suite" and read.groups == made.groups
    assert read.figures == {name: Figure(f.name, f.unit, f.tells, f.better) for name, f in made.figures.items()}
    assert read.mean("flicker") == made.mean("flicker") and read.mean("flicker").value == 3
    (_, interval) = read.sets["distance"]
    assert (interval.value, interval.low, interval.num_clips) == (0.5, 0.25, 3) and math.isnan(interval.high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("format"), "holds no results"),
        (lambda content: content.update(version=7), "version 7"),
        (lambda content: content.pop("samples"), "damaged"),
        (lambda content: content["samples"][0].pop("group"), "damaged"),
        (lambda content: content["samples"][0].update(right="much"), "damaged"),
        (lambda content: content["figures"]["right"].update(better="sideways"), "damaged"),
        (lambda content: content.update(figures=[]), "damaged"),
        (lambda content: content["samples"].append(content["samples"][0]), "holds a sample twice"),
    ],
)
def test_a_file_that_is_none_is_said(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results([1.0, 2.0]).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(OpenSoraError, match=message):
        Results.read(path)


def test_settings_that_differ_are_named_and_nothing_else_is() -> None:
    columns = {"cfg_channels 3": {"seed": 1, "steps": None}, "cfg_channels all": {"seed": 1, "steps": 20}}
    check_same_settings(Path("a.json"), {"columns": columns}, {"columns": columns})
    other = {**columns, "cfg_channels all": {"seed": 1, "steps": 30}}
    with pytest.raises(OpenSoraError) as error:
        check_same_settings(Path("a.json"), {"columns": columns, "version": "1"}, {"columns": other, "version": "1"})
    assert str(error.value) == (
        "a.json was made with columns: cfg_channels all: steps = 30, this run has 20; choose another `output`"
    )
    with pytest.raises(OpenSoraError, match="made with seeds = None, this run has 2"):
        check_same_settings(Path("a.json"), {"seeds": 2}, {})


def test_a_small_change_is_seen_clip_by_clip_where_intervals_of_means_hide_it() -> None:
    before, after = results(NUMBERS), results(NUMBERS, right=-0.01, flicker=-0.01, motion=0.01)
    right, flicker, motion = changes(before, after)
    assert before.mean("right").low < after.mean("right").value  # the means alone tell nothing
    assert (right.verdict, flicker.verdict, motion.verdict) == ("worse", "better", "different")
    assert right.is_regression and not flicker.is_regression and not motion.is_regression
    assert right.difference is not None and right.difference.value == pytest.approx(-0.01)
    assert num_shared(before, after) == 200


def test_chance_is_no_change() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 200)
    found = changes(results(NUMBERS), results(NUMBERS + noise - noise.mean()))
    assert [change.verdict for change in found] == ["unchanged"] * 3
    assert not any(change.is_regression for change in found)


def test_other_clips_are_compared_as_two_means() -> None:
    before, after = results(NUMBERS), results(NUMBERS, first=1000, right=-0.01, flicker=1.0)
    right, flicker, _ = changes(before, after)
    assert num_shared(before, after) == 0
    assert right.verdict == "unchanged" and flicker.verdict == "worse" and flicker.is_regression


def test_what_both_have_is_compared_and_the_rest_left_out() -> None:
    found = changes(results(NUMBERS), results(NUMBERS[:20], right=0.5))
    assert found[0].difference is not None and found[0].difference.num_clips == 20


def test_bounds_allow_so_much() -> None:
    before, after = results(NUMBERS), results(NUMBERS, right=-0.1, flicker=0.1)  # of about 5
    assert [c.is_regression for c in changes(before, after, Bounds(0.05))] == [False] * 3
    assert [c.is_regression for c in changes(before, after, Bounds(0.01))] == [True, True, False]
    assert [c.is_regression for c in changes(before, after, Bounds(0.05, {"flicker": 0.05}))] == [False, True, False]
    with pytest.raises(OpenSoraError, match="a bound is given for colour, but these results have right, flicker"):
        changes(before, after, Bounds(0, {"colour": 1}))


def test_figures_of_sets_change_where_their_intervals_part() -> None:
    before, after = results(NUMBERS), results(NUMBERS)
    before.sets["distance"] = (DISTANCE, Interval(1.0, 0.9, 1.1, 200))
    for value, verdict in ((1.15, "unchanged"), (1.3, "worse"), (0.7, "better")):
        after.sets["distance"] = (DISTANCE, Interval(value, value - 0.1, value + 0.1, 200))
        assert changes(before, after)[-1].verdict == verdict


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(OpenSoraError, match="results of suite and of loss"):
        changes(results(NUMBERS), results(NUMBERS, name="loss"))
    other = results(NUMBERS)
    other.figures = {}
    with pytest.raises(OpenSoraError, match="no figure in common"):
        changes(results(NUMBERS), other)
