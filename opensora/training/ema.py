"""Exponential moving average of the trained weights, the copy that is sampled from and shipped."""

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's trainable parameters in float32.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that early averages follow the weights.

    Args:
        module: the module being trained.
        decay: weight of the old average, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the weights of `module` after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [weights[n].detach() for n in self.average], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges average and weights in place; calling it again restores them."""
        for name, parameter in module.named_parameters():
            if name in self.average:
                kept = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(kept)
