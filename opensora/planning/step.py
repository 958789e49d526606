"""One training step on meta tensors: what is alive when, and how much is computed.

The step that runs is the task's own, forward and backward. Networks are deep and their layers alike, so only three
layers run: what the second adds is counted once for every layer that was left out.

Time goes on in segments:

    before the layers | layer 0 | layer 1 ... | after the layers | backward of the last layer | ... | of layer 0 | rest
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opensora.models.int8 import int8_linear
from opensora.planning.autocast import MetaAutocast
from opensora.planning.flops import CountedFlops
from opensora.planning.tracing import LiveMemory, replaced

LAYERS_RUN = 3  # the first, the last, and one to stand for those between


@dataclass(frozen=True)
class Segment:
    """A part of a step.

    Attributes:
        kept_bytes: how much more is alive at its end than at its beginning, gradients of weights left out.
        peak_bytes: the most that is alive within it beyond what was at its beginning.
        gradient_bytes: of the gradients of weights that become ready in it.
        flops: that are computed.
    """

    kept_bytes: int
    peak_bytes: int
    gradient_bytes: int
    flops: int


@dataclass(frozen=True)
class Step:
    """One batch's forward and backward pass.

    Attributes:
        segments: in the order in which they run, those of layers that were left out included.
    """

    segments: tuple[Segment, ...]

    @property
    def flops(self) -> int:
        """Everything that is computed, what is computed again included."""
        return sum(segment.flops for segment in self.segments)

    @property
    def activation_bytes(self) -> int:
        """The most that is alive at once besides weights and their gradients."""
        return max(alive for alive, _ in self.moments())

    def moments(self) -> Iterator[tuple[int, int]]:
        """For each segment: bytes alive at its worst, and gradients that are ready at its end."""
        alive = gradients = 0
        for segment in self.segments:
            gradients += segment.gradient_bytes
            yield alive + segment.peak_bytes, gradients
            alive += segment.kept_bytes


def layers_of(blocks: Sequence[nn.Module]) -> list[Sequence[nn.Module]]:
    """Blocks in groups that repeat, such as pairs of a spatial and a temporal one; all in one group if nothing does.

    Blocks of several classes are no layers of one network, and none are returned.
    """
    if len({type(block) for block in blocks}) > 1:
        return []
    makes = [repr(block) for block in blocks]
    for size in range(1, len(blocks) // 2 + 1):
        if len(blocks) % size == 0 and makes == makes[:size] * (len(blocks) // size):
            return [blocks[start : start + size] for start in range(0, len(blocks), size)]
    return [blocks] if blocks else []


def trace_step(
    compute_loss: Callable[[], Tensor],
    module: nn.Module,
    blocks: Sequence[nn.Module] = (),
    autocast: MetaAutocast | None = None,
) -> Step:
    """Runs one step on the device "meta".

    Args:
        compute_loss: prepares a meta batch and returns the scalar loss.
        module: what is trained.
        blocks: its repeated blocks, in the order in which they run.
        autocast: in which precision.
    """
    recorder, autocast = _Recorder(), autocast or MetaAutocast(enabled=False, on_accelerator=False)
    layers = layers_of(blocks)
    with ExitStack() as stack:
        for number, layer in enumerate(layers[:LAYERS_RUN]):
            recorder.watch(stack, number, layer)
        for block in itertools.chain.from_iterable(layers[LAYERS_RUN:]):
            stack.enter_context(replaced(block, "forward", _pass_on))
        for parameter in module.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(recorder.collect).remove)
        stack.enter_context(recorder)
        with autocast, torch.enable_grad():
            loss = compute_loss()
            if len(layers) > LAYERS_RUN:
                recorder.begin(("forget", 1))
                autocast.forget(parameter for block in layers[1] for parameter in block.parameters())
            recorder.begin(("after", 0))
        autocast.forget()
        recorder.is_forward = False
        with autocast:
            # `loss.backward()` would set the mode aside, and what is computed again would be computed without it.
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        del loss
        recorder.begin(("end", 0))
    return Step(tuple(_unrolled(recorder.segments, len(layers))))


@dataclass(frozen=True)
class Work:
    """What one batch's step computes.

    Attributes:
        forward, backward: floating-point operations, nothing computed twice.
        in_layers: those of `forward` that are in the repeated blocks.
        tokens: shape of what enters the first layer, (B, T, S, D) or (B, N, D) in a transformer; None without layers.
    """

    forward: int
    backward: int
    in_layers: int
    tokens: tuple[int, ...] | None


def count_work(compute_loss: Callable[[], Tensor], *stacks: Sequence[nn.Module]) -> Work:
    """The work of a step, told from its forward pass, of which one layer of each stack runs.

    Args:
        compute_loss: see `trace_step`.
        stacks: repeated blocks in the order in which they run; several where one kind follows another.
    """
    counted = CountedFlops()
    counts = [_CountedStack(layers, counted) for blocks in stacks if (layers := layers_of(blocks))]
    with ExitStack() as stack:
        for count in counts:
            count.watch(stack)
        stack.enter_context(MetaAutocast(enabled=False, on_accelerator=False))
        stack.enter_context(_PlainProducts())
        stack.enter_context(counted)
        stack.enter_context(torch.enable_grad())
        compute_loss()
    forward, backward = counted.totals
    return Work(
        forward=forward + sum((len(count.layers) - 1) * count.of_one(0) for count in counts),
        backward=backward + sum((len(count.layers) - 1) * count.of_one(1) for count in counts),
        in_layers=sum(len(count.layers) * count.of_one(0) for count in counts),
        tokens=counts[0].tokens if counts else None,
    )


class _PlainProducts(TorchFunctionMode):
    """Products with weights in eight bits as those with others: in a function of its own none has a gradient to see."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is int8_linear:
            input, weight, _, bias = args
            return F.linear(input, weight.to(input.dtype), bias)
        return func(*args, **(kwargs or {}))


