"""The training loop: prepare, loss, backward, clip, finite?, step, average, log, checkpoint.

A run lives in one folder: `recipe.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `previews/`, `cache/` and, at
the end, `model/`. Starting a run in a folder that holds checkpoints resumes it; because every draw depends on
a batch's place in the run alone, the resumed run's weights equal an uninterrupted run's bit for bit on CPU.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opensora.distributed.seeding import Draw, derive_seed
from opensora.errors import OpenSoraError
from opensora.files import use_default_permissions
from opensora.settings import read_json, save_settings, to_dict
from opensora.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from opensora.training.config import Recipe
from opensora.training.ema import EMA
from opensora.training.metrics import Metrics
from opensora.training.optimizer import Optimizer, clip_gradients, learning_rate_factor


class Trainer:
    """Runs a recipe in a folder.

    Args:
        recipe: what to train and how.
        folder: the run's folder; resumes from its newest checkpoint if it has one.
        device: "cpu", "cuda", "mps".
        on_step: called after every step with (step, steps, figures) to show progress.

    Raises:
        OpenSoraError: the folder holds a run of another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: str = "cpu",
        on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self.loop, self.folder, self.device, self.on_step = recipe.loop, folder, device, on_step
        torch.manual_seed(recipe.loop.seed)  # for the weights that a network begins with
        self.objective = recipe.objective.build(device)
        self.module = self.objective.module.to(device)
        if self.loop.compile:
            for block in self.objective.blocks():
                block.compile()
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.optimizer = Optimizer(named, self.objective.not_matrices, self.loop.optimizer)
        self.ema = EMA(self.module, self.loop.ema_decay)
        self.step = 0
        self.bad_steps = 0
        self.stop_requested = False
        record_recipe(recipe, folder / "recipe.json")
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints:
            self.load_state_dict(load_checkpoint(checkpoints[-1]))

    def run(self) -> Path:
        """Trains to the last step and exports the averaged weights.

        Returns:
            Folder of the exported model.

        Raises:
            OpenSoraError: `max_bad_steps` non-finite steps in a row.
            KeyboardInterrupt: `stop_requested` was set; the step under way was finished and saved.
        """
        loop = self.loop
        self.objective.set_up(self.folder / "cache")
        metrics = Metrics(self.folder, self.step)
        started = time.perf_counter()
        while self.step < loop.steps:
            terms = self.accumulate_gradients()
            grad_norm = float(clip_gradients(self.parameters, loop.max_grad_norm))
            self.update_weights(grad_norm)
            self.step += 1

            seconds, started = time.perf_counter() - started, time.perf_counter()
            figures = {**terms, "grad_norm": grad_norm, "step_s": seconds, "bad_steps": float(self.bad_steps)}
            if self.on_step is not None:
                self.on_step(self.step, loop.steps, figures)
            if self.due(loop.log_every) or self.step == loop.steps:
                metrics.write(self.step, figures)
            if self.due(loop.preview_every):
                metrics.write(self.step, self.preview())
            if self.due(loop.checkpoint_every) or self.step == loop.steps or self.stop_requested:
                self.checkpoint()
            if self.stop_requested:
                metrics.close()
                raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")
        metrics.close()
        return self.export()

    def due(self, every: int) -> bool:
        """Whether what happens `every` so many steps (0 = never) happens now."""
        return every > 0 and self.step % every == 0

    def accumulate_gradients(self) -> dict[str, float]:
        """Forward and backward of every microbatch; returns the mean of each loss term."""
        self.module.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for microbatch in range(self.loop.microbatches):
            draw = Draw(self.loop.seed, self.step * self.loop.microbatches + microbatch, self.step)
            torch.manual_seed(derive_seed(self.loop.seed, "layers", draw.position))  # dropout and its like
            batch = self.objective.prepare(draw)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.loop.precision == "bf16"):
                terms = self.objective.loss(batch, draw)
            minimised = [term.mean() for name, term in terms.items() if not name.startswith("_")]
            loss = torch.stack(minimised).sum() / self.loop.microbatches
            loss.backward()
            means = {name.lstrip("_"): float(term.detach().mean()) for name, term in terms.items()}
            for name, mean in {"loss": float(loss.detach()) * self.loop.microbatches, **means}.items():
                sums[name] = sums.get(name, 0.0) + mean / self.loop.microbatches
        return sums

    def update_weights(self, grad_norm: float) -> None:
        """One optimiser step, or none if the gradient is not finite."""
        if grad_norm != grad_norm or grad_norm == float("inf"):
            self.bad_steps += 1
            if self.bad_steps >= self.loop.max_bad_steps:
                raise OpenSoraError(
                    f"{self.bad_steps} steps in a row up to step {self.step} had a non-finite gradient; "
                    "start again in another --output with a lower learning rate or loop.precision=fp32"
                )
            return
        self.bad_steps = 0
        self.optimizer.step(learning_rate_factor(self.step, self.loop.steps, self.loop.optimizer))
        self.ema.update(self.module, self.step)

    def preview(self) -> dict[str, float]:
        """Samples of the averaged weights, written to `previews/`."""
        return self.with_average(lambda: self.objective.preview(self.folder / "previews", self.step))

    def export(self) -> Path:
        """Writes the averaged weights as `model/`."""
        folder = self.folder / "model"
        self.with_average(lambda: self.objective.export(folder))
        use_default_permissions(folder)
        return folder

    def with_average(self, action: Callable[[], Any]) -> Any:
        """Runs `action` while the module holds its averaged weights, in evaluation mode."""
        self.ema.swap(self.module)
        self.module.eval()
        try:
            with torch.no_grad():
                return action()
        finally:
            self.module.train()
            self.ema.swap(self.module)

    def checkpoint(self) -> Path:
        return save_checkpoint(self.folder / "checkpoints", self.step, self.state_dict(), self.loop.keep_checkpoints)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.bad_steps = state["step"], state["bad_steps"]


FREE_TO_CHANGE = (
    "loop.log_every",
    "loop.checkpoint_every",
    "loop.preview_every",
    "loop.keep_checkpoints",
    "objective.num_previews",
    "objective.preview",
    "objective.export_dtype",
    "objective.diffusion.sampler",
    "objective.defaults",
)
"""Settings, and groups of settings, that do not decide the weights."""


def record_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe beside the run, or holds it against the one that is there: a resumed run must be the same run.

    Raises:
        OpenSoraError: a setting that decides the weights has changed.
    """
    if path.exists():
        before, now = flatten(read_json(path)), flatten(to_dict(recipe))
        changed = sorted(k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE_TO_CHANGE))
        if changed:
            values = ", ".join(f"{k}={now.get(k)} (was {before.get(k)})" for k in changed)
            raise OpenSoraError(
                f"{path.parent} holds a run with other settings: {values}; use them, or another --output"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_settings(recipe, path)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one: {"loop.steps": 100, ...}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
