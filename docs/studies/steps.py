"""How many calls of the network are worth it, and of which sampler: `python docs/studies/steps.py`

IDDPM's ancestral sampler, DDIM and DPM-Solver++ on toybox-iddpm, rectified flow with and without a shift of time on
toybox, from 2 to 20 steps. A step calls the network twice, once with the text and once without.

Rows go to `docs/studies/data/steps-*.parquet`; a study that was stopped goes on. `--page` makes table and picture of
the blocks that are whole.
"""

from pathlib import Path
from typing import Any

from analysis import options_of, save_picture, shown, table, write_tables
from grids import STUDIES, Block, Found, carry_out

from opensora.generation.request import ClipRequest

STEPS = [2, 4, 8, 12, 20]
BLOCKS = [
    Block(
        "steps-iddpm",
        ClipRequest("", model="toybox-iddpm", cfg_channels=3, dtype="bfloat16"),
        {"sampler": ["ancestral", "ddim", "dpm-solver++"], "num_inference_steps": STEPS},
        500,
    ),
    Block(
        "steps-flow",
        ClipRequest("", model="toybox", dtype="bfloat16"),
        {"time_shift": [1.0, 3.0], "num_inference_steps": STEPS},
        500,
    ),
]
FIGURES = {
    "right_all": ("all read right, %", 100.0, 1),
    "right_motion": ("motion read right, %", 100.0, 1),
    "flicker_levels": ("flicker, levels", 1.0, 3),
    "sharpness": ("sharpness", 1.0, 4),
}


def ways(block: Block) -> tuple[str, list[Any]]:
    """What varies besides the steps."""
    return next((name, values) for name, values in block.axes.items() if name != "num_inference_steps")


def steps_table(found: Found, block: Block) -> str:
    """A row for every way and number of steps."""
    if block.name not in found.rows:
        return "Not made yet."
    lines = []
    for column in block.comparison.columns:
        means = [(found.mean(block.name, column.name, name), *how[1:]) for name, how in FIGURES.items()]
        calls = 2 * column.settings["num_inference_steps"]
        lines.append([column.name, str(calls), *(shown(mean, digits, times) for mean, times, digits in means)])
    return table(["settings", "calls", *(name for name, _, _ in FIGURES.values())], lines)


def conclusion(found: Found) -> str:
    """Which way needs fewest steps to come within two points of the best."""
    sentences = []
    for block in BLOCKS:
        if block.name not in found.rows:
            continue
        varying, values = ways(block)
        columns = [(value, steps) for value in values for steps in STEPS]
        named = {one: block.column(**{varying: one[0], "num_inference_steps": one[1]}) for one in columns}
        means = {one: found.mean(block.name, name, "right_all") for one, name in named.items()}
        best = max(mean.value for mean in means.values())
        way, steps = min((one for one, mean in means.items() if mean.value > best - 0.02), key=lambda one: one[1])
        sentences.append(
            f"on {block.base.model_name}, {varying.replace('_', ' ')} {way} needs fewest steps, {steps}, to have "
            f"{shown(means[way, steps], 1, 100)} % read right, where the best has {100 * best:.1f} %"
        )
    said = f"{len(found.rows)} of {len(BLOCKS)} blocks are in"
    return "; ".join([said, *sentences]) + ("." if sentences else ": nothing is said yet.")


def draw(found: Found, picture: Path) -> None:
    """Every figure over the calls of the network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    calls = [2 * steps for steps in STEPS]
    figure, panels = plt.subplots(1, len(FIGURES), figsize=(3.4 * len(FIGURES), 3.2))
    for panel, (name, (title, times, _)) in zip(panels, FIGURES.items(), strict=True):
        for block in BLOCKS:
            if block.name not in found.rows:
                continue
            varying, values = ways(block)
            for value in values:
                columns = [block.column(**{varying: value, "num_inference_steps": steps}) for steps in STEPS]
                means = [found.mean(block.name, column, name) for column in columns]
                label = f"{varying.replace('_', ' ')} {value}"
                (line,) = panel.plot(calls, [times * mean.value for mean in means], "o-", label=label)
                low, high = ([times * getattr(mean, bound) for mean in means] for bound in ("low", "high"))
                panel.fill_between(calls, low, high, color=line.get_color(), alpha=0.2)
        panel.set(xlabel="calls of the network", xscale="log", title=title)
        panel.set_xticks(calls, calls)
        panel.minorticks_off()
    panels[-1].legend(fontsize=7, loc="lower right")
    save_picture(figure, picture)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/studies/steps"), help="folder for what is not kept")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    found = carry_out(BLOCKS, options.output, options.workers, make=not options.page)
    tables = {block.name: steps_table(found, block) for block in BLOCKS}
    write_tables(STUDIES / "steps.md", {"conclusion": conclusion(found), **tables})
    if found.rows:
        draw(found, STUDIES / "images" / "steps.png")
    print(f"{len(found.rows)} of {len(BLOCKS)} blocks are in")


if __name__ == "__main__":
    main()
