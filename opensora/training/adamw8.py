"""AdamW (Loshchilov & Hutter, 2019) whose two moments take eight bits each, with a factor for every block of a row.

A code c of L levels stands for (c / L)^p times the largest of its block: p = 2 for the first moment, signed, and 4 for
the second, so small values are told from each other as well as large ones are (Dettmers et al., 2022, use a table for
that). Rounding to the nearest code would keep a moment where it is whenever a step changes it by less than half the way
to the next one, which is most of them. So what is rounded up differs from step to step: an additive recurrence (Weyl,
1916) moves the threshold of every column, and a moment is on average what it should be. The threshold depends on the
step and the column alone, so a resumed run goes on bit for bit, and any number of ranks, each with its rows, does the
same.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora.distributed.shards import own_part

BLOCK = 128
"""Columns that share a factor, of matrices whose columns it divides; otherwise those of a row do."""
BYTES_OF_A_NUMBER = 2 + 2 * 4 / BLOCK
"""That both moments take."""
_TINY = torch.finfo(torch.float32).tiny
_TURNS = (0.6180339887498949, 0.7548776662466927)
"""Of the threshold from one step and one column to the next, in turns: irrational numbers far from fractions."""


class Code(NamedTuple):
    """How numbers are written in eight bits.

    Attributes:
        dtype: of the codes.
        levels: L.
        power: p.
        least: of the codes of numbers that are not 0.
    """

    dtype: torch.dtype
    levels: int
    power: int
    least: int

    def decode(self, codes: Tensor, factors: Tensor) -> Tensor:
        """The numbers, float32 (rows, columns).

        Args:
            codes: (rows, columns).
            factors: (rows, blocks).
        """
        numbers = codes.unflatten(1, (factors.shape[1], -1)).float() / self.levels
        return (numbers * numbers.abs() ** (self.power - 1) * factors[..., None]).flatten(1)

    def encode(self, numbers: Tensor, factors: Tensor, codes: Tensor, thresholds: Tensor) -> None:
        """Writes numbers into `codes` and `factors`, shaped as in `decode`.

        Args:
            numbers: (rows, columns), of any sign if the codes have one.
            factors: written to.
            codes: written to.
            thresholds: (columns,) in [0, 1): how near the code above a number must be to get it, rather than the one
                below, as a share of the way between what the two stand for.
        """
        blocks = numbers.unflatten(1, (factors.shape[1], -1))
        sizes = blocks.abs()
        torch.amax(sizes, dim=-1, out=factors)
        shares = sizes / factors.clamp(min=_TINY)[..., None]
        below = (shares ** (1 / self.power) * self.levels).floor().clamp_(max=self.levels - 1)
        low, high = ((code / self.levels) ** self.power for code in (below, below + 1))
        chosen = below + ((shares - low) / (high - low) > thresholds.view(blocks.shape[1:]))
        codes.copy_((chosen.maximum(self.least * sizes.sign()) * blocks.sign()).flatten(1))


MOMENTS = {"exp_avg": Code(torch.int8, 127, 2, least=0), "exp_avg_sq": Code(torch.uint8, 255, 4, least=1)}
"""What is divided by does not become 0, which would move a weight by far too much."""


class AdamW8(torch.optim.Optimizer):
    """AdamW whose state is `step` and, for each moment, codes and factors (`exp_avg` and `exp_avg_factors`, ...).

    Args:
        parameters: of two dimensions or more, or groups of them; sharded ones along the first.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: what is added to the denominator.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step, sharded as the parameter is."""
        rows = parameter.detach().flatten(1)
        columns = rows.shape[1]
        one_a_block = rows[:, : 1 if columns % BLOCK else columns // BLOCK]
        state = {"step": torch.zeros(())}
        for name, code in MOMENTS.items():
            state[name] = torch.zeros_like(rows, dtype=code.dtype)
            state[f"{name}_factors"] = torch.zeros_like(one_a_block, dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self.empty_state(parameter)
                self._update(own_part(parameter), own_part(parameter.grad), self.state[parameter], group)

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        rows = grad.flatten(1).float()
        stored = {name: (own_part(state[name]), own_part(state[f"{name}_factors"])) for name in MOMENTS}
        first, second = (code.decode(*stored[name]) for name, code in MOMENTS.items())
        first.lerp_(rows, 1 - beta1)
        second.mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
        thresholds = _thresholds(step, rows)
        for (name, code), moment in zip(MOMENTS.items(), (first, second), strict=True):
            codes, factors = stored[name]
            code.encode(moment, factors, codes, thresholds)
        size = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_((first / size).mul_(group["lr"] / (1 - beta1**step)).view(weight.shape))


def _thresholds(step: int, rows: Tensor) -> Tensor:
    of_step, of_column = _TURNS
    columns = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device)
    return ((columns * of_column + step * of_step) % 1).float().clamp(max=1 - 2**-24)
