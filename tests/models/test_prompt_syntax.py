"""What people write into prompts: scores, loops, JSON suffixes, mask strategies, and their spelling mistakes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.errors import OpenSoraError
from opensora.models.text import prompts
from opensora.models.text.cleaning import clean_text
from opensora.models.text.prompts import FramePlacement

TEXTS = st.text(st.characters(exclude_characters="|"), min_size=1).map(str.strip).filter(bool)


@given(st.lists(TEXTS, min_size=1, max_size=5), st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_loops_come_back(texts, gaps):
    starts = [sum(gaps[:n]) for n in range(len(texts))]
    prompt = prompts.join_loops(texts, starts)
    assert prompts.split_loops(prompt) == (texts, starts)
    for text, start in zip(texts, starts, strict=True):
        assert prompts.prompt_of_loop(prompt, start) == text
    assert prompts.prompt_of_loop(prompt, starts[-1] + 100) == texts[-1]


@pytest.mark.parametrize("prompt", ["|0|a|b|c", "|0|a|2", "|0|a|2|b|2|c", "|0|a|3|b|1|c", "|0|a|-1|b", "|0|a|²|b"])
def test_broken_loops(prompt):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        prompts.split_loops(prompt)
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        prompts.prompt_of_loop(prompt, 0)


@pytest.mark.parametrize(("texts", "starts"), [(["a", "b"], None), (["a"], [0, 1]), ([], None)])
def test_loops_that_cannot_be_joined(texts, starts):
    with pytest.raises(OpenSoraError, match="for"):
        prompts.join_loops(texts, starts)


def test_negative_loop():
    with pytest.raises(OpenSoraError, match="loop is -1"):
        prompts.prompt_of_loop("|0|a", -1)


@pytest.mark.parametrize(
    "scores", [{"aesthetic": float("nan")}, {"flow": float("inf")}, {"camera_motion": " "}, {"camera_motion": ""}]
)
def test_impossible_scores(scores):
    with pytest.raises(OpenSoraError, match=r"expected a number|camera motion is empty"):
        prompts.append_scores("a cat", **scores)


def test_braces_inside_a_json_value():
    text, entries = prompts.split_json('a cat {"reference_path": "{1}.png"}')
    assert (text, entries) == ("a cat ", {"reference_path": "{1}.png"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {'mask_strategy': '0'}", "not a JSON object"),
        ('a {"mask_strategy": "0", "mask_strategy": "1"}', "there twice"),
        ('a {"mask_strategy": "0"} b', "not a JSON object"),
        ('a {"mask_strategy": __import__("os")}', "not a JSON object"),
        ("a " + '{"a":' * 100_000, "not a JSON object"),
        ('a {"mask_strategie": "0"}', "known: reference_path, mask_strategy"),
        ('a {"mask_strategy": 0}', "text in quotes"),
        ('a {"reference_path": null}', "text in quotes"),
    ],
)
def test_broken_json(prompt, message):
    with pytest.raises(OpenSoraError, match=message) as caught:
        prompts.split_references(prompt)
    assert "\n" not in str(caught.value)


@given(
    st.builds(
        FramePlacement,
        loop=st.integers(0, 9),
        reference=st.integers(-3, 3),
        reference_start=st.integers(-50, 50),
        target_start=st.integers(-50, 50),
        length=st.integers(1, 50),
        edit_ratio=st.floats(0, 1),
    )
)
def test_placements_come_back(placement):
    assert prompts.parse_mask_strategy(f"{placement};0") == [placement, FramePlacement()]


@pytest.mark.parametrize("text", [None, "", "  "])
def test_nothing_placed(text):
    assert prompts.parse_mask_strategy(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0;", "loop in the entry '' of a mask strategy is not a whole number"),
        ("0,a", "reference in the entry"),
        ("0,0,0.5", "reference_start in the entry"),
        ("0,0,0,0,1,x", "edit_ratio in the entry '0,0,0,0,1,x' of a mask strategy is not a number"),
        ("0,0,0,0,1,0,0", "7 fields"),
        ("0,0,0,0,0", "takes 0 frames"),
        ("-1", "names loop -1"),
        ("0,0,0,0,1,1.5", "edit ratio 1.5"),
        ("0,0,0,0,1,nan", "edit ratio nan"),
    ],
)
def test_broken_mask_strategies(text, message):
    with pytest.raises(OpenSoraError, match=message):
        prompts.parse_mask_strategy(text)


@given(st.text())
def test_cleaning_leaves_tidy_text(text):
    try:
        cleaned = clean_text(text)
    except OpenSoraError:
        return
    assert cleaned == cleaned.strip()
    assert "  " not in cleaned


def test_ornaments_only_leave_nothing():
    assert clean_text("*** ... ***") == ""


def test_text_that_looks_like_a_file_is_no_warning(recwarn):
    clean_text("my holiday/film")
    assert not recwarn.list


def test_markup_that_cannot_be_read(monkeypatch):
    import bs4

    def refuse(*args, **kwargs):
        raise bs4.ParserRejectedMarkup("no")

    monkeypatch.setattr(bs4, "BeautifulSoup", refuse)
    with pytest.raises(OpenSoraError, match="markup that cannot be read"):
        clean_text("a <![cat")


def test_scores_in_words_are_said_once():
    said = prompts.append_scores("a cat", aesthetic="very good", flow=12, in_words=True)
    assert said == "a cat The aesthetic score is very good. The motion strength is very high."
    assert prompts.append_scores(said, aesthetic=3, flow=0, in_words=True) == said
    with pytest.raises(OpenSoraError, match="'superb', expected a number or one of terrible, very poor"):
        prompts.append_scores("a cat", aesthetic="superb", in_words=True)
    with pytest.raises(OpenSoraError, match=r"expected a number such as 6\.5"):
        prompts.append_scores("a cat", aesthetic="very good")  # to a model that is told numbers
    with pytest.raises(OpenSoraError, match=r"expected a number such as 6\.5"):
        prompts.append_scores("a cat", flow=float("nan"), in_words=True)
