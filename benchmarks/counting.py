"""Work as it is counted: operations of arithmetic, bytes that pass through memory, tensors that are made.

Operations that only look at a tensor in another way count nothing. Bytes are those of all tensors that an operation
reads and writes, as if none of it were in a cache. Products and convolutions are kept by their shapes, so that they can
be done once more by themselves: no rendition of the same work can be faster than these, unless it multiplies less.

Letters: n heads of all samples together, q queries, k keys, d features of a head.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora.planning.flops import operation_flops

_aten: Any = torch.ops.aten
_FREE = {_aten._unsafe_view, _aten.detach, _aten.empty, _aten.new_empty, _aten.empty_like, _aten._local_scalar_dense}
"""What moves no data besides views."""
_COPIES = {_aten.clone, _aten.copy_, _aten._to_copy, _aten.cat, _aten.stack, _aten.constant_pad_nd}
_CONVOLUTION = _aten.convolution
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# The linear layer with GELU of `opensora.models.fused`; only torch with oneDNN has it.
_FUSED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@dataclass(frozen=True)
class Product:
    """One product of matrices, of batches of them, or one convolution.

    Attributes:
        shapes: of both factors.
        transposed: of each factor, whether its last two axes lie in memory the other way round.
        convolution: stride, padding, dilation, whether it is transposed, output padding and groups; None for a product.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    transposed: tuple[bool, bool] = (False, False)
    convolution: tuple[Any, ...] | None = None

    def prepared(self, dtype: torch.dtype) -> Callable[[], object]:
        """The same on arbitrary numbers, into memory that is there already; convolutions make their own."""
        first, second = (_factor(*factor, dtype) for factor in zip(self.shapes, self.transposed, strict=True))
        if self.convolution is not None:
            options = self.convolution
            return lambda: _CONVOLUTION(first, second, None, *options)
        multiply, made = (torch.mm, torch.bmm)[first.ndim == 3], first.new_empty(*first.shape[:-1], second.shape[-1])
        return lambda: multiply(first, second, out=made)


class Counted(TorchDispatchMode):
    """Counts what is computed within; a backward pass within it, too. Needs gradients off by `no_grad`, or on.

    Attributes:
        flops: floating-point operations, two for every multiplication with its sum.
        bytes: read and written.
        operations: that move data.
        copies: among them, those that compute nothing.
        made: tensors with memory of their own.
        products: how often each was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.operations = self.copies = self.made = 0
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.is_view or packet in _FREE:
            return result
        self.flops += operation_flops(func, args, kwargs, result)
        read = {name: value for name, value in kwargs.items() if name != "out"}
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, read, result)) if isinstance(leaf, Tensor))
        self.operations += 1
        self.copies += packet in _COPIES
        self.made += sum(returned.alias_info is None for returned in func._schema.returns)
        self.products.update(_products(packet, args))
        return result

    def traffic(self) -> dict[str, int]:
        """What passed through memory, by the names of tables and files."""
        return {
            "operations": self.operations,
            "copies": self.copies,
            "tensors made": self.made,
            "bytes": self.bytes,
        }


def counted_in(work: Callable[[], object]) -> Counted:
    """What a call computes."""
    with Counted() as counted:
        work()
    return counted


def floor(products: Mapping[Product, int], dtype: torch.dtype) -> Callable[[], None]:
    """All products and convolutions of a computation, and nothing else."""
    prepared = [(product.prepared(dtype), count) for product, count in products.items()]

    def run() -> None:
        for compute, count in prepared:
            for _ in range(count):
                compute()

    return run


def _products(packet: Any, args: Sequence[Any]) -> list[Product]:
    """Of one operation."""
    if packet in (_aten.mm, _aten.bmm):
        return [_product(args[0], args[1])]
    if packet in (_aten.addmm, _aten.baddbmm):
        return [_product(args[1], args[2])]
    if packet is _FUSED_LINEAR:
        return [_product(args[0], args[1].t())]
    if packet is _CONVOLUTION:
        options = tuple(tuple(value) if isinstance(value, list) else value for value in args[3:9])
        return [Product((tuple(args[0].shape), tuple(args[1].shape)), convolution=options)]
    if packet is _ATTENTION:
        return _attention(*args[:2])
    if packet is _ATTENTION_BACKWARD:  # the scores once more, and four products for the gradients
        return 2 * _attention(*args[1:3]) + _attention(*args[1:3])[:1]
    return []


def _product(first: Tensor, second: Tensor) -> Product:
    shapes = tuple(first.shape), tuple(second.shape)
    return Product(shapes, (_is_transposed(first), _is_transposed(second)))


def _attention(query: Tensor, key: Tensor) -> list[Product]:
    """The two products of attention among (B, H, N, d)."""
    (q, d), k, n = query.shape[-2:], key.shape[-2], math.prod(query.shape[:-2])
    return [Product(((n, q, d), (n, d, k)), (False, True)), Product(((n, q, k), (n, k, d)))]


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.stride(-2) == 1 and matrix.stride(-1) != 1


def _factor(shape: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> Tensor:
    if transposed:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-2, -1)
    return torch.randn(shape, dtype=dtype)
