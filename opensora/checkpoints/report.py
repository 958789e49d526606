"""What a component's weights are and whether they are what they claim to be, found out without running them.

Names and shapes say what the weights are, `config.json` what they claim to be; the network is built without memory to
compare the two. Whatever is wrong becomes one line that says what to do; nothing is raised but for a file that cannot
be read at all.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints.adapters import FUSED_KEY
from opensora.checkpoints.components import build_model, find_class
from opensora.checkpoints.key_maps import adapt_weights, find_config
from opensora.checkpoints.published import PUBLISHED
from opensora.containers.files import split_choice, weight_files
from opensora.containers.tensors import TensorInfo
from opensora.contents import kind_of
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.families import format_of
from opensora.models.format import Identity
from opensora.models.identify import identify
from opensora.weights import StoredWeights, check_header, coded_weights, read_weights

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, bytes done, bytes in all."""


@dataclass
class ComponentReport:
    """One network's weights.

    Attributes:
        path: file or folder.
        summary: what they are, in a few words.
        kind: their place in a pipeline; "" of an unknown network.
        class_name: class that holds them; the name the network is known by where this package has none.
        num_parameters: values in all tensors, buffers included.
        size_bytes: of the files.
        dtypes: of the tensors, the most frequent first.
        file_format: "safetensors" or "pickle".
        num_files: shards.
        sha256: of the file, or of names and hashes of several; None where data was not read, or in a pipeline.
        config: keywords of the class, as `config.json` says, else as shapes tell.
        fused: name, hash and scale of each adapter that was merged into a transformer for good.
        unsure: keywords that shapes cannot tell, with what is known; where there is a configuration, those of which
            it says something else than the published ones of these shapes do.
        compared: whether names and shapes were held against those of the network; shapes alone may not suffice to
            build it.
        latent_space: of an autoencoder; None if nobody says.
        null_text: tokens and width of a transformer's null text; None without one.
        same_shape_as: published models of these shapes.
        non_finite: tensors with NaN or infinite values; None where data was not read.
        problems: what is wrong and what to do, one line each.
    """

    path: str
    summary: str = "tensors of an unknown network"
    kind: str = ""
    class_name: str = ""
    num_parameters: int = 0
    size_bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    file_format: str = ""
    num_files: int = 0
    sha256: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    fused: list[dict[str, Any]] = field(default_factory=list)
    unsure: dict[str, str] = field(default_factory=dict)
    compared: bool = False
    latent_space: dict[str, Any] | None = None
    null_text: tuple[int, int] | None = None
    same_shape_as: list[str] = field(default_factory=list)
    non_finite: list[str] | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect_component(
    path: Path,
    cls: Any = None,
    config: Mapping[str, Any] | None = None,
    *,
    on_progress: OnProgress | None = None,
    hashed: bool = False,
) -> tuple[ComponentReport, nn.Module | None]:
    """Looks at the weights of one network.

    Args:
        path: a component's folder or a file of weights.
        cls: what it should be; None for whatever it is.
        config: keywords of `cls`; None for what the path says.
        on_progress: told how far reading is; None leaves the data unread: no hash, no look for NaN.
        hashed: take the hash of the files.

    Returns:
        The report, and the network on the meta device if one can be built.

    Raises:
        OpenSoraError: nothing there, or a file that cannot be read.
    """
    files, stored = (
        weight_files(split_choice(path)[0]),
        read_weights(path, None if cls is None else format_of(cls).kind),
    )
    header = check_header(stored, path)
    report, identity = _first_look(path, files, header)
    described = config is not None or (path / "config.json").is_file()
    if identity is not None and identity.supported:
        if not described:
            report.unsure = dict(identity.unsure)
        if cls is None:
            cls = find_class(identity.kind, *identity.runner)
    network = None
    if cls is not None:
        try:
            network = _compare(report, path, cls, config, header, stored)
            report.compared = True
        except OpenSoraError as error:
            if described:  # else shapes alone did not suffice, which is no fault
                report.problems.append(str(error))
        if identity is not None and described:
            report.unsure = _unlike_published(report.config, identity)
    if isinstance(network, VideoCodec) and (described or report.class_name == type(network).__name__):
        report.latent_space = network.latent_space.to_dict()
    if on_progress is not None:
        _read(report, stored, on_progress)
        if hashed:
            report.sha256 = _hash(files, report.size_bytes, on_progress)
    return report, network


def _compare(
    report: ComponentReport,
    path: Path,
    cls: Any,
    config: Mapping[str, Any] | None,
    header: Mapping[str, TensorInfo],
    stored: StoredWeights,
) -> nn.Module:
    """Builds what the weights claim to be; adds what is missing, unexpected or of another shape to the report."""
    with torch.device("meta"):
        named = {name: torch.empty(info.shape, dtype=stored.read_as(name)) for name, info in header.items()}
        keywords = dict(find_config(path, cls) if config is None else config)
        network = build_model(cls, keywords, path)
        report.problems += _differences(network, adapt_weights(network, named, str(path)), path)
    # A configuration of transformers holds everything a model could ever be asked.
    shown = set(report.config) if getattr(cls, "config_class", None) is not None else set(keywords)
    report.config = {name: value for name, value in keywords.items() if name in shown and not name.startswith("_")}
    report.fused = list(keywords.get(FUSED_KEY) or ())
    if isinstance(network, VideoCodec):
        report.problems += _latent_space_problems(network, stored, path)
    return network


