"""The models known by name, in plain data: what each is made of, what of it is on this machine, what a download costs.

Looks at the package and at the local cache of the Hub, never at the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opensora.checkpoints import hub
from opensora.checkpoints.published import (
    ALIASES,
    BUNDLED,
    PUBLISHED,
    PublishedModel,
    component_folders,
    published_name,
    unknown_model,
)
from opensora.contents import read_object

_PARTS = ("transformer", "autoencoder", "text_encoder", "tokenizer")


def list_models() -> list[dict[str, Any]]:
    """Every model by `summarize`, bundled ones first."""
    return [summarize(describe_model(name)) for name in [*BUNDLED, *PUBLISHED]]


def describe_model(name: str) -> dict[str, Any]:
    """All that is known of a model, as plain JSON values.

    Raises:
        OpenSoraError: no model of that name.
    """
    if name in BUNDLED:
        return _describe_bundled(name)
    full_name = published_name(name)
    if full_name is None:
        raise unknown_model(name)
    model = PUBLISHED[full_name]
    parts = {part: _describe_part(model, part) for part in model.parts}
    return {
        "name": full_name,
        "aliases": [alias for alias, stands_for in ALIASES.items() if stands_for == full_name],
        "summary": model.summary,
        "parts": parts,
        "download_bytes": sum(part["download_bytes"] for part in parts.values()),
        "scheduler": {"class": model.scheduler_class.rsplit(".", 1)[1], **model.scheduler_config},
        "latent_space": model.autoencoder.config["latent_space"],
        "text_tokens": model.transformer.config["model_max_length"],
        "defaults": dict(model.defaults),
    }


def _describe_part(model: PublishedModel, name: str) -> dict[str, Any]:
    part = model.parts[name]
    cached = hub.look_up(part)
    path = hub.part_path(part, cached)
    return {
        "class": part.class_name.rsplit(".", 1)[1],
        "repository": part.repository,
        "files": list(part.files),
        "size_bytes": cached.size_bytes if cached.complete else part.size_bytes,
        "path": None if path is None else str(path),
        "missing": list(cached.missing),
        "download_bytes": cached.missing_bytes(part),
    }


def _describe_bundled(name: str) -> dict[str, Any]:
    model = BUNDLED[name]
    index = read_object(model.folder / "model_index.json")
    folders = component_folders(model.folder, [*_PARTS, "scheduler"])
    parts = {}
    for part in _PARTS:
        files = sorted(file for file in folders[part].iterdir() if file.is_file())
        parts[part] = {
            "class": index[part][1],
            "repository": None,
            "files": [file.name for file in files],
            "size_bytes": sum(file.stat().st_size for file in files),
            "path": str(folders[part]),
            "missing": [],
            "download_bytes": 0,
        }
    scheduler = read_object(folders["scheduler"] / "scheduler_config.json")
    return {
        "name": name,
        "aliases": [],
        "summary": model.summary,
        "parts": parts,
        "download_bytes": 0,
        "scheduler": {
            "class": index["scheduler"][1],
            **{key: value for key, value in scheduler.items() if not key.startswith("_")},
        },
        "latent_space": read_object(folders["autoencoder"] / "config.json").get("latent_space"),
        "text_tokens": read_object(folders["transformer"] / "config.json").get("model_max_length"),
        "defaults": {key: value for key, value in index.items() if key[0] != "_" and key not in folders},
    }


def summarize(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `describe_model` tells: name, where the model is ("package", "cache", "partly", "absent"), and sizes."""
    parts = described["parts"].values()
    complete = [part["path"] is not None for part in parts]
    found = any(part["missing"] != part["files"] for part in parts)
    where = "package" if described["name"] in BUNDLED else "cache" if all(complete) else "partly" if found else "absent"
    return {
        **{key: described[key] for key in ("name", "aliases", "summary")},
        "where": where,
        "size_bytes": sum(part["size_bytes"] for part in parts),
        "download_bytes": described["download_bytes"],
    }


def settings_in_words(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a model samples, what its latents are and what text it takes: (what, in words)."""
    scheduler, defaults = described["scheduler"], described["defaults"]
    options = ", ".join(f"{key} {value}" for key, value in scheduler.items() if key != "class")
    channels = defaults["cfg_channels"]
    guided = "all latent channels" if channels is None else f"the first {channels} latent channels"
    if isinstance(channels, list):
        guided = f"the latent channels {', '.join(map(str, channels))}"
    fps = defaults["fps"]
    frames = f"{defaults['num_frames']} frames of {defaults['height']}x{defaults['width']}, {fps} frames per second"
    if (interval := defaults.get("frame_interval", 1)) != 1:
        frames += f" told, played at {fps / interval:g}"
    if nominal := defaults.get("nominal_size"):
        frames += f"; the network is told {nominal[0]}x{nominal[1]}"
    return [
        ("sampler", f"{scheduler['class']}{f' ({options})' if options else ''}"),
        ("steps", str(defaults["num_inference_steps"])),
        ("guidance", f"scale {defaults['guidance_scale']:g} on {guided}"),
        *([("distilled from", _teacher(distilled))] if (distilled := defaults.get("distilled_from")) else []),
        ("video", frames),
        ("aspect ratios", f"written {defaults.get('aspect_ratio_order', 'width:height')}"),
        ("latent space", _latent_space(described["latent_space"])),
        ("text", _text(described["text_tokens"], defaults)),
    ]


def _latent_space(space: Mapping[str, Any]) -> str:
    convention = "divided" if space.get("convention") == "divide" else "multiplied"
    text = f"{convention} by {space.get('scaling_factor', 1.0):g}"
    for name in ("shift", "scale"):
        if space.get(name):
            text += f", {name} {', '.join(describe_figures(space[name]))}"
    return f"{text}; {space['trained_with']}" if space.get("trained_with") else text


def describe_figures(figures: Sequence[float | Sequence[float]]) -> list[str]:
    """A latent space's number of every channel; where latent frames of a chunk have their own, "0.1/0.2/0.3"."""
    rows = (value if isinstance(value, Sequence) else [value] for value in figures)
    return ["/".join(f"{value:.4g}" for value in row) for row in rows]


def _text(tokens: int, defaults: Mapping[str, Any]) -> str:
    text = f"up to {tokens} tokens"
    if defaults.get("clean_prompts"):
        text += ", cleaned as the captions it was trained on"
    scores = defaults.get("scores") or {}
    if scores:
        known = [f"{name} {value}" for name, value in scores.items() if value is not None]
        others = [name for name, value in scores.items() if value is None]
        text += f"; conditioned on the scores {', '.join(known)}" + (f"; knows {', '.join(others)}" if others else "")
    return text


def _teacher(distilled_from: Mapping[str, Any]) -> str:
    """Whose path was learnt in few steps."""
    steps, scale = distilled_from["teacher_steps"], distilled_from["guidance_scale"]
    return f"{distilled_from['teacher']}, its {steps} steps at guidance {scale:g}"
