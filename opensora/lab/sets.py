"""Figures of whole columns: how far their clips are, as a set, from reference clips, and from each other.

Every clip is two vectors: how its frames look (EfficientNet features, averaged over eight of them) and what happens in
time (the motion encoder). They are kept beside the rows, so that a comparison that is resumed measures only new clips.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.metric import Figure
from opensora.files import replacing
from opensora.generation.clip import Clip
from opensora.lab.measuring import video_of

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.evaluation.intervals import Interval
    from opensora.lab.grid import Cell

KINDS = ("look", "motion")
TOYBOX = "toybox"
"""The reference of clips drawn by the toy world itself."""
LEAST_CLIPS = 4
_FRAMES_LOOKED_AT = 8
_DRAWS = 50

FIGURES = tuple(
    Figure(f"{kind}_{name}", "", f"{what} of a column's {of} and those of the reference clips.", "lower", blind)
    for kind, of in (("look", "frame features, averaged over a clip,"), ("motion", "motion features"))
    for name, what, blind in (
        ("frechet", "Frechet distance", "Grows as there are fewer clips; compare equal numbers only."),
        ("kernel", "Squared kernel distance, cubic (KID),", "Unbiased, so it may be below 0 by chance."),
    )
)
DIVERSITY = tuple(
    Figure(f"{kind}_diversity", "", f"Mean distance of two clips of the same prompt, in {kind} features.")
    for kind in KINDS
)


@dataclass(frozen=True)
class Reference:
    """Clips that columns are held against.

    Attributes:
        source: a folder of clips, or `TOYBOX`.
        num_clips: of the toy world; of a folder all are taken.
    """

    source: str
    num_clips: int = 0

    @property
    def files(self) -> dict[str, Path]:
        """By name; none of the toy world, whose clips are drawn.

        Raises:
            OpenSoraError: a folder without clips, or with too few.
        """
        from opensora.lab.grid import columns_of_folders

        if self.source == TOYBOX:
            return {}
        files = columns_of_folders([Path(self.source)])[0][0].files
        if len(files) < LEAST_CLIPS:
            raise OpenSoraError(
                f"`reference` {self.source} has {len(files)} clips; give {LEAST_CLIPS} or more, or {TOYBOX}"
            )
        return files


def features_of(clip: Clip) -> dict[str, np.ndarray]:
    """Kind -> a vector of the clip.

    Raises:
        OpenSoraError: a clip of one frame, in which nothing happens.
    """
    from opensora.evaluation.features import frame_features
    from opensora.evaluation.motion_encoder import motion_features

    video = video_of(clip)
    if video.shape[2] < 2:
        raise OpenSoraError(
            "`reference` compares what happens in time, but clips of one frame were given; leave it out"
        )
    chosen = np.linspace(0, video.shape[2] - 1, min(_FRAMES_LOOKED_AT, video.shape[2])).round().astype(int)
    looks = frame_features(video[:, :, chosen]).mean(dim=1)
    return {"look": looks[0].half().numpy(), "motion": motion_features(video)[0].half().numpy()}


def keep_features(path: Path, clip: Clip) -> None:
    """Writes what `features_of` says of a clip, unless it is there."""
    if not path.exists():
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **features_of(clip))  # type: ignore[arg-type]


def read_features(paths: Sequence[Path]) -> "dict[str, Tensor]":
    """Kind -> (N, D) of clips that were kept."""
    import torch

    rows = []
    for path in paths:
        with np.load(path, allow_pickle=False) as kept:
            rows.append({kind: torch.from_numpy(kept[kind]).float() for kind in KINDS})
    return {kind: torch.stack([row[kind] for row in rows]) for kind in KINDS}


def reference_features(reference: Reference, folder: Path, num_frames: int) -> "dict[str, Tensor]":
    """The same of the reference clips, kept in a folder; those that the toy world draws have so many frames.

    Raises:
        OpenSoraError: see `Reference.files`.
    """
    paths = []
    for name, clip in _reference_clips(reference, num_frames):
        paths.append(folder / f"{name}.npz")
        if not paths[-1].exists():
            keep_features(paths[-1], clip())
    return read_features(paths)


def set_figures(cells: "Sequence[Cell]", features: Path, reference: "dict[str, Tensor]") -> "list[dict[str, Interval]]":
    """Of each column: name of a figure -> its value and interval.

    Args:
        cells: all that were compared.
        features: folder that those of their clips were kept in.
        reference: from `reference_features`.
    """
    from opensora.evaluation.metrics.distances import diversity, estimate, frechet_distance, kernel_distance

    found = []
    for number in sorted({cell.column for cell in cells}):
        mine = [cell for cell in cells if cell.column == number]
        own = read_features([features / f"{cell.name}.npz" for cell in mine])
        figures = {}
        for kind in KINDS:
            for name, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):
                figures[f"{kind}_{name}"] = estimate(distance, own[kind], reference[kind], draws=_DRAWS)
            prompts = [cell.prompt for cell in mine]
            if len(set(prompts)) < len(prompts):
                figures[f"{kind}_diversity"] = diversity(own[kind], prompts, draws=_DRAWS)
        found.append(figures)
    return found


def figures_against(
    reference: str, cells: "Sequence[Cell]", features: Path, num_frames: int
) -> "list[dict[str, Interval]]":
    """`set_figures` against a folder of clips, or against as many clips of the toy world as a column has, or a hundred.

    Args:
        reference: a folder, or `TOYBOX`.
        cells: all that were compared.
        features: folder that those of their clips were kept in, and those of the reference are.
        num_frames: of the clips that the toy world draws.
    """
    num_clips = max(100, len(cells) // len({cell.column for cell in cells}))
    return set_figures(cells, features, reference_features(Reference(reference, num_clips), features, num_frames))


def _reference_clips(reference: Reference, num_frames: int) -> Iterator[tuple[str, Callable[[], Clip]]]:
    if reference.source != TOYBOX:
        from opensora.media.read import read_video

        for name, path in reference.files.items():
            yield f"reference-{name}", lambda path=path: Clip(*read_video(path))
        return
    from opensora.generation.clip import to_uint8
    from opensora.toybox.specs import EASY_WORLD, sample_specs
    from opensora.toybox.world import render

    specs = sample_specs(reference.num_clips, 1, EASY_WORLD, "held_out")  # other clips than those of the prompts
    for number, spec in enumerate(specs):

        def draw(spec=spec) -> Clip:
            video, _ = render([spec], num_frames)
            return Clip(to_uint8((video[0].transpose(0, 1) + 1) / 2), 8.0)

        yield f"toybox-{num_frames}-{number:05d}", draw
