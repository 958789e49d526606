"""Guidance on the first 3 of 4, 8 or 16 latent channels: which scale on all of them is the same? `python
docs/studies/more_channels.py`

The first Open-Sora sampler guided 3 of 4 channels. Of DiT, which has the same lines, its author says that a scale of
1 + x on three channels behaves like 1 + 0.75 x on all four: the strength counts in proportion to the channels, k / C.
By the length of the step that guidance adds it would be the root of that. Here temporal autoencoders of 4, 8 and 16
channels are trained on the same frames, a transformer on each, and new prompts are generated with guidance on 3,
on half and on all channels.

Rows go to `docs/studies/data/more_channels.jsonl`, models to `runs/studies`; page and picture are made of the rows. A
study that was stopped goes on. `--page` makes the page of the rows that there are.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis import marks, minus, nested_interval, options_of, save_picture, shown, table, write_tables
from measuring import prompts, quiet, read_right, reconstruction_psnr, rounded
from small_world import (
    CLIPS,
    STUDIES,
    Budget,
    autoencoder_recipe,
    carry_out_missing,
    deviations,
    spatial_autoencoder,
    train,
    transformer_recipe,
)
from torch import Tensor

from opensora.checkpoints.source import find_part
from opensora.evaluation.intervals import Interval
from opensora.evaluation.judge import Judge, load_judge
from opensora.evaluation.metrics.catalogue import measure_all, metrics_of
from opensora.lab.rows import Row
from opensora.models.guidance_strength import equivalent_scale
from opensora.weights import fingerprint

ROWS = STUDIES / "data" / "more_channels.jsonl"
SEEDS = 3
CHANNELS = (4, 8, 16)
FEW = 3
SCALES = (2.0, 4.0, 7.0)
"""On some channels; on all of them besides 1, and what both rules make of these."""
FIGURES = ("saturation", "clipped_share", "flicker_levels")


def by_share(scale: float, k: int, channels: int) -> float:
    """1 + (s - 1) k / C: the same mean pull."""
    return equivalent_scale(scale, guided=k, channels=channels)


def by_root(scale: float, k: int, channels: int) -> float:
    """1 + (s - 1) sqrt(k / C): the same root mean square of the pull, see `models.guidance_strength`."""
    return 1 + (scale - 1) * math.sqrt(k / channels)


@dataclass(frozen=True)
class Guided:
    """One row: guidance on the first k of C channels of the models of a seed; k = 0 is the row of the autoencoder."""

    seed: int
    channels: int
    k: int
    scale: float

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.seed}, {self.k} of {self.channels} at {self.scale:g}"


def settings_of(seed: int, channels: int) -> list[Guided]:
    """All that one transformer is asked for."""
    some = [Guided(seed, channels, k, s) for k in dict.fromkeys((FEW, channels // 2)) for s in SCALES]
    equal = [rule(s, FEW, channels) for s in SCALES for rule in (by_share, by_root)]
    scales = sorted({1.0, *SCALES, *(round(scale, 4) for scale in equal)})
    return [Guided(seed, channels, 0, 0.0), *some, *(Guided(seed, channels, channels, s) for s in scales)]


def plan(seeds: int = SEEDS) -> list[Guided]:
    """All rows, seed by seed."""
    return [row for seed in range(seeds) for channels in CHANNELS for row in settings_of(seed, channels)]


def carry_out(row: Guided, folder: Path, budget: Budget, judge: Judge) -> dict[str, Any]:
    """Trains what a row needs, if it is not there, and measures."""
    started = time.process_time()
    spatial, factor = spatial_autoencoder(folder.parent / "frames", budget)
    here = folder / f"seed{row.seed}" / f"channels{row.channels}"
    recipe = autoencoder_recipe(f"{here.name}_autoencoder", row.seed, row.channels, factor, spatial, budget)
    autoencoder = train(recipe, here / "autoencoder")
    found: dict[str, Any] = vars(row).copy()
    if row.k == 0:
        model = find_part(autoencoder, "autoencoder").load()
        found |= {"autoencoder": fingerprint(model.state_dict())[:12]}
        found |= {"std": rounded(deviations(model.latent_space), 4)}
        found |= {"psnr": reconstruction_psnr(model, budget.num_new)}
    else:
        recipe = transformer_recipe(f"{here.name}_transformer", row.seed, row.channels, autoencoder, budget)
        pipeline = quiet(train(recipe, here / "transformer"))
        how = {"guidance_scale": row.scale, "cfg_channels": row.k}
        found["right"], measured = read_right(pipeline, judge, prompts(budget.num_new), _measure, **how)
        for name in FIGURES:
            values = torch.cat([figures[name] for figures in measured])
            found[name] = [None if value != value else value for value in rounded(values, 4)]
    return found | {"cpu_s": round(time.process_time() - started, 1)}


def _measure(video: Tensor) -> dict[str, Tensor]:
    return measure_all(video, CLIPS.fps, metrics_of(("flicker", "colour")))


# ---- what the rows say

JUDGED = "judge"
"""Read right in everything, as a figure like the others."""
NAMES = {"saturation": "saturation", "clipped_share": "clipped share", "flicker_levels": "flicker", JUDGED: "judge"}


def clips_of(rows: list[Row], guided: Guided, figure: str) -> list[float] | None:
    """A figure of every clip of a row; None where the row is not in."""
    row = next((row for row in rows if row["cell"] == guided.name), None)
    if row is None:
        return None
    if figure == JUDGED:
        return marks(row["right"]["all"])
    return [math.nan if value is None else value for value in row[figure]]


def finished(rows: list[Row], channels: int) -> list[int]:
    """Seeds all of whose rows are in."""
    seeds, names = sorted({row["seed"] for row in rows}), {row["cell"] for row in rows}
    return [seed for seed in seeds if all(one.name in names for one in settings_of(seed, channels))]


def same_scale(rows: list[Row], channels: int, k: int, scale: float, figure: str) -> Interval | None:
    """The scale on all channels at which a figure is what it is with guidance on k of them; None without rows.

    Between the scales that were tried the figure is taken to be linear. NaN where it is never reached.
    """
    seeds = finished(rows, channels)
    if not seeds:
        return None
    scales = [one.scale for one in settings_of(0, channels) if one.k == channels]
    values = []
    for seed in seeds:
        columns = [clips_of(rows, Guided(seed, channels, k, scale), figure)]
        columns += [clips_of(rows, Guided(seed, channels, channels, s), figure) for s in scales]
        clips = np.array(columns, dtype=float).T
        values.append(np.where(np.isnan(clips).any(axis=1, keepdims=True), np.nan, clips))
    return nested_interval(values, lambda means: where_equal(scales, means[1:], means[0]))


def where_equal(scales: Sequence[float], curve: np.ndarray, target: float) -> float:
    """The first place where a curve through these points has this value; NaN where it never has."""
    for left, right, low, high in zip(scales[:-1], scales[1:], curve[:-1], curve[1:], strict=True):
        if min(low, high) <= target <= max(low, high):
            return left if low == high else left + (right - left) * (target - low) / (high - low)
    return math.nan


def more_than(rows: list[Row], channels: int, k: int, scale: float, on_all: float, figure: str) -> Interval | None:
    """How much more of a figure guidance on k channels gives than on all of them at another scale, clip by clip."""
    seeds = finished(rows, channels)
    if not seeds:
        return None
    some = [clips_of(rows, Guided(seed, channels, k, scale), figure) for seed in seeds]
    others = [clips_of(rows, Guided(seed, channels, channels, round(on_all, 4)), figure) for seed in seeds]
    return nested_interval(minus(some, others))  # type: ignore[arg-type]


def not_told_apart(rows: list[Row], channels: int, k: int, scale: float, figure: str) -> str:
    """The scales on all channels that give a figure which differs from that of k channels by chance at most."""
    tried = [one.scale for one in settings_of(0, channels) if one.k == channels]
    alike = []
    for on_all in tried:
        difference = more_than(rows, channels, k, scale, on_all, figure)
        if difference is not None and not difference.excludes_zero:
            alike.append(on_all)
    return f"{min(alike):.3g} to {max(alike):.3g}" if alike else "none"


def scale_table(rows: list[Row]) -> str:
    """Which scale on all channels is the same as s on three of them."""
    lines = []
    for channels in CHANNELS:
        if not finished(rows, channels):
            continue
        for scale in SCALES:
            cells = [f"{rule(scale, FEW, channels):.2f}" for rule in (by_share, by_root)]
            for figure in FIGURES:
                found = same_scale(rows, channels, FEW, scale, figure)
                cells.append("never" if found is None or math.isnan(found.value) else shown(found, 2))
            lines.append([str(channels), f"{scale:g}", *cells, not_told_apart(rows, channels, FEW, scale, JUDGED)])
    head = ["channels", "scale on 3", "by k/C", "by its root", *(f"by {NAMES[name]}" for name in FIGURES)]
    return table([*head, "not told apart by the judge"], lines)


def rule_table(rows: list[Row]) -> str:
    """Guidance on three channels less guidance on all at the scale that a rule calls equal."""
    lines = []
    for channels in CHANNELS:
        if not finished(rows, channels):
            continue
        for scale in SCALES:
            for name, rule in (("k/C", by_share), ("root", by_root)):
                cells = []
                for figure in (*FIGURES, JUDGED):
                    found = more_than(rows, channels, FEW, scale, rule(scale, FEW, channels), figure)
                    assert found is not None
                    cells.append(shown(found, 4) + (" *" if found.excludes_zero else ""))
                lines.append([str(channels), f"{scale:g}", name, f"{rule(scale, FEW, channels):.2f}", *cells])
    return table(["channels", "scale on 3", "rule", "scale on all", *NAMES.values()], lines)


def accuracy_table(rows: list[Row]) -> str:
    """What the judge reads right, in per cent, by the number of guided channels."""
    lines = []
    for channels in CHANNELS:
        seeds = finished(rows, channels)
        for k in dict.fromkeys((FEW, channels // 2, channels)) if seeds else ():
            cells = []
            for scale in (1.0, *SCALES):
                of_seeds = [clips_of(rows, Guided(seed, channels, k, scale), JUDGED) for seed in seeds]
                known = [clips for clips in of_seeds if clips is not None]
                cells.append(shown(nested_interval(known), 1, 100) if known else "")
            lines.append([str(channels), str(k), *cells])
    return table(["channels", "guided", *(f"scale {scale:g}" for scale in (1.0, *SCALES))], lines)


def conclusion(rows: list[Row], num_rows: int) -> str:
    """What the rows carry, in two sentences; they claim nothing beyond the intervals."""
    state = f"{len(rows)} of {num_rows} rows are in"
    alike: list[str] = []
    refused: list[str] = []
    done = {channels: finished(rows, channels) for channels in CHANNELS}
    for channels, seeds in done.items():
        if not seeds:
            continue
        found = same_scale(rows, channels, FEW, SCALES[1], "saturation")
        assert found is not None
        told = f"k/C says {by_share(SCALES[1], FEW, channels):.2f}, its root {by_root(SCALES[1], FEW, channels):.2f}"
        reached = "at none that was tried" if math.isnan(found.value) else f"at {shown(found, 2)}"
        alike.append(f"of {channels} channels {reached} ({told}; trainings: {len(seeds)})")
        by_rule = [f"{_refused(rows, channels, rule)}" for rule in (by_share, by_root)]
        refused.append(f"of {channels} channels k/C in {by_rule[0]}, its root in {by_rule[1]}")
    if not alike:
        return f"{state}, and no number of channels is finished: nothing is said yet."
    return (
        f"{state}: guidance of {SCALES[1]:g} on three channels saturates like guidance on all "
        f"{', '.join(alike)}.\n"
        f"Of {len(SCALES) * len(FIGURES)} comparisons each (three scales; saturation, clipped share, flicker) "
        f"intervals refuse {'; '.join(refused)}."
    )


def _refused(rows: list[Row], channels: int, rule: Callable[[float, int, int], float]) -> int:
    """How often guidance on three channels differs by more than chance from what a rule calls equal to it."""
    found = [
        more_than(rows, channels, FEW, scale, rule(scale, FEW, channels), figure)
        for scale in SCALES
        for figure in FIGURES
    ]
    return sum(one is not None and one.excludes_zero for one in found)


def draw(rows: list[Row], picture: Path) -> None:
    """Strength on all channels that equals a strength on three, beside what the two rules say."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FIGURES), figsize=(11, 3.6), sharey=True)
    for axis, name in zip(axes, FIGURES, strict=True):
        for number, channels in enumerate(c for c in CHANNELS if finished(rows, c)):
            for place, scale in enumerate(SCALES):
                found = same_scale(rows, channels, FEW, scale, name)
                if found is None or math.isnan(found.value):
                    continue
                value, low, high = ((s - 1) / (scale - 1) for s in (found.value, found.low, found.high))
                x = number + 0.15 * (place - 1)
                axis.plot([x, x], [low, high], color=f"C{place}")
                axis.plot(x, value, "o", color=f"C{place}", label=f"scale {scale:g} on 3" if number == 0 else None)
        ticks = range(len(CHANNELS))
        axis.plot(ticks, [FEW / c for c in CHANNELS], "k:", label="k/C")
        axis.plot(ticks, [math.sqrt(FEW / c) for c in CHANNELS], "k--", label="root of k/C")
        axis.set(title=f"equal {NAMES[name]}", xticks=ticks, xticklabels=CHANNELS, xlabel="latent channels")
    axes[0].set(ylabel="(scale on all - 1) / (scale on 3 - 1)")
    axes[0].legend(fontsize=7)  # of the other figures, one is never reached by some scale
    save_picture(figure, picture)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--models", type=Path, default=Path("runs/studies/more_channels"), help="folder for weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [] if options.page else plan(options.seeds)
    budget, judge = Budget(), load_judge()
    rows = carry_out_missing(ROWS, runs, budget, lambda run: carry_out(run, options.models, budget, judge))
    draw(rows, STUDIES / "images" / "more_channels.png")
    num_rows = len(plan(options.seeds))
    tables = {
        "conclusion": conclusion(rows, num_rows),
        "scales": scale_table(rows),
        "rules": rule_table(rows),
        "accuracy": accuracy_table(rows),
    }
    write_tables(STUDIES / "more_channels.md", tables)
    print(f"{len(rows)} of {num_rows} rows are in")


if __name__ == "__main__":
    main()
