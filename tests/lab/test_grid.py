"""Which clips a comparison has: every combination once, under names and noise that stay."""

from pathlib import Path

import pytest

from opensora.errors import OpenSoraError
from opensora.evaluation.suites import SuitePrompt, read_suite
from opensora.generation.request import ClipRequest, parse_cfg_channels
from opensora.lab.grid import cells_of, check_number, columns_of, columns_of_folders, num_clips_of, shown_value
from opensora.lab.making import batches_of
from opensora.media.write import write_video


def test_every_combination_is_a_column_and_what_does_not_vary_is_in_all() -> None:
    axes = {"model": ["toybox-iddpm"], "cfg_channels": [3, "all"], "guidance_scale": [2.0, 7.0]}
    columns = columns_of(ClipRequest("", num_frames=17), axes)
    assert [column.name for column in columns] == [
        "cfg_channels 3, guidance_scale 2",
        "cfg_channels 3, guidance_scale 7",
        "cfg_channels all, guidance_scale 2",
        "cfg_channels all, guidance_scale 7",
    ]
    last = columns[-1].request
    assert last is not None
    assert (last.model, last.cfg_channels, last.guidance_scale, last.num_frames) == ("toybox-iddpm", "all", 7, 17)
    assert num_clips_of(axes, 8, 2) == len(cells_of(columns, read_suite("toybox", 8), 2)) == 64


def test_settings_that_differ_are_told_apart_in_their_names() -> None:
    channels = [1, 2, [1], [2], [1, 2], "all"]
    scales = [7.0, 7.0000001, 7.000001]
    columns = columns_of(ClipRequest(""), {"cfg_channels": channels, "guidance_scale": scales})
    assert len({column.name for column in columns}) == len(channels) * len(scales)
    assert [parse_cfg_channels(shown_value(value)) for value in channels] == channels


def test_one_combination_is_named_after_its_model() -> None:
    assert [column.name for column in columns_of(ClipRequest("", model="toybox"), {})] == ["toybox"]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"guidance_scale": [2.0, 2.0]}, "`guidance_scale` has a value twice"),
        ({"guidance_scale": [2.0, -1.0]}, "`guidance_scale` is -1"),
        ({"sampler": ["dpm"]}, "unknown sampler 'dpm'"),
    ],
)
def test_what_no_clip_can_be_is_found_before_any_is_made(axes: dict, words: str) -> None:
    with pytest.raises(OpenSoraError, match=words):
        columns_of(ClipRequest(""), axes)


def test_a_grid_that_nobody_means_has_to_be_asked_for_twice() -> None:
    with pytest.raises(OpenSoraError, match=r"10,000 clips.*give `yes`"):
        check_number(10_000, confirmed=False)
    check_number(10_000, confirmed=True)
    with pytest.raises(OpenSoraError, match="`seeds` is 0"):
        cells_of(columns_of(ClipRequest(""), {}), read_suite("toybox", 1), 0)


def test_batches_hold_one_column_and_are_the_same_whatever_is_done() -> None:
    columns = columns_of(ClipRequest(""), {"guidance_scale": [2.0, 3.0]})
    batches = batches_of(cells_of(columns, read_suite("toybox", 3), 1), 2)
    assert [[cell.name for cell in batch] for batch in batches] == [
        ["000-0000-000", "000-0001-000"],
        ["000-0002-000"],
        ["001-0000-000", "001-0001-000"],
        ["001-0002-000"],
    ]


def test_noise_depends_on_the_prompt_and_its_number_alone(tmp_path: Path) -> None:
    prompt = SuitePrompt("held_out-0-00000", "a red ball")
    assert prompt.seed(0) == 594_904_380
    assert len({prompt.seed(0), prompt.seed(1), SuitePrompt("held_out-0-00001", "a red ball").seed(0)}) == 3
    assert read_suite("toybox", 5)[:3] == read_suite("toybox", 3)
    assert read_suite("toybox-zh", 1)[0].wanted == read_suite("toybox", 1)[0].wanted


def test_suites_are_text_files_or_lists_as_vbench_writes_them(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a cat\n\na dog\n")
    assert [(p.id, p.text) for p in read_suite(tmp_path / "some.txt")] == [
        ("some-00000", "a cat"),
        ("some-00001", "a dog"),
    ]
    (tmp_path / "bench.json").write_text('[{"prompt_en": "a cat", "dimension": ["subject_consistency"]}]')
    assert read_suite(tmp_path / "bench.json")[0].dimensions == ("subject_consistency",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", "{}", "is no list of prompts"),
        ("none.json", '[{"prompt": "a cat"}]', "entry 0 has no prompt_en"),
        ("none.json", '[{"prompt_en": "a cat", "dimension": 3}]', "dimension 3"),
        ("none.txt", "\n", "holds no prompt"),
        ("few.txt", "a cat\n", "holds 1 prompts, but 2 are asked for"),
    ],
)
def test_a_file_that_is_no_suite_is_told(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(OpenSoraError, match=words):
        read_suite(tmp_path / name, 2)


def test_clips_of_two_folders_belong_together_by_name(tmp_path: Path) -> None:
    import numpy as np

    for name in ("a/one.mp4", "a/two.mp4", "b/two.gif", "c/three.mp4"):
        write_video(tmp_path / name, np.zeros((3, 16, 16, 3), np.uint8), 8)
    (tmp_path / "a" / "notes.txt").write_text("no clip")
    columns, prompts = columns_of_folders([tmp_path / "a", tmp_path / "b"])
    assert [prompt.id for prompt in prompts] == ["two"] and columns[1].files["two"].name == "two.gif"
    for folders, words in (("ac", "same name"), ("aa", "given twice"), ("ad", "no folder")):
        with pytest.raises(OpenSoraError, match=words):
            columns_of_folders([tmp_path / folder for folder in folders])
