"""What a run is bound to, written beside it: its settings, tables of clips, and weights that it does not train."""

import json
from pathlib import Path
from typing import Any

from opensora.adapters.reading import adapter_hash
from opensora.checkpoints.file_hashes import read_hash
from opensora.containers.runs import HISTORY, RECIPE, read_history
from opensora.contents import read_object
from opensora.distributed.mesh import Mesh
from opensora.errors import OpenSoraError
from opensora.manifest import tables_of
from opensora.overrides import apply_overrides
from opensora.settings import flatten, save_settings, to_dict
from opensora.training.config import LoopConfig, Recipe
from opensora.training.frozen_parts import fingerprint_of_frozen
from opensora.training.task import TrainingSetup
from opensora.weights import fingerprint

FREE_TO_CHANGE = (
    "loop.log_every",
    "loop.checkpoint_every",
    "loop.preview_every",
    "loop.keep_checkpoints",
    "loop.microbatches",
    "loop.activation_checkpointing",
    "loop.sharding",
    "loop.sequence_parallel",
    "loop.prefetch",
    "loop.trackers",
    "loop.peak_tflops",
    "objective.preview",
    "objective.export_dtype",
    "objective.diffusion.sampler",
    "objective.data.num_workers",
    "objective.defaults",
)
"""Settings, and groups of settings, that do not decide the weights, or only with how many ranks there are."""

RECORDED_WHEN_CHANGED = (
    "loop.steps",
    "loop.optimizer.lr",
    "loop.optimizer.muon_lr",
    "loop.optimizer.betas",
    "loop.optimizer.eps",
    "loop.optimizer.weight_decay",
    "loop.optimizer.warmup_steps",
    "loop.optimizer.decay",
    "loop.critic.lr",
    "loop.critic.muon_lr",
    "loop.critic.betas",
    "loop.critic.eps",
    "loop.critic.weight_decay",
    "loop.critic.warmup_steps",
    "loop.critic.decay",
    "loop.ema_decay",
    "loop.max_grad_norm",
    "loop.max_bad_steps",
    "loop.precision",
    "loop.compile",
)
"""Settings that decide the steps to come and not those that were done: free to change, and kept in `HISTORY`."""

FROZEN = "frozen.json"
_FROZEN_PART = "the frozen part of what is trained"
_MOST_CHANGES = 3

Changes = dict[str, tuple[Any, Any]]
"""Setting -> what it was, and what it is now."""


def record_recipe(recipe: Recipe, path: Path, mesh: Mesh) -> tuple[bool, Changes]:
    """Writes the recipe beside a new run, or holds it against the one that is there.

    Returns:
        Whether the run is new, and what has changed of `RECORDED_WHEN_CHANGED`. What is left of a run that never wrote
        a checkpoint is taken away.

    Raises:
        OpenSoraError: a setting has changed that decided the weights as they are.
    """
    changes: Changes = {}
    is_new = not any((path.parent / "checkpoints").glob("step-*"))  # nothing was learnt, so nothing to hold to
    if not is_new and path.exists():
        before, now = flatten(read_object(path)), flatten(to_dict(recipe))
        changed = sorted(k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE_TO_CHANGE))
        changes = {k: (before.get(k), now.get(k)) for k in changed if k in RECORDED_WHEN_CHANGED}
        if fixed := [k for k in changed if k not in changes]:
            raise _other_settings(path.parent, fixed, before, now)
    mesh.wait()
    if mesh.is_first and (is_new or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_new:
            for left in (FROZEN, HISTORY, "cache/latent_space.json"):  # measured and noted with other settings
                (path.parent / left).unlink(missing_ok=True)
        save_settings(recipe, path)
    return is_new, changes


def _other_settings(folder: Path, fixed: list[str], before: dict[str, Any], now: dict[str, Any]) -> OpenSoraError:
    if "name" in fixed:
        return OpenSoraError(
            f"{folder} holds a run of the recipe {before.get('name')}, not of {now.get('name')}; give another `output`"
        )
    values = ", ".join(f"{k}={now.get(k)} (was {before.get(k)})" for k in fixed[:_MOST_CHANGES])
    values += f" and {len(fixed) - _MOST_CHANGES} more" if len(fixed) > _MOST_CHANGES else ""
    return OpenSoraError(
        f"{folder} holds a run with other settings: {values}; use them, or train on from its weights in another "
        f"`output` with objective.init_from={folder}"
    )


def record_resumed(recipe: Recipe, folder: Path, step: int, changes: Changes, mesh: Mesh) -> None:
    """Writes the settings that a run goes on with, and since which step."""
    if not mesh.is_first:
        return
    if changes:
        add_to_history(folder, {"step": step, "changed": {name: list(values) for name, values in changes.items()}})
    save_settings(recipe, folder / RECIPE)


def add_to_history(folder: Path, entry: dict[str, Any]) -> None:
    """Notes what happened to a run: settings that changed, models that were exported."""
    save_settings([*read_history(folder), entry], folder / HISTORY)


def previous_loop(loop: LoopConfig, changes: Changes) -> LoopConfig:
    """The loop as it was before the changes."""
    overrides = [f"{name.removeprefix('loop.')}={json.dumps(before)}" for name, (before, _) in changes.items()]
    return apply_overrides(loop, overrides)


def changes_in_words(changes: Changes, step: int) -> list[str]:
    """What has changed, one sentence each."""
    return [f"{name}={now} from step {step} on (was {before})" for name, (before, now) in changes.items()]


def record_frozen(recipe: Recipe, setup: TrainingSetup, path: Path, mesh: Mesh) -> None:
    """Writes hashes of what a run uses and does not change, or holds them against those that are there.

    These are the weights that are not trained, and the tables and the adapter that its settings name.

    Raises:
        OpenSoraError: something has changed since.
    """
    if not mesh.is_first:
        return
    now = {name: fingerprint(network.state_dict()) for name, network in setup.frozen.items()}
    if any(not parameter.requires_grad for parameter in setup.task.module.parameters()):
        now[_FROZEN_PART] = setup.frozen_fingerprint or fingerprint_of_frozen(setup.task.module)
    for name, value in flatten(to_dict(recipe)).items():
        if name.endswith(".manifest") and value and not name.startswith(FREE_TO_CHANGE):
            tables = [table for table, _ in tables_of(value) if table.is_file()]
            now |= {name if len(tables) == 1 else f"{name} {table}": read_hash(table) for table in tables}
        if name.endswith(".init_adapter") and value:
            now[name] = adapter_hash(value)
    if path.exists():
        before = read_object(path)
        if changed := sorted(name for name in now if before.get(name) != now[name]):
            raise OpenSoraError(
                f"{path.parent} holds a run that began with other contents of: {', '.join(changed)}; "
                "give back the files it began with, or another `output`"
            )
        return
    save_settings(now, path)
