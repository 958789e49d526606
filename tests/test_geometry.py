"""Sizes: validity with the nearest valid ones named, durations, and the published resolution tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora import geometry
from opensora.errors import OpenSoraError
from opensora.geometry import SizeRule, VideoSize

CAUSAL = SizeRule(spatial_multiple=8, frame_multiple=4, frame_offset=1)


@pytest.mark.parametrize(
    ("size", "rule", "nearest"),
    [
        ((16, 64, 64), CAUSAL, "13 or 17"),
        ((0, 64, 64), CAUSAL, "nearest valid is 1"),
        ((-3, 64, 64), CAUSAL, "nearest valid is 1"),
        ((17, 63, 64), CAUSAL, "height 63 must be a multiple of 8; the nearest valid is 56 or 64"),
        ((17, 64, 3), CAUSAL, "nearest valid is 8"),
        ((17, 64, 0), CAUSAL, "nearest valid is 8"),
        ((90, 64, 64), SizeRule(max_frames=68), "nearest valid is 68"),
        ((17, 64, 3000), SizeRule(max_side=1001), "nearest valid is 1000"),
    ],
)
def test_impossible_sizes_name_the_nearest_valid(size, rule, nearest):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
        VideoSize(*size).check(rule)
    assert nearest in str(caught.value)


@given(st.integers(1, 500), st.integers(1, 17), st.integers(0, 20), st.none() | st.integers(1, 200))
def test_nearest_valid_is_valid_and_nearest(value, multiple, offset, maximum):
    valid = [n for n in range(1, 600) if n % multiple == offset % multiple]
    allowed = [n for n in valid if maximum is None or n <= maximum] or valid[:1]
    found = geometry.nearest_valid(value, multiple, offset, maximum)
    assert found in allowed
    assert abs(found - value) == min(abs(n - value) for n in allowed)
    rule = SizeRule(frame_multiple=multiple, frame_offset=offset, max_frames=maximum)
    assert VideoSize(found, 8, 8).check(rule).num_frames == found


@pytest.mark.parametrize(
    ("text", "fps", "expected"),
    [("17", 8, 17), (17, 8, 17), ("2s", 8, 17), ("4s", 8, 33), ("0.1s", 8, 1), ("2.5s", 24, 61), (" 1s ", 8, 9)],
)
def test_frames_from_counts_and_durations(text, fps, expected):
    assert geometry.parse_num_frames(text, fps, CAUSAL) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("four", "neither a count"),
        ("4.5", "neither a count"),
        ("4 s", "neither a count"),
        ("", "neither a count"),
        ("0s", "more than 0s"),
        ("-1s", "more than 0s"),
        ("18", "17 or 21"),
        ("0", "nearest valid is 1"),
    ],
)
def test_bad_frame_counts(text, message):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
        geometry.parse_num_frames(text, 8, CAUSAL)
    assert message in str(caught.value)


def test_a_duration_beyond_the_model_is_an_error():
    with pytest.raises(OpenSoraError, match="nearest valid is 65 frames"):
        geometry.parse_num_frames("60s", 8, SizeRule(frame_multiple=4, frame_offset=1, max_frames=68))


def test_bad_fps():
    with pytest.raises(OpenSoraError, match="fps"):
        geometry.parse_num_frames("2s", 0, CAUSAL)


def test_image_sizes():
    assert geometry.image_size("240p", "16:9") == (240, 426)
    assert geometry.image_size("240p", "9:16") == (426, 240)
    assert geometry.image_size("512", "1:1") == (512, 512)
    with pytest.raises(OpenSoraError, match="nearest valid is 522:196"):
        geometry.image_size("240p", "5:1")
    with pytest.raises(OpenSoraError, match="known: 144p, 256"):
        geometry.image_size("241p", "1:1")
    with pytest.raises(OpenSoraError, match="not width:height"):
        geometry.image_size("240p", "wide")


def test_aspect_ratios_in_the_order_of_the_tables():
    assert geometry.image_size("240p", "9:16", "height:width") == (240, 426)
    assert geometry.image_size("720p", "16:9", "height:width") == (1280, 720)
    with pytest.raises(OpenSoraError, match=r"5:1 \(height:width\); the nearest valid is 462:222"):
        geometry.image_size("240p", "5:1", "height:width")
    with pytest.raises(OpenSoraError, match=r"not height:width, for example 16:9"):
        geometry.parse_aspect_ratio("tall", "height:width")


@pytest.mark.parametrize(("default", "expected"), [((240, 424), (720, 1280)), ((424, 240), (1280, 720))])
def test_a_resolution_alone_keeps_the_format(default, expected):
    assert geometry.table_size(default, "720p") == expected


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, (64, 64)),
        ({"aspect_ratio": "1:2", "order": "height:width"}, (48, 88)),
        ({"height": 64, "aspect_ratio": "1:2", "order": "height:width"}, (64, 128)),
        ({"resolution": "240p", "aspect_ratio": "9:16", "order": "height:width"}, (240, 424)),
        ({"height": 96}, (96, 64)),
        ({"height": 96, "width": 128}, (96, 128)),
        ({"aspect_ratio": "2:1"}, (48, 88)),
        ({"height": 64, "aspect_ratio": "2:1"}, (64, 128)),
        ({"width": 64, "aspect_ratio": "2:1"}, (32, 64)),
        ({"resolution": "144p"}, (192, 192)),
        ({"resolution": "240p", "aspect_ratio": "16:9"}, (240, 424)),
    ],
)
def test_resolving_what_a_person_said(wishes, expected):
    assert geometry.resolve_image_size((64, 64), rule=CAUSAL, **wishes) == expected


@pytest.mark.parametrize(
    "wishes",
    [
        {"height": 64, "resolution": "144p"},
        {"height": 64, "width": 64, "aspect_ratio": "1:1"},
        {"height": 63},
        {"resolution": "nope"},
        {"aspect_ratio": "0:1"},
    ],
)
def test_contradicting_wishes(wishes):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        geometry.resolve_image_size((64, 64), rule=CAUSAL, **wishes)


@pytest.mark.parametrize("text", ["4 x", "0x", "3s", "1.5s", "-2s", "four", "", "0", "2.0"])
def test_impossible_named_frame_counts(text):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        geometry.named_num_frames(text)


def test_named_frame_counts_take_other_clips():
    assert geometry.named_num_frames("6x", clip_frames=17) == 102
    assert geometry.named_num_frames("6s", clip_frames=68, clip_s=3) == 136


@given(st.floats(0.25, 4), st.integers(1_000, 10_000_000))
def test_even_sizes_are_even_and_near(ratio, pixels):
    height, width = geometry.even_size(ratio, pixels)
    assert height % 2 == width % 2 == 0
    assert abs(height - (pixels * ratio) ** 0.5) <= 1.001
    assert abs(width - height / ratio) <= 1.001


@pytest.mark.parametrize(("ratio", "pixels"), [(0, 100), (-1, 100), (float("nan"), 100), (1, 0), (1000, 100)])
def test_impossible_even_sizes(ratio, pixels):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$"):
        geometry.even_size(ratio, pixels)


def test_all_names_are_published(golden_json):
    assert set(golden_json("aspect_v1_2")["ASPECT_RATIOS"]) == set(geometry.resolution_names())


@pytest.mark.parametrize(("num_frames", "within"), [(1, 1), (16, 1), (17, 17), (51, 49), (113, 113), (400, 113)])
def test_frames_within(num_frames, within):
    """What of a reference can be encoded: 16k + 1 frames, as many as there are."""
    assert SizeRule(8, 16, 1, max_frames=113).frames_within(num_frames) == within
