"""The numbers that networks compute in: those asked for, the usual ones, or those that a CPU multiplies faster.

bfloat16 takes half the time of float32 where a processor has instructions for it (AMX, AVX-512 bf16), and several times
as long where it has none. "auto" is the faster one, measured once on a machine and kept by processor and torch in
`~/.cache/opensora/precision.json` (or under `XDG_CACHE_HOME`). Every clip's record tells which it was.
"""

import contextlib
import functools
import json
import os
import platform
import time
from pathlib import Path

import torch

from opensora.contents import read_object
from opensora.errors import OpenSoraError
from opensora.files import replacing

AUTO = "auto"
CHOICES: tuple[str, ...] = ("float32", "bfloat16")
ENOUGH = 1.25
"""Times as fast bfloat16 must be, for the digits that it lacks."""
_ROWS, _WIDTH, _ROUNDS = 512, 1152, 6


def dtype_named(name: str | None, *, on_cpu: bool) -> torch.dtype:
    """The precision of that name; None is the usual one: float32 on a CPU, bfloat16 elsewhere.

    Args:
        name: of a torch dtype that networks compute or are stored in, "auto", or None.
        on_cpu: where they compute. "auto" is bfloat16 elsewhere.
    """
    if name == AUTO:
        name = quickest_dtype() if on_cpu else "bfloat16"
    return getattr(torch, name or ("float32" if on_cpu else "bfloat16"))


@functools.cache
def quickest_dtype() -> str:
    """What this machine's CPU multiplies faster; measured if that is not known yet, which takes a tenth of a second.

    Processes that torchrun started together might each measure something else: of them none does, and what is not known
    is float32.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensora" / "precision.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OpenSoraError, OSError):
        known = {key: name for key, name in read_object(path).items() if name in CHOICES}
    machine = f"{_processor()}, torch {torch.__version__}"
    if machine not in known and torch.distributed.is_torchelastic_launched():
        return "float32"
    if machine not in known:
        known[machine] = measured_dtype()
        with contextlib.suppress(OpenSoraError, OSError), replacing(path) as partial:  # then it is measured again
            partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[machine]


def measured_dtype() -> str:
    """The same, measured: the best of some rounds of a product as wide as the released models."""
    best = dict.fromkeys(CHOICES, float("inf"))
    with torch.inference_mode():
        factors = {name: torch.ones(_ROWS + _WIDTH, _WIDTH, dtype=getattr(torch, name)) for name in CHOICES}
        for _ in range(_ROUNDS):
            for name, both in factors.items():
                started = time.perf_counter()
                torch.mm(both[:_ROWS], both[_ROWS:])
                best[name] = min(best[name], time.perf_counter() - started)
    return "bfloat16" if best["float32"] > ENOUGH * best["bfloat16"] else "float32"


def _processor() -> str:
    """By the name that Linux knows, or what else there is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
