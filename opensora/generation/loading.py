"""The model of a request: found on this machine, checked against the record of a clip that is made again, loaded."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from opensora.errors import OpenSoraError
from opensora.generation.record import Record, UsedAdapter, check_same_adapters, check_same_model
from opensora.generation.request import Adapter, ClipRequest, check_dtype

if TYPE_CHECKING:
    from opensora.models.format import Kind
    from opensora.offloading import Offload
    from opensora.pipeline import OpenSoraPipeline


@dataclass(frozen=True)
class LoadedModel:
    """What the records of clips say of the model that made them.

    Attributes:
        name: as it is known by, or that of its folder.
        sha256: over weights and configuration, see `checkpoints.source.ModelSource.hash`.
        components: parts that took the place of the model's own, by the name of their file or folder.
        adapters: merged into the transformer.
        folder: where it lies, which no record tells; None for a published model, whose parts lie apart.
    """

    name: str
    sha256: str
    components: dict[str, str] = dataclasses.field(default_factory=dict)
    adapters: tuple[UsedAdapter, ...] = ()
    folder: Path | None = None


def locate_model(
    request: ClipRequest,
    *,
    download: bool = False,
    ask: Callable[[str], bool] | None = None,
    record: Record | None = None,
) -> None:
    """Makes sure that the model is on this machine.

    Args:
        request: names the model, replaced components and adapters.
        download: fetch what is missing of a published model, or of a repository on the Hub.
        ask: called with what is missing of it; returns whether to fetch that. None for no.
        record: of the clip that is made again.

    Raises:
        OpenSoraError: no such model, or parts are missing.
    """
    from opensora.checkpoints.folders import is_repository
    from opensora.checkpoints.published import published_name
    from opensora.checkpoints.source import ModelSource
    from opensora.containers.files import is_there
    from opensora.weights import read_header

    name, components = request.model_name, request.components
    used_adapters(request, record)
    for part, path in components.items():
        if part != "tokenizer" and is_there(path.expanduser()):
            read_header(path.expanduser(), cast("Kind", part))  # a wrong file is told before anything is fetched
    published = published_name(name) is not None
    if download and not published and not is_repository(name):
        raise OpenSoraError(f"`download` fetches published models, and {name} is none; leave it out")
    can_ask = published and not download and all(is_there(path.expanduser()) for path in components.values())
    if ask is not None and can_ask:
        try:
            ModelSource.find(name, components)
        except OpenSoraError as missing:
            if not ask(str(missing)):
                raise OpenSoraError(f"{name} was not fetched") from None
            download = True
    ModelSource.find(name, components, download=download)


def load_model(
    request: ClipRequest, *, offload: "Offload | bool | None" = None, record: Record | None = None
) -> "tuple[OpenSoraPipeline, LoadedModel]":
    """The pipeline of a request, ready to run, and what records will say of it.

    Args:
        request: names the model, what its latents stand for, and where it runs.
        offload: what is in memory only while it works, see `load_pipeline`.
        record: of the clip that is made again.

    Raises:
        OpenSoraError: damaged files, an absent device, an unknown dtype, or another model than the recorded one.
    """
    from opensora.checkpoints import loading
    from opensora.checkpoints.precision import dtype_named
    from opensora.checkpoints.source import ModelSource
    from opensora.models.autoencoders.latent_space import parse_override

    check_dtype(request.dtype)
    device = loading.choose_device(request.device)
    source = ModelSource.find(request.model_name, request.components)
    found = source.hash()
    if record is not None:
        check_same_model(record, found)
    adapters = used_adapters(request, record)
    pipe = loading.load_pipeline(
        request.model_name,
        device=device,
        dtype=dtype_named(request.dtype, on_cpu=device.type == "cpu"),
        override_latent_space=None if request.latent_space is None else parse_override(request.latent_space),
        components=request.components,
        adapters={path: used.scale for path, used in adapters.items()},
        offload=offload,
    )
    pipe.set_progress_bar_config(disable=True)
    components = {name: path.name for name, path in request.components.items()}
    name = _recorded_name(request.model_name)
    return pipe, LoadedModel(name, found, components, tuple(adapters.values()), source.folder)


def used_adapters(request: ClipRequest, record: Record | None = None) -> dict[Path, UsedAdapter]:
    """The adapters asked for; of a clip that is made again, those that it was made with.

    Raises:
        OpenSoraError: a file that is not there, one named twice, or not the ones of the record.
    """
    from opensora.adapters.adapter import read_adapter
    from opensora.adapters.reading import adapter_hash

    strengths = {used.sha256: used.scale for used in record.adapters} if record else {}
    used: dict[Path, UsedAdapter] = {}
    for adapter in request.adapters:
        path = adapter.path.expanduser()
        if path in used:
            raise OpenSoraError(f"`adapter` {path} is given twice")
        notes = read_adapter(path).notes
        sha256 = adapter_hash(path)
        scale = strengths.get(sha256, 1.0) if adapter.scale is None else adapter.scale
        used[path] = UsedAdapter(path.resolve().name, sha256, scale, notes)
    if record is not None:
        check_same_adapters(record, list(used.values()))
    return used


def parse_adapter(text: str) -> Adapter:
    """`"look:0.5"` -> look and 0.5, `"look"` -> look and None.

    Raises:
        OpenSoraError: a scale that is not finite.
    """
    path, colon, scale = text.rpartition(":")
    try:
        strength = float(scale) if colon and path else None
    except ValueError:  # a colon within a path
        strength = None
    if strength is None:
        return Adapter(Path(text).expanduser())
    if not abs(strength) < float("inf"):
        raise OpenSoraError(f"`adapter` {text} has the scale {scale}; expected a number such as 0.5")
    return Adapter(Path(path).expanduser(), strength)


def adapter_scales(texts: Sequence[str]) -> dict[Path, float]:
    """Adapters as `parse_adapter` reads them -> their scales, 1 where none is given.

    Raises:
        OpenSoraError: a scale that is not finite, or an adapter that is named twice.
    """
    scales: dict[Path, float] = {}
    for adapter in map(parse_adapter, texts):
        if adapter.path in scales:
            raise OpenSoraError(f"`adapter` {adapter.path} is given twice")
        scales[adapter.path] = 1.0 if adapter.scale is None else adapter.scale
    return scales


def _recorded_name(name: str) -> str:
    """A name as it is; of a folder its name alone."""
    from opensora.checkpoints.folders import is_repository
    from opensora.checkpoints.published import BUNDLED, published_name

    return (
        name
        if name in BUNDLED or is_repository(name)
        else published_name(name) or Path(name).expanduser().resolve().name
    )
