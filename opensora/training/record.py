"""What a run is bound to, written beside it: its settings, tables of clips, and weights that it does not train."""

import hashlib
from pathlib import Path

from opensora.checkpoints.weights import fingerprint
from opensora.distributed.mesh import Mesh
from opensora.errors import OpenSoraError
from opensora.settings import flatten, read_json, save_settings, to_dict
from opensora.training.config import Recipe
from opensora.training.task import TrainingSetup

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
    "loop.peak_tflops",
    "objective.preview",
    "objective.export_dtype",
    "objective.diffusion.sampler",
    "objective.data.num_workers",
    "objective.defaults",
)
"""Settings, and groups of settings, that do not decide the weights, or only with how many ranks there are."""


FROZEN = "frozen.json"
_MOST_CHANGES = 8


def record_recipe(recipe: Recipe, path: Path, mesh: Mesh) -> bool:
    """Writes the recipe beside the run, or holds it against the one that is there.

    Returns:
        Whether the run is new. What is left of one that never wrote a checkpoint is taken away.

    Raises:
        OpenSoraError: a setting that decides the weights has changed.
    """
    is_new = not any((path.parent / "checkpoints").glob("step-*"))  # nothing was learnt, so nothing to hold to
    if not is_new and path.exists():
        before, now = flatten(read_json(path)), flatten(to_dict(recipe))
        changed = sorted(k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE_TO_CHANGE))
        if changed:
            shown = ["name"] if "name" in changed else changed[:_MOST_CHANGES]
            values = ", ".join(f"{k}={now.get(k)} (was {before.get(k)})" for k in shown)
            values += f" and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
            raise OpenSoraError(
                f"{path.parent} holds a run with other settings: {values}; use them, or another `output`"
            )
    mesh.wait()
    if mesh.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_new:
            (path.parent / FROZEN).unlink(missing_ok=True)
            (path.parent / "cache" / "latent_space.json").unlink(missing_ok=True)  # measured with other settings
        save_settings(recipe, path)
    return is_new


def record_frozen(recipe: Recipe, setup: TrainingSetup, path: Path, mesh: Mesh) -> None:
    """Writes hashes of what a run uses and does not change, or holds them against those that are there.

    These are the weights that are not trained, and the tables that its settings name.

    Raises:
        OpenSoraError: something has changed since.
    """
    if not mesh.is_first:
        return
    parameters = setup.task.module.named_parameters()
    parts = {"the frozen part of what is trained": {n: p for n, p in parameters if not p.requires_grad}}
    parts |= {name: network.state_dict() for name, network in setup.frozen.items()}
    now = {name: fingerprint(weights) for name, weights in parts.items() if weights}
    for name, value in flatten(to_dict(recipe)).items():
        if name.endswith(".manifest") and value and not name.startswith(FREE_TO_CHANGE) and Path(value).is_file():
            now[name] = hashlib.sha256(Path(value).read_bytes()).hexdigest()
    if path.exists():
        before = read_json(path)
        if changed := sorted(name for name in now if before.get(name) != now[name]):
            raise OpenSoraError(
                f"{path.parent} holds a run that began with other contents of: {', '.join(changed)}; "
                "give back the files it began with, or another `output`"
            )
        return
    save_settings(now, path)
