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
import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opensora.checkpoints.published import BUNDLED, component_folders
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.models.autoencoders.latent_space import LatentSpace
    from opensora.pipeline import OpenSoraPipeline

PIPELINE_CLASS = "OpenSoraPipeline"
PIPELINE_INDEX = "model_index.json"
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LIBRARIES = ("diffusers", "transformers")


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
    folders = component_folders(folder)
    components = {
        name: _load_component(
            folders.get(name, folder / name),
            *index[name],
            dtype=dtype,
            override_latent_space=override_latent_space if name == "autoencoder" else None,
        )
        for name in names
    }
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
        if folder.suffix in _PICKLES:
            _read_pickle(folder)
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
    index = _read_json(folder / PIPELINE_INDEX)
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
    weights = (".safetensors", *_PICKLES)
    components = component_folders(Path(folder)).items()
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


def _load_component(
    folder: Path, library: str, class_name: str, *, dtype: torch.dtype, override_latent_space: Any = None
) -> Any:
    if not folder.is_dir():
        raise OpenSoraError(f"the folder {folder} is missing; it should hold the model's {folder.name}")
    cls = _find_class(library, class_name, folder)
    if override_latent_space is not None:
        model = cls.from_pretrained(folder, override_latent_space=override_latent_space)
        return cast_weights(model, dtype).eval()
    if issubclass(cls, nn.Module):
        # Loading a model must not change what a seed gives afterwards.
        with torch.random.fork_rng(devices=[]), _WithoutRandomInit():
            model = _build_model(cls, folder)
        load_weights(cast_weights(model, dtype), read_weights(folder), source=str(folder))
        return model.eval()
    if hasattr(cls, "from_config"):
        config = _read_json(folder / cls.config_name)
        _check_known(config, inspect.signature(cls.__init__).parameters, folder / cls.config_name)
        return cls.from_config(config)
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenSoraError(f"{folder} does not hold a readable {class_name}: {_first_line(error)}") from error
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if type(error) is not Exception:
            raise
        raise OpenSoraError(f"{folder} does not hold a readable {class_name}: {_first_line(error)}") from error


def _find_class(library: str, class_name: str, folder: Path) -> type:
    if library not in _LIBRARIES and not library.startswith("opensora."):
        raise OpenSoraError(
            f"{folder.name} is to be a {class_name} of {library!r}; components come from opensora, "
            f"{' and '.join(_LIBRARIES)} only"
        )
    try:
        found = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise OpenSoraError(f"{folder.name} is to be a {class_name} of {library!r}, which has none") from error
    if not isinstance(found, type):
        raise OpenSoraError(f"{folder.name} is to be a {class_name} of {library!r}, which is no class")
    return found


def _build_model(cls: Any, folder: Path) -> nn.Module:
    """The model its configuration describes, in float32, with arbitrary numbers for weights."""
    path = folder / "config.json"
    config = _read_json(path)
    if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
        return cls(cls.config_class.from_dict(config))
    _check_known(config, inspect.signature(cls.__init__).parameters, path)
    try:
        return cls.from_config(config)
    except TypeError as error:
        raise OpenSoraError(f"{path} does not describe a {cls.__name__}: {_first_line(error)}") from error


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in this precision, but for the modules that it wants to keep in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if kept.isdisjoint(name.split(".")):
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    return model


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


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Copy weights into a model, which keeps its own dtype and device; every tensor must find its place.

    Args:
        model: to be filled.
        weights: name -> tensor, of any floating dtype.
        source: what to call them in an error.

    Raises:
        OpenSoraError: NaN or infinite values, or missing, unexpected or mis-shaped tensors, each named.
    """
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not _all_finite(tensor)]
    if bad:
        raise OpenSoraError(f"{source}: NaN or infinite values in {_some(bad)}; the file is damaged, get it again")
    own = dict(model.state_dict())
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except OpenSoraError:
        raise
    except RuntimeError as error:
        shapes = [
            f"{name} is {tuple(tensor.shape)} but the model has {tuple(own[name].shape)}"
            for name, tensor in weights.items()
            if name in own and tensor.shape != own[name].shape
        ]
        reason = f"mis-shaped tensors: {_some(shapes)}" if shapes else _first_line(error)
        raise OpenSoraError(f"{source}: {reason}; weights and configuration are of two different models") from error
    # Tied weights are stored once: a name without an entry of its own is filled if its memory was.
    filled = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in filled]
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in
                (("missing tensors", missing), ("unexpected tensors", unexpected)) if names]  # fmt: skip
    if problems:
        raise OpenSoraError(f"{source}: {', '.join(problems)}; weights and configuration are of two different models")


# --- files ------------------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of one component, from one file or from shards.

    Raises:
        OpenSoraError: no weights, a shard or file is missing or damaged, or a pickle holds more than tensors.
    """
    for stem in _WEIGHT_NAMES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            return {name: tensor for shard in shards for name, tensor in _read_safetensors(folder / shard).items()}
        if (folder / f"{stem}.safetensors").is_file():
            return _read_safetensors(folder / f"{stem}.safetensors")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if len(pickles) > 1:
        raise OpenSoraError(f"{folder} holds several files of weights ({_some([p.name for p in pickles])}); keep one")
    if pickles:
        return _read_pickle(pickles[0])
    raise OpenSoraError(f"{folder} holds no weights; expected {_WEIGHT_NAMES[0]}.safetensors or model.safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise OpenSoraError(f"{path} is missing; the model's folder is incomplete, get it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise OpenSoraError(f"{path} is damaged ({_first_line(error)}); get it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # torch warns of pickles it then refuses
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on rubbish, the restricted unpickler fails in every way a stack machine can
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():
            raise OpenSoraError(
                f"{path} is a pickle that holds more than tensors and could run code when opened; refused, "
                "ask for the weights as safetensors"
            ) from error
        raise OpenSoraError(f"{path} is damaged ({_first_line(error)}); get it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise OpenSoraError(f"{path} holds something else than named tensors; expected a state dict")
    return dict(state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OpenSoraError(f"{path} is missing; the model's folder is incomplete, get it again") from error
    except (OSError, ValueError) as error:
        raise OpenSoraError(f"{path} is not readable JSON ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise OpenSoraError(f"{path} holds a {type(values).__name__}; expected an object")
    return values


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


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
