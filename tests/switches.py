"""What ranks send each other."""

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Switches(TorchDispatchMode):
    """Counts all-to-alls, and the bytes that this rank sends to others in them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(func):
            ranks = dist.get_world_size()
            self.sent.append(args[0].numel() * args[0].element_size() * (ranks - 1) // ranks)
        return func(*args, **(kwargs or {}))
