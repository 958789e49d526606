"""`opensora convert`: checkpoints of any format that is read, written as a folder of this package."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from opensora.cli.inspect import print_lines
from opensora.cli.options import option
from opensora.cli.progress import ReadingBar, quiet_libraries
from opensora.errors import OpenSoraError
from opensora.generation.request import DTYPES
from opensora.settings import nearest_name


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint anew: diffusers' layout, safetensors, all settings in the folder.

    SOURCE is a file of weights or a folder in the reference's format or in diffusers', or the name of a model that is
    here. A transformer with --autoencoder, --text-encoder and --tokenizer becomes a whole model, alone a component.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH", help_behavior_hint="")]
    """Name of a model, folder of a model or a component, or file of weights."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """What is written; it must not exist yet, or be empty."""
    model: Annotated[str | None, option("NAME", "told by the weights")] = None
    """Published model whose settings go with weights that do not tell theirs, such as opensora-1.1-stage3."""
    autoencoder: Annotated[Path | None, option("PATH")] = None
    """File or folder: the autoencoder of a whole model."""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """Likewise, its text encoder; a tokenizer in that folder is taken as well."""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """Folder: its tokenizer."""
    dtype: Annotated[str | None, option("NAME", "as they are stored")] = None
    """Precision of the networks written: float32, bfloat16, float16."""
    max_shard_size: Annotated[str, option("SIZE", "5GB")] = "5GB"
    """Weights of more than this are written in several files."""

    def run(self) -> None:
        import torch

        from opensora.checkpoints.conversion import convert
        from opensora.checkpoints.wording import report_lines

        if self.dtype is not None and self.dtype not in DTYPES:
            raise OpenSoraError(f"unknown dtype {self.dtype!r}{nearest_name(self.dtype, DTYPES)}")
        if not re.fullmatch(r"[1-9][0-9]*[KMG]i?B", self.max_shard_size, re.IGNORECASE):
            raise OpenSoraError(
                f"--max-shard-size is {self.max_shard_size!r}; give a number of KB, MB or GB such as 5GB"
            )
        quiet_libraries()
        parts = {name: getattr(self, name) for name in ("autoencoder", "text_encoder", "tokenizer")}
        with ReadingBar() as progress:
            report = convert(
                self.source,
                self.output,
                model=self.model,
                components={name: path for name, path in parts.items() if path is not None},
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                max_shard_size=self.max_shard_size,
                on_progress=progress.update,
            )
        print(f"written: {self.output}")
        print_lines(report_lines(report), [])