def _read(report: ComponentReport, stored: StoredWeights, on_progress: OnProgress) -> None:
    """Looks for values that are no numbers."""
    report.non_finite, done = [], 0
    for name in stored:
        tensor = stored[name]
        if tensor.is_floating_point() and not _finite(tensor):
            report.non_finite.append(name)
        done += tensor.nbytes
        on_progress("reading", done, report.size_bytes)
    if report.non_finite:
        what = f"NaN or infinite values in {_listed(report.non_finite)}"
        report.problems.append(f"{report.path}: {what}; the file is damaged, get it again")


def _hash(files: list[Path], total: int, on_progress: OnProgress) -> str:
    """SHA-256 of the file, or over names and hashes of several."""
    done, digests = 0, {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                done += len(block)
                on_progress("hashing", done, total)
        digests[path.name] = digest.hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name}\0{hex}\n" for name, hex in sorted(digests.items())).encode()).hexdigest()


# --- what speaks against it -------------------------------------------------------------------------------------------


def _first_look(
    path: Path, files: list[Path], header: Mapping[str, TensorInfo]
) -> tuple[ComponentReport, Identity | None]:
    """What names and shapes say."""
    values: dict[str, int] = {}
    for info in header.values():
        values[info.dtype] = values.get(info.dtype, 0) + math.prod(info.shape)
    report = ComponentReport(
        str(path),
        num_parameters=sum(values.values()),
        size_bytes=sum(file.stat().st_size for file in files),
        dtypes=sorted(values, key=lambda name: -values[name]),
        file_format="safetensors" if kind_of(files[0]) == "safetensors" else "pickle",
        num_files=len(files),
    )
    identity = identify(header)
    if identity is not None:
        report.kind, report.summary, report.class_name = identity.kind, identity.summary, identity.class_name
        report.null_text = identity.null_text
        report.config = dict(identity.config)
        report.same_shape_as = published_as(identity)
    return report, identity


def published_as(identity: Identity) -> list[str]:
    """Published models whose transformer has these shapes."""
    if identity.kind != "transformer" or not identity.supported:
        return []

    def same(config: Mapping[str, Any]) -> bool:
        return all(_plain(config[name]) == _plain(value) for name, value in identity.config.items() if name in config)

    of_class = {
        n: m.transformer for n, m in PUBLISHED.items() if m.transformer.class_name.endswith(f".{identity.class_name}")
    }
    return [name for name, part in of_class.items() if same(part.config)]


def _unlike_published(config: Mapping[str, Any], identity: Identity) -> dict[str, str]:
    """Keywords that shapes do not tell and in which a configuration differs from the published ones of such shapes."""
    both = config.keys() & identity.config.keys() & identity.unsure.keys()
    unlike = [name for name in sorted(both) if _plain(config[name]) != _plain(identity.config[name])]
    return {name: f"{config[name]} as configured; {identity.unsure[name]}" for name in unlike}


def _differences(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """Missing, unexpected and mis-shaped tensors."""
    own = network.state_dict(keep_vars=True)
    filled = {id(own[name]) for name in weights if name in own}  # tied weights are stored once
    # An autoencoder's statistics stand in its configuration as well, and published 2D ones have them nowhere else.
    declared = set(network.declared_tensors) if isinstance(network, VideoCodec) else set()
    stored = declared.union(weights)
    missing = [name for name in own if name not in stored and id(own[name]) not in filled]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(tensor.shape)} but the model has {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape and not (name in declared and tensor.ndim == 0)
    ]
    found = {"missing tensors": missing, "unexpected tensors": unexpected, "mis-shaped tensors": shapes}
    what = ", ".join(f"{len(names)} {kind} ({_listed(names)})" for kind, names in found.items() if names)
    problems = [f"{path}: {what}; weights and configuration are of two different models"] if what else []
    coded = coded_weights(own, weights)
    return problems + ([f"{path}: {coded}"] if coded else [])


def _latent_space_problems(network: VideoCodec, stored: StoredWeights, path: Path) -> list[str]:
    """What speaks against the latent space that an autoencoder declares: its own weights, and published ones."""
    declared = network.latent_space.declared_by_weights
    try:
        declared.check_same(network.latent_space_of(stored), here="the configuration", there="the weights")
    except OpenSoraError as error:
        return [f"{path}: {error}"]
    for part in (model.autoencoder for model in PUBLISHED.values()):
        known = LatentSpace.from_dict(part.config["latent_space"])
        if known.shift is not None and set(declared.differences(known)) == {"scaling_factor"}:
            return [
                f"{path}: wrong scaling factor: shift and scale are those of {part.repository}, which has the factor "
                f"{known.scaling_factor:g} ({known.convention}), not {declared.scaling_factor:g} "
                f"({declared.convention}); {how_to_set_factor(declared, known)} in its config.json"
            ]
    return []


def how_to_set_factor(ours: LatentSpace, right: LatentSpace) -> str:
    """How to put a factor right; often it is only the other way round."""
    if math.isclose(ours.factor * right.factor, 1.0, rel_tol=1e-4):
        other = "divide" if ours.convention == "multiply" else "multiply"
        return f'set latent_space.convention to "{other}", the number is right'
    convention = "" if ours.convention == right.convention else f' and its convention to "{right.convention}"'
    return f"set latent_space.scaling_factor to {right.scaling_factor:g}{convention}"


# --- small things -----------------------------------------------------------------------------------------------------


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(wide).all())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
