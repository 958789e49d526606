"""What a metric of clips is: a few figures of every clip, each with a unit, a direction and a word on what it can tell.

A metric sees nothing but the frames and how long one lasts, so it reads clips of any model, of any other program, and
real ones alike. Figures of whole sets of clips (distances), and those against a reference (PSNR), are functions of
their own beside these.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from opensora.errors import OpenSoraError

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One number of a clip.

    Attributes:
        name: column of tables, in lower case with underscores, a unit as its last part where it has one.
        unit: for people, such as "px/frame"; empty for a plain number.
        tells: one sentence: what it measures.
        better: in which direction clips get better, all else being equal; None where more is only different.
        blind_to: one sentence: what it cannot tell, or takes for something else.
    """

    name: str
    unit: str
    tells: str
    better: Better | None = None
    blind_to: str = ""


class Metric(ABC):
    """Figures of single clips.

    Attributes:
        name: of the metric, and of its file.
        figures: what `measure` returns, in this order.
        least_frames: of a clip; 2 for whatever compares frames.
    """

    name: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    least_frames: ClassVar[int] = 1

    @abstractmethod
    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """Figures of each clip, which depend on nothing but that clip.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], float32.
            fps: frames per second as shown.

        Returns:
            name of a figure -> (B,) float64; NaN where a clip has nothing that it could be measured on.
        """

    def check(self, video: Tensor) -> None:
        """Raises `OpenSoraError` for what is no batch of clips, no numbers, or of too few frames for this metric."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise OpenSoraError(f"{self.name} got a tensor of shape {tuple(video.shape)}; give clips (B, 3, T, H, W)")
        if video.shape[2] < self.least_frames:
            raise OpenSoraError(
                f"{self.name} compares frames, but was given clips with {video.shape[2]} of them; "
                f"give {self.least_frames} or more, or leave the metric out"
            )
        if not video.isfinite().all():
            raise OpenSoraError(f"{self.name} got clips with pixels that are no numbers; give finite ones in [-1, 1]")
