"""What a process takes before it does anything: help, the package, the pipeline with torch and diffusers."""

from collections.abc import Iterator

from benchmarks.cases.commands import run_python
from benchmarks.comparison import Comparison, Run, Setting

COMMANDS = {
    "python alone": ("-c", ""),
    "opensora --help": ("-m", "opensora", "--help"),
    "import opensora": ("-c", "import opensora"),
    "import torch": ("-c", "import torch"),
    "import opensora.pipeline": ("-c", "import opensora.pipeline"),
}
SIZES = {"whole": tuple(COMMANDS), "tiny": tuple(COMMANDS)[:3]}


def comparisons(setting: Setting) -> Iterator[Comparison]:
    def way(name: str) -> Run:
        def run() -> None:
            run_python(*COMMANDS[name], threads=setting.threads)

        return run

    yield Comparison("starting", {name: way(name) for name in SIZES[setting.size]})
