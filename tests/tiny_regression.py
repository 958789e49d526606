"""An objective that trains in milliseconds: a small residual network learns a fixed linear map."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from opensora.distributed.seeding import BatchKey
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.task import TrainingTask


class Block(nn.Module):
    """A residual block with everything that trainers meet: matrices, vectors, dropout, attention."""

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.ones(5))  # five numbers do not divide among two or four ranks
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (1, 2, -1)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).flatten(1)
        return x + self.dropout(self.out(F.gelu(attended))) * self.scale.mean()


class Network(nn.Module):
    def __init__(self, dropout: float, dim: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(6, dim)
        self.given = nn.Linear(6, dim).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dim, dropout) for _ in range(depth))
        self.conv = nn.Sequential(nn.Unflatten(1, (3, -1)), nn.Conv1d(3, 3, 3), nn.Flatten())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x) + self.given(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.conv(hidden)


class Regression(TrainingTask):
    not_matrices = {"network.stem.weight"}

    def __init__(self, config: "RegressionConfig") -> None:
        self.network = Network(config.dropout)
        self.module = nn.ModuleDict({"network": self.network})  # never called itself, as those of real objectives
        self.config = config
        self.prefetched: list[BatchKey] = []
        self.prepared: list[BatchKey] = []
        if config.critic:
            self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def prepare(self, key: BatchKey) -> torch.Tensor:
        self.prepared.append(key)
        x = torch.randn(8, 6, generator=key.generator("x"))
        return x * float("nan") if key.step in self.config.poison_steps else x

    def prefetch(self, keys) -> None:
        self.prefetched += keys

    def loss(self, batch, key):
        prediction = self.network(batch)
        terms = {"mse": (prediction - batch).square().mean(dim=1), "_norm": batch.norm(dim=1)}
        if self.critic is not None:
            self.critic.requires_grad_(False)
            terms["deceive"] = -0.1 * self.critic(prediction).squeeze(1)
            self.critic.requires_grad_(True)
        return terms

    def critic_loss(self, batch, key):
        assert self.critic is not None
        with torch.no_grad():
            made = self.network(batch)
        return {"hinge": F.relu(1 - self.critic(batch)).squeeze(1) + F.relu(1 + self.critic(made)).squeeze(1)}

    def groups(self, batch):
        return {"bucket": ["first" if x[0] > 0 else "second" for x in batch]}

    def figures(self):
        return {"unreadable": 2.0}

    def blocks(self):
        return list(self.network.blocks)

    def preview(self, folder: Path, step: int) -> dict[str, float]:
        return {"preview": float(self.network(torch.ones(1, 6)).sum())}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), folder / "weights.pt")


@dataclass(frozen=True)
class RegressionConfig:
    poison_steps: tuple[int, ...] = ()
    critic: bool = False
    dropout: float = 0.1

    def build(self, device: str) -> Regression:
        return Regression(self)


def recipe(steps: int = 12, poison_steps: tuple[int, ...] = (), **settings) -> Recipe:
    """Settings are those of the loop, and `critic`, `dropout`, `matrices` (which optimiser takes them)."""
    of_objective = {name: settings.pop(name) for name in ("critic", "dropout") if name in settings}
    optimizer = OptimizerConfig(matrices=settings.pop("matrices", "muon"), warmup_steps=5)
    loop = {"checkpoint_every": 3, "log_every": 1, "precision": "fp32", "microbatches": 2, "optimizer": optimizer}
    objective = RegressionConfig(poison_steps, **of_objective)
    return Recipe("regression", objective, LoopConfig(steps=steps, **loop | settings))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "weights.pt", weights_only=True)


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
