"""Which numbers networks compute in where nobody says."""

import json

import pytest
import torch

from opensora.checkpoints import precision


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list[str]:
    """What measuring finds, one after the other; a cache that knows nothing yet."""
    found = ["bfloat16", "float32"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "measured_dtype", lambda: found.pop(0))
    precision.quickest_dtype.cache_clear()
    yield found
    precision.quickest_dtype.cache_clear()


def another_process() -> torch.dtype:
    precision.quickest_dtype.cache_clear()
    return precision.dtype_named("auto", on_cpu=True)


def test_it_is_measured_once_on_a_machine(measured, tmp_path, monkeypatch):
    assert [another_process() for _ in range(3)] == [torch.bfloat16] * 3
    assert len(measured) == 1
    monkeypatch.setattr(precision, "_processor", lambda: "another one, on the same home")
    assert another_process() == torch.float32
    assert sorted(json.loads((tmp_path / "opensora" / "precision.json").read_text()).values()) == [
        "bfloat16",
        "float32",
    ]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"x": "int4"}'])
def test_a_damaged_note_is_measured_anew(measured, tmp_path, monkeypatch, content):
    monkeypatch.setattr(precision, "_processor", lambda: "x")
    (tmp_path / "opensora").mkdir()
    (tmp_path / "opensora" / "precision.json").write_text(content)
    assert another_process() == torch.bfloat16 and len(measured) == 1


def test_a_home_that_cannot_be_written_to_is_no_mistake(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [another_process() for _ in range(2)] == [torch.bfloat16, torch.float32]


def test_ranks_measure_nothing(measured, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert another_process() == torch.float32 and len(measured) == 2


def test_nothing_is_measured_where_nobody_asks(measured):
    assert precision.dtype_named(None, on_cpu=True) == torch.float32
    assert precision.dtype_named(None, on_cpu=False) == precision.dtype_named("auto", on_cpu=False) == torch.bfloat16
    assert precision.dtype_named("int8", on_cpu=True) == torch.int8
    assert len(measured) == 2


def test_what_is_measured_is_one_of_the_two():
    assert precision.measured_dtype() in precision.CHOICES


def test_a_record_tells_which_it_was(measured, tmp_path):
    from opensora import ClipRequest, Engine

    request = ClipRequest("a small red ball", num_inference_steps=1, num_frames=1, dtype="auto", device="cpu")
    engine = Engine.load(request)
    clip = engine.make(engine.prepare([request])[0])
    assert clip.record.dtype == "bfloat16" and len(measured) == 1
