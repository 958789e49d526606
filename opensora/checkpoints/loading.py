"""From a name or a folder to a pipeline that is ready to run, and nothing on the way that could run foreign code.

A model is a folder in diffusers' layout (`model_index.json` with the pipeline's defaults and one subfolder per
component) or a published model, whose parts lie in the local cache of the Hub or wherever the caller says, in the
format they were published in. Weights are read from safetensors, or from a pickle that holds nothing but tensors;
components come from this package, diffusers and transformers only. Everything a file can get wrong (missing, cut off,
not matching its configuration, holding NaN) is an error that names the file and the tensor; nothing is initialised at
random instead.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from opensora.checkpoints.adapters import AdaptedWeights, Adapter, read_adapter
from opensora.checkpoints.key_maps import adapt_weights, find_config
from opensora.checkpoints.published import PublishedModel, component_folders, published_name
from opensora.checkpoints.sources import (
    PIPELINE_INDEX,
    PublishedSource,
    find_folders,
    find_model,
    find_published,
    is_component,
    read_index,
)
from opensora.checkpoints.weights import cast_weights, first_line, load_weights, read_object, read_weights
from opensora.errors import OpenSoraError
from opensora.models.families import may_hold_components
from opensora.models.format import LIBRARIES
from opensora.staging import Stages

if TYPE_CHECKING:
    from opensora.models.autoencoders.latent_space import LatentSpace
    from opensora.pipeline import OpenSoraPipeline

Network = TypeVar("Network", bound=nn.Module)


def load_pipeline(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    override_latent_space: "LatentSpace | None" = None,
    components: Mapping[str, str | Path] | None = None,
    adapters: Mapping[str, float] | Mapping[Path, float] | None = None,
    download: bool = False,
    offload: bool = False,
) -> "OpenSoraPipeline":
    """Load a model by name or from a folder.

    Args:
        name_or_path: a bundled model ("toybox", "toybox-iddpm"), a published one ("opensora-1.2", see
            `published.PUBLISHED`), or a folder that `save_pretrained` wrote.
        device: where it runs.
        dtype: precision of the networks; None is float32 on the CPU and bfloat16 elsewhere. Latents stay float32.
        override_latent_space: used instead of the one declared with the autoencoder's weights, and recorded in every
            output.
        components: component -> folder or file that takes the place of the model's own, in our format or in the one
            that the reference saves: "transformer", "autoencoder", "text_encoder", "tokenizer".
        adapters: adapter (its file or folder) -> how strongly it acts: 1 as it was trained, 0 not at all.
        download: fetch the parts of a published model that this machine lacks. Nothing else ever goes to the network.
        offload: each network is in memory only while it works. On an accelerator it lies in the CPU's memory otherwise;
            on the CPU it is read from its files whenever it is needed.

    Returns:
        The pipeline, in evaluation mode on `device`.

    Raises:
        OpenSoraError: unknown name, a missing or damaged file, weights that do not fit, an adapter of another model, or
            an absent device.
    """
    device = resolve_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    merged = [(read_adapter(path), scale) for path, scale in (adapters or {}).items()]
    load = functools.partial(_load_network, dtype=dtype, without_data=offload and device.type == "cpu", adapters=merged)
    if published_name(str(name_or_path)) is not None:
        source = find_published(str(name_or_path), components, download=download)
        parts, defaults = _load_published(source, load, override_latent_space)
    else:
        parts, defaults = _load_folder(find_model(name_or_path), components, load, override_latent_space)
    networks = {name: part for name, part in parts.items() if isinstance(part, _Loaded)}
    parts |= {name: part.network for name, part in networks.items()}
    if override_latent_space is not None:
        parts["autoencoder"].override_latent_space(override_latent_space)
    from opensora.pipeline import OpenSoraPipeline

    pipeline = OpenSoraPipeline(**parts, **defaults)
    pipeline.register_to_config(_name_or_path=str(name_or_path))
    if not offload:
        return pipeline.to(device)
    loaders = {name: part.again for name, part in networks.items()} if device.type == "cpu" else {}
    pipeline.stages = Stages(device, {name: parts[name] for name in networks}, loaders)
    with pipeline.resident("autoencoder"):
        pass  # a damaged one shows now, and not when everything else is done
    return pipeline


@dataclass(frozen=True)
class _Loaded:
    """A network, and how to load it once more."""

    network: nn.Module
    again: Callable[[], nn.Module]


def _load_network(
    name: str,
    path: Path,
    cls: type[nn.Module],
    config: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype,
    without_data: bool,
    override_latent_space: "LatentSpace | None",
    adapters: Sequence[tuple[Adapter, float]],
) -> _Loaded:
    again = functools.partial(
        load_component,
        path,
        cls,
        dtype,
        config=config,
        override_latent_space=override_latent_space if name == "autoencoder" else None,
        adapters=adapters if name == "transformer" else (),
    )
    return _Loaded(again(without_data=True) if without_data else again(), again)


def _load_folder(
    folder: Path,
    given: Mapping[str, str | Path] | None,
    load: Callable[..., _Loaded],
    override_latent_space: "LatentSpace | None",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components, and the pipeline's defaults, of a folder in diffusers' layout."""
    from opensora.pipeline import OpenSoraPipeline

    index = read_index(folder)
    parameters = inspect.signature(OpenSoraPipeline.__init__).parameters
    names = [n for n, p in parameters.items() if n != "self" and p.default is inspect.Parameter.empty]
    missing = [name for name in names if not is_component(index.get(name))]
    if missing:
        raise OpenSoraError(f"{folder / PIPELINE_INDEX} names no {', '.join(missing)}; a pipeline needs all of {names}")
    defaults = {name: value for name, value in index.items() if not name.startswith("_") and name not in names}
    check_known(defaults, parameters, folder / PIPELINE_INDEX)
    components: dict[str, Any] = {}
    for name, path in find_folders(folder, names, given).items():
        cls = find_class(name, *index[name])
        if not issubclass(cls, nn.Module):
            components[name] = load_settings_of(path, cls)
            continue
        config = None
        if name in (given or {}):
            own = component_folders(folder, [name])[name] / "config.json"
            assumed = {key: value for key, value in read_object(own).items() if not key.startswith("_")}
            config = find_config(path, cls, read_weights(path), assumed)
        components[name] = load(name, path, cls, config, override_latent_space=override_latent_space)
    return components, defaults


