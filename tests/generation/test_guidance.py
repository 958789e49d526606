"""How strongly which channels of a clip are guided: with the model's own defaults, and as strongly on others."""

import pytest
from published_pipelines import pipeline_of

from opensora.errors import OpenSoraError
from opensora.generation.guidance import equal_strength_note, resolve_guidance
from opensora.generation.request import ClipRequest

PROMPT = "a red ball"
FRAMES = "opensora-1.3-i2v"


def resolved(model: str, **wishes):
    return resolve_guidance(pipeline_of(model), ClipRequest(PROMPT, **wishes))


def test_left_out_it_is_the_model_s():
    own = {"guidance_scale": 7.0, "image_guidance_scale": None, "cfg_channels": 3}
    assert resolved("opensora-1.0-hq-16x256x256") == own
    assert resolved("opensora-1.0-hq-16x256x256", guidance_scale=2.0, cfg_channels="all") == {
        **own,
        "guidance_scale": 2.0,
        "cfg_channels": "all",
    }


def test_scales_of_channels_take_the_place_of_both():
    scaled = resolved(FRAMES, channel_scales="0-11:7,12-15:1", image_guidance_scale=2.0)
    expected = {"channel_scales": [7.0] * 12 + [1.0] * 4, "image_guidance_scale": 2.0}
    assert scaled == {**expected, "guidance_scale": None, "cfg_channels": None}


@pytest.mark.parametrize(
    ("model", "wishes", "made", "note"),
    [
        (
            "opensora-1.0-hq-16x256x256",
            {"equivalent_to": "all"},
            {"guidance_scale": 5.5, "image_guidance_scale": None, "cfg_channels": "all"},
            "guidance 7 on 3 of 4 channels = 5.5 on all 4",
        ),
        (
            "opensora-1.2",
            {"equivalent_to": "0,2", "guidance_scale": 3.0},
            {"guidance_scale": 5.0, "image_guidance_scale": None, "cfg_channels": [0, 2]},
            "guidance 3 on all 4 channels = 5 on 2",
        ),
        (  # guidance by known frames acts on the same channels
            FRAMES,
            {"equivalent_to": "all", "cfg_channels": 12, "loop": 2, "guidance_scale": 7.0, "image_guidance_scale": 5.0},
            {"guidance_scale": 5.5, "image_guidance_scale": 4.0, "cfg_channels": "all"},
            "guidance 7 on 12 of 16 channels = 5.5 on all 16, image guidance 5 = 4",
        ),
    ],
)
def test_equal_strength_on_other_channels(model, wishes, made, note):
    assert resolved(model, **wishes) == made
    assert equal_strength_note(pipeline_of(model), ClipRequest(PROMPT, **wishes)) == [note]


def test_nothing_is_said_of_what_was_not_asked_for():
    assert equal_strength_note(pipeline_of("opensora-1.2"), ClipRequest(PROMPT)) == []


@pytest.mark.parametrize("wishes", [{"equivalent_to": 4}, {"equivalent_to": "0,1", "cfg_channels": [1, 0]}])
def test_the_same_channels_are_no_others(wishes):
    with pytest.raises(OpenSoraError, match="`equivalent_to` has no effect: these channels are guided already"):
        resolved("opensora-1.2", **wishes)


def test_distilled_guidance_is_of_no_channels():
    pipe = pipeline_of("opensora-2.0")
    pipe.transformer.reads_guidance = True
    with pytest.raises(OpenSoraError, match="leave out `equivalent_to`") as error:
        resolve_guidance(pipe, ClipRequest(PROMPT, equivalent_to=1))
    assert "\n" not in str(error.value)
