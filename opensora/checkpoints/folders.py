"""Where models lie: bundled ones, folders of pipelines, repositories in the Hub's local cache, training runs."""

from pathlib import Path
from typing import Any

from opensora.adapters.reading import is_adapter
from opensora.checkpoints import hub
from opensora.checkpoints.published import BUNDLED, unknown_model
from opensora.containers.files import split_choice
from opensora.containers.runs import frozen_folder, is_checkpoint, resolve_run
from opensora.containers.tensors import WEIGHT_SUFFIXES, open_tensors
from opensora.contents import read_object
from opensora.errors import OpenSoraError

PIPELINE_CLASS = "OpenSoraPipeline"
PIPELINE_INDEX = "model_index.json"


def is_repository(name: str) -> bool:
    """Whether a name can only be of the Hub: "somebody/model" or "somebody/model@revision", and no such path."""
    named = hub.split_revision(name)
    return named is not None and not Path(name).exists() and not Path(named[0]).exists()


def no_such_model(name: str) -> OpenSoraError:
    """The error that says so: with the nearest known name, or, of a repository, how to fetch it."""
    if not is_repository(name):
        return unknown_model(name)
    return OpenSoraError(
        f"unknown model {name!r}: there is no such folder, and nothing of such a repository in the Hub's cache; "
        f"fetch it with `download`, or by: {hub.repository_command(name)}"
    )


def find_folder(name_or_path: str | Path, *, download: bool = False) -> Path:
    """The folder of a bundled model, of a path, or of a repository in the local cache of the Hub.

    Raises:
        OpenSoraError: no such model (the nearest known name is given), not a folder, or a folder without a pipeline.
    """
    name = str(name_or_path)
    if download and is_repository(name):
        hub.download_repository(name)
    folder = locate(name_or_path)
    if (file := split_choice(folder)[0]).is_file():
        # A lone file of weights is refused in any case; one that is something else deserves to be called by its name.
        if file.suffix in WEIGHT_SUFFIXES:
            open_tensors(file)
        raise OpenSoraError(
            f"{folder} is a file; a model is a folder with a {PIPELINE_INDEX} and all its components, or a published "
            "model in which this file takes the place of a part (components)"
        )
    if not folder.is_dir():
        if name in BUNDLED:
            raise OpenSoraError(f"the bundled model {name!r} is not installed: {folder} is missing; reinstall")
        raise no_such_model(name)
    if is_adapter(folder):
        raise OpenSoraError(
            f"{name} is an adapter; give it with `adapter`, and the model that it belongs to with `model`"
        )
    if is_checkpoint(folder) and not is_pipeline(folder):
        raise OpenSoraError(f"{name} is a checkpoint of one part alone; give it in that part's place (components)")
    if not is_pipeline(folder):
        raise OpenSoraError(f"{folder} holds no {PIPELINE_INDEX}; expected the folder of a pipeline")
    return folder


def locate(name_or_path: str | Path) -> Path:
    """The folder of a bundled model, a repository in the local cache of the Hub, or a run; other paths as they are.

    Of a training run that is its finished model or a checkpoint, see `containers.runs.resolve_run`.
    """
    name = str(name_or_path)
    if name in BUNDLED:
        return BUNDLED[name].folder
    cached = hub.snapshot(name) if is_repository(name) else None
    return cached or resolve_run(Path(name_or_path).expanduser())


def index_folder(path: Path) -> Path:
    """Where a model's `model_index.json` lies: in its folder; of a run's checkpoint among its frozen parts."""
    return frozen_folder(path) if is_checkpoint(path) else path


def is_pipeline(path: Path) -> bool:
    """Whether a path is a whole model: the folder of a pipeline, or the checkpoint of a run that trains one."""
    return (index_folder(path) / PIPELINE_INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says: components as [module, class], and the pipeline's defaults.

    Raises:
        OpenSoraError: unreadable, or the index of another pipeline.
    """
    folder = index_folder(folder)
    index = read_object(folder / PIPELINE_INDEX)
    named = index.get("_class_name")
    class_name = named[-1] if isinstance(named, list) and named else named  # [module in the folder, class], or a class
    if class_name != PIPELINE_CLASS:
        raise OpenSoraError(f"{folder / PIPELINE_INDEX} describes a {class_name}; expected an {PIPELINE_CLASS}")
    return {key: value for key, value in index.items() if not key.startswith("_")}
