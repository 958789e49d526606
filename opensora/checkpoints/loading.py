"""From a name or a folder to a pipeline that is ready to run, and nothing on the way that could run foreign code.

A model is a folder in diffusers' layout: `model_index.json` with the pipeline's defaults and one subfolder per
component. Weights are read from safetensors, or from a pickle that holds nothing but tensors; components come from this
package, diffusers and transformers only. Everything a file can get wrong (missing, cut off, not matching its
configuration, holding NaN) is an error that names the file and the tensor; nothing is initialised at random instead.
"""

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opensora.checkpoints.published import BUNDLED, component_folders
from opensora.checkpoints.weights import (
    PICKLES,
    cast_weights,
    first_line,
    load_weights,
    read_object,
    read_pickle,
    read_weights,
)
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.models.autoencoders.latent_space import LatentSpace
    from opensora.pipeline import OpenSoraPipeline

PIPELINE_CLASS = "OpenSoraPipeline"
PIPELINE_INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")

Network = TypeVar("Network", bound=nn.Module)


def load_pipeline(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    override_latent_space: "LatentSpace | None" = None,
) -> "OpenSoraPipeline":
    """Load a model by name or from a folder.

    Args:
        name_or_path: a bundled model ("toybox", "toybox-iddpm") or a folder that `save_pretrained` wrote.
        device: where it runs.
        dtype: precision of the networks; None is float32 on the CPU and bfloat16 elsewhere. Latents stay float32.
        override_latent_space: used instead of the one declared with the autoencoder's weights, and recorded in every
            output.

    Returns:
        The pipeline, in evaluation mode on `device`.

    Raises:
        OpenSoraError: unknown name, a missing or damaged file, weights that do not fit, or an absent device.
    """
    device = resolve_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = find_model(name_or_path)
    index = read_index(folder)
    from opensora.pipeline import OpenSoraPipeline

    parameters = inspect.signature(OpenSoraPipeline.__init__).parameters
    names = [n for n, p in parameters.items() if n != "self" and p.default is inspect.Parameter.empty]
    missing = [name for name in names if not _is_component(index.get(name))]
    if missing:
        raise OpenSoraError(f"{folder / PIPELINE_INDEX} names no {', '.join(missing)}; a pipeline needs all of {names}")
    defaults = {name: value for name, value in index.items() if not name.startswith("_") and name not in names}
    _check_known(defaults, parameters, folder / PIPELINE_INDEX)
    components: dict[str, Any] = {}
    for name, part in component_folders(folder, names).items():
        cls = _find_class(name, *index[name])
        if issubclass(cls, nn.Module):
            overridden = name == "autoencoder" and override_latent_space is not None
            components[name] = load_component(part, cls, dtype, check_latent_space=not overridden)
        else:
            components[name] = _load_settings_of(part, cls)
    if override_latent_space is not None:
        components["autoencoder"].override_latent_space(override_latent_space)
    pipeline = OpenSoraPipeline(**components, **defaults)
    pipeline.register_to_config(_name_or_path=str(name_or_path))
    return pipeline.to(device)


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
        raise OpenSoraError(f"{folder} is a file; a model is a folder with a {PIPELINE_INDEX} and all its components")
    if not folder.is_dir():
        if known is not None:
            raise OpenSoraError(f"the bundled model {name_or_path!r} is not installed: {folder} is missing; reinstall")
        near = difflib.get_close_matches(str(name_or_path), BUNDLED, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OpenSoraError(
            f"unknown model {str(name_or_path)!r}; {hint}known are {', '.join(BUNDLED)}; or give a folder"
        )
    if not (folder / PIPELINE_INDEX).is_file():
        raise OpenSoraError(f"{folder} holds no {PIPELINE_INDEX}; expected the folder of a pipeline")
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` says: components as [module, class], and the pipeline's defaults.

    Raises:
        OpenSoraError: unreadable, or the index of another pipeline.
    """
    index = read_object(folder / PIPELINE_INDEX)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise OpenSoraError(
            f"{folder / PIPELINE_INDEX} describes a {index.get('_class_name')}; expected an {PIPELINE_CLASS}"
        )
    return index


def model_hash(folder: Path) -> str:
    """SHA-256 over what decides the frames: weights and configuration of every component, by name and content.

    The defaults in `model_index.json` are left out: they are settings of a call, recorded as such.

    Returns:
        64 hexadecimal digits.

    Raises:
        OpenSoraError: there are no weights.
    """
    weights = (".safetensors", *PICKLES)
    names = [name for name, value in read_index(folder).items() if _is_component(value)]
    components = [(name, part) for name, part in component_folders(folder, names).items() if part.is_dir()]
    files = {f"{name}/{path.name}": path for name, part in components for path in part.iterdir() if path.is_file()}
    files = {name: path for name, path in files.items() if name.endswith((*weights, ".json", ".model"))}
    if not any(name.endswith(weights) for name in files):
        raise OpenSoraError(f"{folder} holds no weights to take a hash of")
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


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
    folder: Path, cls: type[Network], dtype: torch.dtype = torch.float32, *, check_latent_space: bool = True
) -> Network:
    """A network from the folder that its `save_pretrained` wrote.

    Args:
        folder: holds `config.json` and weights.
        cls: of diffusers, transformers or this package.
        dtype: precision it will run in, whatever the file's.
        check_latent_space: False for an autoencoder whose declared latent space is overridden next, and may therefore
            disagree with its weights.

    Returns:
        The network on the CPU, in evaluation mode. Random numbers drawn afterwards are those of an unloaded process.

    Raises:
        OpenSoraError: a missing or damaged file, or weights that are not finite or not those of the configuration.
    """
    _check_folder(folder)
    with torch.random.fork_rng(devices=[]), _WithoutRandomInit():
        model = _build_model(cls, folder)
    if not check_latent_space:
        model.checks_loaded_statistics = False
    load_weights(cast_weights(model, dtype), read_weights(folder), source=str(folder))
    return model.eval()


def _load_settings_of(folder: Path, cls: Any) -> Any:
    """A scheduler or a tokenizer: files without weights."""
    _check_folder(folder)
    if hasattr(cls, "from_config"):
        path = folder / cls.config_name
        config = read_object(path)
        _check_known(config, inspect.signature(cls.__init__).parameters, path)
        return _build_from(path, cls, lambda: cls.from_config(config))
    try:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OpenSoraError(f"{folder} does not hold a readable {cls.__name__}: {first_line(error)}") from error


def _find_class(name: str, library: str, class_name: str) -> type:
    """The class of a component, of the kind that its place in the pipeline asks for."""
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    wanted = f"{name} is to be a {class_name} of {library!r}"
    if library not in _LIBRARIES and not library.startswith("opensora."):
        raise OpenSoraError(f"{wanted}; components come from opensora, {' and '.join(_LIBRARIES)} only")
    try:
        found = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise OpenSoraError(f"{wanted}, which has none") from error
    if not isinstance(found, type):
        raise OpenSoraError(f"{wanted}, which is no class")
    kind = {"scheduler": SchedulerMixin, "tokenizer": PreTrainedTokenizerBase}.get(name, nn.Module)
    if not issubclass(found, kind):
        raise OpenSoraError(f"{wanted}, which is no {kind.__name__}")
    return found


def _build_model(cls: Any, folder: Path) -> Any:
    """The model its configuration describes, in float32, with arbitrary numbers for weights."""
    path = folder / "config.json"
    config = read_object(path)
    if getattr(cls, "config_class", None) is not None:  # transformers
        return _build_from(path, cls, lambda: cls(cls.config_class.from_dict(config)))
    _check_known(config, inspect.signature(cls.__init__).parameters, path)
    return _build_from(path, cls, lambda: cls.from_config(config))


def _build_from(path: Path, cls: type, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # whatever a constructor trips over, it is the file that asked for it
        raise OpenSoraError(f"{path} does not describe a {cls.__name__}: {first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OpenSoraError(f"the folder {folder} is missing; it should hold the model's {folder.name}")


class _WithoutRandomInit(TorchFunctionMode):
    """Leaves new weights uninitialised: all of them are read from a file next, and drawing them takes longer than that.

    Only in-place random filling is skipped; tables that a model computes are computed.
    """

    _SKIPPED = frozenset(
        {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_}
        | {getattr(nn.init, name) for name in dir(nn.init) if name.endswith(("normal_", "uniform_"))}
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# --- small things -----------------------------------------------------------------------------------------------------


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _check_known(values: Iterable[str], parameters: Mapping[str, Any], path: Path) -> None:
    """Refuse options that would be ignored; those with a leading underscore are the libraries' own notes."""
    known = [name for name in parameters if name != "self"]
    for name in values:
        if not name.startswith("_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OpenSoraError(f"{path}: unknown option {name!r}; {hint}")
