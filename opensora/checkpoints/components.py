"""One component of a model, built and filled: networks from weights, schedulers and tokenizers from their settings.

Weights are read from safetensors, or from a pickle that holds nothing but tensors; classes come from this package,
diffusers, transformers and packages that declare a family only. Everything a file can get wrong (missing, cut off, not
matching its configuration, holding NaN) is an error that names the file and the tensor; nothing is initialised at
random instead.
"""

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from opensora.checkpoints.adapters import AdaptedWeights, Adapter
from opensora.checkpoints.key_maps import adapt_weights, find_config
from opensora.checkpoints.weights import cast_weights, first_line, load_weights, read_object, read_weights
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.families import may_hold_components
from opensora.models.format import LIBRARIES

Network = TypeVar("Network", bound=nn.Module)


def load_component(
    path: Path,
    cls: type[Network],
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | None = None,
    override_latent_space: LatentSpace | None = None,
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
    config = find_config(path, cls) if config is None else config
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


def check_known(values: Iterable[str], parameters: Mapping[str, Any], path: Path | str) -> None:
    """Refuse options that would be ignored; those with a leading underscore are the libraries' own notes."""
    known = [name for name in parameters if name != "self"]
    for name in values:
        if not name.startswith("_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OpenSoraError(f"{path}: unknown option {name!r}; {hint}")
