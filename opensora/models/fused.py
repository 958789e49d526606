"""Linear layers and MLPs in fewer passes over memory, on a CPU and without gradients.

oneDNN adds the bias to a tile of a product while it is still in the cache; torch alone writes the bias into all of the
result first, which in bf16 takes up to a fifth of a layer's time, and no bit is another. It applies GELU there too, in
its full precision, before the product is rounded. Rows of an MLP are worked on in pieces, so that the wide hidden layer
never leaves the cache either, nor takes memory.
Two runs of `python -m benchmarks kernels` (both products, one thread) took, at the widths of the released models,
0.67 and 0.80 of the time in bf16, 0.87 and 0.89 in float32; at those of the bundled ones 0.70 and 0.81 in float32, and
as long as before in bf16. Where GELU is exact, no bit of float32 changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from opensora.models.pieces import is_hooked, is_whole

ROWS = 1024
"""Of a piece: enough for the products to be as quick as in one, few enough for the cache."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FusedLinear(nn.Linear):
    """A linear layer that can apply GELU to what it returns, so that whatever is hooked into it sees one call."""

    def forward(self, input: Tensor, approximate: str | None = None) -> Tensor:
        """x W^T + b, then GELU if `approximate` (`"tanh"` or `"none"`) is given."""
        # In float32 other sums than torch's would come out, and no sooner.
        is_gain = approximate is not None or (self.bias is not None and input.dtype == torch.bfloat16)
        if is_gain and _is_fused(self, input):
            rows, after = input.reshape(-1, self.in_features), "none" if approximate is None else "gelu"
            made = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, after, [], approximate or "")
            return made.view(*input.shape[:-1], self.out_features)
        made = super().forward(input)
        return made if approximate is None else F.gelu(made, approximate=approximate)


def gelu_mlp(hidden_states: Tensor, fc1: nn.Module, fc2: nn.Module, approximate: str) -> Tensor:
    """fc2(gelu(fc1(x))).

    Args:
        hidden_states: (..., features of `fc1`).
        fc1, fc2: `FusedLinear`, or what stands in its place, such as an adapter around one.
        approximate: `"tanh"` or `"none"`, of GELU.
    """
    if type(fc1) is not FusedLinear:
        return fc2(F.gelu(fc1(hidden_states), approximate=approximate))
    if type(fc2) is not FusedLinear or is_hooked(fc1) or is_hooked(fc2) or not _is_fused(fc1, hidden_states):
        return fc2(fc1(hidden_states, approximate))
    rows = hidden_states.reshape(-1, fc1.in_features)
    made = torch.cat([fc2(fc1(piece, approximate)) for piece in rows.split(ROWS)])
    return made.view(*hidden_states.shape[:-1], fc2.out_features)


def _is_fused(linear: nn.Linear, hidden_states: Tensor) -> bool:
    """Whether oneDNN computes the product and GELU at once: dense weights on a CPU, no gradients, nothing compiled."""
    if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or not hidden_states.numel():
        return False
    if not _HAS_ONEDNN or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_whole():
        return False
    weight = linear.weight
    is_dense = (
        type(weight.data) in (Tensor, FakeTensor)
        and weight.device.type == "cpu"
        and weight.dtype == hidden_states.dtype
    )
    return is_dense and (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
