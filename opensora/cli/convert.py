"""`opensora convert`: checkpoints of any format that is read, written as a folder of this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint anew: diffusers' layout, safetensors, all settings in the folder.

    SOURCE is a file of weights or a folder in the reference's format or in diffusers', or the name of a model that is
    here. A transformer with --autoencoder, --text-encoder and --tokenizer becomes a whole model, alone a component.
    """

    source: Annotated[str, tyro.conf.Positional]
    """File, folder, or name of a model."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder to be written; it must not exist yet, or be empty."""
    model: str | None = None
    """Published model whose settings go with weights that do not tell theirs, such as opensora-1.1-stage3."""
    autoencoder: Path | None = None
    """File or folder: the autoencoder of a whole model."""
    text_encoder: Path | None = None
    """File or folder: its text encoder; a tokenizer in that folder is taken as well."""
    tokenizer: Path | None = None
    """Folder: its tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the networks written; by default as they are stored."""
    max_shard_size: str = "5GB"
    """Weights of more than this are written in several files."""

    def run(self) -> None:
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from opensora.checkpoints.conversion import convert
        from opensora.checkpoints.fit import PipelineReport
        from opensora.cli.inspect import Progress, component_lines, pipeline_lines, print_lines

        for logging in (diffusers_logging, transformers_logging):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        parts = {name: getattr(self, name) for name in ("autoencoder", "text_encoder", "tokenizer")}
        with Progress() as progress:
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
        is_pipeline = isinstance(report, PipelineReport)
        print_lines(pipeline_lines(report) if is_pipeline else component_lines(report), [])
