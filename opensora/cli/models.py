"""`opensora models`: which models there are, what of them is on this machine, and what a download would cost.

Looks at the package and at the local cache of the Hub, never at the network.
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from opensora.checkpoints import hub
from opensora.checkpoints.published import (
    ALIASES,
    BUNDLED,
    PUBLISHED,
    SVD_AUTOENCODER,
    PublishedModel,
    component_folders,
    published_name,
    unknown_model,
)
from opensora.settings import read_json

WIDTH = 100
_PARTS = ("transformer", "autoencoder", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Models:
    """List the models known by name, or show one of them with all its parts."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Show this model."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        if self.name is not None:
            described = _describe(self.name)
            print(json.dumps(described, indent=2) if self.json else _one(described))
            return
        listed = [_list_entry(_describe(name)) for name in [*BUNDLED, *PUBLISHED]]
        print(json.dumps(listed, indent=2) if self.json else _table(listed))


# --- what there is to say ---------------------------------------------------------------------------------------------


def _describe(name: str) -> dict[str, Any]:
    """All that is known of a model, as plain JSON values."""
    if name in BUNDLED:
        return _describe_bundled(name)
    full_name = published_name(name)
    if full_name is None:
        raise unknown_model(name)
    model = PUBLISHED[full_name]
    parts = {part: _describe_part(model, part) for part in _PARTS}
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
    index = read_json(model.folder / "model_index.json")
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
    scheduler = read_json(folders["scheduler"] / "scheduler_config.json")
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
        "latent_space": read_json(folders["autoencoder"] / "config.json").get("latent_space"),
        "text_tokens": read_json(folders["transformer"] / "config.json").get("model_max_length"),
        "defaults": {key: value for key, value in index.items() if key[0] != "_" and key not in folders},
    }


def _list_entry(described: Mapping[str, Any]) -> dict[str, Any]:
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


# --- how it is said ---------------------------------------------------------------------------------------------------


def _where(where: str, download_bytes: int) -> str:
    size = f"{hub.gigabytes(download_bytes)} to fetch"
    return {"package": "in the package", "cache": "here", "partly": f"in part, {size}", "absent": size}[where]


def _table(listed: list[dict[str, Any]]) -> str:
    """Name, what it is and where it is, in lines of at most `WIDTH`."""
    rows = [(entry["name"], entry["summary"], _where(entry["where"], entry["download_bytes"])) for entry in listed]
    first, last = (max(len(row[i]) for row in rows) for i in (0, 2))
    lines = []
    for name, summary, where in rows:
        wrapped = textwrap.wrap(summary, WIDTH - first - last - 4)
        middle = WIDTH - first - last - 4
        lines.append(f"{name:<{first}}  {wrapped[0]:<{middle}}  {where}".rstrip())
        lines += [" " * (first + 2) + more for more in wrapped[1:]]
    short = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    notes = (
        f"Short names: {short}. Sizes are about, and what two models share is fetched once. "
        "`opensora models NAME` tells more; a model's folder can be used in place of a name."
    )
    other = (
        "Another autoencoder for 1.0 and 1.1, whose decoder looks at neighbouring frames: "
        f"`{hub.fetch_command(SVD_AUTOENCODER)}` ({hub.gigabytes(SVD_AUTOENCODER.size_bytes)}), then "
        "`opensora generate --autoencoder` with the folder `vae` in it."
    )
    return "\n".join([*lines, "", *textwrap.wrap(notes, WIDTH), "", *textwrap.wrap(other, WIDTH, **_WHOLE_WORDS)])


def _one(described: Mapping[str, Any]) -> str:
    """One model on one screen."""
    entry = _list_entry(described)
    aliases = f" ({', '.join(described['aliases'])})" if described["aliases"] else ""
    how = f": opensora generate --model {described['name']} --download" if described["download_bytes"] else ""
    rows = [
        ("what", described["summary"]),
        ("where", _where(entry["where"], entry["download_bytes"]) + how),
        *_sampling(described["scheduler"], described["defaults"]),
        ("latent space", _latent_space(described["latent_space"])),
        ("text", _text(described["text_tokens"], described["defaults"])),
    ]
    lines = [f"{described['name']}{aliases}", *_rows(rows)]
    for name, part in described["parts"].items():
        where = f"in {part['path']}" if part["path"] else "not here"
        if not part["path"] and part["missing"] != part["files"]:
            where = f"here but for {', '.join(part['missing'])}"
        source = f"{part['repository']}: {', '.join(part['files'])}; " if part["repository"] else ""
        about = "" if part["path"] else "about "
        lines += ["", f"{name}: {part['class']}, {about}{hub.gigabytes(part['size_bytes'])}"]
        lines += textwrap.wrap(f"{source}{where}", WIDTH, initial_indent="  ", subsequent_indent="  ", **_WHOLE_WORDS)
    return "\n".join(lines)


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, text in rows:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {label:<{width}}", subsequent_indent=" " * (width + 2), **_WHOLE_WORDS
        )
    return lines


def _sampling(scheduler: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        ("video", frames),
        ("aspect ratios", f"written {defaults.get('aspect_ratio_order', 'width:height')}"),
    ]


def _latent_space(space: Mapping[str, Any]) -> str:
    convention = "divided" if space.get("convention") == "divide" else "multiplied"
    text = f"{convention} by {space.get('scaling_factor', 1.0):g}"
    for name in ("shift", "scale"):
        if space.get(name):
            text += f", {name} {', '.join(f'{value:.4g}' for value in space[name])}"
    return f"{text}; {space['trained_with']}" if space.get("trained_with") else text


def _text(tokens: int, defaults: Mapping[str, Any]) -> str:
    text = f"up to {tokens} tokens"
    if defaults.get("clean_prompts"):
        text += ", cleaned as the captions it was trained on"
    scores = defaults.get("scores") or {}
    if scores:
        told = [f"{name} {value}" for name, value in scores.items() if value is not None]
        others = [name for name, value in scores.items() if value is None]
        text += f"; told the scores {', '.join(told)}" + (f"; knows {', '.join(others)}" if others else "")
    return text
