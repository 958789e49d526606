"""A training task of milliseconds: a small residual network learns a fixed linear map."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from opensora.distributed.seeding import BatchKey
from opensora.training.config import LoopConfig, Recipe
from opensora.training.optimizer import OptimizerConfig
from opensora.training.task import Critic, Partition, Preview, TrainingData, TrainingSetup, TrainingTask
from opensora.training.trainer import Trainer


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


class KeysSeen(TrainingData):
    """Remembers what it is to prefetch."""

    def __init__(self) -> None:
        self.prefetched: list[BatchKey] = []

    def prefetch(self, keys) -> None:
        self.prefetched += keys

    def figures(self):
        return {"unreadable": 2.0}


class Regression(TrainingTask):
    def __init__(self, config: "RegressionConfig") -> None:
        self.network = Network(config.dropout)
        self.module = nn.ModuleDict({"network": self.network})  # never called itself, as those of real tasks
        self.config = config
        self.prepared: list[BatchKey] = []
        self.critic = None
        if config.critic:
            self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def prepare(self, key: BatchKey) -> torch.Tensor:
        self.prepared.append(key)
        x = torch.randn(8, 6, generator=key.generator("x"))
        return x * float("nan") if key.step in self.config.poison_steps else x

    def loss(self, batch, key):
        prediction = self.network(batch)
        terms = {"mse": (prediction - batch).square().mean(dim=1), "_norm": batch.norm(dim=1)}
        if self.critic is not None:
            self.critic.requires_grad_(False)
            terms["deceive"] = -0.1 * self.critic(prediction).squeeze(1)
            self.critic.requires_grad_(True)
        return terms

    def groups(self, batch):
        return {"bucket": ["first" if x[0] > 0 else "second" for x in batch]}

    def export(self, module: nn.ModuleDict, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), folder / "weights.pt")


class RegressionCritic(Critic):
    def __init__(self, task: Regression, critic: nn.Module) -> None:
        self.task, self.module = task, critic

    def loss(self, batch, key):
        with torch.no_grad():
            made = self.task.network(batch)
        return {"hinge": F.relu(1 - self.module(batch)).squeeze(1) + F.relu(1 + self.module(made)).squeeze(1)}


class SumOfOnes(Preview):
    def show(self, module: nn.ModuleDict, folder: Path, step: int) -> dict[str, float]:
        return {"preview": float(module["network"](torch.ones(1, 6)).sum())}


@dataclass(frozen=True)
class RegressionConfig:
    poison_steps: tuple[int, ...] = ()
    critic: bool = False
    dropout: float = 0.1

    def build(self, device: str) -> TrainingSetup:
        return setup_of(Regression(self))


def setup_of(task: Regression) -> TrainingSetup:
    return TrainingSetup(
        task,
        KeysSeen(),
        Partition(list(task.network.blocks)),
        not_matrices={"network.stem.weight"},
        critic=None if task.critic is None else RegressionCritic(task, task.critic),
        preview=SumOfOnes(),
        groups=task.groups,
    )


def recipe(steps: int = 12, poison_steps: tuple[int, ...] = (), **settings) -> Recipe:
    """Settings are those of the loop, and `critic`, `dropout`, `matrices` and `state_bits` of its optimiser."""
    of_objective = {name: settings.pop(name) for name in ("critic", "dropout") if name in settings}
    of_optimizer = {name: settings.pop(name) for name in ("matrices", "state_bits") if name in settings}
    optimizer = OptimizerConfig(**of_optimizer, warmup_steps=5)
    loop = {"checkpoint_every": 3, "log_every": 1, "precision": "fp32", "microbatches": 2, "optimizer": optimizer}
    objective = RegressionConfig(poison_steps, **of_objective)
    return Recipe("regression", objective, LoopConfig(steps=steps, **loop | settings))


def run_until(recipe: Recipe, folder: Path, stop_after: int | None = None) -> None:
    """A run, or its first steps; on any rank."""
    torch.set_num_threads(1)
    trainer = Trainer(recipe, folder)

    def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
        trainer.stop_requested = step == stop_after and trainer.mesh.is_first

    trainer.on_step = on_step
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert stop_after is not None


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "weights.pt", weights_only=True)


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
