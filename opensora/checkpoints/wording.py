"""Reports on checkpoints in words: what each line begins with, and what it says."""

import math
from typing import Any

from opensora.checkpoints.adapters import AdapterReport
from opensora.checkpoints.catalogue import describe_figures
from opensora.checkpoints.fit import PipelineReport
from opensora.checkpoints.report import ComponentReport

Lines = list[tuple[str, str]]
"""What the lines of a report begin with, and what they say."""


def report_lines(report: AdapterReport | PipelineReport | ComponentReport) -> Lines:
    """A report in one screen, but for its problems."""
    if isinstance(report, AdapterReport):
        return adapter_lines(report)
    return pipeline_lines(report) if isinstance(report, PipelineReport) else component_lines(report)


def verdict(report: AdapterReport | PipelineReport | ComponentReport) -> str:
    """The last line of a report of which nothing is wrong."""
    if isinstance(report, ComponentReport) and not report.compared:
        return "nothing wrong was seen; whether all of its tensors are there cannot be told without a config.json"
    return "nothing is wrong with it"


def pipeline_lines(report: PipelineReport) -> Lines:
    """A model in one screen."""
    parts = list(report.components.values())
    parameters, size = sum(part.num_parameters for part in parts), sum(part.size_bytes for part in parts)
    lines = [
        ("model", f"{report.name}, {count(parameters)} parameters, {megabytes(size)} of weights"),
        *([("model hash", report.sha256)] if report.sha256 else []),
        *defaults_lines(report.defaults),
        ("scheduler", describe_scheduler(report.scheduler)),
        ("tokenizer", "{class}, {tokens} tokens".format(**report.tokenizer) if report.tokenizer else "none"),
    ]
    for name, part in report.components.items():
        lines += [("", ""), *component_lines(part, name.replace("_", " "))]
        if name == "transformer":
            lines.append(("trained on", describe_origin(report.trained_on)))
    return lines + [("", "")] + [("note", note) for note in report.notes]


def adapter_lines(report: AdapterReport) -> Lines:
    """An adapter in a few lines."""
    origin = report.origin
    what = "of an unknown network" if origin is None else f"of a {origin.class_name}, trained on {origin.base}"
    lines = [
        ("adapter", f"LoRA of rank {report.rank} {what}"),
        ("at", report.path),
        ("size", f"{count(report.num_parameters)} parameters beside {report.num_layers} layers"),
        ("strength", f"alpha / rank is {_range(*report.strength)}, {_stated(report.stated)}"),
        ("sha256", report.sha256),
    ]
    lines += [("note", note) for note in report.notes]
    if origin is None:
        fits = f"; by names and sizes it fits {', '.join(report.fits)}" if report.fits else "; no bundled model fits"
        lines.append(("cannot tell", f"which model it belongs to; the file does not say{fits}"))
        return lines
    lines.append(("base", f"{describe_config(origin.config)}; weights {origin.fingerprint[:16]}..."))
    lines.append(("fits", ", ".join(report.fits) or f"{origin.base}, if it has these weights; no bundled model has"))
    if diffusion := origin.training.get("diffusion"):
        lines.append(("trained with", describe_config(diffusion)))
    return lines


