"""Networks that are in memory only while they work: text encoder, transformer, autoencoder.

Otherwise a network lies on the CPU (where the work is done on an accelerator) or nowhere at all: then it is on torch's
meta device, which keeps shapes and no data, and its weights are read from their files again whenever it is needed. The
module stays the same object throughout, so hooks, caches and whoever holds it go on working.

Where even one network is too large, its blocks take turns (`BlockStream`, `stream_to_accelerator`).
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from opensora.errors import OpenSoraError
from opensora.models.network import VideoTransformer, blocks_of
from opensora.models.offload_hooks import merge_tied_layers
from opensora.tuning import give_memory_back
from opensora.weights import load_weights, make_room

Offload: TypeAlias = Literal["networks", "blocks"]
"""What is in memory only while it works: each network, or besides each block of those that have blocks."""

STREAMED = ("text_encoder", "transformer")
"""Kinds of networks whose blocks take turns; an autoencoder is small."""

_META = torch.device("meta")


class Offloader:
    """Brings networks in and sends them away.

    Args:
        device: where networks work.
        networks: name -> network that is sent away at once, and whenever it does not work.
        loaders: name -> function that makes the network anew, on the CPU, in the precision it works in; what has none
            lies on the CPU meanwhile.
        streams: name -> network on the CPU whose blocks are read one by one; it has no loader.

    Raises:
        OpenSoraError: a network that would lie on the CPU works there, so that nothing would be saved.
    """

    def __init__(
        self,
        device: torch.device,
        networks: Mapping[str, nn.Module],
        loaders: Mapping[str, Callable[[], nn.Module]],
        streams: "Mapping[str, BlockStream] | None" = None,
    ) -> None:
        self._streams = dict(streams or {})
        kept = [name for name in networks if name not in loaders and name not in self._streams]
        if kept and device.type == "cpu":
            raise OpenSoraError(f"no files are known for {', '.join(kept)}, and on the CPU nothing else saves memory")
        self.device = device
        self._networks, self._loaders = dict(networks), dict(loaders)
        if device.type == "cpu":
            give_memory_back()
        self._users = Counter[str]()
        self._lock = threading.Lock()
        for name in self._networks:
            self._send_away(name)

    def reads_again(self, name: str) -> bool:
        """Whether a network's weights come from its files whenever it is needed, and nothing beside them is kept."""
        return name in self._loaders or name in self._streams

    @contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """A network is on the device within, and away afterwards, also after an error.

        It may be asked for several times, within each other or by several threads: the last to leave sends it away. A
        network that the offloader does not know stays where it is.
        """
        if name not in self._networks:
            yield
            return
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
        if name in self._streams:
            self._streams[name].open()
            return
        if name in self._loaders:
            _adopt(network, self._loaders[name]())
        network.to(self.device)

    def _send_away(self, name: str) -> None:
        if name in self._streams:
            self._streams[name].close()
            return
        self._networks[name].to("meta" if name in self._loaders else "cpu")
        if self.device.type == "cuda":  # what the allocator keeps for it does not fit the next one's sizes
            torch.cuda.empty_cache()


def _adopt(network: nn.Module, loaded: nn.Module) -> None:
    """Puts the tensors of one network into another of the same make; those that are tied stay so."""
    theirs = dict(loaded.named_modules())
    for name, module in network.named_modules():
        module._parameters.update(theirs[name]._parameters)
        module._buffers.update(theirs[name]._buffers)


# --- block by block ---------------------------------------------------------------------------------------------------


class BlockStream:
    """A network on the CPU of which one block is in memory, and the next one, which is read meanwhile.

    What is not in a block (embedders, last layer) is there from `open` to `close`.

    Args:
        network: with its tables; its weights are let go of.
        weights: name -> tensor, each read when it is asked for; another thread asks.
        source: what to call them in an error.

    Raises:
        OpenSoraError: of `open` and of the network's `forward`, as of `load_weights`.
    """

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
        self._network, self._weights, self._source = network, weights, source
        self._blocks = blocks_of(network)
        self._next = dict(zip(self._blocks, list(self._blocks)[1:], strict=False))
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[str, Future[None]] | None = None
        for name, block in self._blocks.items():
            block.register_forward_pre_hook(partial(self._before, name))
            block.register_forward_hook(partial(self._after, name), always_call=True)
        self.close()

    def open(self) -> None:
        """From now on the network can be called."""
        in_blocks = {module for block in self._blocks.values() for module in block.modules()}
        make_room([module for module in self._network.modules() if module not in in_blocks], torch.device("cpu"))
        prefixes = tuple(f"{name}." for name in self._blocks)
        rest = [name for name in self._weights if not name.startswith(prefixes)]
        load_weights(self._network, _Selected(self._weights, {name: name for name in rest}), source=self._source)
        self._reader = ThreadPoolExecutor(1, "weights")

    def close(self) -> None:
        """Everything is let go of."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._reader = self._ahead = None
        make_room(self._network.modules(), _META)

    def _before(self, name: str, *_: Any) -> None:
        """Waits for a block, and has the next one read. There is none after the last: text may be projected then."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != name:  # a cache left some out
            ahead[1].result()
            self._send_away(ahead[0])
            ahead = None
        assert self._reader is not None, "the network is away; ask for it by `pipeline.on_device`"
        reading = ahead[1] if ahead is not None else self._reader.submit(self._read, name)
        reading.result()
        if (after := self._next.get(name)) is not None:
            self._ahead = after, self._reader.submit(self._read, after)

    def _after(self, name: str, *_: Any) -> None:
        self._send_away(name)

    def _read(self, name: str) -> None:
        block, prefix = self._blocks[name], f"{name}."
        make_room(block.modules(), torch.device("cpu"))
        own = {stored.removeprefix(prefix): stored for stored in self._weights if stored.startswith(prefix)}
        load_weights(block, _Selected(self._weights, own), source=f"{self._source}, {name}")

    def _send_away(self, name: str) -> None:
        make_room(self._blocks[name].modules(), _META)


class _Selected(Mapping[str, Tensor]):
    """Some weights under other names, each read when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stream_to_accelerator(network: Any, device: torch.device) -> None:
    """Blocks of a network on the CPU are on an accelerator while they run, by diffusers' group offloading.

    On CUDA the next block is copied while one computes, from memory that is locked into place (pinned); it takes the
    place of what is there tensor by tensor. A text encoder's layers take turns, which are no blocks to diffusers.
    """
    from diffusers.hooks import apply_group_offloading

    merge_tied_layers(network)
    streams = device.type == "cuda"
    if streams:
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.pin_memory()
    grouped: dict[str, Any] = {"offload_type": "leaf_level"}
    if isinstance(network, VideoTransformer):
        grouped = {"offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(network, device, torch.device("cpu"), use_stream=streams, record_stream=streams, **grouped)
