"""Linear layers whose weights lie in memory in eight bits, with a factor for each row; computing is as before.

    q = round(w / s),  s = max |w| / 127 of each row of w,  y = x (q s)^T + b

Rounding to the nearest of 255 steps is an error of s / 4 on average, in all layers of a network's blocks; what is small
and decides much (embedders, norms, the last layer) stays as it was. Weights are made anew at every call, one layer at a
time, and once more in a backward pass, for the gradient of x. This is absmax quantisation by rows without its outliers
(Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from opensora.models.fused import FusedLinear
from opensora.models.network import blocks_of

_SCALE = "weight_scale"
_LINEAR = (nn.Linear, FusedLinear)


class Int8Linear(nn.Linear):
    """A linear layer with eight-bit weights, without data until it is loaded.

    Attributes:
        weight: q, int8 (out, in).
        weight_scale: s, float32 (out,).

    Args:
        layer: whose place it takes; its bias is kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(len(weight), device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), see `int8_linear`."""
        return int8_linear(input, self.weight, self.weight_scale, self.bias)


class _Product(torch.autograd.Function):
    """y = x (q s)^T + b, which keeps q and s for its backward pass and not the weight that is made of them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(input, dequantize_rows(weight, scale, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (needs_input, _, _, needs_bias), (weight, scale) = ctx.needs_input_grad, ctx.saved_tensors
        to_input = gradient @ dequantize_rows(weight, scale, gradient.dtype) if needs_input else None
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs_bias else None
        return to_input, None, None, to_bias


def int8_linear(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (q s)^T + b in the precision of x, or in that of autocast; gradients reach x and b.

    Args:
        input: x, (..., in).
        weight: q, int8 (out, in).
        scale: s, float32 (out,).
        bias: b, (out,).
    """
    if has_torch_function_unary(input):  # so that plans can tell it from other products, as they do torch's functions
        return handle_torch_function(int8_linear, (input,), input, weight, scale, bias)
    device, dtype = input.device.type, input.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _Product.apply(input.to(dtype), weight, scale, None if bias is None else bias.to(dtype))


class Int8Weights(Mapping[str, Tensor]):
    """Weights of a network some of whose layers are `Int8Linear`: each tensor when it is asked for.

    Args:
        network: that they are for.
        weights: of the network before.
    """

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._layers = {name for name, module in network.named_modules() if isinstance(module, Int8Linear)}
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        if layer not in self._layers or kind == "bias":
            return self._weights[name]
        if self._last is None or self._last[0] != layer:  # weight and scale are asked for one after the other
            self._last = layer, quantize_rows(self._weights[f"{layer}.weight"])
        return self._last[1][kind == _SCALE]

    def __iter__(self) -> Iterator[str]:
        for name in self._weights:
            yield name
            layer, _, kind = name.rpartition(".")
            if layer in self._layers and kind == "weight":
                yield f"{layer}.{_SCALE}"

    def __len__(self) -> int:
        return sum(1 for _ in self)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and s of a weight (out, in)."""
    values = weight.float()
    scale = values.abs().amax(dim=1) / 127
    return (values / scale.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scale


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q s in a precision; (out, in)."""
    return weight.to(dtype).mul_(scale[:, None])


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer of a block: what eight bits are for."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module) in _LINEAR
    }


def saved_bytes(block: nn.Module) -> int:
    """What a block takes less in eight bits."""
    return sum(
        layer.weight.nbytes - layer.weight.numel() - 4 * layer.out_features for layer in linear_layers(block).values()
    )


def use_int8(network: nn.Module) -> None:
    """Puts an `Int8Linear` without data in the place of every linear layer of a network's blocks."""
    for block in blocks_of(network).values():
        for name, layer in linear_layers(block).items():
            block.set_submodule(name, Int8Linear(layer))


def round_to_int8(network: nn.Module) -> None:
    """Puts the weights of a network's blocks into eight bits where they are, layer by layer; trained ones stay."""
    for block in blocks_of(network).values():
        for name, layer in linear_layers(block).items():
            if layer.weight.requires_grad:
                continue
            rounded = Int8Linear(layer)
            weight, scale = quantize_rows(layer.weight.detach())
            rounded.weight, rounded.weight_scale = nn.Parameter(weight, False), nn.Parameter(scale, False)
            block.set_submodule(name, rounded)


def is_int8(network: nn.Module) -> bool:
    """Whether a network has such layers."""
    return any(isinstance(module, Int8Linear) for module in network.modules())


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that networks compute in: bfloat16 where weights are in eight bits."""
    return torch.bfloat16 if dtype == torch.int8 else dtype
