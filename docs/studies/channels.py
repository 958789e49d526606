"""Guidance on three latent channels or on all: `python docs/studies/channels.py`

The IDDPM sampler of Open-Sora guides the first three of four latent channels, as those of DiT and PixArt do. Is that a
typo or a feature? Here the bundled models are guided on the first one, two, three and on all channels, and on single
ones, at scales from 1 to 10, with plain guidance, with rescaling, with adaptive projected guidance, and with a shift of
time. The judge reads the clips, metrics measure them, and as sets they are held against clips of the toy world itself.

Rows go to `docs/studies/data/channels-*.parquet`; a study that was stopped goes on. `--page` makes tables and pictures
of the blocks that are whole.
"""

from pathlib import Path
from typing import Any

import numpy as np
from analysis import options_of, save_picture, shown, table, write_tables
from grids import STUDIES, Block, Found, carry_out

from opensora.evaluation.intervals import DRAWS, Interval
from opensora.generation.request import ClipRequest
from opensora.models.guidance_strength import equivalent_scale

IDDPM = ClipRequest("", model="toybox-iddpm", num_inference_steps=30)
FLOW = ClipRequest("", model="toybox")
SCALES = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0]
FLOW_SCALES = [1.0, 1.75, 2.5, 4.0, 7.0, 10.0]
BOTH: list[Any] = [3, "all"]
SINGLE: list[Any] = [1, 2, [1], [2], [3]]
"""The first one and two, and the second to fourth alone."""

BLOCKS = [
    Block("channels-iddpm", IDDPM, {"cfg_channels": BOTH, "guidance_scale": SCALES}, 250, 2, sets=True),
    Block("channels-flow", FLOW, {"cfg_channels": BOTH, "guidance_scale": FLOW_SCALES}, 250, 2, sets=True),
    Block("channels-iddpm-single", IDDPM, {"cfg_channels": SINGLE, "guidance_scale": [3.0, 7.0]}, 250),
    Block("channels-flow-single", FLOW, {"cfg_channels": SINGLE, "guidance_scale": [2.5, 7.0]}, 250),
    Block(
        "channels-iddpm-guiders",
        IDDPM,
        {
            "guider": ["apg", "cfg:guidance_rescale=0.7"],
            "cfg_channels": BOTH,
            "guidance_scale": [3.0, 7.0],
        },
        250,
    ),
    Block(
        "channels-flow-shift",
        ClipRequest("", model="toybox", time_shift=3.0),
        {"cfg_channels": BOTH, "guidance_scale": [2.5, 7.0]},
        250,
    ),
]

FIGURES = {
    "right_all": ("all read right, %", 100.0, 1),
    "flicker_levels": ("flicker, levels", 1.0, 3),
    "saturation": ("saturation", 1.0, 4),
    "clipped_share": ("clipped, %", 100.0, 2),
}
"""Figure -> its name in tables, factor and digits."""


def grid_table(found: Found, block: Block) -> str:
    """Every column of a block; on all channels, the difference from three at the same scale."""
    if block.name not in found.rows:
        return "Not made yet."
    lines = []
    for column in block.comparison.columns:
        cells = [column.name]
        for figure, (_, times, digits) in FIGURES.items():
            cells.append(shown(found.mean(block.name, column.name, figure), digits, times))
            if column.settings.get("cfg_channels") == "all":
                other = block.column(**{**column.settings, "cfg_channels": 3})
                pair = found.difference(block.name, column.name, other, figure)
                cells[-1] += f" ({'' if pair.excludes_zero else 'not '}told apart from 3)"
        sets = found.sets.get(block.name, {}).get(column.name, {})
        cells += [shown(sets[name], 2) if name in sets else "" for name in ("look_kernel", "motion_frechet")]
        lines.append(cells)
    head = ["settings", *(name for name, _, _ in FIGURES.values()), "look, kernel distance", "motion, Frechet distance"]
    return table(head, lines)


def mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Of what is no NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    counts = known.sum(axis)
    return np.where(counts, np.where(known, values, 0).sum(axis) / np.maximum(counts, 1), np.nan)


def curve(found: Found, block: Block, channels: Any, figure: str) -> tuple[list[float], np.ndarray]:
    """Scales, and the figure of every prompt at each: (scales, prompts)."""
    scales, values = block.axes["guidance_scale"], []
    for scale in scales:
        column = block.column(cfg_channels=channels, guidance_scale=scale)
        own = np.array(found.values(block.name, column, figure))
        prompts = found.prompts(block.name, column)
        names = list(dict.fromkeys(prompts))
        values.append([mean_of(own[[p == name for p in prompts]], 0) for name in names])
    return scales, np.array(values)


