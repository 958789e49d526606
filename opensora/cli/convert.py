"""`opensora convert`: checkpoints of any format that is read, written as a folder of this package."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import tyro

from opensora.cli.generate_options import PARTS
from opensora.cli.inspect import print_lines
from opensora.cli.options import option
from opensora.cli.progress import ReadingBar, quiet_libraries
from opensora.errors import OpenSoraError
from opensora.generation.loading import adapter_scales
from opensora.generation.request import StoredDType
from opensora.settings import nearest_name

_DTYPES: tuple[str, ...] = get_args(StoredDType)


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint anew: diffusers' layout, safetensors, all settings in the folder.

    SOURCE is a file of weights or a folder in the reference's format or in diffusers', or the name of a model that is
    here. A transformer with --autoencoder, --text-encoder and --tokenizer becomes a whole model, alone a component.
    Adapters become part of the transformer; with --to one is written anew for another tool, and SOURCE may be left out.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH", help_behavior_hint="")]
    """Name of a model, folder of a model or a component, or file of weights."""
    output: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """What is written; it must not exist yet, or be empty."""
    adapter: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], option("PATH[:SCALE]", "none")] = ()
    """Fine-tuning (LoRA) that is merged into the transformer for good; may be given several times."""
    to: Annotated[str | None, option("TOOL")] = None
    """Write the one adapter for another tool: diffusers or peft (a folder), kohya or comfyui (a file)."""
    model: Annotated[str | None, option("NAME", "told by the weights")] = None
    """Published model whose settings go with weights that do not tell theirs, such as opensora-1.1-stage3."""
    autoencoder: Annotated[Path | None, option("PATH")] = None
    """File or folder: the autoencoder of a whole model."""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """Likewise, its text encoder; a tokenizer in that folder is taken as well."""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """Folder: its tokenizer."""
    text_encoder_2: Annotated[Path | None, option("PATH")] = None
    """The second text encoder of a whole model of 2.0 (CLIP)."""
    tokenizer_2: Annotated[Path | None, option("PATH")] = None
    """Folder: its tokenizer."""
    dtype: Annotated[str | None, option("NAME", "as they are stored")] = None
    """Precision of the networks written: float32, bfloat16, float16."""
    max_shard_size: Annotated[str, option("SIZE", "5GB")] = "5GB"
    """Weights of more than this are written in several files."""

    def run(self) -> None:
        import torch

        from opensora.checkpoints.conversion import convert
        from opensora.checkpoints.wording import report_lines, verdict

        if self.to is not None:
            self.write_adapter()
            return
        if self.output is None:
            raise OpenSoraError("FOLDER is missing, what is written: opensora convert SOURCE FOLDER")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise OpenSoraError(f"unknown dtype {self.dtype!r}{nearest_name(self.dtype, _DTYPES)}")
        if not re.fullmatch(r"[1-9][0-9]*[KMG]i?B", self.max_shard_size, re.IGNORECASE):
            raise OpenSoraError(
                f"--max-shard-size is {self.max_shard_size!r}; give a number of KB, MB or GB such as 5GB"
            )
        quiet_libraries()
        parts = {name: getattr(self, name) for name in PARTS[1:]}
        with ReadingBar() as progress:
            report = convert(
                self.source,
                self.output,
                model=self.model,
                components={name: path for name, path in parts.items() if path is not None},
                adapters=adapter_scales(self.adapter),
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                max_shard_size=self.max_shard_size,
                on_progress=progress.update,
            )
        print(f"written: {self.output}")
        print_lines(report_lines(report), [], verdict(report))

    def write_adapter(self) -> None:
        """Writes the adapter for another tool."""
        from opensora.checkpoints.adapters import convert_adapter
        from opensora.checkpoints.wording import adapter_lines, verdict

        others = ("model", *PARTS[1:], "dtype")
        if given := [name for name in others if getattr(self, name) is not None]:
            raise OpenSoraError(f"`{given[0]}` does nothing for an adapter; leave it out, or leave out `to`")
        output, model = (self.source, None) if self.output is None else (self.output, self.source)
        report = convert_adapter(adapter_scales(self.adapter), Path(output), str(self.to), model)
        print(f"written: {output}")
        print_lines(adapter_lines(report), [], verdict(report))
