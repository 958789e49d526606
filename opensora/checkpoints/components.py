"""One component of a model, built and filled: networks from weights, schedulers and tokenizers from their settings.

Weights are read from safetensors, or from a pickle that holds nothing but tensors; classes come from this package,
diffusers, transformers and packages that declare a family only. Everything a file can get wrong (missing, cut off, not
matching its configuration, holding NaN) is an error that names the file and the tensor; nothing is initialised at
random instead.
"""

import base64
import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opensora.adapters.adapter import Adapter
from opensora.adapters.merging import AdaptedWeights
from opensora.checkpoints.key_maps import adapt_weights, find_config
from opensora.containers.files import is_there
from opensora.containers.runs import described_in
from opensora.containers.tensors import first_line
from opensora.contents import describe_kind, describe_value, kind_of, read_object, shown
from opensora.errors import OpenSoraError
from opensora.keywords import check_keywords
from opensora.models.autoencoders.latent_space import Override, override_configured
from opensora.models.families import format_of, may_hold_components
from opensora.models.format import LIBRARIES, kind_of_place
from opensora.models.int8 import Int8Weights, computing_dtype, is_int8, use_int8
from opensora.weights import cast_weights, load_weights, make_room, read_weights

Network = TypeVar("Network", bound=nn.Module)


def load_component(
    path: Path,
    cls: type[Network],
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | None = None,
    override_latent_space: Override | None = None,
    without_data: bool = False,
    adapters: Sequence[tuple[Adapter, float]] = (),
    device: torch.device | str = "cpu",
) -> Network:
    """A network from the folder that its `save_pretrained` wrote, or from weights as the reference saves them.

    It takes its own memory and a portion of its files, for it is built without data and filled portion by portion.

    Args:
        path: a folder with weights and, usually, a `config.json`, or a lone file of weights.
        cls: of diffusers, transformers or this package.
        dtype: precision it will run in, whatever the file's; int8 for weights in eight bits, see `models.int8`.
        config: keywords of `cls`, in place of what the path tells (see `key_maps.find_config`).
        override_latent_space: of an autoencoder, in place of the declared one, or of those fields of it, with which
            its weights may disagree.
        without_data: build it on torch's meta device: shapes alone, weights are not read.
        adapters: merged into the weights, each at a scale.
        device: where its weights go, straight from the files.

    Returns:
        The network in evaluation mode. Random numbers drawn afterwards are those of an unloaded process.

    Raises:
        OpenSoraError: a missing or damaged file, weights that are not finite or not those of the configuration, or an
            adapter of other weights.
    """
    place = torch.device("meta") if without_data else _WithoutWeights()
    model, weights = _open(path, cls, dtype, place, config, override_latent_space)
    if without_data and not adapters:
        return model
    weights = _adapted(model, weights, adapters, path)
    if not without_data:
        make_room(model.modules(), torch.device(device))
        model.to(device)
        load_weights(model, weights, source=str(path))
    return model


