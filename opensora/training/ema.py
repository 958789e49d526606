"""Exponential moving average of the trained weights, the copy that is sampled from and shipped."""

import torch
from torch import Tensor, nn

from opensora.distributed.shards import own_part


class EMA:
    """Average of a module's trainable parameters in float32, sharded as they are.

    Args:
        module: the module being trained.
        decay: weight of the old average, in [0, 1).
        warmup: begin at min(decay, (1 + step) / (10 + step)), so that early averages follow the weights.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.average = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the weights of `module` after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        weights = dict(module.named_parameters())
        averages = [own_part(average) for average in self.average.values()]
        torch._foreach_lerp_(averages, [own_part(weights[n].detach()) for n in self.average], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average