def _load_published(
    source: PublishedSource, load: Callable[..., _Loaded], override_latent_space: "LatentSpace | None"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components, and the pipeline's defaults, of a published model."""
    model = source.model
    components: dict[str, Any] = {}
    for name, part in model.parts.items():
        path, cls = source.paths[name], find_class(name, *part.class_name.rsplit(".", 1))
        if not issubclass(cls, nn.Module):
            components[name] = load_settings_of(path, cls)
            continue
        given = name in source.given
        config = find_config(path, cls, read_weights(path), part.config) if given else part.config
        components[name] = load(name, path, cls, config, override_latent_space=override_latent_space)
    components["scheduler"], defaults = published_settings(model)
    return components, defaults


def published_settings(model: PublishedModel) -> tuple[Any, dict[str, Any]]:
    """Scheduler, and the pipeline's defaults, of a published model: what its table alone says."""
    scheduler = find_class("scheduler", *model.scheduler_class.rsplit(".", 1))
    trained_on = {"latent_space": model.autoencoder.config["latent_space"]}
    return scheduler(**model.scheduler_config), {**model.defaults, "trained_on": trained_on}


def choose_device(name: str | None) -> torch.device:
    """The device of that name; for None an accelerator if there is one, else the CPU.

    Raises:
        OpenSoraError: no such device, or it is absent here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return resolve_device(name or accelerator or "cpu")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        OpenSoraError: no such device, or it is absent here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise OpenSoraError(f"device {str(device)!r} is not available; here there is: {here}") from error
    return found


# --- components -------------------------------------------------------------------------------------------------------


def load_component(
    path: Path,
    cls: type[Network],
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | None = None,
    override_latent_space: "LatentSpace | None" = None,
    without_data: bool = False,
    adapters: Sequence[tuple[Adapter, float]] = (),
) -> Network:
    """A network from the folder that its `save_pretrained` wrote, or from weights as the reference saves them.

    Args:
        path: a folder with weights and, usually, a `config.json`, or a lone file of weights.
        cls: of diffusers, transformers or this package.
        dtype: precision it will run in, whatever the file's.
        config: keywords of `cls`, in place of what the path tells (see `key_maps.find_config`).
        override_latent_space: of an autoencoder, in place of the declared one, with which its weights may disagree.
        without_data: build it on torch's meta device: shapes alone, weights are not read.
        adapters: merged into the weights, each at a scale.

    Returns:
        The network on the CPU, in evaluation mode. Random numbers drawn afterwards are those of an unloaded process.

    Raises:
        OpenSoraError: a missing or damaged file, weights that are not finite or not those of the configuration, or an
            adapter of other weights.
    """
    if not path.exists():
        raise OpenSoraError(f"the folder {path} is missing; it should hold the model's {path.name}")
    described = path / "config.json" if path.is_dir() and config is None else path
    if not described.exists():
        raise OpenSoraError(f"{described} is missing; the model's folder is incomplete, get it again")
    weights = read_weights(path)
    config = find_config(path, cls, weights) if config is None else config
    if override_latent_space is not None:
        config = {**config, "latent_space": override_latent_space.instead_of(config.get("latent_space"))}
    place = torch.device("meta") if without_data else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), _WithoutRandomInit(), place:
        model = build_model(cls, config, described)
    cast_weights(model, dtype)
    if without_data and not adapters:
        return model.eval()
    weights = adapt_weights(model, weights, str(path))
    if adapters:
        weights = AdaptedWeights(model, weights, adapters, str(path))
    if not without_data:
        load_weights(model, weights, source=str(path))
    return model.eval()


def load_settings_of(folder: Path, cls: Any) -> Any:
    """A scheduler or a tokenizer: files without weights."""
    if not folder.exists():
        raise OpenSoraError(f"the folder {folder} is missing; it should hold the model's {folder.name}")
    if hasattr(cls, "from_config"):
        path = folder / cls.config_name
        config = read_object(path)
        # A scheduler also keeps what those know that sample the same models, for the way back.
        kinds = [cls, *(cls._get_compatibles() if cls.has_compatibles else ())]
        parameters = {k: v for kind in kinds for k, v in inspect.signature(kind.__init__).parameters.items()}
        check_known(config, parameters, path)
        return _build_from(path, cls, lambda: cls.from_config(config))
    try:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OpenSoraError(f"{folder} does not hold a readable {cls.__name__}: {first_line(error)}") from error


def find_class(name: str, library: str, class_name: str) -> type:
    """The class of a component, of the kind that its place in the pipeline asks for."""
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    wanted = f"{name} is to be a {class_name} of {library!r}"
    if not may_hold_components(library):
        raise OpenSoraError(f"{wanted}; components come from opensora, {' and '.join(LIBRARIES)} only")
    try:
        found = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise OpenSoraError(f"{wanted}, which has none") from error
    if not isinstance(found, type):
        raise OpenSoraError(f"{wanted}, which is no class")
    place = name.rstrip("_0123456789")  # a pipeline may have a second one: "tokenizer_2"
    kind = {"scheduler": SchedulerMixin, "tokenizer": PreTrainedTokenizerBase}.get(place, nn.Module)
    if not issubclass(found, kind):
        raise OpenSoraError(f"{wanted}, which is no {kind.__name__}")
    return found


def build_model(cls: Any, config: Mapping[str, Any], path: Path) -> Any:
    """The model that a configuration describes, in float32, with arbitrary numbers for weights."""
    if getattr(cls, "config_class", None) is not None:  # transformers
        return _build_from(path, cls, lambda: cls(cls.config_class.from_dict(dict(config))))
    check_known(config, inspect.signature(cls.__init__).parameters, path)
    return _build_from(path, cls, lambda: cls.from_config(dict(config)))


def _build_from(path: Path, cls: type, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # whatever a constructor trips over, it is the file that asked for it
        raise OpenSoraError(f"{path} does not describe a {cls.__name__}: {first_line(error)}") from error


class _WithoutRandomInit(TorchFunctionMode):
    """Leaves new weights uninitialised: all of them are read from a file next, and drawing them takes longer than that.

    Only in-place random filling is skipped; tables that a model computes are computed. Functions are known by their
    names, because transformers puts others of the same name into `torch.nn.init`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_", "erfinv_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# --- small things -----------------------------------------------------------------------------------------------------


def check_known(values: Iterable[str], parameters: Mapping[str, Any], path: Path) -> None:
    """Refuse options that would be ignored; those with a leading underscore are the libraries' own notes."""
    known = [name for name in parameters if name != "self"]
    for name in values:
        if not name.startswith("_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OpenSoraError(f"{path}: unknown option {name!r}; {hint}")
