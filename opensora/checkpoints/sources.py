"""Where the parts of a model lie: found by a bundled name, a published name or a folder, before anything is loaded."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.checkpoints import hub
from opensora.checkpoints.published import (
    BUNDLED,
    PUBLISHED,
    PublishedModel,
    component_folders,
    published_name,
    unknown_model,
)
from opensora.checkpoints.weights import PICKLES, WEIGHT_SUFFIXES, read_object, read_pickle, weight_files
from opensora.errors import OpenSoraError

PIPELINE_CLASS = "OpenSoraPipeline"
PIPELINE_INDEX = "model_index.json"

_TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class PublishedSource:
    """A published model whose parts are all on this machine.

    Attributes:
        name: of the model, in full.
        model: its entry in the table.
        paths: part -> folder or file.
        given: parts that the caller put in place of the published ones.
    """

    name: str
    model: PublishedModel
    paths: dict[str, Path]
    given: frozenset[str]


def find_published(
    name: str, components: Mapping[str, str | Path] | None = None, *, download: bool = False
) -> PublishedSource:
    """The parts of a published model, each from the local cache of the Hub or from a path.

    Args:
        name: in full or short.
        components: part -> path that takes its place. A text encoder's folder that holds a tokenizer brings that too.
        download: fetch what is not there.

    Raises:
        OpenSoraError: an unknown name or part, a path that does not exist, or parts that are not there: the message
            names each, its size and how to fetch it.
    """
    full_name = published_name(name)
    if full_name is None:
        raise unknown_model(name)
    model = PUBLISHED[full_name]
    paths = _check_components(components, model.parts)
    encoder = paths.get("text_encoder")
    if (
        encoder is not None
        and "tokenizer" not in paths
        and any((encoder / file).is_file() for file in _TOKENIZER_FILES)
    ):
        paths["tokenizer"] = encoder
    given = frozenset(paths)
    missing: list[str] = []
    for part_name, part in model.parts.items():
        if part_name in given:
            continue
        cached = hub.look_up(part)
        if not cached.complete and download:
            cached = hub.download(part)
        path = hub.part_path(part, cached)
        if path is None:
            missing.append(part_name)
        else:
            paths[part_name] = path
    if missing:
        raise _incomplete(full_name, model, missing)
    return PublishedSource(full_name, model, paths, given)


def _check_components(components: Mapping[str, str | Path] | None, names: Iterable[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    known = list(names)
    for name, given in (components or {}).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OpenSoraError(f"unknown component {name!r}; {hint}")
        paths[name] = Path(given).expanduser()
        if not paths[name].exists():
            raise OpenSoraError(f"{given}, given as {name}, does not exist")
    return paths


def _incomplete(name: str, model: PublishedModel, missing: list[str]) -> OpenSoraError:
    parts = [(part_name, model.parts[part_name]) for part_name in missing]
    listed = ", ".join(
        f"{part_name} ({part.repository}, {hub.gigabytes(part.size_bytes)})" for part_name, part in parts
    )
    commands = "; ".join(dict.fromkeys(hub.fetch_command(part) for _, part in parts))
    total = hub.gigabytes(sum(part.size_bytes for _, part in parts))
    return OpenSoraError(
        f"{name} is not complete on this machine, missing: {listed}; fetch about {total} with `download`, "
        f"or by: {commands}"
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a bundled model or of a path.

    Raises:
        OpenSoraError: no such model (the nearest known name is given), not a folder, or a folder without a pipeline.
    """
    known = BUNDLED.get(str(name_or_path))
    folder = Path(name_or_path).expanduser() if known is None else known.folder
    if folder.is_file():
        # A lone file of weights is refused in any case; one that carries code deserves to be called by its name.
        if folder.suffix in PICKLES:
            read_pickle(folder)
        raise OpenSoraError(
            f"{folder} is a file; a model is a folder with a {PIPELINE_INDEX} and all its components, or a published "
            "model in which this file takes the place of a part (components)"
        )
    if not folder.is_dir():
        if known is not None:
            raise OpenSoraError(f"the bundled model {name_or_path!r} is not installed: {folder} is missing; reinstall")
        raise unknown_model(str(name_or_path))
    if not (folder / PIPELINE_INDEX).is_file():
        raise OpenSoraError(f"{folder} holds no {PIPELINE_INDEX}; expected the folder of a pipeline")
    return folder


