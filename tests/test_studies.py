"""docs/studies: what their analysis makes of rows whose answer is known, and both of them at a tiny size."""

import dataclasses
import sys
from importlib import import_module
from pathlib import Path

import pytest

from opensora.errors import OpenSoraError
from opensora.evaluation.judge import load_judge

pytest.importorskip("matplotlib")
STUDIES = Path(__file__).parent.parent / "docs" / "studies"


@pytest.fixture
def load(monkeypatch):
    """Modules of the studies, which find each other as those of a script do."""
    monkeypatch.syspath_prepend(str(STUDIES))
    yield import_module
    for name in (
        "small_world",
        "analysis",
        "measuring",
        "scaling_factor",
        "more_channels",
        "grids",
        "channels",
        "steps",
    ):
        sys.modules.pop(name, None)


def test_intervals_know_that_seeds_differ(load):
    """Clips agree within a seed and seeds do not: only several seeds show it."""
    nested = load("analysis").nested_interval
    one, several = nested([[0.5] * 50]), nested([[0.0] * 50, [0.5] * 50, [1.0] * 50])
    assert (one.low, one.value, one.high) == (0.5, 0.5, 0.5)
    assert several.value == pytest.approx(0.5) and several.low < 0.2 and several.high > 0.8


def test_a_scale_is_read_off_the_curve(load):
    where_equal = load("more_channels").where_equal
    assert where_equal([1, 2, 4], [0.0, 1.0, 2.0], 1.5) == pytest.approx(3.0)
    assert where_equal([1, 2], [0.0, 1.0], 1.5) != where_equal([1, 2], [0.0, 1.0], 1.5)  # NaN: it is never reached


def rows_of_a_world(study, rule):
    """Saturation grows with (s - 1) times what this rule makes of the number of channels; the judge is always right."""
    rows = []
    for one in (one for seed in (0, 1) for channels in study.CHANNELS for one in study.settings_of(seed, channels)):
        on_all = rule(one.scale, one.k, one.channels) if one.k else 1.0
        clips = [round(0.3 + 0.02 * on_all + 0.01 * clip, 6) for clip in range(8)]
        figures = {"saturation": clips, "clipped_share": clips, "flicker_levels": clips}
        rows.append({"cell": one.name, **vars(one), "right": {"all": "1" * 8}, **figures})
    return rows


@pytest.mark.parametrize("law", ["by_share", "by_root"])
def test_the_rule_that_a_world_follows_is_found_and_the_other_refused(load, law):
    study = load("more_channels")
    rule = getattr(study, law)
    rows = rows_of_a_world(study, rule)
    for channels in study.CHANNELS:
        found = study.same_scale(rows, channels, 3, 4.0, "saturation")
        assert found.value == pytest.approx(rule(4.0, 3, channels), abs=0.01)
        other = study.by_root if law == "by_share" else study.by_share
        assert study.more_than(rows, channels, 3, 4.0, other(4.0, 3, channels), "saturation").excludes_zero
        right = study.more_than(rows, channels, 3, 4.0, rule(4.0, 3, channels), "saturation")
        assert right.value == pytest.approx(0, abs=1e-4)
    assert study.conclusion(rows, 153).startswith("102 of 153 rows are in: ")
    assert study.not_told_apart(rows, 8, 3, 4.0, study.JUDGED) == "1 to 7"


def test_an_arm_is_compared_with_the_right_one_seed_by_seed(load):
    """Seeds differ more than arms do; what all of them agree on is found nevertheless, and nothing else."""
    study = load("scaling_factor")

    def row(seed, factor, latents, more):
        unexplained = [[0.1 * seed + more + 0.01 * clip for clip in range(8)]] * len(study.LOG_SNRS)
        read = {"right": {"all": "11110000"}, "unexplained": unexplained}
        return {"seed": seed, "factor": factor, "latents": latents, **read}

    more = {("right", "normalised"): [0, 0, 0], ("4 too large", "raw"): [0.02, 0.03, 0.02]}
    more |= {("4 too large", "normalised"): [-0.01, 0.01, 0.0]}
    rows = [row(seed, *arm, seeds[seed]) for arm, seeds in more.items() for seed in range(3)]
    assert study.verdict(rows, "4 too large", "raw") == "worse"
    assert study.verdict(rows, "4 too large", "normalised") == "not told apart"
    assert study.verdict(rows, "4 too small", "raw") is None
    assert "| 4 too large | raw | 3 |" in study.transformer_table(rows)


