"""How far a clip is, and how its maker is told to stop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.pipeline import OpenSoraPipeline

Stage = Literal["encoding", "denoising", "decoding"]


@dataclass(frozen=True)
class Progress:
    """How far a clip is.

    Attributes:
        stage: what is being done; text is encoded first.
        step: steps of the loop that are done.
        num_steps: steps of the loop; 0 while it is not known.
        loop: number of the loop, from 0.
        num_loops: of a long video; 1 for a clip.
        latents: (B, C, T, H, W) after a step of the loop; None at other times.
    """

    stage: Stage
    step: int
    num_steps: int
    loop: int
    num_loops: int
    latents: "Tensor | None" = field(default=None, compare=False, repr=False)


class Cancelled(Exception):
    """The caller asked to stop; nothing was made."""


class Watch:
    """Tells how far a clip is, and stops it when the caller wants.

    Args:
        num_loops: of the video.
        on_progress: is told, in the thread that makes the clip.
        cancelled: is asked there, between all steps.
    """

    def __init__(
        self,
        num_loops: int,
        on_progress: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.num_loops, self.on_progress, self.cancelled = num_loops, on_progress, cancelled
        self.loop = 0

    def check(self) -> None:
        """Raises `Cancelled` if the caller asked to stop."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the clip was cancelled")

    def tell(self, stage: Stage, step: int, num_steps: int, latents: "Tensor | None" = None) -> None:
        """A stage begins, or a step is done."""
        self.check()
        if self.on_progress is not None:
            self.on_progress(Progress(stage, step, num_steps, self.loop, self.num_loops, latents))

    def loop_begins(self, loop: int) -> None:
        """A loop begins, with its text."""
        self.loop = loop
        self.tell("encoding", 0, 0)

    def step_done(self, pipe: "OpenSoraPipeline", step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after each step."""
        num_steps = pipe.num_timesteps or 0
        self.tell("denoising", step + 1, num_steps, values.get("latents"))
        if step + 1 == num_steps:
            self.tell("decoding", num_steps, num_steps)
        return values
