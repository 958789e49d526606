"""Clips of a grid, made: each by the settings of its column, from the noise of its prompt, saved and measured."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opensora.evaluation.suites import SuitePrompt
from opensora.generation.clip import Clip
from opensora.generation.request import OF_THE_MODEL, ClipRequest
from opensora.lab.grid import Cell, Column, shown_value
from opensora.lab.rows import Row

Batch = list[Cell]
"""Cells of one column that are made at once."""


def batches_of(cells: Sequence[Cell], batch_size: int) -> list[Batch]:
    """Cells column by column in fixed batches, so that a resumed run makes the batches of one that never stopped."""
    batches: list[Batch] = []
    for cell in cells:
        if not batches or len(batches[-1]) == batch_size or batches[-1][0].column != cell.column:
            batches.append([])
        batches[-1].append(cell)
    return batches


def row_of(cell: Cell, column: Column, prompt: SuitePrompt, clip: Clip, figures: dict[str, float]) -> Row:
    """What the table says of a clip."""
    varying = {name: shown_value(value) for name, value in column.settings.items()}
    told: dict[str, Any] = {"prompt_id": prompt.id, "prompt": prompt.text, "seed": prompt.seed(cell.seed)}
    shape = {"num_frames": len(clip.frames), "fps": clip.fps}
    return {"cell": cell.name, "column": column.name, **varying, **told, **shape, **figures}


def make_clips(
    columns: Sequence[Column],
    prompts: Sequence[SuitePrompt],
    folder: Path | None,
    metrics: Sequence[str],
    features: Path | None = None,
) -> Callable[[Batch], list[Row]]:
    """What makes batches, in a process of its own or not; it keeps the model of the last one.

    Args:
        columns, prompts: of the grid.
        folder: where clips are saved under the names of their cells; None keeps none.
        metrics: names of those that they are measured by.
        features: where the features of clips are kept, see `sets`; None for nowhere.
    """
    from opensora.generation.engine import Engine
    from opensora.lab.measuring import Measuring
    from opensora.lab.sets import keep_features

    measuring = Measuring(metrics)
    engines: dict[str, Engine] = {}

    def engine_for(request: ClipRequest) -> Engine:
        loaded = ClipRequest("", **{name: getattr(request, name) for name in OF_THE_MODEL})
        if repr(loaded) not in engines:
            engines.clear()
            engines[repr(loaded)] = Engine.load(loaded, allows_idle=True)
        return engines[repr(loaded)]

    def clips_of(batch: Batch) -> list[Clip]:
        request = columns[batch[0].column].request
        if request is None:
            return [_read(columns[cell.column].files[prompts[cell.prompt].id]) for cell in batch]
        asked = [(prompts[cell.prompt], cell.seed) for cell in batch]
        wanted = [dataclasses.replace(request, prompt=p.text, seed=p.seed(number)) for p, number in asked]
        engine = engine_for(request)
        return engine.make_batch(engine.prepare(wanted))

    def make(batch: Batch) -> list[Row]:
        rows = []
        for cell, clip in zip(batch, clips_of(batch), strict=True):
            prompt = prompts[cell.prompt]
            figures = measuring.figures(clip, prompt.wanted)
            if features is not None:
                keep_features(features / f"{cell.name}.npz", clip)
            if folder is not None:
                clip.save(folder / f"{cell.name}.mp4")
            rows.append(row_of(cell, columns[cell.column], prompt, clip, figures))
        return rows

    return make


def _read(path: Path) -> Clip:
    from opensora.media.read import read_video

    return Clip(*read_video(path))
