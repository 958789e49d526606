"""Guidance on three latent channels or on all: `python docs/studies/channels.py`

The IDDPM sampler of Open-Sora guides the first three of four latent channels, as those of DiT and PixArt do. Is that a
typo or a feature? Here the bundled models are guided on the first one, two, three and on all channels, and on single
ones, at scales from 1 to 10, with plain guidance, with rescaling, with adaptive projected guidance, and with a shift of
time. The judge reads the clips, metrics measure them, and as sets they are held against clips of the toy world itself.

Rows go to `docs/studies/data/channels-*.parquet`; a study that was stopped goes on. `--page` makes tables and pictures
of the blocks that are whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from analysis import options_of, save_picture, shown, table, write_tables
from grids import STUDIES, Block, Found, carry_out

from opensora.evaluation.intervals import DRAWS, Interval, mean_interval
from opensora.generation.request import ClipRequest
from opensora.models.guidance_strength import equivalent_scale

IDDPM = ClipRequest("", model="toybox-iddpm", num_inference_steps=20, dtype="bfloat16")
FLOW = ClipRequest("", model="toybox", num_inference_steps=20, dtype="bfloat16")
SCALES = [1.0, 2.0, 4.0, 7.0, 10.0]
BOTH: list[Any] = [3, "all"]
SINGLE: list[Any] = [1, 2, [1], [2], [3]]
"""The first one and two, and the second to fourth alone."""

BLOCKS = [
    Block("channels-iddpm", IDDPM, {"cfg_channels": BOTH, "guidance_scale": SCALES}, 250, 2, sets=True),
    Block("channels-flow", FLOW, {"cfg_channels": BOTH, "guidance_scale": SCALES}, 250, 2, sets=True),
    Block("channels-iddpm-single", IDDPM, {"cfg_channels": SINGLE, "guidance_scale": [4.0, 7.0]}, 250),
    Block("channels-flow-single", FLOW, {"cfg_channels": SINGLE, "guidance_scale": [4.0, 7.0]}, 250),
    Block(
        "channels-iddpm-guiders",
        IDDPM,
        {
            "guider": ["apg", "cfg:guidance_rescale=0.7"],
            "cfg_channels": BOTH,
            "guidance_scale": [4.0, 7.0],
        },
        250,
    ),
    Block(
        "channels-flow-shift",
        replace(FLOW, time_shift=3.0),
        {"cfg_channels": BOTH, "guidance_scale": [4.0, 7.0]},
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
CARRIED = {
    "right_all": ("all read right, %", 100.0, 1),
    "right_shape": ("shape", 100.0, 1),
    "right_colour": ("colour", 100.0, 1),
    "right_size": ("size", 100.0, 1),
    "right_motion": ("motion", 100.0, 1),
    "right_background": ("background", 100.0, 1),
    "flicker_levels": ("flicker, levels", 1.0, 3),
    "saturation": ("saturation", 1.0, 4),
    "sharpness": ("sharpness", 1.0, 4),
}
"""What guidance of single channels may change."""
SETS = {
    "look_kernel": "look, kernel distance",
    "motion_frechet": "motion, Frechet distance",
    "look_diversity": "diversity of look",
    "motion_diversity": "of motion",
}


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
        cells += [shown(sets[name], 3) if name in sets else "" for name in (SETS if block.sets else ())]
        lines.append(cells)
    head = ["settings", *(name for name, _, _ in FIGURES.values()), *(SETS.values() if block.sets else ())]
    return table(head, lines)


def more_than_unguided(found: Found, block: Block, column: str, figure: str) -> Interval | None:
    """What guidance of a column changes, clip by clip on the noise of the first seed; None without clips at scale 1."""
    main = next(other for other in BLOCKS[:2] if other.base == block.base)
    if main.name not in found.rows:
        return None
    unguided = found.rows[main.name][main.column(cfg_channels=3, guidance_scale=1.0)]
    before = {row["prompt_id"]: row[figure] for row in reversed(unguided)}  # of each prompt the first seed
    after = {row["prompt_id"]: row[figure] for row in found.rows[block.name][column]}
    both = [name for name in after if before[name] is not None and after[name] is not None]
    if not both:
        return None
    return mean_interval([after[name] - before[name] for name in both], both)


def single_table(found: Found, block: Block) -> str:
    """What guidance of single channels changes; a star where the interval excludes zero."""
    if block.name not in found.rows:
        return "Not made yet."
    lines = []
    for column in block.comparison.columns:
        changes = [more_than_unguided(found, block, column.name, figure) for figure in CARRIED]
        cells = [
            "not told" if change is None else starred(change, digits, times)
            for change, (_, times, digits) in zip(changes, CARRIED.values(), strict=True)
        ]
        lines.append([f"{_channels_in_words(column.settings)} at {column.settings['guidance_scale']:g}", *cells])
    return table(["guided", *(name for name, _, _ in CARRIED.values())], lines)


def _channels_in_words(settings: Mapping[str, Any]) -> str:
    """Counted from 1."""
    channels = settings["cfg_channels"]
    if channels == 1:
        return "the first"
    return f"the first {channels}" if isinstance(channels, int) else f"channel {channels[0] + 1}"


def means(curve: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of the numbers of a curve (scales, prompts), prompts counted so many `times` (..., prompts); (..., scales)."""
    known = np.isfinite(curve)
    with np.errstate(invalid="ignore"):
        return (times @ np.where(known, curve, 0).T) / (times @ known.T)