def find_folders(
    folder: Path, names: Iterable[str], components: Mapping[str, str | Path] | None = None
) -> dict[str, Path]:
    """Component name -> path, in the folder of a pipeline.

    Args:
        folder: of the pipeline.
        names: of its components.
        components: component -> path that takes its place.

    Raises:
        OpenSoraError: an unknown component, or a path that does not exist.
    """
    names = list(names)
    return component_folders(folder, names) | _check_components(components, names)


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says: components as [module, class], and the pipeline's defaults.

    Raises:
        OpenSoraError: unreadable, or the index of another pipeline.
    """
    index = read_object(folder / PIPELINE_INDEX)
    named = index.get("_class_name")
    class_name = named[-1] if isinstance(named, list) and named else named  # [module in the folder, class], or a class
    if class_name != PIPELINE_CLASS:
        raise OpenSoraError(f"{folder / PIPELINE_INDEX} describes a {class_name}; expected an {PIPELINE_CLASS}")
    return index | {"_class_name": class_name}


def is_component(value: Any) -> bool:
    """Whether an entry of `model_index.json` names a component: [module, class]."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


# --- the hash ---------------------------------------------------------------------------------------------------------


def model_hash(name_or_path: str | Path, components: Mapping[str, str | Path] | None = None) -> str:
    """SHA-256 over what decides the frames: weights and configuration of every component, by name and content.

    The defaults in `model_index.json` are left out: they are settings of a call, recorded as such.

    Args:
        name_or_path: as for `load_pipeline`.
        components: likewise.

    Returns:
        64 hexadecimal digits.

    Raises:
        OpenSoraError: there are no weights, or not all of them.
    """
    if published_name(str(name_or_path)) is not None:
        return _published_hash(find_published(str(name_or_path), components))
    folder = find_model(name_or_path)
    names = [name for name, value in read_index(folder).items() if is_component(value) and not name.startswith("_")]
    files: dict[str, Path] = {}
    for name, part in find_folders(folder, names, components).items():
        if part.is_file():
            files[f"{name}/{part.name}"] = part
        elif part.is_dir():
            files |= {f"{name}/{path.name}": path for path in part.iterdir() if path.is_file()}
    files = {name: path for name, path in files.items() if name.endswith((*WEIGHT_SUFFIXES, ".json", ".model"))}
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in files):
        raise OpenSoraError(f"{folder} holds no weights to take a hash of")
    return _hash({name: _file_hash(path) for name, path in files.items()})


def _published_hash(source: PublishedSource) -> str:
    """Files of every part, and what the table says of those that are the published ones."""
    model = source.model
    told: dict[str, Any] = {"scheduler": [model.scheduler_class, dict(model.scheduler_config)]}
    hashes: dict[str, str] = {}
    for name, path in source.paths.items():
        part = model.parts[name]
        if name in source.given:
            files = _described_files(path) if name == "tokenizer" else [*weight_files(path), *_described_files(path)]
        else:
            files = list(hub.look_up(part).files)
            told[name] = [part.class_name, dict(part.config)]
        for file in files:
            hashes[f"{name}/{file.name}"] = hub.content_hash(file) or _file_hash(file)
    hashes["table"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return _hash(hashes)


def _described_files(path: Path) -> list[Path]:
    """Configuration and vocabulary in a component's folder; of a lone file, nothing but itself if it is one."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return [file for file in files if file.suffix in (".json", ".model")]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(hashes: Mapping[str, str]) -> str:
    total = hashlib.sha256()
    for name, digest in sorted(hashes.items()):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()
