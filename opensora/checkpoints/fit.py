"""Whether the parts of a model fit together, found out without running it.

What a transformer's latents were in training stands in the pipeline's `model_index.json` under `trained_on`: the latent
space, and a fingerprint of the autoencoder's weights. For weights shaped like a published model's that lack it, the
table of published models knows. Whatever is wrong becomes one line that says what to do.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import CLIPTextModel

from opensora.checkpoints.folders import PIPELINE_INDEX, is_pipeline, locate, no_such_model
from opensora.checkpoints.published import PUBLISHED, published_name
from opensora.checkpoints.report import ComponentReport, OnProgress, how_to_set_factor, inspect_component
from opensora.checkpoints.source import ModelSource, Part
from opensora.containers.files import is_there
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.families import format_of
from opensora.pipeline import OpenSoraPipeline
from opensora.weights import fingerprint, read_weights

# In the order of a report.
_PARTS = ("transformer", "autoencoder", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


@dataclass
class PipelineReport:
    """A whole model.

    Attributes:
        name: as asked for.
        components: the networks' reports.
        scheduler: class and configuration.
        tokenizer: class and number of tokens.
        defaults: what it samples with where nothing else is asked for.
        trained_on: what the transformer was trained on; None if nobody says.
        sha256: over what decides the frames, see `ModelSource.hash`; None where data was not read or something is
            wrong.
        fit: what is wrong between the parts, one line each.
        notes: what cannot be told, one line each.
    """

    name: str
    components: dict[str, ComponentReport] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] | None = None
    sha256: str | None = None
    fit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, in the parts and between them."""
        return [problem for part in self.components.values() for problem in part.problems] + self.fit

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "problems": self.problems}


def inspect_model(
    name_or_path: str | Path, *, on_progress: OnProgress | None = None
) -> ComponentReport | PipelineReport:
    """Looks at a model, a component's folder or a file of weights.

    Args:
        name_or_path: a bundled model, a published one that lies in the local cache, a folder, or a file.
        on_progress: told how far reading is; None leaves the data unread: no hash, no look for NaN, no comparison with
            the autoencoder of the training.

    Raises:
        OpenSoraError: nothing there, or a file that cannot be read.
    """
    name = str(name_or_path)
    path = locate(name_or_path)
    if published_name(name) is not None or is_pipeline(path):
        return _inspect_pipeline(ModelSource.find(name_or_path), on_progress)
    if not is_there(path):
        raise no_such_model(name)
    return inspect_component(path, on_progress=on_progress, hashed=True)[0]


def _inspect_pipeline(source: ModelSource, on_progress: OnProgress | None) -> PipelineReport:
    defaults = dict(source.defaults)
    report = PipelineReport(source.name, trained_on=defaults.pop("trained_on", None), defaults=defaults)
    found: dict[str, Any] = {}
    ordered = sorted(source.parts, key=lambda name: _PARTS.index(name) if name in _PARTS else len(_PARTS))
    for name in ordered:
        _inspect_part(report, found, source.parts[name], on_progress)
    return _inspect_whole(report, found, source, on_progress)


def _inspect_part(report: PipelineReport, found: dict[str, Any], part: Part, on_progress: OnProgress | None) -> None:
    """Adds a part's report to the whole one, and the part itself to `found` if it can be built."""

    def named_progress(what: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"{what} {part.name}", done, total)

    try:
        if not part.is_network:
            found[part.name] = part.load_settings()
            return
        progress = None if on_progress is None else named_progress
        report.components[part.name], network = inspect_component(
            part.path, part.cls, part.keywords(), on_progress=progress
        )
    except OpenSoraError as error:
        report.fit.append(str(error))
    else:
        if network is not None:
            found[part.name] = network


def _inspect_whole(
    report: PipelineReport, found: dict[str, Any], source: ModelSource, on_progress: OnProgress | None
) -> PipelineReport:
    """Adds what concerns more than one part."""
    scheduler, tokenizer = found.get("scheduler"), found.get("tokenizer")
    if scheduler is not None:
        options = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
        report.scheduler = {"class": type(scheduler).__name__, **options}
    if tokenizer is not None:
        report.tokenizer = {"class": type(tokenizer).__name__, "tokens": len(tokenizer)}
    _check_latents(report, found)
    _check_text(report, found)
    _check_pipeline(report, found, source)
    if on_progress is not None and not report.problems:
        on_progress("hashing", 0, 0)
        report.sha256 = source.hash()
        _check_autoencoder(report)
    return report


# --- what is wrong between parts --------------------------------------------------------------------------------------