class _CountedStack:
    """Layers that are alike, of which the first one runs.

    Args:
        layers: see `layers_of`.
        counted: what is computed.

    Attributes:
        tokens: shape of what entered the first layer.
    """

    def __init__(self, layers: list[Sequence[nn.Module]], counted: CountedFlops) -> None:
        self.layers, self.counted = layers, counted
        self.tokens: tuple[int, ...] = ()
        self._totals: list[tuple[int, int]] = []  # forward and backward before and after it
        self._returned = 0  # tensors that a layer takes first and returns; 0 for one that is no tuple

    def watch(self, stack: ExitStack) -> None:
        """Leaves all layers but the first out, as long as the stack lasts."""
        stack.callback(self.layers[0][0].register_forward_pre_hook(self._enter).remove)
        stack.callback(self.layers[0][-1].register_forward_hook(self._leave).remove)
        for block in itertools.chain.from_iterable(self.layers[1:]):
            stack.enter_context(replaced(block, "forward", self._pass_on))

    def of_one(self, way: int) -> int:
        """What one layer computes, forward (0) or backward (1)."""
        passes = zip(self._totals[::2], self._totals[1::2], strict=True)  # a loss may ask twice
        return sum(after[way] - before[way] for before, after in passes)

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = tuple(args[0].shape)
        self._totals.append(self.counted.totals)

    def _leave(self, _: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self._returned = len(result) if isinstance(result, tuple) else 0
        self._totals.append(self.counted.totals)

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return args[: self._returned] if self._returned else args[0]


class _Recorder(LiveMemory):
    """Cuts what happens into segments."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[tuple[tuple[str, int], Segment]] = []
        self.is_forward = True
        self._name = ("before", 0)
        self._started = (0, 0, 0)  # live bytes, gradient bytes, flops
        self._gradient_bytes = 0

    def begin(self, name: tuple[str, int]) -> None:
        """Ends a segment and begins the next."""
        live, gradients, flops = self._started
        segment = Segment(
            kept_bytes=self.live_bytes - live,
            peak_bytes=max(self.peak_bytes, self.live_bytes) - live,
            gradient_bytes=self._gradient_bytes - gradients,
            flops=self.flops - flops,
        )
        self.segments.append((self._name, segment))
        self._name, self._started = name, (self.live_bytes, self._gradient_bytes, self.flops)
        self.peak_bytes = self.live_bytes

    def collect(self, parameter: nn.Parameter) -> None:
        """Takes a gradient that is ready out of the account of what is alive."""
        assert parameter.grad is not None
        self.release(parameter.grad)
        self._gradient_bytes += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None

    def watch(self, stack: ExitStack, number: int, layer: Sequence[nn.Module]) -> None:
        """Begins segments where a layer begins and ends, forward and backward."""
        first, last = layer[0], layer[-1]
        run_first, run_last = first.forward, last.forward

        def enter(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.is_forward:
                self.begin(("forward", number))
            return leave(hidden_states, *args, **kwargs) if first is last else run_first(hidden_states, *args, **kwargs)

        def leave(*args: Any, **kwargs: Any) -> Tensor:
            result = run_last(*args, **kwargs)
            if self.is_forward:
                if result.requires_grad:
                    result.register_hook(lambda gradient: self.begin(("backward", number)))
                self.begin(("between", number))
            return result

        if first is not last:
            stack.enter_context(replaced(last, "forward", leave))
        stack.enter_context(replaced(first, "forward", enter))


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer that is left out."""
    return hidden_states


def _unrolled(segments: Sequence[tuple[tuple[str, int], Segment]], num_layers: int) -> Iterator[Segment]:
    """With the second layer's segments as often as there are layers between the first and the last."""
    missing = max(0, num_layers - LAYERS_RUN)
    for name, group in itertools.groupby(segments, key=lambda named: (named[0][0] == "backward", named[0][1])):
        part = [segment for _, segment in group]
        yield from part
        if name[1] == 1:
            yield from part * missing
