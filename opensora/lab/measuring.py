"""Figures of one clip: those of the metrics, and what the judge of the toy world reads right of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opensora.evaluation.metrics.catalogue import measure_all, metrics_of
from opensora.evaluation.suites import SuitePrompt
from opensora.generation.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.evaluation.judge import Judge

RIGHT = "right_"
"""Begins the names of figures that are 1 where the judge reads what was wanted, else 0."""


def figure_names(metrics: Sequence[str], prompts: Sequence[SuitePrompt]) -> list[str]:
    """What `Measuring.figures` returns for these, in order."""
    names = [figure.name for metric in metrics_of(metrics) for figure in metric.figures]
    wanted = next((prompt.wanted for prompt in prompts if prompt.wanted), None)
    return names + [f"{RIGHT}{name}" for name in (*wanted, "all")] if wanted else names


class Measuring:
    """Measures clips one by one.

    Args:
        metrics: names, see `evaluation.metrics.catalogue`.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = metrics_of(metrics)
        self._judge: Judge | None = None

    def figures(self, clip: Clip, wanted: dict[str, str] | None = None) -> dict[str, float]:
        """Name of a figure -> its value; NaN where there is nothing to be measured on.

        Args:
            clip: of as many frames as the metrics need.
            wanted: attribute -> label that the judge should read.
        """
        video = video_of(clip)
        figures = {name: float(value[0]) for name, value in measure_all(video, clip.fps, self.metrics).items()}
        if wanted:
            read = self.judge.read(video)[0]
            right = {name: float(read[name] == label) for name, label in wanted.items()}
            figures |= {f"{RIGHT}{name}": hit for name, hit in right.items()}
            figures[f"{RIGHT}all"] = float(all(right.values()))
        return figures

    @property
    def judge(self) -> "Judge":
        """Of the toy world, read when it is first asked."""
        if self._judge is None:
            from opensora.evaluation.judge import load_judge

            self._judge = load_judge()
        return self._judge


def video_of(clip: Clip) -> "Tensor":
    """(1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