def _check_latents(report: PipelineReport, found: Mapping[str, Any]) -> None:
    """Whether the autoencoder's latents are those that the transformer was trained on."""
    autoencoder, transformer = found.get("autoencoder"), report.components.get("transformer")
    if transformer is None or not isinstance(autoencoder, VideoCodec):
        return
    here = autoencoder.latent_space
    if report.trained_on and "latent_space" in report.trained_on:
        origin = "in the transformer's training"
        try:
            trained = LatentSpace.from_dict(report.trained_on["latent_space"])
        except (OpenSoraError, TypeError) as error:
            report.fit.append(f"trained_on in {PIPELINE_INDEX} records no latent space: {error}")
            return
    elif transformer.same_shape_as:
        name = transformer.same_shape_as[0]
        published = PUBLISHED[name].autoencoder
        origin = f"for {name}, whose shapes the transformer has"
        trained = LatentSpace.from_dict(published.config["latent_space"])
        family = format_of(type(autoencoder))
        difference = family.difference(autoencoder.config, published.config)
        if difference is not None:
            report.fit.append(
                f"wrong autoencoder: {difference}, unlike {published.repository}, the one {origin}; put that one in"
            )
            return
    else:
        report.notes.append(
            f"{PIPELINE_INDEX} has no trained_on, so nobody knows whether the transformer was trained on latents of "
            "this autoencoder"
        )
        return
    differences = here.differences(trained)
    if not differences or here.overridden:
        return
    if set(differences) == {"scaling_factor"}:
        report.fit.append(
            f"wrong scaling factor or wrong autoencoder: {here.scaling_factor:g} ({here.convention}) in the "
            f"autoencoder, {trained.scaling_factor:g} ({trained.convention}) {origin}; put in the autoencoder that the "
            f"transformer was trained with, or, if this is it, {how_to_set_factor(here, trained)} in its config.json"
        )
        return
    names = " and ".join(name.replace("_", " ") for name in differences)
    report.fit.append(
        f"wrong autoencoder: its {names} of the latents are not those {origin}; put in the one that the transformer "
        "was trained with"
    )


def _check_text(report: PipelineReport, found: Mapping[str, Any]) -> None:
    """Whether tokenizers, text encoders and transformer understand each other."""
    for number in ("", "_2"):
        _check_encoder(
            report, *(found.get(name) for name in ("transformer", f"text_encoder{number}", f"tokenizer{number}"))
        )


def _check_encoder(report: PipelineReport, transformer: Any, encoder: Any, tokenizer: Any) -> None:
    if transformer is not None and encoder is not None:
        width = "pooled_channels" if isinstance(encoder, CLIPTextModel) else "caption_channels"
        read, made = transformer.config.get(width), getattr(encoder.config, "hidden_size", None)
        if None not in (read, made) and read != made:
            report.fit.append(
                f"wrong text encoder: the transformer reads text states of width {read}, it makes {made}; put in the "
                "one that the transformer was trained with"
            )
    known = getattr(getattr(encoder, "config", None), "vocab_size", None)
    if tokenizer is not None and known is not None and len(tokenizer) > known:
        report.fit.append(
            f"wrong tokenizer: it knows {len(tokenizer)} tokens, the text encoder {known}; put in "
            "the one of this text encoder"
        )


def _check_pipeline(report: PipelineReport, found: Mapping[str, Any], source: ModelSource) -> None:
    """Whether the pipeline takes its parts and its defaults, and a call that asks for nothing else could be made."""
    transformer, scheduler = found.get("transformer"), found.get("scheduler")
    if transformer is not None and scheduler is not None:
        learned = scheduler.config.get("variance_type") == "learned_range"
        if learned and not transformer.config.get("pred_sigma", True):
            report.fit.append(
                "wrong scheduler: it reads a learned variance, which the transformer does not predict; set "
                'variance_type to "fixed_small" in scheduler_config.json'
            )
    needed = OpenSoraPipeline.needed_components()
    if all(name in found for name in needed) and not report.problems:
        try:
            source.pipeline(lambda part: found[part.name]).check_defaults()
        except (OpenSoraError, TypeError) as error:
            report.fit.append(f"{report.name}: {error}")
    elif absent := [name for name in needed if name not in found and not report.problems]:
        report.fit.append(f"{report.name} has no {', '.join(absent)}; a model needs all of {', '.join(needed)}")


def _check_autoencoder(report: PipelineReport) -> None:
    """Whether the autoencoder's weights are those that the transformer was trained with."""
    recorded, part = (report.trained_on or {}).get("autoencoder"), report.components["autoencoder"]
    if recorded is None:
        return
    found = fingerprint(read_weights(Path(part.path), "autoencoder"))
    if found != recorded:
        report.fit.append(
            f"wrong autoencoder: its weights have the fingerprint {found[:16]}..., those of the transformer's training "
            f"{recorded[:16]}..., though both declare the same latent space; put in the one of the training, or, if "
            "this is it rounded to another precision, record its fingerprint under trained_on"
        )
