"""Optimisers and the learning-rate schedule.

Muon takes the hidden matrices, AdamW everything else: embeddings, first and last layers, norms and biases. On the small
models of this package Muon needs about a quarter of AdamW's samples for the same loss.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora.distributed.shards import whole
from opensora.errors import OpenSoraError
from opensora.training.adamw8 import AdamW8
from opensora.training.muon import Muon


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
        state_bits: 8 keeps what AdamW accumulates for matrices in eight bits each, see `adamw8`; None in float32.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    muon_lr: float = 0.02
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 50
    decay: float = 0.4
    state_bits: Literal[8] | None = None

    def __post_init__(self) -> None:
        for name in ("muon_lr", "lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise OpenSoraError(f"optimizer.{name} is {getattr(self, name)}; give a number above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OpenSoraError(f"optimizer.betas are {list(self.betas)}; give two numbers in [0, 1)")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise OpenSoraError(
                f"optimizer.weight_decay is {self.weight_decay}, warmup_steps {self.warmup_steps}; give 0 or more"
            )
        if not 0 <= self.decay <= 1:
            raise OpenSoraError(f"optimizer.decay is {self.decay}; give a share of the run, from 0 to 1")
        if self.state_bits is not None and self.matrices != "adamw":
            raise OpenSoraError(
                f"optimizer.state_bits is {self.state_bits}, which is for AdamW; give optimizer.matrices=adamw, too"
            )

    def idle(self) -> dict[str, str]:
        """Settings that change nothing, and why; see `overrides.apply_overrides`."""
        return {"muon_lr": "AdamW updates all weights; its rate is lr"} if self.matrices == "adamw" else {}


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
        named_parameters: trainable parameters by name; sharded ones are updated share by share.
        not_matrices: names whose parameters AdamW takes although they are matrices (first and last layers).
        config: rates and decay.
    """

    def __init__(
        self, named_parameters: list[tuple[str, nn.Parameter]], not_matrices: set[str], config: OptimizerConfig
    ) -> None:
        self.named_parameters = dict(named_parameters)

        def is_matrix(name: str) -> bool:
            return config.matrices == "muon" and self.named_parameters[name].ndim >= 2 and name not in not_matrices

        matrices = [p for n, p in named_parameters if is_matrix(n)]
        others = [p for n, p in named_parameters if not is_matrix(n)]
        decayed = {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay}
        groups = [decayed, {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}]
        rates: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if config.state_bits == 8 and decayed["params"]:
            self.parts["adamw8"] = AdamW8([groups.pop(0)], **rates)
        if groups := [group for group in groups if group["params"]]:
            self.parts["adamw"] = torch.optim.AdamW(groups, **rates, fused=True)
        if matrices:
            self.parts["muon"] = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        self.peak_rates = {name: config.muon_lr if name == "muon" else config.lr for name in self.parts}

    def step(self, factor: float) -> None:
        """Updates every weight at `factor` times its peak rate."""
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self.peak_rates[name] * factor
            part.step()

    def state_dict(self) -> dict[str, Tensor]:
        """What was accumulated for each parameter: {"exp_avg/blocks.0.weight": ..., ...}."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.named_parameters.items()
            for part in self.parts.values()
            for key, value in part.state.get(parameter, {}).items()
        }

    def prepare_state(self, names: Iterable[str]) -> None:
        """Makes room for what `state_dict` called so, before it is read from a checkpoint.

        Names of parameters that are not trained here are left out; whoever reads the checkpoint finds them missing.
        """
        for key, _, name in (entry.partition("/") for entry in names):
            if name not in self.named_parameters:
                continue
            parameter = self.named_parameters[name]
            for part in self.parts.values():
                if not any(parameter is p for group in part.param_groups for p in group["params"]):
                    continue
                if isinstance(part, AdamW8):
                    part.state[parameter] = part.state[parameter] or part.empty_state(parameter)
                else:
                    empty = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                    part.state[parameter][key] = empty.detach()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scales gradients in place to a global norm of at most `max_norm`; returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return float(norm)