def _range(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _stated(where: str | None) -> str:
    return "which nothing states" if where is None else f"as stated in {where}"


def component_lines(report: ComponentReport, what: str = "weights") -> Lines:
    """A component in a few lines."""
    class_name = f" ({report.class_name})" if report.class_name else ""
    files = f"{report.num_files} files" if report.num_files > 1 else "one file"
    safety = "safetensors" if report.file_format == "safetensors" else "pickle, read as tensors only"
    lines = [
        (what, f"{report.summary}{class_name}"),
        ("at", report.path),
        ("size", f"{count(report.num_parameters)} parameters, {megabytes(report.size_bytes)}"),
        ("format", f"{safety}, {files}, {' and '.join(report.dtypes)}"),
    ]
    if report.sha256:
        lines.append(("sha256", report.sha256))
    if report.config:
        lines.append(("built as", describe_config(report.config)))
    lines += [("fused", "adapter {name} at {scale:g}, hash {sha256}".format(**adapter)) for adapter in report.fused]
    if report.kind == "transformer" and report.config:
        null_text = "present, {} tokens of width {}".format(*report.null_text) if report.null_text else "none"
        lines.append(("null text", null_text))
    if report.latent_space is not None:
        lines.append(("latent space", describe_latent_space(report.latent_space)))
    elif report.kind == "autoencoder":
        lines.append(("latent space", "not in this file; its config.json or the model it belongs to tells"))
    if report.same_shape_as:
        lines.append(("shaped like", ", ".join(report.same_shape_as)))
    lines += [("cannot tell", f"{name}: {note}") for name, note in report.unsure.items()]
    if report.non_finite is not None:
        lines.append(("values", "all finite" if not report.non_finite else "NaN or infinite ones"))
    return lines


def defaults_lines(defaults: dict[str, Any]) -> Lines:
    """How a pipeline samples where nothing else is asked for."""
    numbers = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
    channels = defaults.get("cfg_channels", {})
    whole = not isinstance(channels, dict) and all(isinstance(defaults.get(name), int | float) for name in numbers)
    if not whole:  # what a damaged file declares is told as it stands
        return [("defaults", describe_config(defaults))]
    guided = "all latent channels" if channels is None else f"the first {channels} latent channels"
    if isinstance(channels, list | tuple):
        guided = f"latent channels {', '.join(map(str, channels))}"
    return [
        ("makes", "{num_frames} frames of {width}x{height} at {fps:g} fps".format(**defaults)),
        ("samples", "{num_inference_steps} steps, guidance {guidance_scale:g} on ".format(**defaults) + guided),
        *([("distilled", describe_config(distilled))] if (distilled := defaults.get("distilled_from")) else []),
    ]


def describe_scheduler(scheduler: dict[str, Any]) -> str:
    """Class and keywords."""
    options = {name: value for name, value in scheduler.items() if name != "class"}
    return f"{scheduler['class']} ({describe_config(options)})" if scheduler else "none"


def describe_origin(trained_on: dict[str, Any] | None) -> str:
    """What a transformer was trained on."""
    if not trained_on:
        return "not recorded"
    parts = [describe_latent_space(trained_on["latent_space"])] if "latent_space" in trained_on else []
    if trained_on.get("autoencoder"):
        parts.append(f"autoencoder {trained_on['autoencoder'][:16]}...")
    return "; ".join(parts)


def describe_latent_space(space: dict[str, Any]) -> str:
    """A latent space in one line."""
    parts = [f"scaling factor {space.get('scaling_factor', 1.0):g} ({space.get('convention', 'multiply')})"]
    for name in ("shift", "scale"):
        if space.get(name) is not None:
            parts.append(f"{name} {' '.join(describe_figures(space[name]))}")
    if space.get("replaces"):
        parts.append(f"a user's, in place of {describe_latent_space(space['replaces'])}")
    return ", ".join(parts)


def describe_config(config: dict[str, Any]) -> str:
    """Keywords that hold plain values, as `name=value`; what is nested is left to JSON."""
    named = {name: value.get("type") if isinstance(value, dict) else value for name, value in config.items()}
    hidden = {name for name, value in config.items() if isinstance(value, dict) and "type" not in value}
    return ", ".join(f"{name}={_short(value)}" for name, value in named.items() if name not in hidden)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def count(number: int) -> str:
    """`"1.13 B"`, `"83.6 M"`, `"1,204"`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def megabytes(size_bytes: int) -> str:
    """`"4.84 GB"`, `"167 MB"`, `"13 kB"`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= size:
            return f"{size_bytes / size:.3g} {unit}"
    return f"{size_bytes / 1e3:.3g} kB"
