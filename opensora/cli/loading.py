"""Which model, from which files, and where it runs."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction

from opensora.cli.devices import choose_device
from opensora.cli.options import FLAG, option
from opensora.cli.record import DTYPES, Record, UsedAdapter, check_same_model
from opensora.errors import OpenSoraError
from opensora.settings import nearest_name

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

DEFAULT_MODEL = "toybox"


@dataclass(frozen=True)
class MemoryOptions:
    """For what would not fit otherwise; `opensora plan` says which of them a clip needs."""

    offload: Annotated[bool, FLAG] = False
    """Each network is in memory only while it works."""
    sequential_guidance: Annotated[bool, FLAG] = False
    """The branches of guidance one after the other instead of at once."""
    micro_batch_size: Annotated[int | None, option("N")] = None
    """Frames that the 2D autoencoder works on at once."""

    def check(self) -> None:
        """Raises `OpenSoraError` for an impossible number."""
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise OpenSoraError(f"--micro-batch-size is {self.micro_batch_size}, expected 1 or more")

    def set_up(self, pipe: "OpenSoraPipeline") -> None:
        """Makes the pipeline work so, but for `offload`, which is decided before it is loaded."""
        pipe.sequential_guidance = self.sequential_guidance
        if self.micro_batch_size is not None:
            pipe.autoencoder.micro_batch_size = self.micro_batch_size


@dataclass(frozen=True)
class ModelOptions:
    """What `opensora models` lists, or a folder; each part of it can be replaced."""

    model: Annotated[str | None, option("NAME|PATH", DEFAULT_MODEL)] = None
    """toybox, toybox-iddpm, opensora-1.0, opensora-1.1, opensora-1.2, ..., or a model's folder."""
    download: Annotated[bool, FLAG] = False
    """Fetch what this machine lacks of a published model."""
    transformer: Annotated[Path | None, option("PATH", aliases=["--ckpt-path"])] = None
    """Weights (file or folder) in place of the model's diffusion transformer."""
    autoencoder: Annotated[Path | None, option("PATH", aliases=["--vae-path"])] = None
    """Likewise, its autoencoder."""
    text_encoder: Annotated[Path | None, option("PATH", aliases=["--text-encoder-path"])] = None
    """Likewise, its text encoder."""
    tokenizer: Annotated[Path | None, option("PATH", aliases=["--tokenizer-path"])] = None
    """Likewise, its tokenizer."""
    adapter: Annotated[UseAppendAction[tuple[str, ...]], option("PATH[:SCALE]", "none")] = ()
    """Fine-tuning beside the transformer's weights (LoRA), half as strong with :0.5; may be given several times."""

    @property
    def components(self) -> dict[str, Path]:
        """The parts that are replaced."""
        parts = {name: getattr(self, name) for name in ("transformer", "autoencoder", "text_encoder", "tokenizer")}
        return {name: path for name, path in parts.items() if path is not None}

    def adapters(self, record: Record | None = None) -> dict[Path, UsedAdapter]:
        """The adapters asked for; of a clip that is made again, those that it was made with.

        Raises:
            OpenSoraError: a file that is not there, or not the ones of the record.
        """
        from opensora.checkpoints.adapters import adapter_hash

        given: dict[Path, UsedAdapter] = {}
        for text in self.adapter:
            path, scale = parse_adapter(text)
            if path in given:
                raise OpenSoraError(f"--adapter {path} is given twice")
            given[path] = UsedAdapter(path.resolve().name, adapter_hash(path), 1.0 if scale is None else scale)
            if record is not None and scale is None:  # then the record says how strong
                scales = [used.scale for used in record.adapters if used.sha256 == given[path].sha256]
                given[path] = dataclasses.replace(given[path], scale=scales[0] if scales else 1.0)
        if record is not None:
            check_same_adapters(record, list(given.values()))
        return given

    def name(self, record: Record | None) -> str:
        """The model asked for, or the recorded one, or the default."""
        return self.model or (record.model if record else DEFAULT_MODEL)

    def locate(self, record: Record | None = None) -> None:
        """Makes sure that the model is on this machine; fetches it if that was asked for.

        Raises:
            OpenSoraError: no such model, or parts are missing.
        """
        from opensora.checkpoints.adapters import read_adapter
        from opensora.checkpoints.identify import read_header
        from opensora.checkpoints.published import published_name
        from opensora.checkpoints.sources import find_model, find_published

        name = self.name(record)
        for path in self.adapters(record):
            read_adapter(path)
        for part, path in self.components.items():
            if part != "tokenizer" and path.expanduser().exists():
                read_header(path.expanduser())  # a wrong file is told before anything is fetched
        try:
            if published_name(name) is None:
                if self.download:
                    raise OpenSoraError(f"--download fetches published models, and {name} is none; leave it out")
                find_model(name)
            else:
                fetch = self.download or self._asks_to_download(name)
                find_published(name, self.components, download=fetch)
        except OpenSoraError as error:
            if record is None or self.model is not None:
                raise
            raise OpenSoraError(f"{error}; --model says where the model is that made this clip") from error

    def load(
        self, device: str | None, dtype: str | None, memory: MemoryOptions, record: Record | None = None
    ) -> "tuple[OpenSoraPipeline, str]":
        """The pipeline, ready to run, and the hash of its weights.

        Raises:
            OpenSoraError: damaged files, an absent device, or another model than the recorded one.
        """
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from opensora.checkpoints.loading import load_pipeline
        from opensora.checkpoints.sources import model_hash

        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        chosen = choose_device(device)
        name = self.name(record)
        found = model_hash(name, self.components)
        if record:
            check_same_model(record, found)
        pipe = load_pipeline(
            name,
            device=chosen,
            dtype=getattr(torch, dtype) if dtype else None,
            components=self.components,
            adapters={path: used.scale for path, used in self.adapters(record).items()},
            offload=memory.offload,
        )
        memory.set_up(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe, found

    def recorded_name(self, record: Record | None) -> str:
        """A name as it is; of a folder its name alone."""
        from opensora.checkpoints.published import BUNDLED, published_name

        name = self.name(record)
        return name if name in BUNDLED else published_name(name) or Path(name).expanduser().resolve().name

    def _asks_to_download(self, name: str) -> bool:
        """Whether a user at a terminal wants what is missing fetched; not asked where nothing is, or nobody is there.

        Raises:
            OpenSoraError: the user does not.
        """
        from opensora.checkpoints.sources import find_published

        at_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        if not at_terminal or not all(path.expanduser().exists() for path in self.components.values()):
            return False
        try:
            find_published(name, self.components)
        except OpenSoraError as missing:
            print(f"{missing}\nFetch now? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise OpenSoraError(f"{name} was not fetched") from None
            return True
        return False


def parse_adapter(text: str) -> tuple[Path, float | None]:
    """`"look:0.5"` -> look and 0.5, `"look"` -> look and None."""
    path, colon, scale = text.rpartition(":")
    try:
        strength = float(scale) if colon and path else None
    except ValueError:  # a colon within a path
        strength = None
    if strength is None:
        return Path(text).expanduser(), None
    if not abs(strength) < float("inf"):
        raise OpenSoraError(f"--adapter {text} has the scale {scale}; expected a number such as 0.5")
    return Path(path).expanduser(), strength


def check_same_adapters(record: Record, given: list[UsedAdapter]) -> None:
    """Raises `OpenSoraError` if adapters are not those that a clip was made with."""
    were = {used.sha256: used for used in record.adapters}
    for used in given:
        if used.sha256 not in were:
            made = ", ".join(f"{was.name} ({was.sha256[:12]})" for was in were.values()) or "none"
            raise OpenSoraError(f"adapter {used.name} ({used.sha256[:12]}) is not one this clip was made with: {made}")
        if used.scale != were[used.sha256].scale:
            raise OpenSoraError(
                f"adapter {used.name} acted at {were[used.sha256].scale:g} in this clip, not at {used.scale:g}; "
                "leave out the scale"
            )
    missing = [was for sha256, was in were.items() if sha256 not in {used.sha256 for used in given}]
    if missing:
        raise OpenSoraError(
            f"this clip was made with the adapter {missing[0].name} (hash {missing[0].sha256[:12]}); "
            "say where it is with --adapter PATH"
        )


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs, and in which numbers."""

    device: Annotated[str | None, option("NAME", "an accelerator if there is one, else cpu")] = None
    """cpu, cuda, cuda:1, mps."""
    dtype: Annotated[str | None, option("NAME", "float32 on the cpu, else bfloat16")] = None
    """Numbers the networks compute in: float32, bfloat16, float16."""

    def check(self) -> None:
        """Raises `OpenSoraError` for an unknown dtype."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OpenSoraError(f"unknown dtype {self.dtype!r}{nearest_name(self.dtype, DTYPES)}")
