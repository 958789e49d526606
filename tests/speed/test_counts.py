"""The work of small networks and clips does not grow; `python -m benchmarks counts --write` keeps what is meant to."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.tables import counts

ADVICE = "if that is meant, run: python -m benchmarks counts --write"


def test_networks_compute_no_more_than_before():
    assert counts.grown(counts.kept()["flops"], counts.flops_of_networks()) == [], ADVICE


def test_clips_take_no_more_calls_than_before():
    assert counts.grown(counts.kept()["calls"], counts.calls_of_clips()) == [], ADVICE


def test_blocks_move_no_more_memory_than_before():
    kept = counts.kept()["operations"]
    if counts.torch_version() not in kept:
        pytest.skip(f"no operations are kept for {counts.torch_version()}; python -m benchmarks counts --write")
    assert counts.grown(kept[counts.torch_version()], counts.operations_of_blocks()) == [], ADVICE


def test_what_is_kept_is_what_is_counted():
    """No count is kept that nothing makes any more."""
    counted, kept = counts.operations_of_blocks(), counts.kept()
    assert all(version.keys() == counted.keys() for version in kept["operations"].values())
    assert {name for values in kept["flops"].values() for name in values} == {"flops"}


def test_what_grew_is_named():
    kept = {"a": {"flops": 1000, "copies": 2}, "b": {"flops": 5}}
    assert counts.grown(kept, {"a": {"flops": 1000, "copies": 2}, "b": {"flops": 4}}) == []
    counted = {"a": {"flops": 1001, "copies": 1}, "c": {"flops": 1}}
    assert counts.grown(kept, counted) == ["a: 1,001 flops, kept are 1,000", "c: 1 flops, kept are None"]


def test_counts_are_written_beside_those_of_other_versions_of_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "KEPT", tmp_path / "counts.json")
    for name in ("flops_of_networks", "calls_of_clips", "operations_of_blocks"):
        monkeypatch.setattr(counts, name, lambda name=name: {name: {"copies": 1}})
    (tmp_path / "counts.json").write_text(json.dumps({"operations": {"torch 1.0": {"a": {"copies": 7}}}}))
    before = counts.kept()
    assert main(["counts"]) == 0 and counts.kept() == before
    assert main(["counts", "--write"]) == 0
    assert counts.kept() == {
        "flops": {"flops_of_networks": {"copies": 1}},
        "calls": {"calls_of_clips": {"copies": 1}},
        "operations": {
            "torch 1.0": {"a": {"copies": 7}},
            counts.torch_version(): {"operations_of_blocks": {"copies": 1}},
        },
    }
    assert "| calls_of_clips | 1 copies |" in capsys.readouterr().out
