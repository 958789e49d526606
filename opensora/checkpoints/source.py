"""Where a model comes from: name, folder or repository -> its parts -> the class and the keywords of each.

Said once for whoever loads a model, builds it without weights, inspects it, plans it, starts training from it or takes
its hash. Nothing is read until it is asked for but `model_index.json`.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opensora.checkpoints import hub
from opensora.checkpoints.components import (
    build_model,
    find_class,
    load_component,
    load_settings_of,
    open_component,
)
from opensora.checkpoints.file_hashes import file_hash
from opensora.checkpoints.folders import PIPELINE_INDEX, find_folder, index_folder, is_pipeline, locate, read_index
from opensora.checkpoints.key_maps import find_config
from opensora.checkpoints.published import PUBLISHED, PublishedModel, component_folders, published_name
from opensora.checkpoints.published_parts import PublishedPart
from opensora.containers.files import is_there, split_choice, weight_files
from opensora.containers.runs import described_in, is_checkpoint, read_about, resolve_run
from opensora.containers.tensors import WEIGHT_SUFFIXES
from opensora.contents import describe_value, read_object
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.format import Kind, kind_of_place
from opensora.models.identify import identify
from opensora.settings import nearest_name
from opensora.weights import read_header

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

_TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_DESCRIPTIONS = (".json", ".model")


@dataclass(frozen=True)
class Part:
    """One component of a model.

    Attributes:
        name: its place in the pipeline.
        path: its folder or file; what to call it where nothing is there.
        class_name: module and class, where the model says so; None for what stands alone.
        config: keywords of the class that the model says, in place of what the path tells.
        replaced: the path was put in place of the model's own part, so `config` holds where the path tells nothing.
        config_file: which `config` was read from, where the model has one.
        published: the entry of the table of published models that it is, if it is one.
    """

    name: str
    path: Path
    class_name: tuple[str, str] | None = None
    config: Mapping[str, Any] | None = None
    replaced: bool = False
    config_file: Path | None = None
    published: PublishedPart | None = None

    @property
    def kind(self) -> Kind:
        """What it is, whichever it is of several: "text_encoder" for "text_encoder_2"."""
        return kind_of_place(self.name)

    @cached_property
    def cls(self) -> Any:
        """Its class: as the model says, else as its tensors tell.

        Raises:
            OpenSoraError: a class that may not be a component, or tensors of no network that fits here.
        """
        if self.class_name is not None:
            return find_class(self.name, *self.class_name)
        if self.kind == "tokenizer":
            from transformers import AutoTokenizer

            return AutoTokenizer
        identity = identify(read_header(self.path, self.kind))
        if identity is None or not identity.supported or identity.kind != self.kind:
            what = "an unknown network" if identity is None else identity.summary
            raise OpenSoraError(f"{self.path} holds {what}; expected a {self.kind.replace('_', ' ')} of this family")
        return find_class(self.name, *identity.runner)

    @property
    def is_network(self) -> bool:
        """Whether it has weights; schedulers and tokenizers have settings alone."""
        return issubclass(self.cls, nn.Module)

    def keywords(self) -> dict[str, Any]:
        """Keywords of its class; of its weights, names and shapes are read at most."""
        if self.config is not None and not self.replaced:
            return dict(self.config)
        described = described_in(self.path, self.name)
        if self.class_name is not None and not self.replaced and not described.exists():
            if not is_there(self.path):
                raise OpenSoraError(f"the folder {self.path} is missing; it should hold the model's {self.path.name}")
            raise OpenSoraError(f"{described} is missing; the model's folder is incomplete, get it again")
        return find_config(self.path, self.cls, self.config)

    def build(self) -> Any:
        """The network with arbitrary numbers for weights, on the default device: without any, on torch's "meta"."""
        return build_model(self.cls, self.keywords(), self.path)

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """The network with its weights, see `load_component`."""
        config = None if self.config is None else self.keywords()
        return load_component(self.path, self.cls, dtype, config=config, **options)

    def open(self, dtype: torch.dtype, **options: Any) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """The network without its weights, and these, each read when it is asked for, see `open_component`."""
        config = None if self.config is None else self.keywords()
        return open_component(self.path, self.cls, dtype, config=config, **options)

    def load_settings(self) -> Any:
        """The scheduler or tokenizer."""
        return load_settings_of(self.path, self.cls) if self.config is None else self.cls(**self.config)

    def files(self) -> dict[str, Path]:
        """Name -> file of all that it is read from.

        Raises:
            OpenSoraError: weights that are not all there.
        """
        if self.published is not None:
            return {file.name: file for file in hub.look_up(self.published).files}
        own = {} if self.config_file is None else {self.config_file.name: self.config_file}
        if (file := split_choice(self.path)[0]).is_file():
            return {**own, self.path.name: file}
        if is_checkpoint(self.path):
            return {**own, **{file.name: file for file in weight_files(self.path)}}
        if not self.path.is_dir() and not self.is_network:
            return {}
        suffixes = _DESCRIPTIONS if self.is_network else (*_DESCRIPTIONS, ".txt")
        weights = weight_files(self.path) if self.is_network else []  # which may lie in folders below
        found = own | {file.name: file for file in self.path.iterdir() if file.is_file() and file.suffix in suffixes}
        for file in weights:
            found[file.name if file.name not in found else file.relative_to(self.path).as_posix()] = file
        return found


