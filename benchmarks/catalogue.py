"""What there is to run: cases of speed, which share the runner's options, and tables, which have their own."""

import importlib
from types import ModuleType

from opensora.errors import OpenSoraError
from opensora.settings import nearest_name

CASES = {
    "step": "a layer pair of a denoising step: ours, the plain rendition, diffusers' nearest layers",
    "autoencoder": "encoding and decoding over time and by frames: ours and plain",
    "text": "the text encoder on a short prompt: ours and plain",
    "train": "forward and backward of a layer pair: ours and plain",
    "kernels": "MLPs and attention, each way between which the networks choose",
    "scaling": "a layer pair from few tokens to sixteen times as many: time over counted work",
    "startup": "help, and what is imported",
    "clip": "the bundled model's clip from a cold start to the file",
    "neighbour": "the same beside one busy process a core",
}
"""Name -> what is measured; a module of `benchmarks.cases`, with `SIZES`, the default first, and `comparisons`."""
TABLES = {
    "accelerator": "released models at full size on an accelerator (README)",
    "full-size-step": "a denoising step of the released models on the CPU",
    "sequence-parallel": "what sharing a clip's tokens among processes costs",
    "cards": "what makes a clip fit on cards of 8 to 80 GB (docs/memory.md)",
    "memory": "predicted against measured memory of a clip's stages (docs/memory.md)",
    "max-memory": "whether --max-memory keeps its word (docs/memory.md)",
    "train-memory": "the same of training (docs/memory.md)",
    "loading": "peak memory of loading (docs/memory.md)",
    "input-memory": "memory that a long clip takes as an input (docs/memory.md)",
    "million-rows": "memory and time of `opensora data` for very many clips (docs/memory.md)",
    "metrics": "what metrics of clips cost, and how they move (docs/metrics.md)",
    "fast": "what generate --fast costs: evaluations, decibels, what the judge reads (docs/performance.md)",
    "fast-full-size": "evaluations and operations that --fast saves of a released model (docs/performance.md)",
    "serving": "a server under load: answers, streams, memory, waits (docs/serving.md)",
    "counts": "work of small networks and clips, as a test holds it",
}
"""Name -> what it prints; a module of `benchmarks.tables` with `main(args)`."""


def case(name: str) -> ModuleType:
    """The module of a case."""
    return importlib.import_module(f"benchmarks.cases.{name}")


def table(name: str) -> ModuleType:
    """The module of a table."""
    return importlib.import_module(f"benchmarks.tables.{name.replace('-', '_')}")


def check_names(names: list[str]) -> None:
    """Refuses what is no case, and tables among cases.

    Raises:
        OpenSoraError: naming the first.
    """
    for name in names:
        if name in TABLES:
            raise OpenSoraError(f"{name} has options of its own; run it by itself: python -m benchmarks {name} --help")
        if name not in CASES:
            raise OpenSoraError(f"unknown case {name!r}{nearest_name(name, [*CASES, *TABLES, 'list'])}")


def size_of(name: str, asked: str | None) -> str:
    """The size that a case is run at, its first where none is asked for.

    Raises:
        OpenSoraError: the case has no size of that name.
    """
    sizes = list(case(name).SIZES)
    if asked is not None and asked not in sizes:
        raise OpenSoraError(f"case {name} has no size {asked!r}; give one of {', '.join(sizes)}")
    return asked or sizes[0]
