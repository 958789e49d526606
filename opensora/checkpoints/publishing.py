"""A model's folder, put on the Hub: checked first, in one commit, and of the folder only what the model is read from.

Whose token is used, and which server, is huggingface_hub's business (`hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.checkpoints import hub
from opensora.checkpoints.fit import PipelineReport, inspect_model
from opensora.checkpoints.folders import PIPELINE_INDEX
from opensora.checkpoints.report import OnProgress
from opensora.checkpoints.source import ModelSource
from opensora.checkpoints.wording import (
    count,
    defaults_lines,
    describe_config,
    describe_latent_space,
    describe_origin,
    describe_scheduler,
)
from opensora.containers.runs import is_checkpoint
from opensora.errors import OpenSoraError

CARD = "README.md"
_BESIDES = (CARD, "LICENSE*", "NOTICE*", "pipeline.py", "calibrations/*.json")
"""Of a folder, what this package does not need to load the model; diffusers alone needs `pipeline.py`."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        repository: "somebody/model".
        revision: branch, made from the main one if there is none; None for that.
        files: path in the repository -> file.
        card: text of the model card; None where the folder has one of its own, which is among the files.
        parts: folders of the repository that belong to the model: what is in them and not among the files goes.
        left_out: other files of the folder.
    """

    repository: str
    revision: str | None
    files: dict[str, Path]
    card: str | None
    parts: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files.values())


def prepare_upload(
    folder: Path,
    repository: str,
    *,
    revision: str | None = None,
    licence: str | None = None,
    on_progress: OnProgress | None = None,
) -> Upload:
    """Looks a folder over, weights included, and says what of it would go to the Hub. Nothing goes yet.

    Args:
        folder: of a whole model.
        repository: "somebody/model".
        revision: branch that it goes to; None for the main one.
        licence: identifier of the Hub, such as "apache-2.0", for the card; None where nothing is said.
        on_progress: told how far reading is.

    Raises:
        OpenSoraError: a name that no repository has, no whole model, or anything that `inspect_model` finds wrong.
    """
    if hub.split_revision(repository) != (repository, None):
        raise OpenSoraError(f"{repository!r} is no name of a repository; expected one such as somebody/model")
    if revision is not None and hub.split_revision(f"{repository}@{revision}") is None:
        raise OpenSoraError(f"`revision` is {revision!r}; expected the name of a branch such as v2")
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise OpenSoraError(f"`license` is {licence!r}; expected an identifier of the Hub such as apache-2.0 or other")
    if not folder.is_dir():
        what = f"{folder} is no folder" if folder.exists() else f"the folder {folder} does not exist"
        raise OpenSoraError(
            f"{what}; a model that is known by name is written into one by: opensora convert NAME FOLDER"
        )
    source = ModelSource.find(str(folder.resolve()))
    root = source.folder
    assert root is not None  # of no published model
    if is_checkpoint(root):
        raise OpenSoraError(f"{folder} is the checkpoint of a run; write it anew by: opensora convert {folder} FOLDER")
    for part in source.parts.values():
        if not part.path.is_relative_to(root):
            raise OpenSoraError(
                f"{folder} has no {part.name} of its own; write it anew, whole, by: opensora convert {folder} FOLDER"
            )
    report = inspect_model(root, on_progress=on_progress or (lambda *_: None))
    if report.problems:
        more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        raise OpenSoraError(f"nothing was uploaded, for something is wrong with {folder}: {report.problems[0]}{more}")
    assert isinstance(report, PipelineReport)
    files = {PIPELINE_INDEX: root / PIPELINE_INDEX}
    for part in source.parts.values():
        files |= {file.relative_to(root).as_posix(): file for file in part.files().values()}
    for pattern in _BESIDES:
        files |= {file.relative_to(root).as_posix(): file for file in sorted(root.glob(pattern)) if file.is_file()}
    card = (
        None
        if CARD in files
        else card_of(report, repository if revision is None else f"{repository}@{revision}", licence)
    )
    if card is None and licence is not None:
        raise OpenSoraError(f"{root / CARD} is the model's card; say the licence there, and leave out `license`")
    others = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()} - files.keys()
    return Upload(repository, revision, files, card, (*source.parts, "calibrations"), tuple(sorted(others)))


def card_of(report: PipelineReport, name: str, licence: str | None) -> str:
    """The model card: what `opensora inspect` knows of the model, and how to use it.

    Args:
        report: of the model, of which nothing is wrong.
        name: "somebody/model", or with "@revision" behind it.
        licence: see `prepare_upload`.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="opensora", pipeline_tag="text-to-video", license=licence, tags=["text-to-video", "open-sora"]
    )
    transformer, autoencoder = report.components["transformer"], report.components["autoencoder"]
    facts = {
        "transformer": f"{transformer.summary}, {count(transformer.num_parameters)} parameters",
        "autoencoder": autoencoder.summary,
        **dict(defaults_lines(report.defaults)),
        "scheduler": describe_scheduler(report.scheduler),
        "latent space": describe_latent_space(autoencoder.latent_space) if autoencoder.latent_space else "not recorded",
        "trained on": describe_origin(report.trained_on),
        **_origin(report),
        "licence": licence or "not said by who uploaded it",
        "model hash": f"`{report.sha256}`",
    }
    rows = "\n".join(f"| {name} | {_cell(text)} |" for name, text in facts.items())
    return f"""---
{data.to_yaml()}
---
# {name.partition("/")[2]}

A text-to-video model of the Open-Sora family, in the format of the Python package `opensora`.

```
opensora generate "a prompt" --model {name} --download
```

| | |
|---|---|
{rows}
"""


def _origin(report: PipelineReport) -> dict[str, str]:
    distilled = report.defaults.get("distilled_from")
    fused = [f"{adapter['name']} at {adapter['scale']:g}" for adapter in report.components["transformer"].fused]
    return {
        **({"distilled from": describe_config(distilled)} if distilled else {}),
        **({"adapters merged": ", ".join(fused)} if fused else {}),
    }


def _cell(text: Any) -> str:
    """A text within a table of Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|")


def upload(prepared: Upload, *, private: bool = False) -> str:
    """Puts it on the Hub in one commit, and returns the commit; the repository is made if there is none.

    Args:
        prepared: what goes there.
        private: nobody else may see the repository.

    Raises:
        OpenSoraError: no token, no access, no connection, or a public repository where a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, revision = prepared.repository, prepared.revision
    api = HfApi()
    # No token, no access, no connection: the last is of httpx, whichever version of it huggingface_hub has.
    refusals: Any = (OSError, HFValidationError, HfHubHTTPError.__bases__[0])
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise OpenSoraError(
                f"nothing was uploaded: {repository} is public; make it private first, or leave out `private`"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(name, str(file)) for name, file in prepared.files.items()]
        if prepared.card is not None:
            added.append(CommitOperationAdd(CARD, prepared.card.encode()))
        there = api.list_repo_files(repository, revision=revision)
        stale = [name for name in there if name.partition("/")[0] in prepared.parts and name not in prepared.files]
        operations = [*added, *(CommitOperationDelete(name) for name in stale)]
        commit = api.create_commit(repository, operations, commit_message="Upload by opensora push", revision=revision)
    except refusals as error:
        raise OpenSoraError(f"{repository} was not uploaded: {' '.join(str(error).split())}") from error
    return commit.oid
