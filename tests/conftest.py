"""Options and fixtures shared by all tests."""

import functools
import gc
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opensora

if "torch" not in sys.modules:  # tests import this file once more
    opensora.tune()

import pytest
import torch
import tyro
from hypothesis import settings
from safetensors import safe_open

# The models of these tests are so small that more threads only wait for one another.
torch.set_num_threads(min(2, torch.get_num_threads()))

# The same examples on every run, and no failure because a machine is busy.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# For the help of options tyro reads their source anew with every command line, and under pytest twice: half the time of
# most. No source changes while tests run. Where a later tyro knows no such name, they only take longer.
if (_source := getattr(getattr(tyro, "_docstrings", None), "_ClassTokenization", None)) is not None:
    _source.make = staticmethod(functools.cache(_source.make))

GOLDEN_DIR = Path(__file__).parent / "golden"
REAL_CLIPS_DIR = Path(__file__).parent.parent / ".venv" / "real-clips"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir", type=Path, default=GOLDEN_DIR, help="folder with the reference fixtures (default: tests/golden)"
    )
    parser.addoption(
        "--real-clips",
        type=Path,
        default=REAL_CLIPS_DIR,
        help="folder with real clips (default: what `make clips` makes)",
    )


def pytest_collection_finish() -> None:
    """The libraries' half a million objects stay to the end: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_clips(pytestconfig: pytest.Config) -> list[Path]:
    """Real videos, sorted by name; a test that needs them is skipped where `make clips` has not been run."""
    folder: Path = pytestconfig.option.real_clips
    clips = sorted((p for s in ("mp4", "mpg", "avi") for p in folder.rglob(f"*.{s}")), key=lambda path: path.name)
    if not clips:
        pytest.skip(f"no clips in {folder}; run `make clips`")
    return clips


@dataclass(frozen=True)
class Golden:
    """One fixture file: its metadata and its tensors, named `sd.*` (weights), `in.*`, `mid.*`, `out.*`."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix.`, without that prefix."""
        return {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the network; of some fixtures they are whole numbers, in steps of 2^-9, or 2^-6 where 1D."""
        stored = self.under("sdq")
        return self.under("sd") | {k: v.float() * 2.0 ** (-9 if v.ndim > 1 else -6) for k, v in stored.items()}


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.option.golden_dir


@pytest.fixture(scope="session")
def golden(golden_dir: Path):
    """`golden("name")` loads `name.safetensors`; a fixture that the folder lacks skips the test."""

    def load(name: str) -> Golden:
        path = golden_dir / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"{path.name} is not in {golden_dir}")
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            return Golden(meta, {name: file.get_tensor(name) for name in file.keys()})

    return load


@pytest.fixture(scope="session")
def golden_json(golden_dir: Path):
    """`golden_json("name")` reads `name.json` or `name.json.gz`; a fixture that the folder lacks skips the test."""

    def load(name: str) -> Any:
        path = golden_dir / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        if not (packed := path.with_suffix(".json.gz")).exists():
            pytest.skip(f"{path.name} is not in {golden_dir}")
        return json.loads(gzip.decompress(packed.read_bytes()))

    return load
