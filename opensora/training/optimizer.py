"""Optimisers and the learning-rate schedule.

Muon (Jordan et al., 2024: momentum, then the nearest orthogonal matrix by Newton-Schulz) takes the hidden matrices,
AdamW everything else: embeddings, first and last layers, norms and biases. On the small models of this package Muon
needs about a quarter of AdamW's samples for the same loss.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        matrices: optimiser of the hidden matrices (convolution kernels count as (out, in*k) matrices).
        muon_lr: peak learning rate of Muon.
        lr: peak learning rate of AdamW.
        betas: AdamW's decay rates.
        eps: what AdamW adds to its denominator.
        weight_decay: decoupled weight decay of matrices (vectors are never decayed).
        warmup_steps: linear warm-up from 0.
        decay: fraction of the run, at its end, over which the rate falls to 0 along a cosine.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    muon_lr: float = 0.02
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 50
    decay: float = 0.4


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Multiple of the peak rate at `step` of `steps`: linear warm-up, constant, cosine to zero."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay_steps = config.decay * steps
    remaining = steps - step
    if remaining >= decay_steps:
        return warmup
    return warmup * 0.5 * (1 - math.cos(math.pi * remaining / decay_steps))


class Optimizer:
    """Muon on the hidden matrices and AdamW on the rest, stepped as one.

    Args:
        named_parameters: trainable parameters by name.
        not_matrices: names whose parameters AdamW takes although they are matrices (first and last layers).
        config: rates and decay.
    """

    def __init__(
        self, named_parameters: list[tuple[str, nn.Parameter]], not_matrices: set[str], config: OptimizerConfig
    ) -> None:
        use_muon = config.matrices == "muon"
        self.matrices = [p for n, p in named_parameters if use_muon and p.ndim >= 2 and n not in not_matrices]
        chosen = {id(p) for p in self.matrices}
        others = [p for _, p in named_parameters if id(p) not in chosen]
        # torch's Muon takes matrices only: it sees each kernel through a view that shares its storage.
        self.matrix_views = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self.matrices]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if groups:
            self.parts["adamw"] = torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
            )
        if self.matrix_views:
            self.parts["muon"] = torch.optim.Muon(
                self.matrix_views, lr=config.muon_lr, momentum=0.95, nesterov=True, weight_decay=config.weight_decay
            )
        self.peak_rates = {"adamw": config.lr, "muon": config.muon_lr}

    def step(self, factor: float) -> None:
        """Updates every weight at `factor` times its peak rate."""
        for view, parameter in zip(self.matrix_views, self.matrices, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self.peak_rates[name] * factor
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients in place to a global norm of at most `max_norm`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