@dataclass(frozen=True)
class ModelSource:
    """A model before anything of it is loaded.

    Attributes:
        name: in full where it is a published one, else as it was asked for.
        parts: component -> where it lies and what it is.
        defaults: keywords of the pipeline other than its components.
        folder: its own folder; None for a published model, whose parts lie apart.
    """

    name: str
    parts: dict[str, Part]
    defaults: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def find(
        cls,
        name_or_path: str | Path,
        components: Mapping[str, str | Path] | None = None,
        *,
        download: bool = False,
        on_disk: bool = True,
    ) -> "ModelSource":
        """A model by a bundled or published name, from its folder, or from its repository on the Hub.

        Args:
            name_or_path: "toybox", "opensora-1.2", a folder with a `model_index.json`, or "somebody/model" or
                "somebody/model@revision", which lies in the local cache of the Hub.
            components: part -> folder or file that takes its place. A text encoder's folder that holds a tokenizer
                brings that too, to a published model.
            download: fetch what is not there.
            on_disk: whether the files of a published model are needed; else those that are not there are not missed.

        Raises:
            OpenSoraError: no such model, an unknown part, a path that does not exist, or parts of a published model
                that are not there: the message names each, its size and how to fetch it.
        """
        if (full_name := published_name(str(name_or_path))) is not None:
            return _find_published(full_name, components or {}, download=download, on_disk=on_disk)
        return _find_in_folder(str(name_or_path), find_folder(name_or_path, download=download), components or {})

    def pipeline(self, build: Callable[[Part], Any]) -> "OpenSoraPipeline":
        """The pipeline of the parts that are built so.

        Args:
            build: part -> component.

        Raises:
            OpenSoraError: a part that every pipeline needs is missing, or one that none has is there.
        """
        from opensora.pipeline import OpenSoraPipeline

        needed = OpenSoraPipeline.needed_components()
        parameters = inspect.signature(OpenSoraPipeline.__init__).parameters
        where = self.name if self.folder is None else self.folder / PIPELINE_INDEX
        if missing := [name for name in needed if name not in self.parts]:
            raise OpenSoraError(f"{where} names no {', '.join(missing)}; a pipeline needs all of {needed}")
        for name in OpenSoraPipeline._optional_components:
            if name in self.defaults:  # what is no [library, class] is taken for a default
                found = describe_value(self.defaults[name])
                raise OpenSoraError(f"{where}: {name} is {found}, expected [library, class] or [null, null]")
        check_keywords(OpenSoraPipeline.__init__, {**self.parts, **self.defaults}, where)
        parts = {name: build(self.parts[name]) for name in parameters if name in self.parts}
        return OpenSoraPipeline(**parts, **self.defaults)

    def hash(self) -> str:
        """SHA-256 over what decides the frames: weights and configuration of every part, by name and content.

        Every file that is loaded counts, wherever it lies. The pipeline's defaults are left out: they are settings of a
        call, recorded as such.

        Returns:
            64 hexadecimal digits.

        Raises:
            OpenSoraError: there are no weights, or not all of them.
        """
        files = {f"{part.name}/{name}": file for part in self.parts.values() for name, file in part.files().items()}
        if not any(name.endswith(WEIGHT_SUFFIXES) for name in files):
            raise OpenSoraError(f"{self.folder or self.name} holds no weights to take a hash of")
        hashes = {name: hub.content_hash(file) or file_hash(file) for name, file in files.items()}
        if self.folder is None:  # what the table says decides as well
            known = [part for part in self.parts.values() if not part.replaced]
            rows = {part.name: [".".join(part.class_name or ()), dict(part.config or {})] for part in known}
            hashes["table"] = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        listed = "".join(f"{name}\0{digest}\n" for name, digest in sorted(hashes.items()))
        return hashlib.sha256(listed.encode()).hexdigest()


