"""Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix by Newton-Schulz.

torch's own Muon takes plain matrices. This one also takes convolution kernels, as (out, in * k) matrices, and sharded
parameters: momentum is kept in shards, only the matrix to be made orthogonal is gathered, and each rank applies its
share of the result. So ranks that share a matrix move it exactly as a single rank would.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opensora.distributed.shards import spread_like, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration drives singular values near 1 fastest."""


def orthogonalize(
    matrix: Tensor, iterations: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Nearly the nearest orthogonal matrix: singular values between 0.5 and 1.5.

    Args:
        matrix: (rows, columns).
        iterations: of Newton-Schulz.
        eps: least norm that is divided by.
        dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def hidden_matrices(network: nn.Module) -> set[str]:
    """Names of the matrices between two hidden layers: weights of the linear layers in a network's lists of blocks."""
    modules = dict(network.named_modules())
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    linear = (name for name, module in modules.items() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linear if name.startswith(lists)}


class Muon(torch.optim.Optimizer):
    """Moves each matrix by an orthogonal one.

    Args:
        parameters: of two dimensions or more; the first is the matrix's rows.
        lr: learning rate; multiplied by sqrt(rows / columns) where there are more rows.
        momentum: share of the old direction, with Nesterov's look ahead.
        weight_decay: decoupled.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                direction = whole(parameter.grad.lerp(buffer, momentum)).flatten(1)
                rows, columns = direction.shape
                update = orthogonalize(direction).to(parameter.dtype).reshape(parameter.shape)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(spread_like(update, parameter), alpha=-lr * max(1.0, rows / columns) ** 0.5)
