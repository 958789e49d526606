"""Automatic mixed precision for tensors without data, which torch's own does not know.

What is cast is what torch casts (`ATen/autocast_mode.h`): products and attention are computed in bfloat16 everywhere;
accelerators compute norms, softmax, exponentials, sums and losses in float32 besides, which CPUs do not. As in torch, a
trained weight is cast once for all its uses within one region.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from opensora.models.int8 import int8_linear

_aten: Any = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Fused attention: without it, tensors without data take a way that keeps all scores.

    Where a bias of the scores is learnt, as T5's of positions is, all scores are kept in truth.
    """
    names = ("attn_mask", "dropout_p", "is_causal", "scale")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    bias = given.get("attn_mask")
    if bias is not None and bias.requires_grad:
        return F.scaled_dot_product_attention(query, key, value, **given)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=given.get("is_causal", False), attn_mask=bias, scale=given.get("scale")
    )[0]  # fmt: skip


_BFLOAT16: frozenset[Any] = frozenset(
    [
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
        F.scaled_dot_product_attention,
        int8_linear,
    ]
)
_FLOAT32_ON_ACCELERATORS: frozenset[Any] = frozenset(
    [
        *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.softplus, F.cosine_similarity),
        *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.cross_entropy, F.binary_cross_entropy_with_logits, F.interpolate),
        *(torch.layer_norm, torch.group_norm, torch.rms_norm, torch.softmax, torch.log_softmax),
        *(torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.cumsum, torch.prod),
        *(Tensor.softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.sum, Tensor.prod),
    ]
)


class MetaAutocast(TorchFunctionMode):
    """Within it, calls of torch's functions on tensors without data cast their arguments as autocast would.

    It must be active during the backward pass, too, where checkpointed blocks are computed again.

    Args:
        enabled: False for plain float32; attention is fused in any case.
        on_accelerator: cast as accelerators do.
    """

    def __init__(self, *, enabled: bool, on_accelerator: bool) -> None:
        super().__init__()
        self._enabled, self._on_accelerator = enabled, on_accelerator
        self._weights: dict[int, Tensor] = {}

    def forget(self, weights: Iterable[Tensor] | None = None) -> None:
        """Drops what some weights were cast to, by default all of them, as torch does when its context ends."""
        for key in list(self._weights) if weights is None else map(id, weights):
            self._weights.pop(key, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False  # nobody knows; code asks whether a mask hides nothing, and the general case is wanted
        cast = None
        if self._enabled and func in _BFLOAT16:
            cast = self._to_bfloat16
        elif self._enabled and self._on_accelerator and func in _FLOAT32_ON_ACCELERATORS:
            cast = _to_float32
        if cast is not None:
            args, kwargs = tree_map_only(Tensor, cast, args), tree_map_only(Tensor, cast, kwargs)
        if func is F.scaled_dot_product_attention:
            func = _attention
        return func(*args, **(kwargs or {}))

    def _to_bfloat16(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor.to(torch.bfloat16)
        return self._weights[id(tensor)]


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