def curve(found: Found, block: Block, channels: Any, figure: str) -> tuple[list[float], np.ndarray]:
    """Scales, and the figure of every prompt at each: (scales, prompts)."""
    scales, values = block.axes["guidance_scale"], []
    for scale in scales:
        column = block.column(cfg_channels=channels, guidance_scale=scale)
        own = np.array(found.values(block.name, column, figure))
        prompts = found.prompts(block.name, column)
        names = list(dict.fromkeys(prompts))
        groups = [own[[p == name for p in prompts]] for name in names]
        values.append([np.nan if np.isnan(group).all() else np.nanmean(group) for group in groups])
    return scales, np.array(values)


def crossing(scales: list[float], values: np.ndarray, target: float, near: float) -> float:
    """Where a curve is at `target`, linear between scales, nearest to `near`; NaN where it never is."""
    found = [
        low + (target - a) / (b - a) * (high - low)
        for low, high, a, b in zip(scales, scales[1:], values, values[1:], strict=False)
        if (a - target) * (b - target) <= 0 and a != b
    ]
    return min(found, key=lambda scale: abs(scale - near)) if found else np.nan


def over_prompts(curves: list[np.ndarray], figure: Callable[..., float], draws: int = DRAWS) -> Interval | None:
    """What `figure` makes of means over prompts (scales,) of each curve, prompts drawn again.

    None where a tenth of the draws have no such figure: it is not told.
    """
    num_prompts = curves[0].shape[1]
    drawn = np.random.default_rng(0).integers(num_prompts, size=(draws, num_prompts))
    times = np.stack([np.bincount(some, minlength=num_prompts) for some in drawn])
    value = figure(*(means(curve, np.ones(num_prompts)) for curve in curves))
    found = np.array([figure(*some) for some in zip(*(means(curve, times) for curve in curves), strict=True)])
    known = found[np.isfinite(found)]
    if not np.isfinite(value) or len(known) < 0.9 * draws:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(value), float(low), float(high), num_prompts)


def equal_scale(found: Found, block: Block, scale: float, figure: str, draws: int = DRAWS) -> Interval | None:
    """The scale on all channels at which a figure is what it is at `scale` on three; None where that is not told."""
    (scales, three), (_, everything) = (curve(found, block, channels, figure) for channels in BOTH)
    place = scales.index(scale)
    return over_prompts(
        [three, everything], lambda of_three, of_all: crossing(scales, of_all, of_three[place], scale), draws
    )


def at_equal_strength(
    found: Found, block: Block, scale: float, figure: str, by: str | float, draws: int = DRAWS
) -> Interval | None:
    """How much more of a figure there is at `scale` on three channels than on all at a scale of equal strength.

    Args:
        by: a figure that is then equal, or that scale itself.
    """
    (scales, three), (_, everything) = (curve(found, block, channels, figure) for channels in BOTH)
    place = scales.index(scale)
    if not isinstance(by, str):
        return over_prompts([three, everything], lambda a, b: a[place] - np.interp(by, scales, b), draws)
    (_, by_three), (_, by_all) = (curve(found, block, channels, by) for channels in BOTH)

    def difference(a: np.ndarray, b: np.ndarray, strength: np.ndarray, strength_of_all: np.ndarray) -> float:
        equal = crossing(scales, strength_of_all, strength[place], scale)
        return a[place] - np.interp(equal, scales, b) if np.isfinite(equal) else np.nan

    return over_prompts([three, everything, by_three, by_all], difference, draws)


def steadiness_table(found: Found, block: Block) -> str:
    """Flicker on three channels less flicker on all, at the same scale and at scales of equal strength."""
    if block.name not in found.rows:
        return "Not made yet."
    lines = []
    for scale in block.axes["guidance_scale"][1:]:
        ways = (scale, equivalent_scale(scale, guided=3, channels=4), "right_all", "saturation")
        cells = [at_equal_strength(found, block, scale, "flicker_levels", by) for by in ways]
        lines.append([f"{scale:g}", *("not told" if cell is None else starred(cell, 3) for cell in cells)])
    head = ["scale on three", "same scale on all", "1 + (s - 1) 3 / 4", "equally much read right", "equal saturation"]
    return table(head, lines)


