"""Networks that are in memory only while they work: text encoder, transformer, autoencoder.

Otherwise a network lies on the CPU (where the work is done on an accelerator) or nowhere at all: then it is on torch's
meta device, which keeps shapes and no data, and its weights are read from their files again whenever it is needed. The
module stays the same object throughout, so hooks, caches and whoever holds it go on working.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from opensora.errors import OpenSoraError


class Offloader:
    """Brings networks in and sends them away.

    Args:
        device: where networks work.
        networks: name -> network that is sent away at once, and whenever it does not work.
        loaders: name -> function that makes the network anew, on the CPU, in the precision it works in; what has none
            lies on the CPU meanwhile.

    Raises:
        OpenSoraError: a network that would lie on the CPU works there, so that nothing would be saved.
    """

    def __init__(
        self,
        device: torch.device,
        networks: Mapping[str, nn.Module],
        loaders: Mapping[str, Callable[[], nn.Module]],
    ) -> None:
        kept = [name for name in networks if name not in loaders]
        if kept and device.type == "cpu":
            raise OpenSoraError(f"no files are known for {', '.join(kept)}, and on the CPU nothing else saves memory")
        self.device = device
        self._networks, self._loaders = dict(networks), dict(loaders)
        self._users = Counter[str]()
        self._lock = threading.Lock()
        for name in self._networks:
            self._send_away(name)

    def reads_again(self, name: str) -> bool:
        """Whether a network's weights come from its files whenever it is needed, and nothing beside them is kept."""
        return name in self._loaders

    @contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """A network is on the device within, and away afterwards, also after an error.

        It may be asked for several times, within each other or by several threads: the last to leave sends it away.
        """
        try:
            with self._lock:
                self._users[name] += 1
                if self._users[name] == 1:
                    self._bring(name)
            yield
        finally:
            with self._lock:
                self._users[name] -= 1
                if not self._users[name]:
                    self._send_away(name)

    def _bring(self, name: str) -> None:
        network = self._networks[name]
        if name in self._loaders:
            _adopt(network, self._loaders[name]())
        network.to(self.device)

    def _send_away(self, name: str) -> None:
        self._networks[name].to("meta" if name in self._loaders else "cpu")
        if self.device.type == "cuda":  # what the allocator keeps for it does not fit the next one's sizes
            torch.cuda.empty_cache()


def _adopt(network: nn.Module, loaded: nn.Module) -> None:
    """Puts the tensors of one network into another of the same make; those that are tied stay so."""
    theirs = dict(loaded.named_modules())
    for name, module in network.named_modules():
        module._parameters.update(theirs[name]._parameters)
        module._buffers.update(theirs[name]._buffers)
