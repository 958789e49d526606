"""Floating-point operations of a computation, two for every multiplication with its sum.

Products, convolutions and attention count, everything else is traffic. The work of a backward pass is told from the
forward pass: a product costs as much again for each of its two sides that needs a gradient; fused attention, which
computes its scores once more, 2.5 times as much.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_aten: Any = torch.ops.aten

_SIDES: dict[Any, tuple[int, int]] = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.convolution: (0, 1),
    _aten._convolution: (0, 1),
}
"""Operation -> which of its arguments are multiplied."""
_ATTENTION_ON_CPU = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_ON_CPU_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_FUSED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # of `models.fused`; only torch with oneDNN has it
_ATTENTION = {
    _ATTENTION_ON_CPU,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._flash_attention_forward,
    _aten._efficient_attention_forward,
}


def operation_flops(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Of one operation of torch as it was called."""
    packet = operation._overloadpacket
    if packet is _ATTENTION_ON_CPU:  # torch has no formula for it
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    if packet is _ATTENTION_ON_CPU_BACKWARD:
        return 5 * sdpa_flop_count(args[1].shape, args[2].shape, args[3].shape) // 2
    if packet is _FUSED_LINEAR:  # nor for this one
        return 2 * args[0].numel() * len(args[1])
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


class CountedFlops(TorchDispatchMode):
    """Counts what is computed within, and what its backward pass will compute.

    Attributes:
        totals: operations so far, and those that their backward pass will take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.totals = (0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        flops = operation_flops(func, args, kwargs or {}, result)
        if flops:
            backward = _backward_flops(func._overloadpacket, args, flops) if torch.is_grad_enabled() else 0
            self.totals = self.totals[0] + flops, self.totals[1] + backward
        return result


def _backward_flops(packet: Any, args: Sequence[Any], flops: int) -> int:
    if packet in _ATTENTION:
        return 5 * flops // 2 if any(_needs_gradient(arg) for arg in args[:3]) else 0
    return flops * sum(_needs_gradient(args[side]) for side in _SIDES.get(packet, ()))


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
