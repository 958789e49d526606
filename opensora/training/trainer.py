"""The training loop: prepare, loss, backward, clip, finite?, step, average, log, checkpoint.

A run lives in one folder: `recipe.json`, `frozen.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `previews/`,
`cache/` and, at the end, `model/`. Starting a run in a folder that holds checkpoints resumes it; because every draw
depends on a batch's place in the run alone, the resumed run's weights equal an uninterrupted run's bit for bit on CPU.

The same code runs in one process and in many: under `torchrun` each rank makes a `Trainer`, all of them take the same
steps, each with batches of its own, and the first one writes and speaks.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.containers.runs import FROZEN_PARTS, MODEL, RECIPE
from opensora.distributed.checkpoint import Checkpoints, newest_checkpoint, read_counters, read_names, read_tensors
from opensora.distributed.mesh import build_mesh
from opensora.distributed.seeding import BatchKey, derive_seed
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.settings import to_dict
from opensora.training.config import NO_PREVIEW, Recipe
from opensora.training.ema import EMA
from opensora.training.metrics import Means, Metrics, Work, by_group, peak_memory_gb
from opensora.training.optimizer import Optimizer, clip_gradients, learning_rate_factor
from opensora.training.parallel import Parallel, average_gradients, whole_copy, without_data, wrap_blocks
from opensora.training.record import (
    FROZEN,
    Changes,
    add_to_history,
    changes_in_words,
    previous_loop,
    record_frozen,
    record_recipe,
    record_resumed,
)
from opensora.training.trackers import check_trackers


class Trainer:
    """Runs a recipe in a folder.

    Args:
        recipe: what to train and how.
        folder: the run's folder; resumes from its newest checkpoint if it has one.
        device: "cpu", "cuda", "mps".
        on_step: called after every step with (step, steps, figures of this rank) to show progress.

    Attributes:
        step: optimiser steps done, skipped ones included.
        batches: batches drawn, by all ranks; the place in the stream of data.
        bad_steps, skipped_steps: with a non-finite gradient, in a row up to now and in all; they change no weight.
        notes: what was noticed while resuming, in sentences.

    Raises:
        OpenSoraError: the folder holds a run of another recipe, or the ranks do not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: str = "cpu",
        on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, loop = recipe, recipe.loop
        self.loop = loop
        self.notes = check_trackers(loop.trackers, folder)
        self.folder, self.device, self.on_step = folder, device, on_step
        self.mesh = build_mesh(device, loop.sequence_parallel)
        torch.manual_seed(loop.seed)  # for the weights that a network begins with
        setup = self.setup = recipe.objective.build(device)
        if loop.preview_every and setup.preview is None:
            raise OpenSoraError(f"loop.preview_every={loop.preview_every} has no effect: {NO_PREVIEW}")
        self.task, self.critic = setup.task, setup.critic
        self.module = setup.task.module.to(device)
        is_new, changes = record_recipe(recipe, folder / RECIPE, self.mesh)
        try:
            with self.mesh.first_rank_first():
                record_frozen(recipe, setup, folder / FROZEN, self.mesh)
                if self.mesh.is_first and (is_new or not (folder / FROZEN_PARTS).exists()):
                    setup.task.export_frozen(folder / FROZEN_PARTS)
                if setup.preview is not None:
                    setup.preview.check()
                setup.data.open(folder / "cache")  # while all weights are here, and those of the beginning
        except OpenSoraError:
            if is_new:  # nothing has begun: a mistake in a path must not bind the folder to it
                for name in (RECIPE, FROZEN):
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(folder / FROZEN_PARTS, ignore_errors=True)
                with contextlib.suppress(OSError):  # it holds something else
                    folder.rmdir()
            raise
        self.meta_module = without_data(self.module)
        if self.mesh.sequence is not None:
            setup.partition.split_sequences(self.mesh.sequence)
        wrap_blocks(setup.partition.blocks, loop.activation_checkpointing, loop.compile)
        self.parallel = Parallel(setup, self.mesh, loop.sharding, loop.precision)
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.optimizer = Optimizer(named, setup.not_matrices, loop.optimizer)
        self.ema = EMA(self.module, loop.ema_decay, loop.ema_warmup)
        self.critic_optimizer = None
        if self.critic is not None:
            self.critic.module.to(device)
            self.critic_optimizer = Optimizer(list(self.critic.module.named_parameters()), set(), loop.critic)
        self.step = self.batches = self.bad_steps = self.skipped_steps = 0
        self.stop_requested = False
        self.means, self.work = Means(), Work(loop.peak_tflops)
        self.checkpoints = Checkpoints(folder / "checkpoints", self.mesh, loop.keep_checkpoints)
        if self.resume():
            record_resumed(recipe, folder, self.step, changes, self.mesh)
            self.notes += [*changes_in_words(changes, self.step), *self.rates_in_words(recipe, changes)]

    def run(self) -> Path:
        """Trains to the last step and exports the averaged weights.

        Returns:
            Folder of the exported model.

        Raises:
            OpenSoraError: `max_bad_steps` non-finite steps in a row, or a checkpoint that cannot be written.
            KeyboardInterrupt: `stop_requested` was set on a rank; the step under way was finished and saved.
        """
        loop = self.loop
        with self.recorder() as write:
            while self.step < loop.steps:
                figures = self.train_step()
                self.means.add(figures)
                if self.on_step is not None:
                    self.on_step(self.step, loop.steps, figures)
                if self.due(loop.log_every) or self.step == loop.steps:
                    write(self.step, self.figures())
                stop, failed = self.mesh.any(self.stop_requested, self.checkpoints.error is not None)
                if failed:
                    self.checkpoints.wait()
                if self.due(loop.checkpoint_every) or self.step == loop.steps or stop:
                    self.checkpoint()
                if self.due(loop.preview_every):
                    write(self.step, self.preview(), self.previews())
                if stop:
                    self.checkpoints.wait()
                    raise KeyboardInterrupt(f"stopped after step {self.step}; the same command resumes there")
            self.checkpoints.wait()
        if 0 < self.step == self.skipped_steps:
            raise OpenSoraError(
                f"nothing was learnt, and no model is written: no step of {self.step} had a finite gradient; "
                "start again in another `output` with a lower learning rate or loop.precision=fp32"
            )
        return self.export()

    def train_step(self) -> dict[str, float]:
        """One step of the module, and of the critic if there is one; returns this rank's figures."""
        started, loop = time.perf_counter(), self.loop
        terms, batches = self.accumulate_gradients()
        grad_norm = clip_gradients(self.parameters, loop.max_grad_norm)
        if math.isfinite(grad_norm):
            self.bad_steps = 0
            self.optimizer.step(learning_rate_factor(self.step, loop.steps, loop.optimizer))
            self.ema.update(self.module, self.step)
            terms |= self.train_critic(batches)
        else:
            self.count_bad_step()
        self.step += 1
        self.batches += loop.microbatches * self.mesh.num_data_ranks
        step_s = time.perf_counter() - started
        self.work.seconds += step_s
        return {**terms, "grad_norm": grad_norm, "step_s": step_s, "bad_steps": float(self.bad_steps)}

    def accumulate_gradients(self) -> tuple[dict[str, float], list[tuple[Any, BatchKey]]]:
        """Forward and backward of every microbatch.

        Returns:
            The mean of each loss term, and the batches if there is a critic to see them.
        """
        loop, task = self.loop, self.task
        self.module.zero_grad(set_to_none=True)
        seen, batches, waited_s = [], [], 0.0
        for k in range(loop.microbatches):
            key = self.key(k)
            torch.manual_seed(derive_seed(loop.seed, "layers", key.position))  # dropout and its like
            before = time.perf_counter()
            self.setup.data.prefetch(self.next_keys(k))
            batch = task.prepare(key)
            waited_s += time.perf_counter() - before
            self.parallel.reduce_next(k == loop.microbatches - 1)
            groups = self.setup.groups(batch)
            with self.autocast(), self.work.counted(batch):
                terms = self.parallel.losses(task.loss, batch, key)
            total(terms, loop.microbatches).backward()
            seen.append(({name: term.detach() for name, term in terms.items()}, groups))
            if self.critic is not None:
                batches.append((batch, key))
        self.parallel.average_gradients(self.parameters)
        return {**self.read_terms(seen), "data_s": waited_s}, batches

    def train_critic(self, batches: list[tuple[Any, BatchKey]]) -> dict[str, float]:
        """One step of the critic on the batches that the module has just learnt from; returns its mean loss."""
        if self.critic is None or self.critic_optimizer is None:
            return {}
        self.critic.module.zero_grad(set_to_none=True)
        seen = []
        for batch, key in batches:
            torch.manual_seed(derive_seed(self.loop.seed, "critic", key.position))
            with self.autocast():
                terms = self.parallel.losses(self.critic.loss, batch, key)
            loss = total(terms, len(batches))
            loss.backward()
            seen.append(loss.detach())
        parameters = list(self.critic.module.parameters())
        average_gradients(parameters, self.mesh)
        grad_norm = clip_gradients(parameters, self.loop.max_grad_norm)
        if math.isfinite(grad_norm):
            self.critic_optimizer.step(learning_rate_factor(self.step, self.loop.steps, self.loop.critic))
        return {"critic_loss": float(sum(seen)), "critic_grad_norm": grad_norm}

    def key(self, ahead: int) -> BatchKey:
        """The place in the run of this rank's batch that comes `ahead` batches after the step's first."""
        position = self.batches + self.mesh.num_data_ranks * ahead + self.mesh.data_rank
        return BatchKey(self.loop.seed, position, self.step + ahead // self.loop.microbatches)

    def next_keys(self, ahead: int) -> list[BatchKey]:
        """From that batch on, as many as data are told of ahead of time."""
        keys = (self.key(k) for k in range(ahead, ahead + 1 + self.loop.prefetch))
        return [key for key in keys if key.step < self.loop.steps]

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.loop.precision == "bf16")

    def count_bad_step(self) -> None:
        """Notes a step whose gradient is not finite, and which therefore changes nothing."""
        self.bad_steps += 1
        self.skipped_steps += 1
        if self.bad_steps >= self.loop.max_bad_steps:
            raise OpenSoraError(
                f"{self.bad_steps} steps in a row up to step {self.step} had a non-finite gradient; "
                "the same command goes on from the last checkpoint: add a lower loop.optimizer.lr (and "
                "loop.optimizer.muon_lr), or loop.precision=fp32"
            )

    def read_terms(self, seen: list[tuple[dict[str, Tensor], dict[str, list[str]]]]) -> dict[str, float]:
        """The mean of each loss term over the microbatches; losses of groups go to the figures at once.

        Args:
            seen: of each microbatch, its terms, (B,) each, and the groups of its samples.
        """
        means: dict[str, float] = {}
        for terms, groups in seen:
            values = {name.lstrip("_"): term.tolist() for name, term in terms.items()}
            values["loss"] = torch.stack([term for name, term in terms.items() if is_minimised(name)]).sum(0).tolist()
            for of_sample in by_group(values["loss"], groups):
                self.means.add(of_sample)
            self.work.samples += len(values["loss"])
            for name, of_samples in values.items():
                means[name] = means.get(name, 0.0) + sum(of_samples) / len(of_samples) / len(seen)
        return means

    def due(self, every: int) -> bool:
        """Whether what happens `every` so many steps (0 = never) happens now."""
        return every > 0 and self.step % every == 0

    def figures(self) -> dict[str, float]:
        """What is logged: means since the last line over all ranks, and the state of things."""
        rate = learning_rate_factor(self.step - 1, self.loop.steps, self.loop.optimizer)
        figures = {**self.means.take(self.mesh), **self.work.take(self.mesh), "learning_rate_factor": rate}
        figures |= {"bad_steps": float(self.bad_steps), "skipped_steps": float(self.skipped_steps)}
        figures["peak_memory_gb"] = max(self.mesh.gather(peak_memory_gb(self.device)))
        for of_rank in self.mesh.gather(self.setup.data.figures())[:: self.mesh.num_sequence_ranks]:
            for name, value in of_rank.items():
                figures[name] = figures.get(name, 0.0) + value
        return figures

    @contextlib.contextmanager
    def recorder(self) -> Iterator[Callable[..., None]]:
        """Where figures are written: nowhere but on the first rank. A checkpoint under way is written to its end."""
        metrics = None
        if self.mesh.is_first:
            metrics = Metrics(self.folder, self.step, self.loop.trackers, to_dict(self.recipe))
        try:
            yield metrics.write if metrics else lambda *_: None
        finally:
            self.setup.data.cancel_prefetch()
            self.checkpoints.join()
            if metrics:
                metrics.close()

    def preview(self) -> dict[str, float]:
        """Samples of the averaged weights, written to `previews/`; its figures on the first rank."""
        preview = self.setup.preview
        if preview is None:
            return {}
        with self.averaged_module() as module:
            return {} if module is None else preview.show(module, self.folder / "previews", self.step)

    def previews(self) -> list[Path]:
        """What the preview of this step wrote."""
        return sorted((self.folder / "previews").glob(f"step-{self.step:08d}*"))

    def export(self) -> Path:
        """Writes the averaged weights as `model/`."""
        folder = self.folder / MODEL
        with self.averaged_module() as module:
            if module is not None:
                with replacing_folder(folder, overwrite=True) as written:
                    self.task.export(module, written)
                add_to_history(self.folder, {"exported": self.step})
        return folder

    @contextlib.contextmanager
    def averaged_module(self) -> Iterator[torch.nn.Module | None]:
        """A copy of the module with its averaged weights, for evaluation, on the first rank; the others wait."""
        module = whole_copy(self.meta_module, self.module, self.ema.average, self.mesh)
        try:
            with torch.no_grad():
                yield module
        finally:
            self.mesh.wait()

    def checkpoint(self) -> None:
        """Begins to write what `resume` reads."""
        per_step = self.loop.microbatches * self.mesh.num_data_ranks
        counters = {
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
            "batches": self.batches,
            "batches_per_step": per_step,
        }
        self.checkpoints.save(self.step, self.tensors(), counters)

    def resume(self) -> bool:
        """Goes on from the newest checkpoint, if there is one; returns whether there is."""
        path, damages = newest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return False
        if (done := read_counters(path)["step"]) > self.loop.steps:
            raise OpenSoraError(
                f"{self.folder} was trained for {done} steps and loop.steps={self.loop.steps} asks for fewer; give "
                f"loop.steps={done} to export it as it is, or more to train on"
            )
        names = read_names(path)
        self.optimizer.prepare_state(n.removeprefix("optimizer/") for n in names if n.startswith("optimizer/"))
        if self.critic_optimizer is not None:
            critic = (n.removeprefix("critic_optimizer/") for n in names if n.startswith("critic_optimizer/"))
            self.critic_optimizer.prepare_state(critic)
        read_tensors(path, self.tensors(), self.mesh)
        counters = read_counters(path, ("bad_steps", "skipped_steps", "batches", "batches_per_step"))
        self.step, self.batches = counters["step"], counters["batches"]
        self.bad_steps, self.skipped_steps = counters["bad_steps"], counters["skipped_steps"]
        self.notes += [f"{damage}; resuming from {path.name}" for damage in damages]
        before, now = counters["batches_per_step"], self.loop.microbatches * self.mesh.num_data_ranks
        if before != now:
            self.notes.append(f"a step now has {now} batches and had {before}; change loop.microbatches to keep it")
        return True

    def rates_in_words(self, recipe: Recipe, changes: Changes) -> list[str]:
        """Where the learning rate goes on, if that is not where it stopped: a schedule ends with the run."""
        if not changes or self.step >= self.loop.steps:
            return []
        before = previous_loop(recipe.loop, changes)
        was = learning_rate_factor(self.step, before.steps, before.optimizer)
        now = learning_rate_factor(self.step, self.loop.steps, self.loop.optimizer)
        if math.isclose(was, now, abs_tol=0.005):
            return []
        return [f"the schedule goes on at {now:.0%} of the peak learning rate; it was at {was:.0%}"]

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        parts = {
            "module": {name: value for name, value in self.module.state_dict().items() if name not in frozen},
            "average": self.ema.average,
            "optimizer": self.optimizer.state_dict(),
        }
        if self.critic is not None and self.critic_optimizer is not None:
            parts |= {"critic": self.critic.module.state_dict(), "critic_optimizer": self.critic_optimizer.state_dict()}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def is_minimised(name: str) -> bool:
    """Whether a loss term is more than a figure."""
    return not name.startswith("_")


def total(terms: Mapping[str, Tensor], num_batches: int) -> Tensor:
    """What a batch adds to the loss of a step of so many batches."""
    return torch.stack([term.mean() for name, term in terms.items() if is_minimised(name)]).sum() / num_batches
