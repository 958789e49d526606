"""Prompts, mask strategies and conditioning frames against the reference: every case is read from the fixture."""

from dataclasses import replace

import pytest
import torch

from opensora.conditioning import references as conditioning
from opensora.errors import OpenSoraError
from opensora.models.clip_conditions import ClipConditions
from opensora.models.text import prompts
from opensora.models.text.cleaning import clean_text

GENERATIONS = pytest.mark.parametrize("version", ["1_2", "1_3"])
FAILED = "ERR:"  # how a fixture says that the reference raised


def failed(result) -> bool:
    return isinstance(result, str) and result.startswith(FAILED)


def clip_and_references(num_frames: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An empty clip and references whose frames hold 100, 101, ... and 200, 201, ..., as the fixtures are made."""
    frames = [torch.arange(length, dtype=torch.float32) + 100 * (n + 1) for n, length in enumerate(lengths)]
    return torch.zeros(1, num_frames, 1, 1), [values.view(1, -1, 1, 1) for values in frames]


@pytest.mark.parametrize("version", ["1_0", "1_2"])
def test_cleaning(version, golden_json):
    for raw, (twice, once) in golden_json(f"text_preprocessing_v{version}").items():
        assert clean_text(raw) == twice, raw
        assert clean_text(raw, passes=1) == once, raw


def test_scores(golden_json):
    for prompt, aesthetic, flow, camera_motion, (expected,) in golden_json("inference_utils_v1_2")["append_score"]:
        ours = prompts.append_scores(prompt, aesthetic=aesthetic, flow=flow, camera_motion=camera_motion)
        assert ours == expected


def test_scores_in_words(golden_json):
    fixture = golden_json("inference_utils_v1_3")
    for prompt, aesthetic, flow, camera_motion, (expected,) in fixture["append_score"]:
        ours = prompts.append_scores(prompt, aesthetic=aesthetic, flow=flow, camera_motion=camera_motion, in_words=True)
        assert ours == expected
    for name, table in (("aesthetic", "transform_aes"), ("flow", "transform_motion")):
        for number, word in fixture[table].items():
            assert prompts.score_word(name, float(number)) == word
            assert prompts.score_word(name, word.title()) == word


@GENERATIONS
def test_prompt_of_each_loop(version, golden_json):
    for key, (expected,) in golden_json(f"inference_utils_v{version}")["extract_prompts_loop"].items():
        prompt, loop = key.rsplit("||", 1)
        assert prompts.prompt_of_loop(prompt, int(loop)) == expected


@GENERATIONS
def test_loops_split_and_joined(version, golden_json):
    fixture = golden_json(f"inference_utils_v{version}")
    for prompt, (texts, starts) in fixture["split_prompt"].items():
        assert prompts.split_loops(prompt) == (texts, starts)
        assert prompts.join_loops(texts, starts) == fixture["merge_prompt"][prompt]


def test_prompts_of_all_loops_1_1(golden_json):
    for key, result in golden_json("inference_long_v1_1")["process_prompts"].items():
        prompt, num_loops = key.rsplit("||", 1)
        ours = [clean_text(prompts.prompt_of_loop(prompt, loop)) for loop in range(int(num_loops))]
        if failed(result):
            # 1.1 refuses texts of loops that are not made; here, as in 1.2, they are left over.
            assert prompts.split_loops(prompt)[1][-1] > int(num_loops) - 1
        else:
            assert [ours] == result


@GENERATIONS
def test_json_suffix(version, golden_json):
    for prompt, result in golden_json(f"inference_utils_v{version}")["extract_json"].items():
        if prompt == "a {b} {c}":
            assert failed(result)  # braces of no JSON are text
            assert prompts.split_references(prompt) == (prompt, prompts.PromptReferences())
        elif failed(result):
            with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
                prompts.split_references(prompt)
        else:
            (text,), (reference_path,), (mask_strategy,) = result
            assert prompts.split_references(prompt) == (text, prompts.PromptReferences(reference_path, mask_strategy))


def test_json_suffix_1_1(golden_json):
    for prompt, result in golden_json("inference_long_v1_1")["extract_json"].items():
        if "[" in prompt.partition("{")[0]:
            # 1.1 reads JSON from the first bracket on; here, as in 1.2, brackets are text.
            assert prompts.split_json(prompt)[0] == prompt.partition("{")[0]
        elif failed(result):
            with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
                prompts.split_json(prompt)
        else:
            (text,), (entries,) = result
            assert prompts.split_json(prompt) == (text, entries)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("inference_utils_v1_2", "parse_mask_strategy"),
        ("inference_utils_v1_3", "parse_mask_strategy"),
        ("inference_long_v1_1", "process_mask_strategy"),
    ],
)
def test_mask_strategies(name, function, golden_json):
    for text, result in golden_json(name)[function].items():
        given = None if text == "None" else text
        if given is None:
            assert prompts.parse_mask_strategy(given) == []  # 1.1 crashes here
        elif failed(result):
            with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
                prompts.parse_mask_strategy(given)
        else:
            expected = [
                prompts.FramePlacement(*(int(field) for field in fields), edit_ratio=float(ratio))
                for *fields, ratio in result
            ]
            assert prompts.parse_mask_strategy(given) == expected


def check_placed(text, loop, alignment, mask, frames, lengths) -> None:
    latents, references = clip_and_references(len(frames), lengths)
    placements = prompts.parse_mask_strategy(text)
    if failed(mask):
        # 1.1 crashes where an entry asks for more than there is; here it is shortened, as in 1.2, or an error.
        try:
            _, strength = conditioning.place_references(latents, references, placements, loop=loop, alignment=alignment)
        except OpenSoraError:
            return
        asked = sum(entry.length for entry in placements if entry.loop == loop)
        assert int((strength < 1).sum()) < asked
        return
    placed, strength = conditioning.place_references(latents, references, placements, loop=loop, alignment=alignment)
    assert [strength.tolist()] == mask
    assert placed.flatten().tolist() == frames


@GENERATIONS
def test_conditioning_frames(version, golden_json):
    for row in golden_json(f"inference_utils_v{version}")["apply_mask_strategy"]:
        check_placed(*row, lengths=(8, 3))


def test_conditioning_frames_1_1(golden_json):
    for text, loop, mask, frames in golden_json("inference_long_v1_1")["apply_mask_strategy"]:
        check_placed(text, loop, None, mask, frames, lengths=(8, 1))


@GENERATIONS
def test_alignment_of_starts(version, golden_json):
    for start, alignment, num_frames, expected in golden_json(f"inference_utils_v{version}")["find_nearest_point"]:
        assert conditioning.align_start(start, alignment, num_frames) == expected


@GENERATIONS
def test_previous_loop(version, golden_json):
    fixture = golden_json(f"inference_utils_v{version}")["append_generated"]
    settings = {"num_frames": fixture["condition_frame_length"], "edit_ratio": fixture["edit"]}
    cases = zip(fixture["inp"], fixture["refs_before"], fixture["refs_after"], fixture["mask_strategy"], strict=True)
    for text, before, after, expected in cases:
        assert after == before + 1
        added = conditioning.placement_of_previous_loop(fixture["loop_i"], before, **settings)
        assert prompts.parse_mask_strategy(expected) == [*prompts.parse_mask_strategy(text), added]
        assert expected.rsplit(";", 1)[-1] == str(added)


@GENERATIONS
def test_pixel_frames(version, golden_json):
    for latent_frames, result in golden_json(f"inference_utils_v{version}")["dframe_to_frame"].items():
        if failed(result):
            with pytest.raises(OpenSoraError, match="whole chunks"):
                conditioning.pixel_frames(int(latent_frames))
        else:
            assert conditioning.pixel_frames(int(latent_frames)) == result


@GENERATIONS
def test_clip_conditions(version, golden_json):
    """The reference rounds them to the network's precision first; ours, rounded, are the same."""
    for key, result in golden_json(f"inference_utils_v{version}")["prepare_multi_resolution_info"].items():
        size, num_frames, fps, dtype = key.split("|")
        height, width = map(int, size.strip("()").split(","))
        clip = ClipConditions.of_clip(height, width, int(num_frames), float(fps))
        ours = replace(clip, aspect_ratio=clip.height / clip.width)
        names = {"height": "height", "width": "width", "num_frames": "num_frames", "ar": "aspect_ratio", "fps": "fps"}
        for name, values in result.items():
            rounded = torch.tensor(getattr(ours, names[name])).to(getattr(torch, dtype.removeprefix("torch."))).item()
            assert set(values) == {rounded}, (key, name)
