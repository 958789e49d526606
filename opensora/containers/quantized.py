"""Weights stored in eight bits, turned back into numbers: float8 alone, or float8 and int8 with scales beside them.

What is stored is q, what is meant q * scale, with one scale for a tensor (ComfyUI's `scale_weight`), for each row
(`weight_scale` of compressed-tensors), or for each block of 128 x 128 (`weight_scale_inv` of DeepSeek-V3).
"""

from collections.abc import Mapping

from torch import Tensor

from opensora.containers.tensors import TensorInfo
from opensora.errors import OpenSoraError

_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_OF_ACTIVATIONS = ("scale_input", "input_scale", "activation_scale", "comfy_quant")  # how ComfyUI would multiply
_MARKS = ("scaled_fp8", "spiece_model")  # the second is a tokenizer, which ComfyUI puts into its T5
_BLOCK = 128


def is_quantized(info: TensorInfo) -> bool:
    """Whether a tensor is stored in eight bits that need more than a cast, or may do so."""
    return info.dtype.startswith("float8") or info.dtype == "int8"


def find_scales(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, str], set[str]]:
    """The scales among the tensors of a network.

    Returns:
        Name of a quantised weight -> name of its scale, and the names of all that only says how it was quantised.
    """
    scales: dict[str, str] = {}
    notes = {name for name in infos if name.rpartition(".")[2] in _MARKS}
    for name, info in infos.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not is_quantized(info):
            continue
        if scale := next((f"{layer}.{kind}" for kind in _SCALES if f"{layer}.{kind}" in infos), None):
            scales[name] = scale
        notes |= {f"{layer}.{kind}" for kind in (*_SCALES, *_OF_ACTIVATIONS) if f"{layer}.{kind}" in infos}
    return scales, notes


def dequantize(tensor: Tensor, scale: Tensor | None, name: str) -> Tensor:
    """What an eight-bit tensor means, float32 of its shape.

    Raises:
        OpenSoraError: the scale is neither for all of it, nor for its rows, nor for blocks of it.
    """
    values = tensor.float()
    if scale is None:
        return values
    factors = scale.float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    if factors.ndim == 1:
        factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    if factors.ndim == values.ndim:
        for dim, (size, count) in enumerate(zip(values.shape, factors.shape, strict=True)):
            block = _BLOCK if -(-size // _BLOCK) == count else size // count if count and size % count == 0 else 0
            if not block:
                break
            factors = factors.repeat_interleave(block, dim).narrow(dim, 0, size)
        else:
            return values * factors
    raise OpenSoraError(
        f"{name} is {tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')} with a scale of "
        f"{tuple(scale.shape)}, which is for none of it, its rows or its blocks; get the weights in bfloat16"
    )
