"""What making a clip took."""

import sys
import time

import psutil
import torch


def process_seconds() -> float:
    """Since the process started, imports included."""
    return time.time() - psutil.Process().create_time()


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use on the device, or by the process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GB on the device"
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GB"
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return f"{getattr(memory, 'peak_wset', memory.rss) / 2**30:.2f} GB"
