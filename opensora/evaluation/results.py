"""What an evaluation found: one format of file for all suites, so that any two can be compared.

`results.json` is an object of

    {"format": "opensora results", "version": 1,
     "suite":    what was evaluated, such as "toybox" or "loss",
     "settings": all that decides the outcome; two files with equal ones differ by nothing but the machine,
     "figures":  {NAME: {"value", "low", "high", "clips", "unit", "better", "tells"}, ...},
     "sets":     the same of figures of all clips together, such as distances from reference clips,
     "samples":  [{"id", "group", NAME: its value or null, ...}, ...]}

`low` and `high` bound the mean over samples with 95 % confidence. Samples of one group (clips of one prompt) are drawn
together for it. A sample may tell more than its figures, such as its prompt.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.contents import read_object, shown
from opensora.errors import OpenSoraError
from opensora.evaluation.intervals import Interval, mean_interval
from opensora.evaluation.metrics.metric import Figure
from opensora.files import replacing

FORMAT, VERSION = "opensora results", 1
FILE = "results.json"

Sample = dict[str, Any]


@dataclass
class Results:
    """Figures of the clips of a suite.

    Attributes:
        suite: what was evaluated.
        settings: all that decides the outcome, as JSON.
        figures: by name; each is a key of samples.
        samples: what is known of each clip: `id`, `group` and figures, of which one may be None or left out.
        sets: figures of all clips together, by name.
    """

    suite: str
    settings: dict[str, Any]
    figures: dict[str, Figure]
    samples: list[Sample]
    sets: dict[str, tuple[Figure, Interval]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """A figure of every sample; NaN where it has none."""
        found = [sample.get(name) for sample in self.samples]
        return [math.nan if value is None else float(value) for value in found]

    @property
    def groups(self) -> list[str]:
        """Which samples belong together."""
        return [sample["group"] for sample in self.samples]

    def mean(self, name: str) -> Interval:
        """A figure over all samples that have it."""
        return mean_interval(self.values(name), self.groups)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "suite": self.suite,
            "settings": self.settings,
            "figures": {name: _told(figure, self.mean(name)) for name, figure in self.figures.items()},
            "sets": {name: _told(figure, interval) for name, (figure, interval) in self.sets.items()},
            "samples": [_plain(sample) for sample in self.samples],
        }
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What a file holds; of a folder, its `results.json`.

        Raises:
            OpenSoraError: no such file, or one that is none of results.
        """
        path = path / FILE if path.is_dir() else path
        content = read_object(path)
        if content.get("format") != FORMAT:
            raise OpenSoraError(f"{path} holds no results; give a file that opensora evaluate wrote")
        if (version := content.get("version")) != VERSION:
            raise OpenSoraError(
                f"{path} holds results of version {version!r}, this program reads {VERSION}; make it again"
            )
        try:
            figures = {name: _figure(name, told) for name, told in content["figures"].items()}
            sets = {name: (_figure(name, told), _interval(told)) for name, told in content["sets"].items()}
            found = cls(str(content["suite"]), dict(content["settings"]), figures, list(content["samples"]), sets)
            names = [(str(sample["id"]), str(sample["group"])) for sample in found.samples]
            [found.values(name) for name in figures]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OpenSoraError(f"{path} is damaged: no results can be read from it; make it again") from error
        if len({name for name, _ in names}) < len(names):
            raise OpenSoraError(f"{path} holds a sample twice; make it again")
        return found


def check_same_settings(path: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Holds the settings of a run against those that a file of results was made with.

    Raises:
        OpenSoraError: one differs.
    """
    found = _first_difference(mine, theirs)
    if found is not None:
        name, own, other = found
        raise OpenSoraError(
            f"{path} was made with {name} = {shown(repr(other), 200)}, this run has {shown(repr(own), 200)}; "
            "choose another `output`"
        )


def _first_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Name (of a part within parts, as `columns: cfg_channels 3: seed`), own value and the other one."""
    for name in sorted(mine.keys() | theirs.keys()):
        own, other = mine.get(name), theirs.get(name)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            if (found := _first_difference(own, other)) is not None:
                return f"{name}: {found[0]}", *found[1:]
        elif own != other:
            return name, own, other
    return None


def _told(figure: Figure, interval: Interval) -> dict[str, Any]:
    found = {"value": interval.value, "low": interval.low, "high": interval.high, "clips": interval.num_clips}
    return _plain({**found, "unit": figure.unit, "better": figure.better, "tells": figure.tells})


def _figure(name: str, told: Mapping[str, Any]) -> Figure:
    if told["better"] not in (None, "higher", "lower"):
        raise ValueError(told["better"])
    return Figure(name, str(told["unit"]), str(told["tells"]), told["better"])


def _interval(told: Mapping[str, Any]) -> Interval:
    value, low, high = (math.nan if told[name] is None else float(told[name]) for name in ("value", "low", "high"))
    return Interval(value, low, high, int(told["clips"]))


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is no number becomes None, which JSON has a word for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
