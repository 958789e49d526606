"""What networks that are not trained take and compute while they prepare a batch: autoencoders, text encoders."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensora.models.autoencoders.codec import VideoCodec
from opensora.planning.autocast import MetaAutocast
from opensora.planning.tracing import LiveMemory, replaced


@dataclass(frozen=True)
class Preparation:
    """One batch's preparation.

    Attributes:
        activation_bytes: the most that is alive at once.
        flops: that are computed.
    """

    activation_bytes: int
    flops: int


class FrozenNetworks:
    """Traces what they do; parts that do the same on the same sizes are run once.

    Args:
        networks: on the device "meta".
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._alike: list[tuple[list[nn.Module], dict[Any, Any]]]
        self._alike = [(parts, {}) for network in networks for parts in _alike(network)]

    def trace(self, workload: Callable[[], Any]) -> Preparation:
        """What `workload`, which calls some of the networks, takes and computes."""
        memory = LiveMemory()
        with ExitStack() as stack:
            for parts, needed in self._alike:
                for part in parts:
                    stack.enter_context(replaced(part, "forward", memory.remembering(part.forward, needed)))
            stack.enter_context(MetaAutocast(enabled=False, on_accelerator=False))
            stack.enter_context(memory)
            stack.enter_context(torch.no_grad())
            workload()
        return Preparation(memory.peak_bytes, memory.flops)


def _alike(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Parts that see the same sizes over and over: an autoencoder's encoders, and the layers of other networks."""
    if isinstance(network, VideoCodec):
        yield from ([part] for part in network.encoders())
        return
    for parts in network.modules():
        if isinstance(parts, nn.ModuleList) and len(parts) > 2:
            makes: dict[str, list[nn.Module]] = defaultdict(list)
            for part in parts:
                makes[repr(part)].append(part)
            yield from makes.values()
