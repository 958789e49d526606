"""Checkpoints of any format that is read, written anew as folders of this package: diffusers' layout, safetensors.

A whole model comes out of a whole model, or out of a transformer with the parts that go with it; a component out of a
component. What the weights alone cannot tell is taken from a published model, which has to be named where its shapes
are not the only ones. The result is looked at before it gets its name, so a folder that exists is right.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opensora.adapters.adapter import read_adapter
from opensora.adapters.reading import is_adapter
from opensora.checkpoints.adapters import record_fused
from opensora.checkpoints.components import find_class, load_component
from opensora.checkpoints.fit import PipelineReport, inspect_model
from opensora.checkpoints.folders import is_pipeline, locate
from opensora.checkpoints.key_maps import find_config
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import PUBLISHED, PublishedModel, published_name, unknown_model
from opensora.checkpoints.report import ComponentReport, OnProgress, published_as
from opensora.checkpoints.source import ModelSource
from opensora.errors import OpenSoraError
from opensora.files import check_empty, check_writable, remove_left_overs, replacing_folder
from opensora.models.families import format_of
from opensora.models.format import Identity, Kind
from opensora.models.identify import identify
from opensora.weights import cast_weights, fingerprint, read_header

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    output: Path,
    *,
    model: str | None = None,
    components: Mapping[str, Path] | None = None,
    adapters: Mapping[Path, float] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    on_progress: OnProgress | None = None,
) -> ComponentReport | PipelineReport:
    """Writes a model or a component as a folder of this package.

    Args:
        source: a bundled or published model's name, the folder of a model or a component, or a file of weights.
        output: the folder to be; it must not exist, or be empty.
        model: the published model whose defaults go with weights that do not tell theirs.
        components: "autoencoder", "text_encoder", "tokenizer" -> path: what makes a whole model of a transformer, or
            takes the place of a model's own.
        adapters: adapter (its file or folder) -> scale, merged into the transformer for good; its `config.json` says
            which they were, see `FUSED_KEY`.
        dtype: of the networks written; None for that of each one's file.
        max_shard_size: weights of more than this are written in several files.
        on_progress: told how far looking at the result is.

    Returns:
        The report on what was written.

    Raises:
        OpenSoraError: a source that cannot be read or that is wrong, shapes that do not suffice, or an output that is
            in the way. Nothing is written then.
    """
    check_output(output)
    if model is not None and published_name(model) is None:
        raise unknown_model(model)
    components, adapters = dict(components or {}), dict(adapters or {})
    if is_adapter(source):
        raise OpenSoraError(
            f"{source} is an adapter and no model: give the model that it belongs to, and this with `adapter` to merge "
            "them, or with `adapter` and `to` to write it for another tool"
        )
    whole = published_name(str(source)) is not None or is_pipeline(locate(source))
    if whole and model is not None:
        raise OpenSoraError(f"{source} is a whole model and knows its defaults; leave out `model`")
    if not components:  # else the parts given may be what puts a model right
        _refuse_problems(inspect_model(source).problems)
    with replacing_folder(output) as folder:
        if whole:
            _write_pipeline(str(source), folder, components, adapters, dtype, max_shard_size)
        elif components:
            name = _model_of(locate(source), model)
            parts = {"transformer": locate(source), **components}
            _write_pipeline(name, folder, parts, adapters, dtype, max_shard_size)
        else:
            _write_component(locate(source), folder, model, adapters, dtype, max_shard_size)
        report = inspect_model(folder, on_progress=on_progress or (lambda what, done, total: None))
        _refuse_problems([problem.replace(str(folder), str(output)) for problem in report.problems])
    for part in report.components.values() if isinstance(report, PipelineReport) else [report]:
        part.path = part.path.replace(str(folder), str(output))
    if isinstance(report, PipelineReport):
        report.name = str(output)
    return report


def _write_pipeline(
    source: str,
    folder: Path,
    components: Mapping[str, Path],
    adapters: Mapping[Path, float],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """A whole model, each network in its own precision where none is asked for."""
    pipeline = load_pipeline(source, components=components, adapters=adapters)
    record_fused(pipeline.transformer, adapters)
    parts = ModelSource.find(source, components).parts
    if adapters and dtype is None:
        _say_rounding(stored_dtype(parts["transformer"].path, "transformer"))
    networks = {name: getattr(pipeline, name) for name, part in parts.items() if part.is_network}
    recorded = dict(pipeline.config.trained_on or {})
    # Rounding the autoencoder gives it another fingerprint; it stays the one of the training.
    known = recorded.get("autoencoder") == fingerprint(networks["autoencoder"].state_dict())
    if published_name(source) is not None and "autoencoder" not in components:
        known = True
    for name, network in networks.items():
        cast_weights(network, dtype or stored_dtype(parts[name].path, parts[name].kind))
    if known:
        recorded["autoencoder"] = fingerprint(networks["autoencoder"].state_dict())
        pipeline.register_to_config(trained_on=recorded)
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)


def _write_component(
    path: Path,
    folder: Path,
    model: str | None,
    adapters: Mapping[Path, float],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """One network."""
    identity = _identify(path)
    if adapters and identity.kind != "transformer":
        raise OpenSoraError(f"{path} is a {identity.summary}; an adapter changes a transformer, leave out `adapter`")
    cls: Any = find_class(identity.kind, *identity.runner)
    config = find_config(path, cls, _assumed(path, identity, model))
    merged = [(read_adapter(adapter), scale) for adapter, scale in adapters.items()]
    network = load_component(path, cls, dtype or stored_dtype(path), config=config, adapters=merged)
    record_fused(network, adapters)
    if adapters and dtype is None:
        _say_rounding(stored_dtype(path))
    network.save_pretrained(folder, max_shard_size=max_shard_size)


def _say_rounding(dtype: torch.dtype) -> None:
    if dtype is not torch.float32:
        name = str(dtype).removeprefix("torch.")
        logger.warning("the transformer with its adapters is rounded to %s, as it was stored; float32 keeps all", name)


# --- what goes with weights that do not tell --------------------------------------------------------------------------


def _model_of(path: Path, model: str | None) -> str:
    """The published model whose parts and defaults go with a transformer."""
    identity = _identify(path)
    if identity.kind != "transformer":
        raise OpenSoraError(
            f"{path} is no transformer but a {identity.summary}; a whole model is made of a transformer, with "
            "`autoencoder`, `text_encoder` and `tokenizer` beside it"
        )
    if model is None:
        model = _only_model_like(path, identity)
    name = published_name(model) if model is not None else None
    if name is None:
        raise OpenSoraError(
            f"no published model has the shapes of {path}, so its defaults are unknown; name the one that it was "
            f"derived from with `model`, one of {', '.join(PUBLISHED)}"
        )
    if PUBLISHED[name].transformer.class_name.rsplit(".", 1)[1] != identity.class_name:
        raise OpenSoraError(f"{path} is a {identity.summary}, which {name} is not; name another one with `model`")
    return name


def _only_model_like(path: Path, identity: Identity) -> str | None:
    """A published model of these shapes; several are as good as one if they differ in their weights alone."""
    names = published_as(identity)
    if len({_all_but_weights(PUBLISHED[name]) for name in names}) > 1:
        raise OpenSoraError(f"{path} has the shapes of {', '.join(names)}; say which it is with `model`")
    return names[0] if names else None


def _all_but_weights(model: PublishedModel) -> str:
    return repr((model.transformer.config, model.autoencoder, model.scheduler_config, model.defaults))


def _assumed(path: Path, identity: Identity, model: str | None) -> Mapping[str, Any] | None:
    """A published model's configuration of a part, for what neither `config.json` nor shapes say.

    Raises:
        OpenSoraError: they do not say all, and no model is named.
    """
    name = published_name(model) if model is not None else None
    if name is None and identity.kind == "transformer":
        name = _only_model_like(path, identity)
    if name is not None:
        return getattr(PUBLISHED[name], identity.kind).config
    open_questions = [option for option in identity.unsure if option != "exact_gelu"]
    cls = find_class(identity.kind, *identity.runner)
    told_enough = identity.kind == "text_encoder" or format_of(cls).assumes_published(identity.config)
    if (path / "config.json").is_file() or told_enough or not open_questions:
        return None
    raise OpenSoraError(
        f"{path} has no config.json, and shapes do not tell {', '.join(open_questions)}; name the published model it "
        f"is like with `model`, one of {', '.join(PUBLISHED)}"
    )


def _identify(path: Path) -> Identity:
    identity = identify(read_header(path))
    if identity is None or not identity.supported:
        what = identity.summary if identity else "tensors of an unknown network"
        raise OpenSoraError(f"{path} cannot be converted: {what}")
    return identity


# --- precision --------------------------------------------------------------------------------------------------------


def stored_dtype(path: Path, kind: Kind | None = None) -> torch.dtype:
    """The precision that most of a network's values are stored in; bfloat16, which is read everywhere, for float8."""
    sizes: dict[str, int] = {}
    for info in read_header(path, kind).values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
    most = max(sizes, key=lambda dtype: sizes[dtype])
    if most.startswith("float8"):
        return torch.bfloat16
    return getattr(torch, most) if most in ("float16", "bfloat16") else torch.float32


# --- the output -------------------------------------------------------------------------------------------------------


def _refuse_problems(problems: list[str]) -> None:
    if problems:
        raise OpenSoraError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))


def check_output(output: Path) -> None:
    """Proves that a folder can be written there.

    Raises:
        OpenSoraError: there is something in the way, or no folder can be made.
    """
    if not output.exists():
        check_writable(output)
    elif not output.is_dir():
        raise OpenSoraError(f"output {output} is a file; name a folder that does not exist yet")
    else:
        remove_left_overs(output.parent)
        check_empty(output)
