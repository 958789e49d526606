import json

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_space import LatentSpace, override_configured, parse_override

PUBLISHED = LatentSpace(0.18215, shift=(-0.10, 0.34), scale=(3.85, 2.32), trained_with="published")


@pytest.mark.parametrize("convention", ["multiply", "divide"])
def test_each_step_inverts(convention):
    space = LatentSpace(0.25, convention, (0.5, -1.0), (2.0, 4.0))
    latents = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.denormalise(space.normalise(latents)), latents)
    torch.testing.assert_close(space.unscale_frames(space.scale_frames(latents)), latents)
    torch.testing.assert_close(space.scale_frames(latents), latents * 0.25 if convention == "multiply" else latents * 4)
    torch.testing.assert_close(space.normalise(latents)[:, 1], (latents[:, 1] + 1.0) / 4.0)


def test_statistics_are_float32_for_half_precision_latents():
    latents = torch.ones(1, 2, 1, 1, 1, dtype=torch.bfloat16)
    assert PUBLISHED.normalise(latents).dtype == torch.float32


def test_survives_json():
    space = LatentSpace(0.13025, "multiply").overriding(PUBLISHED)
    assert LatentSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert LatentSpace.from_dict({"scaling_factor": 0.5}) == LatentSpace(0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling_factor": 0.0}, "positive"),
        ({"scaling_factor": float("nan")}, "positive"),
        ({"convention": "times"}, "multiply"),
        ({"scale": [1.0, 0.0]}, "positive"),
        ({"shift": [float("inf")]}, "finite"),
        ({"shift": [0.0], "scale": [1.0, 1.0]}, "1 channels and scale 2"),
        ({"scaling": 0.18215}, "unknown field scaling; known are scaling_factor"),
        ({"scale": [1.0, ""]}, "scale is a list"),
    ],
)
def test_bad_declarations(values, message):
    with pytest.raises(OpenSoraError, match=message):
        LatentSpace.from_dict(values)


def test_wrong_number_of_channels():
    with pytest.raises(OpenSoraError, match="2 channels, but the latents have 4"):
        PUBLISHED.normalise(torch.zeros(1, 4, 1, 1, 1))


def test_two_declarations_are_refused_with_both_values_and_both_ways_out():
    other = LatentSpace(0.13025, shift=PUBLISHED.shift, scale=(3.85, 2.0))
    with pytest.raises(OpenSoraError) as caught:
        PUBLISHED.check_same(other, here="the autoencoder", there="the training run")
    message = str(caught.value)
    for part in ("0.18215", "0.13025", "2.32", "2.0", "the autoencoder", "the training run", "scaling_factor"):
        assert part in message
    assert "shift" not in message.split("Keep")[0]
    assert "Keep the checkpoint's" in message and "override_latent_space" in message
    assert "\n" not in message


def test_the_same_figures_in_other_words_agree():
    LatentSpace(0.5, "multiply").check_same(LatentSpace(2.0, "divide"), here="a", there="b")
    LatentSpace(shift=None).check_same(LatentSpace(shift=(0.0, 0.0), scale=(1.0, 1.0)), here="a", there="b")


def test_an_override_remembers_the_checkpoint():
    override = LatentSpace(0.13025).overriding(PUBLISHED)
    assert override.overridden and override.scaling_factor == 0.13025
    assert override.declared_by_weights == PUBLISHED
    assert override.to_dict()["replaces"]["scaling_factor"] == 0.18215
    again = LatentSpace(0.2).overriding(override)
    assert again.declared_by_weights == PUBLISHED, "the first declaration is the one the weights have"
    assert PUBLISHED.overriding(override) == PUBLISHED, "overriding with the checkpoint's own figures is none"
    assert not PUBLISHED.overridden


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        (0.5, {"scaling_factor": 0.5}),
        (2, {"scaling_factor": 2}),
        ("0.5", {"scaling_factor": 0.5}),
        ({"shift": [0.5, 1.0]}, {"shift": [0.5, 1.0]}),
        (' {"scale": null, "convention": "divide"}', {"scale": None, "convention": "divide"}),
    ],
)
def test_an_override_is_a_factor_or_fields(said, fields):
    assert parse_override(said) == fields


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("none", "`latent_space` is the text 'none', expected a scaling factor such as 0.18215"),
        ("[1, 2]", "`latent_space` is the text"),
        ({}, "`latent_space` is an object of 0"),
        ({"trained_with": "care"}, "expected a scaling factor"),
        ("{shift: 1}", "`latent_space` is not valid JSON"),
        ("0", "scaling_factor 0.0 given, but it must be a positive number"),
        ("nan", "scaling_factor nan given"),
        ('{"shift": 0.1}', "shift is the number 0.1"),
        ({"scale": [1.0, -1.0]}, "every channel needs a positive number"),
        ({"shifts": [1.0]}, "unknown field shifts"),
        ({"scaling_factor": 0.5, "replaces": {}}, "leave out `replaces`"),
    ],
)
def test_what_is_no_override(said, message):
    with pytest.raises(OpenSoraError, match=message.replace("[", r"\[")):
        parse_override(said)


def test_fields_that_an_override_leaves_out_stay_as_declared():
    declared = PUBLISHED.to_dict()
    found = LatentSpace.from_dict(override_configured(declared, {"scaling_factor": 0.5, "scale": None}))
    assert (found.scaling_factor, found.shift, found.scale, found.trained_with) == (0.5, PUBLISHED.shift, None, "")
    assert found.declared_by_weights == PUBLISHED
    assert LatentSpace.from_dict(override_configured(declared, LatentSpace(0.5))).shift is None, "nothing is left out"
    again = LatentSpace.from_dict(override_configured(found.to_dict(), {"shift": [1.0, 1.0]}))
    assert (again.scaling_factor, again.shift) == (0.5, (1.0, 1.0)) and again.declared_by_weights == PUBLISHED
    with pytest.raises(OpenSoraError, match="shift has 2 channels and scale 3"):
        override_configured(declared, {"scale": [1.0, 1.0, 1.0]})
