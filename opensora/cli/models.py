"""`opensora models`: which models there are, what of them is on this machine, and what a download would cost."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from opensora.checkpoints import hub
from opensora.checkpoints.catalogue import describe_model, list_models, settings_in_words, summarize
from opensora.checkpoints.published import ALIASES
from opensora.checkpoints.published_parts import SVD_AUTOENCODER

WIDTH = 100


@dataclass(frozen=True)
class Models:
    """List the models known by name, or show one of them with all its parts."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Show this model."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        if self.name is not None:
            described = describe_model(self.name)
            print(json.dumps(described, indent=2) if self.json else _one(described))
            return
        listed = list_models()
        print(json.dumps(listed, indent=2) if self.json else _table(listed))


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
    entry = summarize(described)
    aliases = f" ({', '.join(described['aliases'])})" if described["aliases"] else ""
    how = f": opensora generate --model {described['name']} --download" if described["download_bytes"] else ""
    rows = [
        ("what", described["summary"]),
        ("where", _where(entry["where"], entry["download_bytes"]) + how),
        *settings_in_words(described),
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
