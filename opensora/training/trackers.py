"""Where a run's figures and previews are shown besides its own files: TensorBoard, Weights & Biases.

Both write into the run's folder. Nothing is sent anywhere: W&B runs offline unless its own variable WANDB_MODE says
otherwise, and `wandb sync` uploads what lies in the folder whenever its owner wants.
"""

import importlib.util
import io
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import PIL.Image

from opensora.errors import OpenSoraError
from opensora.files import adding_to
from opensora.media.read import read_video

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Takes figures and previews of a step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def show(self, step: int, files: Sequence[Path]) -> None:
        """Pictures (.png) and clips (.mp4), by the names of their files without the step."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`.

    Args:
        folder: the run's.
        first_step: the step that a run starts or resumes at; what is there of later ones is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = folder / "tensorboard"
        with adding_to(self.events):
            self.writer = SummaryWriter(str(self.events), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        with adding_to(self.events):
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)

    def show(self, step: int, files: Sequence[Path]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        for path in files:
            content, (width, height) = _as_picture(path)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            value = Summary.Value(tag=f"previews/{preview_name(path)}", image=image)
            with adding_to(self.events):
                self.writer.file_writer.add_summary(Summary(value=[value]), step)  # pyright: ignore[reportOptionalMemberAccess]

    def close(self) -> None:
        with adding_to(self.events):
            self.writer.close()


class WeightsAndBiases:
    """A run of W&B in `wandb/`, offline unless WANDB_MODE says otherwise; a resumed run goes on under its id.

    Args:
        folder: the run's, whose name is the run's name.
        config: the recipe, as plain data.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb = wandb
        self.run = wandb.init(
            project="opensora",
            name=folder.name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=config,
            mode=wandb_mode(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("*", step_metric="step")  # a resumed run may tell a step again

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({**figures, "step": step})

    def show(self, step: int, files: Sequence[Path]) -> None:
        kinds = {".png": self.wandb.Image, ".mp4": lambda path: self.wandb.Video(path, format="mp4")}
        shown = {f"previews/{preview_name(path)}": kinds[path.suffix](str(path)) for path in files}
        self.run.log({**shown, "step": step})

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: Sequence[TrackerName], folder: Path, first_step: int, config: Any) -> list[Tracker]:
    """The trackers of a run; without TensorBoard's package there is none of it, and a log line says so."""
    trackers: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name == "wandb":
            trackers.append(WeightsAndBiases(folder, config))
        elif importlib.util.find_spec("tensorboard") is not None:
            trackers.append(TensorBoard(folder, first_step))
        else:
            logger.warning("tensorboard is not installed: figures are in %s alone", folder / "metrics.jsonl")
    return trackers


def check_trackers(names: Sequence[TrackerName], folder: Path) -> list[str]:
    """Before the first step: what is to be known of the trackers, a sentence each.

    Raises:
        OpenSoraError: W&B is asked for and not installed.
    """
    if "wandb" not in names:
        return []
    if importlib.util.find_spec("wandb") is None:
        raise OpenSoraError("loop.trackers names wandb, which is not installed; pip install wandb, or leave it out")
    if wandb_mode() != "offline":
        return [f"wandb: this run is {wandb_mode()}, as WANDB_MODE says"]
    return [f"wandb: offline, in {folder / 'wandb'}; WANDB_MODE=online sends a run while it trains, wandb sync later"]


def wandb_mode() -> Any:
    """What W&B's own variable says, or offline."""
    return os.environ.get("WANDB_MODE") or "offline"


def preview_name(path: Path) -> str:
    """What a preview shows, the same at every step: `step-00000500-0.mp4` is "0"."""
    return path.stem.removeprefix("step-").lstrip("0123456789").strip("-") or "sheet"


def _run_id(folder: Path) -> str:
    path = folder / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _as_picture(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A picture as it is, a clip as a GIF, with (width, height): TensorBoard shows no other clips."""
    if path.suffix == ".png":
        (frame,), _ = read_video(path)
        return path.read_bytes(), (frame.shape[1], frame.shape[0])
    frames, fps = read_video(path)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    content = io.BytesIO()
    pictures[0].save(
        content, "GIF", save_all=True, append_images=pictures[1:], duration=max(round(1000 / fps), 20), loop=0
    )
    return content.getvalue(), pictures[0].size