def find_part(origin: str | Path, name: str, *, on_disk: bool = True) -> Part:
    """A part of a model, or what stands alone in a folder or file.

    Args:
        origin: as for `ModelSource.find`; or the part's own folder, file or repository.
        name: which part.
        on_disk: whether its files are needed.

    Raises:
        OpenSoraError: it is not there; of a published model the message says how to fetch it.
    """
    full_name = published_name(str(origin))
    if full_name is not None:
        part = ModelSource.find(full_name, on_disk=False).parts.get(name)
        if part is None:
            raise OpenSoraError(f"{full_name} has no {name}")
        entry = part.published
        if on_disk and entry is not None and hub.part_path(entry, hub.look_up(entry)) is None:
            raise OpenSoraError(
                f"the {name} of {full_name} ({entry.repository}, {hub.gigabytes(entry.size_bytes)}) is not on this "
                f"machine; fetch it by: {hub.fetch_command(entry)}"
            )
        return part
    path = locate(origin)
    if is_pipeline(path):
        part = _find_in_folder(str(origin), path, {}).parts.get(name)
        if part is None:
            raise OpenSoraError(f"{index_folder(path) / PIPELINE_INDEX} names no {name}")
        return part
    if not is_there(path):
        raise OpenSoraError(f"no {name} in {origin}; train it first, or give a model's name, its folder or its weights")
    return Part(name, path)


# --- published models -------------------------------------------------------------------------------------------------


def _find_published(name: str, components: Mapping[str, str | Path], *, download: bool, on_disk: bool) -> ModelSource:
    model = PUBLISHED[name]
    given = _check_components(components, model.parts)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        encoder = given.get(tokenizer.replace("tokenizer", "text_encoder"))
        if encoder is not None and tokenizer not in given and any((encoder / f).is_file() for f in _TOKENIZER_FILES):
            given[tokenizer] = encoder
    parts: dict[str, Part] = {}
    missing: list[str] = []
    for part_name, entry in model.parts.items():
        class_name = _split(entry.class_name)
        config = None if part_name.startswith("tokenizer") else entry.config
        if part_name in given:
            parts[part_name] = Part(part_name, given[part_name], class_name, config, replaced=True)
            continue
        cached = hub.look_up(entry)
        if not cached.complete and download:
            cached = hub.download(entry)
        path = hub.part_path(entry, cached)
        if path is None and on_disk:
            missing.append(part_name)
        parts[part_name] = Part(part_name, path or Path(entry.repository), class_name, config, published=entry)
    if missing:
        raise _incomplete(name, model, missing)
    scheduler = Part("scheduler", Path(name), _split(model.scheduler_class), model.scheduler_config)
    trained_on = {"latent_space": model.autoencoder.config["latent_space"]}
    return ModelSource(name, {**parts, "scheduler": scheduler}, {**model.defaults, "trained_on": trained_on})


def _split(class_name: str) -> tuple[str, str]:
    return class_name.rpartition(".")[0], class_name.rpartition(".")[2]


def _incomplete(name: str, model: PublishedModel, missing: list[str]) -> OpenSoraError:
    parts = {place: model.parts[place] for place in missing}
    listed = ", ".join(f"{place} ({p.repository}, {hub.gigabytes(p.size_bytes)})" for place, p in parts.items())
    commands = "; ".join(dict.fromkeys(hub.fetch_command(part) for part in parts.values()))
    total = hub.gigabytes(sum(part.size_bytes for part in parts.values()))
    return OpenSoraError(
        f"{name} is not complete on this machine, missing: {listed}; fetch about {total} with `download`, or by: "
        f"{commands}"
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _find_in_folder(name: str, folder: Path, components: Mapping[str, str | Path]) -> ModelSource:
    index = read_index(folder)
    named = {part: (entry[0], entry[1]) for part, entry in index.items() if _is_component(entry)}
    given = _check_components(components, named)
    run = read_about(folder) if is_checkpoint(folder) else None
    parts: dict[str, Part] = {}
    for part, own in component_folders(index_folder(folder), named).items():
        parts[part] = Part(part, own, named[part])
        described = own / "config.json"
        file = described if described.is_file() else None
        if part in given:
            parts[part] = Part(part, given[part], named[part], _options(file), replaced=True, config_file=file)
        elif run is not None and part in run.trained:
            parts[part] = Part(part, folder, named[part], _options(file), config_file=file)
        elif run is not None and part in run.origins:
            parts[part] = find_part(run.origins[part], part)
    defaults = {key: value for key, value in index.items() if key not in named and value != [None, None]}
    return ModelSource(name, parts, defaults, folder)


def _options(file: Path | None) -> dict[str, Any] | None:
    """The keywords in a `config.json`."""
    stored = {} if file is None else read_object(file)
    return {key: value for key, value in stored.items() if not key.startswith("_")} or None


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _check_components(components: Mapping[str, str | Path], names: Mapping[str, Any]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for name, given in components.items():
        if name not in names:
            raise OpenSoraError(f"unknown component {name!r}{nearest_name(name, names)}")
        paths[name] = resolve_run(Path(given).expanduser())
        if not is_there(paths[name]):
            raise OpenSoraError(f"{given}, given as {name}, does not exist")
    return paths
