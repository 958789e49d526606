"""Does the scaling factor matter, and what repairs a wrong one? `python docs/studies/scaling_factor.py`

Open-Sora 1.2 multiplied the latents of the SDXL autoencoder by 0.18215, which is Stable Diffusion 1.5's factor, where
0.13025 is right, and trained its temporal autoencoder on that; its maintainers normalised every channel of the result
by measured shift and scale, and argued that this makes up for it. Here a temporal autoencoder is trained under the
right factor, one too large by 0.18215 / 0.13025, and ones wrong by 4 either way; and on the latents of each a
transformer with normalisation, without, and without but with the time shift that is equivalent to it. All share seeds
and budgets.

Rows go to `docs/studies/data/scaling_factor.jsonl`, models to `runs/studies`; page and picture are made of the rows.
A study that was stopped goes on. `--page` makes the page of the rows that there are.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis import marks, minus, nested_interval, options_of, save_picture, shown, table, write_tables
from measuring import prompts, quiet, read_right, reconstruction_psnr, unexplained_variance
from small_world import (
    STUDIES,
    Budget,
    autoencoder_recipe,
    carry_out_missing,
    deviations,
    spatial_autoencoder,
    train,
    transformer_recipe,
    without_normalisation,
)

from opensora.checkpoints.source import find_part
from opensora.evaluation.intervals import Interval
from opensora.evaluation.judge import Judge, load_judge
from opensora.lab.rows import Row
from opensora.weights import fingerprint

ROWS = STUDIES / "data" / "scaling_factor.jsonl"
SEEDS = 3
FACTORS = {"right": 1.0, "as 1.2": 0.18215 / 0.13025, "4 too large": 4.0, "4 too small": 0.25}
"""Times the right factor."""
LATENTS = ("normalised", "raw", "raw, shifted")
LOG_SNRS = (-4.0, -2.0, 0.0, 2.0, 4.0)


@dataclass(frozen=True)
class Run:
    """One transformer and what it was trained on; rows name it so.

    Attributes:
        seed: of all its parts.
        factor: of `FACTORS`.
        latents: of `LATENTS`; "autoencoder" is the row of the temporal autoencoder itself.
    """

    seed: int
    factor: str
    latents: str

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.seed}, {self.factor}, {self.latents}"


def plan(seeds: int = SEEDS) -> list[Run]:
    """All runs, seed by seed and factor by factor, so that a study that was stopped compares what belongs together.

    The right factor has no shifted arm: nothing is to be repaired there.
    """
    return [
        Run(seed, factor, latents)
        for seed in range(seeds)
        for factor in FACTORS
        for latents in ("autoencoder", *LATENTS)
        if (factor, latents) != ("right", "raw, shifted")
    ]


def carry_out(run: Run, folder: Path, budget: Budget, judge: Judge) -> dict[str, object]:
    """Trains what a run needs and measures it; returns its row."""
    started = time.process_time()
    spatial, own_factor = spatial_autoencoder(folder.parent / "frames", budget)
    factor, here = own_factor * FACTORS[run.factor], folder / f"seed{run.seed}" / run.factor.replace(" ", "_")
    recipe = autoencoder_recipe(f"{here.name}_autoencoder", run.seed, 4, factor, spatial, budget)
    autoencoder = train(recipe, here / "autoencoder")
    model = find_part(autoencoder, "autoencoder").load()
    spread = deviations(model.latent_space)
    row: dict[str, object] = {**vars(run), "autoencoder": fingerprint(model.state_dict())[:12]}
    if run.latents == "autoencoder":
        row |= {"scaling_factor": round(factor, 5), "std": [round(float(s), 4) for s in spread]}
        row["psnr"] = reconstruction_psnr(model, budget.num_new)
    else:
        shift = None
        if run.latents != "normalised":
            autoencoder = without_normalisation(autoencoder, here / "raw_autoencoder")
        if run.latents == "raw, shifted":
            shift = float(spread.square().mean().sqrt())
        name = run.latents.replace(", ", "_")
        recipe = transformer_recipe(f"{here.name}_{name}", run.seed, 4, autoencoder, budget, shift)
        pipeline = quiet(train(recipe, here / name))
        row["shift_ratio"] = None if shift is None else round(shift, 4)
        row["unexplained"] = unexplained_variance(pipeline, LOG_SNRS, budget.num_new)
        row["right"], _ = read_right(pipeline, judge, prompts(budget.num_new))
    row["cpu_s"] = round(time.process_time() - started, 1)
    return row


# ---- what the rows say


@dataclass(frozen=True)
class Arm:
    """Of the seeds that have an arm, in order: what was measured of every clip."""

    seeds: list[int]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, rows: list[Row], factor: str, latents: str) -> "Arm":
        found = [row for row in rows if (row["factor"], row["latents"]) == (factor, latents)]
        found.sort(key=lambda row: row["seed"])
        return cls([row["seed"] for row in found], found)

    def shared_with(self, other: "Arm") -> "tuple[Arm, Arm]":
        """Both with the seeds alone that both have."""
        both = [seed for seed in self.seeds if seed in other.seeds]
        return tuple(Arm(both, [row for row in arm.rows if row["seed"] in both]) for arm in (self, other))  # type: ignore

    def right(self) -> list[list[float]]:
        """1 for a clip of which the judge reads everything as prompted, 0 for another."""
        return [marks(row["right"]["all"]) for row in self.rows]

    def unexplained(self) -> list[list[float]]:
        """Of every clip, the mean over all log-SNRs."""
        return [np.mean(row["unexplained"], axis=0).tolist() for row in self.rows]

    def psnr(self) -> list[list[float]]:
        return [row["psnr"]["clip"] for row in self.rows]


FIGURES = {"unexplained": ("unexplained variance, %", 100.0, 2), "right": ("read right, %", 100.0, 1)}
"""Figure of `Arm` -> its name, factor and digits."""


def compared(arm: Arm, other: Arm, figure: str) -> Interval | None:
    """How much more an arm has of a figure than another, on the seeds that both have."""
    mine, theirs = arm.shared_with(other)
    if not mine.seeds:
        return None
    return nested_interval(minus(getattr(mine, figure)(), getattr(theirs, figure)()))


def autoencoder_table(rows: list[Row]) -> str:
    """Temporal autoencoders under every factor."""
    lines, right = [], Arm.of(rows, "right", "autoencoder")
    for factor, times in FACTORS.items():
        arm = Arm.of(rows, factor, "autoencoder")
        if not arm.seeds:
            continue
        spread = np.mean([np.sqrt(np.mean(np.square(row["std"]))) for row in arm.rows])
        against = compared(arm, right, "psnr") if factor != "right" else None
        cells = [f"{spread:.2f}", shown(nested_interval(arm.psnr()), 2), shown(against, 2) if against else ""]
        lines.append([factor, f"{times:.3g}", str(len(arm.seeds)), *cells])
    head = [
        "factor",
        "times the right one",
        "seeds",
        "std of the latents",
        "PSNR, dB",
        "more than under the right factor",
    ]
    return table(head, lines)


def transformer_table(rows: list[Row]) -> str:
    """Transformers on the latents of every factor, and how they differ from the one on right, normalised latents."""
    lines, best = [], Arm.of(rows, "right", "normalised")
    for factor in FACTORS:
        for latents in LATENTS:
            arm, cells = Arm.of(rows, factor, latents), []
            if not arm.seeds:
                continue
            for figure, (_, times, digits) in FIGURES.items():
                against = compared(arm, best, figure) if arm.rows != best.rows else None
                cells.append(shown(nested_interval(getattr(arm, figure)()), digits, times))
                cells.append(shown(against, digits, times) if against else "")
            lines.append([factor, latents, str(len(arm.seeds)), *cells])
    names = [part for name, _, _ in FIGURES.values() for part in (name, "difference")]
    return table(["factor", "latents", "seeds", *names], lines)


def verdict(rows: list[Row], factor: str, latents: str, figure: str = "unexplained") -> str | None:
    """How an arm compares with the right, normalised one: "worse", "better", "not told apart"; None without rows."""
    against = compared(Arm.of(rows, factor, latents), Arm.of(rows, "right", "normalised"), figure)
    if against is None:
        return None
    if not against.excludes_zero:
        return "not told apart"
    return "worse" if (against.value > 0) == (figure == "unexplained") else "better"


def repaired(rows: list[Row], factor: str, latents: str) -> Interval | None:
    """Which share an arm closes of what raw latents under its factor lose against right, normalised ones; 1 is all."""
    arms = [Arm.of(rows, *names) for names in ((factor, "raw"), (factor, latents), ("right", "normalised"))]
    seeds = [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]
    if not seeds:
        return None
    chosen = [Arm(seeds, [row for row in arm.rows if row["seed"] in seeds]).unexplained() for arm in arms]
    values = np.moveaxis(np.array(chosen), 0, -1)
    return nested_interval(values, lambda means: float((means[0] - means[1]) / (means[0] - means[2])))


def conclusion(rows: list[Row], num_runs: int) -> str:
    """What the rows carry, in three sentences; they claim nothing beyond the intervals."""
    seeds = {row["seed"] for row in rows}
    state = f"{len(rows)} of {num_runs} runs are in"
    if len(seeds) == 1:
        state += ", of one seed, so intervals tell of clips and not of other trainings"
    parts = []
    for factor in FACTORS:
        by_scale, by_shift = repaired(rows, factor, "normalised"), repaired(rows, factor, "raw, shifted")
        if factor != "right" and by_scale and by_shift:
            closed = f"normalisation closes {shown(by_scale, 0, 100)} %, the time shift {shown(by_shift, 0, 100)} %"
            parts.append(f'under "{factor}" {closed}')
    if not parts:
        return f"{state}, and nothing can be compared yet."
    said = [
        f"{state}: of what raw latents lose against normalised ones under the right factor, in unexplained variance, "
        f"{'; '.join(parts)} (below 0: it loses more).",
        *(
            f"{what} more than chance in unexplained variance {_where(rows, latents, 'unexplained')}, and in what the "
            f"judge reads {_where(rows, latents, 'right')}."
            for what, latents in (("Normalised latents still lose", "normalised"), ("Raw latents lose", "raw"))
        ),
    ]
    return "\n".join(said)


def _where(rows: list[Row], latents: str, figure: str) -> str:
    """The factors under which latents are worse than right, normalised ones."""
    factors = [f'"{factor}"' for factor in FACTORS if (factor, latents) != ("right", "normalised")]
    worse = [factor for factor in factors if verdict(rows, factor.strip('"'), latents, figure) == "worse"]
    if worse == factors:
        return "under every factor" if "right" in factors[0] else "under every wrong factor"
    return f"under {' and '.join(worse)}" if worse else "nowhere"


def draw(rows: list[Row], picture: Path) -> None:
    """Unexplained variance over log-SNR, and what is read right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
    styles = dict(zip(LATENTS, ("-", ":", "--"), strict=True))
    colours = dict(zip(FACTORS, ("tab:green", "tab:blue", "tab:red", "tab:orange"), strict=True))
    best = Arm.of(rows, "right", "normalised")
    place, labels = 0, []
    for factor in FACTORS:
        for latents in LATENTS:
            arm = Arm.of(rows, factor, latents)
            if not arm.seeds:
                continue
            mine, theirs = arm.shared_with(best)
            ratio = np.mean([row["unexplained"] for row in mine.rows], axis=(0, 2))
            ratio = ratio / np.mean([row["unexplained"] for row in theirs.rows], axis=(0, 2))
            left.plot(LOG_SNRS, ratio, styles[latents], color=colours[factor], label=f"{factor}, {latents}")
            read = nested_interval(arm.right())
            right.barh(place, 100 * read.value, color=colours[factor], alpha=0.6)
            right.plot([100 * read.low, 100 * read.high], [place, place], color="black", linewidth=1)
            labels.append(f"{factor}, {latents}")
            place += 1
    left.set(xlabel="log-SNR", ylabel="unexplained variance, relative")
    left.set_ylim(top=1.45 * left.get_ylim()[1])
    left.legend(fontsize=6, ncols=3, loc="upper center")
    right.set(xlabel="read right by the judge, % of prompts", xlim=(0, 100))
    right.set_yticks(range(place), labels, fontsize=7)
    right.invert_yaxis()
    save_picture(figure, picture)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--models", type=Path, default=Path("runs/studies/scaling_factor"), help="folder for weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [] if options.page else plan(options.seeds)
    budget, judge = Budget(), load_judge()
    rows = carry_out_missing(ROWS, runs, budget, lambda run: carry_out(run, options.models, budget, judge))
    draw(rows, STUDIES / "images" / "scaling_factor.png")
    num_runs = len(plan(options.seeds))
    tables = {"autoencoders": autoencoder_table(rows), "transformers": transformer_table(rows)}
    write_tables(STUDIES / "scaling_factor.md", {"conclusion": conclusion(rows, num_runs), **tables})
    print(f"{len(rows)} of {num_runs} runs are in")


if __name__ == "__main__":
    main()