def starred(interval: Interval, digits: int, times: float = 1.0) -> str:
    """With a star where zero is excluded."""
    return shown(interval, digits, times) + (" *" if interval.excludes_zero else "")


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
    sentences = [_of_equal_strength(found, block) for block in BLOCKS[:2] if block.name in found.rows]
    missing = [block.name for block in BLOCKS if block.name not in found.rows]
    if not found.rows:
        return f"0 of {len(BLOCKS)} blocks are in: nothing is said yet."
    sentences += [_of_single_channels(found, block) for block in BLOCKS[2:4] if block.name in found.rows]
    sentences += [_of_other_rules(found, block) for block in BLOCKS[4:] if block.name in found.rows]
    if missing:
        sentences.append(f"({len(BLOCKS) - len(missing)} of {len(BLOCKS)} blocks are in; {', '.join(missing)} not.)")
    return "\n".join(sentences)


def _of_equal_strength(found: Found, block: Block) -> str:
    """At the scale before the last: where guidance is strong, and clips are still good."""
    model, scale = block.base.model_name, block.axes["guidance_scale"][-2]
    names = {
        "right_all": "by what the judge reads right",
        "flicker_levels": "by flicker",
        "saturation": "by saturation",
    }
    equal = {figure: equal_scale(found, block, scale, figure) for figure in names}
    told = [f"{shown(one, 1)} {names[figure]}" for figure, one in equal.items() if one is not None]
    rule = equivalent_scale(scale, guided=3, channels=4)
    sentence = (
        f"On {model}, a scale of {scale:g} on three channels equals on all {', '.join(told) or 'none that is told'}; "
        f"1 + (s - 1) 3 / 4 says {rule:g}."
    )
    same = at_equal_strength(found, block, scale, "flicker_levels", scale)
    matched = at_equal_strength(found, block, scale, "flicker_levels", "right_all")
    for words, difference in (("At the same scale", same), ("Where as much is read right", matched)):
        if difference is not None:
            how = "cannot be told apart in flicker from all"
            if difference.excludes_zero:
                how = f"flicker{'s less' if difference.value < 0 else 's more'} than all"
            sentence += f" {words} guidance on three {how} ({shown(difference, 3)} levels)."
    return sentence


def _of_single_channels(found: Found, block: Block) -> str:
    """Which of the four moves what most, guided alone at the higher scale."""
    scale, told = block.axes["guidance_scale"][-1], []
    alone = [1, *(one for one in SINGLE if isinstance(one, list))]
    for figure, words, digits in (("flicker_levels", "flicker", 3), ("saturation", "saturation", 4)):
        changes = {
            number: more_than_unguided(found, block, block.column(cfg_channels=channels, guidance_scale=scale), figure)
            for number, channels in enumerate(alone, start=1)
        }
        known = {number: change for number, change in changes.items() if change is not None and change.excludes_zero}
        if known:
            most = max(known, key=lambda number: abs(known[number].value))
            told.append(f"channel {most} changes {words} most ({shown(known[most], digits)})")
    said = " and ".join(told) or "no channel changes flicker or saturation beyond chance"
    mild = block.axes["guidance_scale"][0]
    names = [block.column(cfg_channels=channels, guidance_scale=mild) for channels in alone]
    gains = [more_than_unguided(found, block, name, "right_all") for name in names]
    points = [100 * gain.value for gain in gains if gain is not None]
    if points:
        said += (
            f"; at {mild:g} any one of them adds {min(points):.1f} to {max(points):.1f} points of what is read right"
        )
    return f"Guided alone at {scale:g} on {block.base.model_name}, {said}."


def _of_other_rules(found: Found, block: Block) -> str:
    """Whether three differ from all at the higher scale under another rule."""
    scale, told = block.axes["guidance_scale"][-1], []
    for guider in block.axes.get("guider", [None]):
        settings = {"guidance_scale": scale} | ({} if guider is None else {"guider": guider})
        names = [block.column(cfg_channels=channels, **settings) for channels in BOTH]
        flicker = found.difference(block.name, *names, "flicker_levels")
        right = found.difference(block.name, *names, "right_all")
        rule = f"a time shift of {block.base.time_shift:g}" if guider is None else guider
        told.append(
            f"with {rule} {starred(flicker, 3)} levels of flicker and {starred(right, 1, 100)} points read right"
        )
    return f"At {scale:g} on {block.base.model_name}, three channels less all: {'; '.join(told)} (* beyond chance)."


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
        tables[block.name] = (single_table if block in BLOCKS[2:4] else grid_table)(found, block)
    for block in BLOCKS[:2]:
        tables[f"{block.name}-equal"] = equal_table(found, block)
        tables[f"{block.name}-steadiness"] = steadiness_table(found, block)
        draw(found, block, STUDIES / "images" / f"{block.name}.png")
    write_tables(STUDIES / "channels.md", tables)
    print(f"{len(found.rows)} of {len(BLOCKS)} blocks are in")


if __name__ == "__main__":
    main()
