"""Whether clips that are there can be held against each other, seen from the files before any of them is measured.

Figures count pixels and frames: a clip of another size or rate has other ones whatever it shows. So all clips have one
size and one rate, those of one name one length, and clips of a reference are what the compared ones are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.lab.compare import Comparison
from opensora.media.frames import probe
from opensora.media.timing import is_same_rate


@dataclass(frozen=True)
class Measures:
    """What clips must share.

    Attributes:
        of: whose: the file, or the model that will make it.
        num_frames: 1 for a picture.
        height, width: in pixels, as seen.
        fps: frames per second; None for a single frame.
    """

    of: str
    num_frames: int
    height: int
    width: int
    fps: float | None

    @classmethod
    def of_file(cls, path: Path) -> "Measures":
        """Of a clip that is there; of its frames only the first is decoded.

        Raises:
            OpenSoraError: it cannot be read.
        """
        try:
            facts = probe(path)
        except OpenSoraError as error:
            raise OpenSoraError(f"{path} cannot be read: {error}") from error
        return cls(str(path), facts.num_frames, facts.height, facts.width, facts.fps if facts.num_frames > 1 else None)

    @classmethod
    def of_request(cls, request: ClipRequest) -> "Measures":
        """Of a clip that is going to be made; of the model only the configuration is read.

        Raises:
            OpenSoraError: a size that the model cannot make.
        """
        from opensora.generation.resolve import resolve_size
        from opensora.planning.meta_pipeline import meta_pipeline
        from opensora.planning.tracing import Tracer

        pipeline = meta_pipeline(Tracer(), request.model_name, request.components).pipeline
        made = resolve_size(request, pipeline.config, pipeline.size_rule())
        fps = made.fps / made.frame_interval if made.num_frames > 1 else None
        return cls(f"a clip of {request.model_name}", made.num_frames, made.height, made.width, fps)

    def check_same_size_and_rate(self, other: "Measures") -> None:
        """Raises `OpenSoraError` for frames of another size, or that follow each other faster or more slowly."""
        if (self.height, self.width) != (other.height, other.width):
            raise OpenSoraError(
                f"{self.of} is {self.height}x{self.width} (height x width), but {other.of} {other.height}x{other.width}"
                f"; scale to one size first, as ffmpeg -i IN -vf scale={self.width}:{self.height} OUT does"
            )
        if self.fps and other.fps and not is_same_rate(self.fps, other.fps):
            raise OpenSoraError(
                f"{self.of} has {self.fps:g} frames per second, but {other.of} {other.fps:g}; resample to one rate "
                f"first, as ffmpeg -i IN -vf fps={self.fps:g} OUT does"
            )

    def check_same_length(self, other: "Measures") -> None:
        """Raises `OpenSoraError` for another number of frames."""
        if self.num_frames != other.num_frames:
            raise OpenSoraError(
                f"{self.of} has {self.num_frames} frames, but {other.of} {other.num_frames}; cut the longer one first, "
                f"as ffmpeg -i IN -frames:v {min(self.num_frames, other.num_frames)} OUT does"
            )


def check_comparable(comparison: Comparison, reference: Sequence[Path] = ()) -> None:
    """Refuses clips whose figures would differ whatever they show.

    Args:
        comparison: of clips that are there, which are held against each other, or of settings.
        reference: files that columns are held against as sets; each as long as any clip that is compared.

    Raises:
        OpenSoraError: the first two that differ, in what, and what to do.
    """
    compared = list(_compared(comparison, bool(reference)))
    if not compared:
        return
    moving = [clip for clips in compared for clip in clips if clip.fps]
    first = moving[0] if moving else compared[0][0]
    for clips in compared:
        for clip in clips:
            first.check_same_size_and_rate(clip)
            clips[0].check_same_length(clip)
    lengths = {clips[0].num_frames for clips in compared}
    for clip in map(Measures.of_file, reference):
        first.check_same_size_and_rate(clip)
        if clip.num_frames not in lengths:
            first.check_same_length(clip)


def _compared(comparison: Comparison, with_reference: bool) -> Iterable[list[Measures]]:
    """Those of a prompt, of all columns; of settings what the first makes, where a reference is to be like it."""
    request = comparison.columns[0].request
    if request is None:
        for prompt in comparison.prompts:
            yield [Measures.of_file(column.files[prompt.id]) for column in comparison.columns]
    elif with_reference:
        yield [Measures.of_request(request)]
