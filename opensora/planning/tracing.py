"""How much memory a computation takes, found by running it on tensors that have a shape and a dtype but no data.

The code that runs is the code that would run, so whatever it allocates is seen: each operation's results are counted
from when they are made until the last reference to their memory is gone. Nothing is computed, nothing is allocated, and
a clip that would take an hour is traced in a second.

What an operation allocates inside itself and gives back is invisible from outside. Only convolutions do so to an extent
that matters; `_convolution_workspace_bytes` tells how much.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from opensora.planning.flops import operation_flops

# oneDNN convolutions work on blocks of so many channels.
_CHANNEL_BLOCK = 16


class Tracer:
    """A world of tensors without data: networks built in it take no memory, computations in it are traced.

    Everything lies on the CPU of that world, so the code takes the way it takes on a CPU.
    """

    def __init__(self) -> None:
        self._world = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def without_data(self) -> Iterator[None]:
        """Tensors and networks made within belong to that world."""
        with self._world, torch.no_grad():
            yield

    def peak_bytes(self, compute: Callable[[], Any], alike: Iterable[Sequence[tuple[Any, str]]] = ()) -> int:
        """The most memory that is taken at once for what `compute` makes, beyond what exists before.

        Args:
            compute: to be traced.
            alike: groups of methods, each as (object, name), that need the same for arguments of the same shapes; of
                such calls only the first is run.
        """
        memory = LiveMemory()
        with ExitStack() as stack:
            for group in alike:
                needed: dict[Any, Any] = {}
                for owner, name in group:
                    stack.enter_context(replaced(owner, name, memory.remembering(getattr(owner, name), needed)))
            stack.enter_context(self.without_data())
            stack.enter_context(memory)
            compute()
        return memory.peak_bytes


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within it, one object's method is another function; its class and other objects keep theirs."""
    before = vars(owner).get(name)  # of this object alone, where blocks are wrapped
    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def weight_bytes(network: nn.Module) -> int:
    """Memory of a network's parameters and buffers; what is shared counts once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class LiveMemory(TorchDispatchMode):
    """Counts the memory of the results of operations for as long as something refers to it.

    Attributes:
        live_bytes: taken now.
        peak_bytes: the most that was taken at once.
        flops: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.live_bytes = self.flops = 0
        self._known: dict[int, int] = {}

    def release(self, tensor: Tensor) -> int:
        """From now on `tensor`, a result of before, does not count; returns what it took."""
        key = tensor.untyped_storage()._cdata
        num_bytes = self._known.get(key, 0)
        self.live_bytes -= num_bytes
        self._known[key] = 0
        return num_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor):
                self._count(value, 0)  # unless seen as a result, it was there before
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value, value.untyped_storage().nbytes())
        workspace_bytes = 0
        if func in (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default):
            workspace_bytes = _convolution_workspace_bytes(args[0], args[1], result)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + workspace_bytes)
        self.flops += operation_flops(func, args, kwargs or {}, result)
        return result

    def remembering(self, function: Callable[..., Any], needed: dict[Any, Any]) -> Callable[..., Any]:
        """The function, but a call with arguments as in `needed` only makes the result and counts what it costs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            key = (structure, *(_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
            if key in needed:
                peak_bytes, flops, layouts = needed[key]
                self.peak_bytes = max(self.peak_bytes, self.live_bytes + peak_bytes)
                self.flops += flops
                return tree_map_only(_Layout, _Layout.empty, layouts)
            before_bytes, flops_before, peak_before = self.live_bytes, self.flops, self.peak_bytes
            self.peak_bytes = before_bytes
            result = function(*args, **kwargs)
            costs = self.peak_bytes - before_bytes, self.flops - flops_before
            needed[key] = *costs, tree_map_only(Tensor, _layout, result)
            self.peak_bytes = max(self.peak_bytes, peak_before)
            return result

        return call

    def _count(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = num_bytes
            self.live_bytes += num_bytes
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)


@dataclass(frozen=True)
class _Layout:
    """What a tensor without data is."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _convolution_workspace_bytes(image: Tensor, weight: Tensor, result: Tensor) -> int:
    """Memory that a convolution takes beyond its result.

    oneDNN turns images from channels-first into blocks of channels and the result back: there is a copy of the input
    and one of the result in its layout while it computes, one of the result beside the result itself afterwards. Images
    that come in channels-last are taken as they are, and so are those of a 1x1 convolution in float32, which is a
    matrix product. Accelerators' libraries rearrange half-precision images likewise.
    """
    is_pointwise = math.prod(weight.shape[2:]) == 1
    if _is_channels_last(image) or (is_pointwise and image.dtype == torch.float32):
        return 0
    result_bytes = result.numel() * result.element_size()
    copy_bytes = _blocked_bytes(result)
    computing = _blocked_bytes(image) + weight.numel() * weight.element_size() + copy_bytes - result_bytes
    return max(computing, copy_bytes)


def _is_channels_last(image: Tensor) -> bool:
    if image.ndim == 4 and len(image) == 1:
        # Whether a single image counts as channels-last depends on the stride of its first axis, which means nothing
        # and which tensors without data do not have right. Autoencoders' single images are channels-first in fact.
        return False
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(image.ndim)
    return layout is not None and not image.is_contiguous() and image.is_contiguous(memory_format=layout)


def _blocked_bytes(image: Tensor) -> int:
    """Of an image (B, C, ...) whose channels are filled up to whole blocks."""
    batch, channels, *sizes = image.shape
    return batch * -(-channels // _CHANNEL_BLOCK) * _CHANNEL_BLOCK * math.prod(sizes) * image.element_size()