def open_component(
    path: Path,
    cls: type[Network],
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | None = None,
    adapters: Sequence[tuple[Adapter, float]] = (),
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network whose weights lie on torch's meta device, and the weights, each read when it is asked for.

    Tables that the network computes are there. For the rest see `load_component`.
    """
    model, weights = _open(path, cls, dtype, _WithoutWeights(), config)
    return model, _adapted(model, weights, adapters, path)


def _open(
    path: Path,
    cls: type[Network],
    dtype: torch.dtype,
    place: contextlib.AbstractContextManager[Any],
    config: Mapping[str, Any] | None,
    override_latent_space: Override | None = None,
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network built in a place where weights have no data, and what its files hold."""
    if not is_there(path):
        raise OpenSoraError(f"the folder {path} is missing; it should hold the model's {path.name}")
    described = described_in(path, format_of(cls).kind) if path.is_dir() and config is None else path
    if not is_there(described):
        raise OpenSoraError(f"{described} is missing; the model's folder is incomplete, get it again")
    weights = read_weights(path, format_of(cls).kind)
    config, what = find_config(path, cls) if config is None else config, str(described)
    if override_latent_space is not None:
        space = override_configured(config.get("latent_space"), override_latent_space)
        config, what = {**config, "latent_space": space}, f"{described} with another latent space"
    with torch.random.fork_rng(devices=[]), place:
        model = build_model(cls, config, what)
    if isinstance(place, _WithoutWeights):
        _check_tables(model)
    cast_weights(model, computing_dtype(dtype))
    if dtype == torch.int8 and format_of(cls).kind in ("text_encoder", "transformer"):
        use_int8(model)
    return model.eval(), weights


def _adapted(
    model: nn.Module, weights: Mapping[str, Tensor], adapters: Sequence[tuple[Adapter, float]], path: Path
) -> Mapping[str, Tensor]:
    """Weights under the names of a model, with adapters merged into them."""
    weights = adapt_weights(model, weights, str(path))
    if adapters:
        weights = AdaptedWeights(model, weights, adapters, str(path))
    return Int8Weights(model, weights) if is_int8(model) else weights


def load_settings_of(folder: Path, cls: Any) -> Any:
    """A scheduler or a tokenizer: files without weights."""
    if not folder.exists():
        raise OpenSoraError(f"the folder {folder} is missing; it should hold the model's {folder.name}")
    if hasattr(cls, "from_config"):
        path = folder / cls.config_name
        config = read_object(path)
        # A scheduler also keeps what those know that sample the same models, for the way back.
        others = cls._get_compatibles() if cls.has_compatibles else ()
        also = [name for other in others for name in inspect.signature(other.__init__).parameters]
        known = inspect.signature(cls.__init__).parameters
        check_keywords(cls.__init__, config, path, also=[name for name in also if name not in known])
        return _build_from(path, cls, lambda: cls.from_config(config))
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if (kind := kind_of(file)) in ("git-lfs pointer", "web page", "empty"):
            raise OpenSoraError(f"{file} is {describe_kind(kind)}; expected a file of the {cls.__name__}")
        if file.name == "tokenizer.json":
            _check_charsmaps(file)
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OpenSoraError(f"{folder} does not hold a readable {cls.__name__}: {first_line(error)}") from error
    longest = getattr(tokenizer, "model_max_length", 0)
    if not isinstance(longest, int | float):
        raise OpenSoraError(f"{folder}: model_max_length is {describe_value(longest)}, expected a whole number")
    return tokenizer


def _check_charsmaps(path: Path) -> None:
    """Refuses a damaged table of characters, at which the tokenizers library would end the process.

    It is base64 of the length of a trie in bytes, the trie, and UTF-8 that the trie points into.
    """
    try:
        left: list[Any] = [json.loads(path.read_bytes())]
    except (ValueError, RecursionError):  # which the library says itself
        return
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            if (table := value.get("precompiled_charsmap")) is None:
                continue
            try:
                packed = base64.b64decode(table, validate=True)
                trie_bytes = int.from_bytes(packed[:4], "little")
                packed[4 + trie_bytes :].decode()
                whole = len(packed) > 4 + trie_bytes and trie_bytes % 4 == 0
            except (TypeError, ValueError):
                whole = False
            if not whole:
                raise OpenSoraError(f"{path}: its precompiled_charsmap is damaged; get the file again")


def find_class(name: str, library: str, class_name: str) -> type:
    """The class of a component, of the kind that its place in the pipeline asks for."""
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    wanted = f"{name} is to be a {class_name} of {shown(repr(library))}"
    if not may_hold_components(library):
        raise OpenSoraError(f"{wanted}; components come from opensora, {' and '.join(LIBRARIES)} only")
    try:
        found = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError, RecursionError) as error:  # the last of a name with hundreds of dots
        raise OpenSoraError(f"{wanted}, which has none") from error
    if not isinstance(found, type):
        raise OpenSoraError(f"{wanted}, which is no class")
    kind = {"scheduler": SchedulerMixin, "tokenizer": PreTrainedTokenizerBase}.get(kind_of_place(name), nn.Module)
    if not issubclass(found, kind):
        raise OpenSoraError(f"{wanted}, which is no {kind.__name__}")
    return found


def build_model(cls: Any, config: Mapping[str, Any], path: Path | str) -> Any:
    """The model that a configuration describes, in float32, with arbitrary numbers for weights."""
    if getattr(cls, "config_class", None) is not None:  # transformers
        known = inspect.signature(cls.config_class.__init__).parameters
        check_keywords(cls.config_class.__init__, config, path, also=[name for name in config if name not in known])
        return _build_from(path, cls, lambda: cls(cls.config_class.from_dict(dict(config))))
    check_keywords(cls.__init__, config, path)
    return _build_from(path, cls, lambda: cls.from_config(dict(config)))


def _build_from(path: Path | str, cls: type, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # whatever a constructor trips over, it is the file that asked for it
        raise OpenSoraError(f"{path} does not describe a {cls.__name__}: {first_line(error)}") from error


class _WithoutWeights(TorchFunctionMode):
    """Leaves new weights without data: all of them are read from a file next, in whatever precision is wanted.

    Layers make theirs by `torch.empty`, which goes to torch's meta device, and fill them in place, which is skipped
    where it is random. Tables that a model computes are computed. Functions are known by their names, because
    transformers puts others of the same name into `torch.nn.init`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif getattr(func, "__name__", "").endswith(("normal_", "uniform_", "erfinv_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_tables(model: nn.Module) -> None:
    """Whether all that is not read from files was computed; `torch.empty` makes nothing that may be filled by hand."""
    if tables := [name for name, table in model.named_buffers() if table.is_meta]:
        raise RuntimeError(
            f"buffers of {type(model).__name__} are made by torch.empty, which has no data here: {tables}"
        )