def equal_scale(found: Found, block: Block, scale: float, figure: str, draws: int = DRAWS) -> Interval | None:
    """The scale on all channels at which a figure is what it is at `scale` on three, interpolated between scales.

    Prompts are drawn again. None where the figure does not rise or fall with the scale beyond chance, or where no scale
    of the grid gives as much.
    """
    scales, three = curve(found, block, 3, figure)
    _, everything = curve(found, block, "all", figure)
    rng = np.random.default_rng(0)
    drawn = rng.integers(three.shape[1], size=(draws, three.shape[1]))

    def matched(of_three: np.ndarray, of_all: np.ndarray) -> float:
        target, place = of_three[scales.index(scale)], scales.index(scale)
        crossings = [
            low + (target - a) / (b - a) * (high - low)
            for low, high, a, b in zip(scales, scales[1:], of_all, of_all[1:], strict=False)
            if (a - target) * (b - target) <= 0 and a != b
        ]
        return min(crossings, key=lambda s: abs(s - scales[place])) if crossings else np.nan

    value = matched(mean_of(three, 1), mean_of(everything, 1))
    found_scales = np.array([matched(mean_of(three[:, d], 1), mean_of(everything[:, d], 1)) for d in drawn])
    known = found_scales[np.isfinite(found_scales)]
    if not np.isfinite(value) or len(known) < 0.9 * draws:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(value), float(low), float(high), three.shape[1])


def equal_table(found: Found, block: Block) -> str:
    """Which scale on all channels equals a scale on three, by each figure, beside the rule of DiT's author."""
    if block.name not in found.rows:
        return "Not made yet."
    lines = []
    for scale in block.axes["guidance_scale"][1:]:
        cells = [f"{scale:g}", f"{equivalent_scale(scale, guided=3, channels=4):.2f}"]
        for figure in FIGURES:
            equal = equal_scale(found, block, scale, figure)
            cells.append("not told" if equal is None else shown(equal, 2))
        lines.append(cells)
    return table(["scale on three", "1 + (s - 1) 3 / 4", *(f"by {name}" for name, _, _ in FIGURES.values())], lines)


def conclusion(found: Found) -> str:
    """What the rows carry, in a sentence or two."""
    said = f"{len(found.rows)} of {len(BLOCKS)} blocks are in"
    sentences = [_of_equal_strength(found, block) for block in BLOCKS[:2] if block.name in found.rows]
    return "; ".join([said, *sentences]) + ("." if sentences else ": nothing is said yet.")


def _of_equal_strength(found: Found, block: Block) -> str:
    model, scale = block.base.model_name, block.axes["guidance_scale"][-2]
    by_rule = equivalent_scale(scale, guided=3, channels=4)
    equal = {name: equal_scale(found, block, scale, figure) for figure, (name, _, _) in FIGURES.items()}
    told = [f"{shown(one, 2)} by {name}" for name, one in equal.items() if one is not None]
    amount = ", ".join(told) or "no scale that the figures tell"
    return f"on {model}, scale {scale:g} on three channels equals on all {amount} (the rule says {by_rule:g})"


def draw(found: Found, block: Block, picture: Path) -> None:
    """Every figure over the scale, on three channels and on all."""
    if block.name not in found.rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(FIGURES), figsize=(3.4 * len(FIGURES), 3.2))
    for panel, (name, (title, times, _)) in zip(panels, FIGURES.items(), strict=True):
        for channels, colour in ((3, "tab:blue"), ("all", "tab:orange")):
            scales = block.axes["guidance_scale"]
            columns = [block.column(cfg_channels=channels, guidance_scale=scale) for scale in scales]
            means = [found.mean(block.name, column, name) for column in columns]
            panel.plot(scales, [times * mean.value for mean in means], "o-", color=colour, label=f"{channels} channels")
            low, high = ([times * getattr(mean, bound) for mean in means] for bound in ("low", "high"))
            panel.fill_between(scales, low, high, color=colour, alpha=0.2)
        panel.set(xlabel="guidance scale", title=title)
    panels[0].legend(fontsize=8)
    save_picture(figure, picture)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/studies/channels"), help="folder for what is not kept"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    found = carry_out(BLOCKS, options.output, options.workers, make=not options.page)
    tables = {"conclusion": conclusion(found)}
    for block in BLOCKS:
        tables[block.name] = grid_table(found, block)
    for block in BLOCKS[:2]:
        tables[f"{block.name}-equal"] = equal_table(found, block)
        draw(found, block, STUDIES / "images" / f"{block.name}.png")
    write_tables(STUDIES / "channels.md", tables)
    print(f"{len(found.rows)} of {len(BLOCKS)} blocks are in")


if __name__ == "__main__":
    main()
