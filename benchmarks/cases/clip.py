"""The bundled model's clip, from a cold start to a written file, with the program's own tuning and without."""

from collections.abc import Iterator

from benchmarks.cases.commands import SHORT, make_clip
from benchmarks.comparison import Comparison, Run, Setting

SIZES = {"17 frames": (), "tiny": SHORT}
TUNED, UNTUNED = "opensora generate", "with --no-tuning"


def comparisons(setting: Setting) -> Iterator[Comparison]:
    options = SIZES[setting.size]
    ways: dict[str, Run] = {
        TUNED: lambda: make_clip(setting, options),
        UNTUNED: lambda: make_clip(setting, ("--no-tuning", *options)),
    }
    yield Comparison("a clip of the bundled model", ways, [(TUNED, UNTUNED)])
