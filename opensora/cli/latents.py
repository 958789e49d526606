"""`opensora latents`: whether an autoencoder's latents are what a diffusion model expects, and what makes them so."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from opensora.cli.options import FLAG, check_output, option, with_flags
from opensora.cli.progress import Progress
from opensora.cli.tables import print_table
from opensora.errors import OpenSoraError

if TYPE_CHECKING:
    from opensora.lab.latents.clips import Clips
    from opensora.lab.latents.subject import Subject
    from opensora.models.autoencoders.codec import VideoCodec

_MODEL = tyro.conf.arg(aliases=["--autoencoder"], metavar="MODEL")


@dataclass(frozen=True)
class Measuring:
    """Which latents, of which clips."""

    model: Annotated[str, _MODEL] = "toybox"
    """Name or folder of a model, or folder or file of an autoencoder."""
    data: str = "toybox"
    """Folder of clips, manifest (.csv or .parquet), or toybox for held-out clips of the toy world."""
    num_clips: int = 100
    """How many clips, chosen by the seed."""
    num_frames: Annotated[int | None, option("N", "the model's")] = None
    """Frames of a clip; 1 for images."""
    height: Annotated[int | None, option("PIXELS", "the model's")] = None
    """Height of a clip."""
    width: Annotated[int | None, option("PIXELS", "the model's")] = None
    """Width of a clip."""
    seed: int = 0
    """Chooses clips and windows."""
    device: str | None = None
    """cpu, cuda or mps; an accelerator if there is one when left out."""

    def _load(self, subject: "Subject") -> "VideoCodec":
        from opensora.checkpoints.loading import choose_device

        return subject.load(choose_device(self.device))

    def _clips(self, subject: "Subject", codec: "VideoCodec") -> "Clips":
        from opensora.lab.latents.clips import choose_clips

        size = subject.size(codec, self.data, self.num_frames, self.height, self.width)
        return choose_clips(self.data, size, self.num_clips, self.seed)


@dataclass(frozen=True)
class LatentsAudit(Measuring):
    """Say whether an autoencoder's latents are right, what they would be otherwise, and what to declare.

    Told are mean, deviation and kurtosis of each channel, how many channels carry what there is, the power over space
    and time, what other scaling factors would make of them, and what that is to every way of training.
    """

    scaling_factor: Annotated[float | None, option("X", "as declared")] = None
    """Look at the autoencoder as if this were declared."""
    convention: Annotated[Literal["multiply", "divide"] | None, option("WORD", "as declared")] = None
    """Whether encoding multiplies or divides by --scaling-factor."""
    output: Path | None = None
    """JSON file of all that was found."""
    plot: Path | None = None
    """PNG file: distribution, channels, principal axes, power by frequency."""

    def run(self) -> None:
        from opensora.lab.latents.audit import audit
        from opensora.lab.latents.picture import draw, import_matplotlib
        from opensora.lab.latents.subject import Subject
        from opensora.lab.latents.wording import lines_of, tables_of

        check_output("--output", self.output, ".json")
        check_output("--plot", self.plot, ".png")
        if self.plot is not None:
            import_matplotlib()
        subject = Subject.find(self.model)
        codec = self._load(subject)
        self._declare(codec)
        clips = self._clips(subject, codec)
        with Progress("encoding clips") as progress:
            found = audit(subject, codec, clips, lambda number: progress.update(number, self.num_clips))
        if self.output is not None:
            from opensora.files import replacing

            with replacing(self.output) as partial:
                partial.write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        if self.plot is not None:
            draw(found, self.plot)
        for table in tables_of(found):
            print(f"\n{table.title}")
            print_table(table.head, table.rows, width=120)
        print()
        for line in lines_of(found):
            print(with_flags(line, self))
        for path in (self.output, self.plot):
            if path is not None:
                print(f"written: {path}")

    def _declare(self, codec: "VideoCodec") -> None:
        """Puts what was asked for in the place of the declared factor."""
        from dataclasses import replace

        if self.convention is not None and self.scaling_factor is None:
            raise OpenSoraError("--convention has no effect without --scaling-factor; give both")
        if self.scaling_factor is None:
            return
        space = codec.latent_space
        convention = self.convention or space.convention
        codec.override_latent_space(
            replace(space, scaling_factor=self.scaling_factor, convention=convention, trained_with="--scaling-factor")
        )


@dataclass(frozen=True)
class LatentsMeasure(Measuring):
    """Write mean and deviation of each channel into an autoencoder's configuration, as shift and scale.

    For an autoencoder that nothing was trained on yet. The configuration says on what they were measured.
    """

    output: Annotated[Path | None, option("FOLDER")] = None
    """New folder of the autoencoder with these figures."""
    in_place: Annotated[bool, FLAG] = False
    """Write them into the autoencoder's own folder instead."""
    from_scratch: Annotated[bool, FLAG] = False
    """Also of an autoencoder that a transformer was trained on: another one will be trained on the new latents."""

    def run(self) -> None:
        from opensora.lab.latents.measure import measure, target
        from opensora.lab.latents.subject import Subject
        from opensora.lab.latents.verdict import configuration

        subject = Subject.find(self.model)
        codec = self._load(subject)
        folder = target(subject, codec, self.output, in_place=self.in_place, from_scratch=self.from_scratch)
        clips = self._clips(subject, codec)
        with Progress("encoding clips") as progress:
            space = measure(subject, codec, clips, folder, lambda number: progress.update(number, self.num_clips))
        print(configuration(space))
        print(f"written: {folder}")


Latents = (
    Annotated[LatentsAudit, tyro.conf.subcommand("audit")] | Annotated[LatentsMeasure, tyro.conf.subcommand("measure")]
)
"""What `opensora latents` can do; every member has `run()`."""