def test_arms_of_a_seed_come_together(load):
    """Wherever a study is stopped, at most one seed is incomplete."""
    for name in ("scaling_factor", "more_channels"):
        seeds = [run.seed for run in load(name).plan(3)]
        assert seeds == sorted(seeds) and len(set(seeds)) == 3


def test_what_normalisation_repairs_is_a_share_of_what_raw_latents_lose(load):
    """Raw latents lose 0.1, normalised ones 0.02 under the same factor: four fifths are closed, in every draw."""
    study = load("scaling_factor")
    lost = {("right", "normalised"): 0.0, ("4 too large", "raw"): 0.1, ("4 too large", "normalised"): 0.02}
    rows = [
        {"seed": seed, "factor": factor, "latents": latents, "unexplained": [[0.3 + seed + more] * 4] * 5}
        for (factor, latents), more in lost.items()
        for seed in range(2)
    ]
    found = study.repaired(rows, "4 too large", "normalised")
    assert [found.low, found.value, found.high] == pytest.approx([0.8] * 3)
    assert study.repaired(rows, "4 too small", "normalised") is None
    assert study.conclusion(rows, 45) == "6 of 45 runs are in, and nothing can be compared yet."


def test_rows_of_another_budget_are_not_gone_on_with(load, tmp_path):
    small, study = load("small_world"), load("scaling_factor")
    made = []
    for budget in (small.TINY, small.TINY):
        rows = small.carry_out_missing(
            tmp_path / "rows.jsonl", study.plan(1), budget, lambda run: made.append(run) or {}
        )
    assert made == study.plan(1) and [row["cell"] for row in rows] == [run.name for run in made]
    with pytest.raises(OpenSoraError, match="another budget"):
        small.carry_out_missing(tmp_path / "rows.jsonl", study.plan(1), small.Budget(), lambda run: {})


def world_of_channels(study, block, law):
    """Rows of a block whose clips get more saturated as all channels would at the scale that a law makes of three."""
    rows = {}
    for column in block.comparison.columns:
        scale = column.settings["guidance_scale"]
        strength = law(scale) if column.settings["cfg_channels"] == 3 else scale
        rows[column.name] = [
            {"prompt_id": f"{clip}", "saturation": 0.3 + 0.02 * strength + 0.01 * (clip % 5), "right_all": 1.0}
            | {"flicker_levels": None, "clipped_share": 0.0}
            for clip in range(20)
        ]
    return rows


def test_the_scale_of_equal_strength_is_found_where_there_is_one(load):
    study, grids = load("channels"), load("grids")
    block = study.BLOCKS[0]
    found = grids.Found({block.name: world_of_channels(study, block, lambda scale: 1 + 0.6 * (scale - 1))})
    equal = study.equal_scale(found, block, 4.0, "saturation")
    assert equal.value == pytest.approx(1 + 0.6 * 3, abs=0.01) and equal.low <= equal.value <= equal.high
    assert study.equal_scale(found, block, 4.0, "right_all") is None, "every scale has as much"
    assert study.equal_scale(found, block, 4.0, "flicker_levels") is None, "nothing was measured"
    assert "2.80 [2.80, 2.80]" in study.equal_table(found, block)
    assert study.grid_table(found, block).count("\n") == 11


def test_steadiness_is_compared_at_the_same_scale_and_at_equal_strength(load):
    """Flicker grows with the scale on three and on all alike, so three flicker more where they are as strong as all."""
    study, grids = load("channels"), load("grids")
    block = study.BLOCKS[0]
    rows = world_of_channels(study, block, lambda scale: 1 + 0.5 * (scale - 1))
    for column in block.comparison.columns:
        for row in rows[column.name]:
            row["flicker_levels"] = 0.1 * column.settings["guidance_scale"]
    found = grids.Found({block.name: rows})
    assert study.at_equal_strength(found, block, 7.0, "flicker_levels", 7.0).value == pytest.approx(0)
    assert study.at_equal_strength(found, block, 7.0, "flicker_levels", 4.0).value == pytest.approx(0.3)
    assert study.at_equal_strength(found, block, 7.0, "flicker_levels", "saturation").value == pytest.approx(0.3)
    assert study.at_equal_strength(found, block, 7.0, "flicker_levels", "right_all") is None
    assert "0.300 [0.300, 0.300] *" in study.steadiness_table(found, block)
    assert "flickers more" not in study.conclusion(found)


