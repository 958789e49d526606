"""Resident memory of this process, as Linux counts it; for the benchmarks of memory."""

import ctypes
import gc
from pathlib import Path


def settled_bytes() -> int:
    """What is resident after everything freed has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_bytes("VmRSS")


def forget_peak() -> None:
    """`peak_bytes` counts from here."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_bytes() -> int:
    """The most that was ever resident since `forget_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; this needs Linux")
