"""Where a run writes its figures: JSON lines always, TensorBoard where it is installed."""

import json
from pathlib import Path

from opensora.files import replacing


class Metrics:
    """Appends one JSON object a logged step to `metrics.jsonl`, and the same figures to TensorBoard event files.

    Args:
        folder: the run's folder.
        first_step: the step a run starts or resumes at; lines of later steps, left by a run that died after them,
            are dropped, so that the file reads as one uninterrupted run.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
            with replacing(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _step_of(line: str) -> float:
    """Step of a line; infinity for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
