"""Settings: round trips, overrides, and one-line errors that name the nearest key."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from opensora.errors import OpenSoraError
from opensora.overrides import apply_overrides
from opensora.settings import from_dict, load_settings, save_settings, to_dict


@dataclass(frozen=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Muon:
    lr: float = 2e-2
    momentum: float = 0.95


@dataclass(frozen=True)
class Training:
    steps: int = 100
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Adam | Muon = field(default_factory=Adam)
    ema: float | None = 0.999
    milestones: tuple[int, ...] = ()
    compile: bool = False


@dataclass(frozen=True)
class Recipe:
    name: str
    output: Path = Path("runs")
    training: Training = field(default_factory=Training)
    notes: dict[str, int] = field(default_factory=dict)
    limits: dict[str, float | None] | None = field(default_factory=lambda: {"low": 0.0})
    network: dict[str, Any] | None = field(default_factory=lambda: {"depth": 2, "spatial": {"groups": 4}})
    chosen: Literal["spatial", "temporal"] | Adam = "spatial"


@dataclass(frozen=True)
class Span:
    first: int = 1
    last: int = 4

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise OpenSoraError(f"first {self.first} is after last {self.last}")


def full() -> Recipe:
    return Recipe("x", Path("runs/x"), Training(7, "fp32", Muon(0.5), None, (3, 5), True), {"a": 1})


def test_a_recipe_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "recipe.json"
    save_settings(full(), path)
    assert load_settings(Recipe, path) == full()
    assert json.loads(path.read_text())["training"]["optimizer"]["type"] == "Muon"
    assert list(path.parent.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    save_settings(full(), path)

    def half(self, *_, **__):
        with self.open("wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        save_settings(Recipe("y"), path)
    assert load_settings(Recipe, path) == full() and list(tmp_path.iterdir()) == [path]


def test_defaults_fill_what_the_file_leaves_out():
    assert from_dict(Recipe, {"name": "x"}) == Recipe("x")


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.steps=12", lambda r: r.training.steps, 12),
        ("training.optimizer.lr=3e-4", lambda r: r.training.optimizer.lr, 3e-4),
        ("training.optimizer.lr=1", lambda r: r.training.optimizer.lr, 1.0),
        ("training.ema=none", lambda r: r.training.ema, None),
        ("training.compile=True", lambda r: r.training.compile, True),
        ("training.precision=fp32", lambda r: r.training.precision, "fp32"),
        ("training.milestones=1,2,3", lambda r: r.training.milestones, (1, 2, 3)),
        ("training.milestones=[4]", lambda r: r.training.milestones, (4,)),
        ("training.milestones=5", lambda r: r.training.milestones, (5,)),
        ("training.milestones=", lambda r: r.training.milestones, ()),
        ("training.optimizer.betas=0.8,1", lambda r: r.training.optimizer.betas, (0.8, 1.0)),
        ("training.optimizer.type=Muon", lambda r: r.training.optimizer, Muon()),
        ('training.optimizer={"type": "Muon", "lr": 2}', lambda r: r.training.optimizer, Muon(2.0)),
        ("name=12", lambda r: r.name, "12"),
        ("name=a=b", lambda r: r.name, "a=b"),
        ("output=else/where", lambda r: r.output, Path("else/where")),
        ("notes.b=2", lambda r: r.notes, {"b": 2}),
        ("limits.low=3", lambda r: r.limits["low"], 3.0),
        ("limits.low=none", lambda r: r.limits["low"], None),
        ("network.depth=3", lambda r: r.network["depth"], 3),
        ("network.kind=folded", lambda r: r.network["kind"], "folded"),
        ("network.spatial.groups=8", lambda r: r.network["spatial"], {"groups": 8}),
        ("network.sizes=[1, 2]", lambda r: r.network["sizes"], [1, 2]),
    ],
)
def test_overrides(override, read, expected):
    recipe = Recipe("x")
    changed = read(apply_overrides(recipe, [override]))
    assert changed == expected and type(changed) is type(expected)
    assert recipe == Recipe("x")


def test_the_order_of_overrides_does_not_matter():
    """A check of two fields sees both changes; a field of a new kind may be named before the kind."""
    with pytest.raises(OpenSoraError, match=r"first 5 is after last 4"):
        apply_overrides(Span(), ["first=5"])
    assert apply_overrides(Span(), ["first=5", "last=6"]) == Span(5, 6)
    assert apply_overrides(Span(), ["last=6", "first=5"]) == Span(5, 6)
    muon = Training(optimizer=Muon(3.0))
    assert apply_overrides(Training(), ["optimizer.lr=3", "optimizer.type=Muon"]) == muon
    assert apply_overrides(Training(), ["optimizer.type=Muon", "optimizer.lr=2", "optimizer.lr=3"]) == muon


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "did you mean training.steps?"),
        ("trainin.steps=3", "did you mean training.steps?"),
        ("training.steps=3.5", "expected int"),
        ("training.steps=true", "expected int"),
        ("training.steps=many", "training.steps is 'many', expected int"),
        ("training.steps.x=3", "training.steps is a value"),
        ("training.precision=bf6", "did you mean bf16?"),
        ("training.optimizer.type=Adem", "expected one of Adam, Muon; did you mean Adam?"),
        ("training.optimizer.betas=0.8", "has 1 entries, expected 2"),
        ("training.compile=2", "expected bool"),
        ("chosen=spatil", "chosen is 'spatil', expected one of spatial, temporal or Adam; did you mean spatial?"),
        ('training.optimizer={"type": "Muon",}', "is not valid JSON: "),
        ("training", "write KEY=VALUE"),
        ("notes.b=two", "notes.b is 'two', expected int"),
        ("notes.b=2.5", "notes.b is 2.5, expected int"),
        ("limits.low=wide", "limits.low is 'wide', expected float or none"),
        ("network.spatail.groups=8", "did you mean network.spatial?"),
    ],
)
def test_bad_overrides_are_one_line(override, message):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
        apply_overrides(Recipe("x"), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "setting name in the file is missing (str)"),
        ({"name": 3}, "name in the file is 3, expected str"),
        ({"name": "x", "trainin": {}}, "unknown setting trainin in the file; did you mean training?"),
        ({"name": "x", "training": {"optimizer": {"lr": 1}}}, "needs a key 'type' naming one of Adam, Muon"),
        (
            {"name": "x", "training": {"optimizer": {"type": [1]}}},
            "type in the file is [1], expected one of Adam, Muon",
        ),
        ({"name": "x", "training": {"ema": "0.9"}}, "training.ema in the file is '0.9', expected float or none"),
        ({"name": "x", "training": {"steps": "7"}}, "expected int"),
        ({"name": "x", "training": 3}, "training in the file is 3, expected Training"),
        ([], "expected Recipe"),
    ],
)
def test_bad_files_are_one_line(data, message):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
        from_dict(Recipe, data, "the file")
    assert message in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(OpenSoraError, match=r"does not exist"):
        load_settings(Recipe, tmp_path / "no.json")
    (tmp_path / "broken.json").write_text('{"name": \n')
    with pytest.raises(OpenSoraError, match=r"not valid JSON.*line"):
        load_settings(Recipe, tmp_path / "broken.json")


def test_to_dict_is_plain():
    assert json.loads(json.dumps(to_dict(full()))) == to_dict(full())