def test_single_channels_are_held_against_no_guidance_on_the_same_noise(load):
    study, grids = load("channels"), load("grids")
    main, single = study.BLOCKS[0], study.BLOCKS[2]

    def rows(block, change, seeds):
        return {
            column.name: [
                {"prompt_id": f"{clip}", **dict.fromkeys(study.CARRIED, clip + seed + change(column))}
                for clip in range(20)
                for seed in range(seeds)
            ]
            for column in block.comparison.columns
        }

    found = grids.Found(
        {
            main.name: rows(main, lambda column: 0.0, 2),
            single.name: rows(single, lambda column: 0.5 * (column.settings["cfg_channels"] == [1]), 1),
        }
    )
    changed = single.column(cfg_channels=[1], guidance_scale=7.0)
    assert study.more_than_unguided(found, single, changed, "saturation").value == 0.5
    lines = study.single_table(found, single).splitlines()
    assert ["0.5000 [0.5000, 0.5000] *" in line for line in lines] == ["channel 2" in line for line in lines]
    assert "channel 2 changes flicker most (0.500 [0.500, 0.500])" in study.conclusion(found)


def test_other_rules_are_told_where_they_are_in(load):
    study, grids = load("channels"), load("grids")
    block = study.BLOCKS[4]
    rows = {
        column.name: [
            {"prompt_id": f"{clip}", "flicker_levels": 0.1 * (column.settings["cfg_channels"] == 3), "right_all": 1.0}
            for clip in range(20)
        ]
        for column in block.comparison.columns
    }
    said = study.conclusion(grids.Found({block.name: rows}))
    assert "with apg 0.100 [0.100, 0.100] * levels of flicker and 0.0 [0.0, 0.0] points" in said


def test_a_page_without_rows_says_so(load):
    for name in ("channels", "steps"):
        study = load(name)
        said = study.conclusion(load("grids").Found())
        assert said == f"0 of {len(study.BLOCKS)} blocks are in: nothing is said yet."


@pytest.mark.slow
def test_blocks_go_on_from_the_rows_that_are_kept(load, tmp_path, monkeypatch):
    from opensora.generation.request import ClipRequest

    grids = load("grids")
    monkeypatch.setattr(grids, "STUDIES", tmp_path)
    base = ClipRequest("", num_inference_steps=1, num_frames=5, device="cpu")
    block = grids.Block("small", base, {"guidance_scale": [1.0, 4.0]}, 2, 2, sets=True)
    found = grids.carry_out([block], tmp_path / "runs", 1)
    kept = (tmp_path / "data" / "small.parquet").read_bytes()
    again = grids.carry_out([block], tmp_path / "elsewhere", 1, make=False)
    assert (tmp_path / "data" / "small.parquet").read_bytes() == kept
    assert again.sets == found.sets
    assert set(found.sets["small"]["guidance_scale 1"]) >= {"look_kernel", "motion_frechet"}
    for name in found.rows["small"]:
        assert again.mean("small", name, "right_all") == found.mean("small", name, "right_all")

    unlike = dataclasses.replace(block, sets=False, axes={"guidance_scale": [1.0, 4.0, 7.0]})
    made: list[int] = []
    monkeypatch.setattr(grids.Progress, "update", lambda self, done, total: made.append(done))
    more = grids.carry_out([unlike], tmp_path / "another", 1)
    assert (made[0], made[-1]) == (8, 12), "rows made elsewhere are not made again"
    assert more.mean("small", "guidance_scale 4", "right_all") == found.mean("small", "guidance_scale 4", "right_all")


@pytest.mark.slow
def test_both_studies_run_end_to_end(load, tmp_path):
    small = load("small_world")
    judge = load_judge()
    for name, pick in (("scaling_factor", slice(0, 7)), ("more_channels", slice(0, 3))):
        study = load(name)
        runs = study.plan(1)[pick]
        rows = [study.carry_out(run, tmp_path / name, small.TINY, judge) for run in runs]
        assert [{key: row[key] for key in vars(run)} for run, row in zip(runs, rows, strict=True)] == list(
            map(vars, runs)
        )
        read = [row["right"]["all"] for row in rows if "right" in row]
        assert read and all(len(marks) == small.TINY.num_new for marks in read)
        assert len({row["autoencoder"] for row in rows if "autoencoder" in row}) == (
            2 if name == "scaling_factor" else 1
        )
    with pytest.raises(OpenSoraError, match="other settings"):
        other = small.transformer_recipe("other", 0, 4, tmp_path, small.TINY)
        small.train(other, tmp_path / "more_channels" / "seed0" / "channels4" / "transformer")
