"""How encoded toybox clips are drawn and worded."""

from collections import Counter

import pytest
import torch

from opensora.data.toybox import CaptionedLatents, ToyboxLatents
from opensora.distributed.seeding import generator
from opensora.errors import OpenSoraError
from opensora.toybox.captions import language_of, plain_caption
from opensora.toybox.specs import sample_specs


@pytest.fixture(scope="module")
def latents() -> CaptionedLatents:
    """200 clips whose latent is their number."""
    specs = sample_specs(200, 0)
    numbers = torch.arange(200.0).half()[:, None, None, None, None]
    return CaptionedLatents(specs, numbers, numbers.to(torch.uint8))


def draw(latents: CaptionedLatents, n: int = 400, **options) -> tuple[list[int], list[str]]:
    numbers, _, captions = latents.sample(n, generator("draw"), ToyboxLatents(**options))
    return numbers.flatten().int().tolist(), captions


def test_captions_are_english_unless_chinese_is_asked_for(latents):
    assert {language_of(text) for text in draw(latents)[1]} == {"en"}
    shares = Counter(language_of(text) for text in draw(latents, chinese=0.4)[1])
    assert 0.3 < shares["zh"] / 400 < 0.5


def test_a_share_is_worded_plainly(latents):
    rows, captions = draw(latents, plain=0.5)
    plain = [text == plain_caption(latents.specs[row]) for row, text in zip(rows, captions, strict=True)]
    assert 0.4 < sum(plain) / 400 < 0.6


def test_motions_are_drawn_by_their_weights(latents):
    rows, _ = draw(latents, motion_weights={"up": 50.0, "down": 0.0})
    motions = Counter(latents.specs[row].motion for row in rows)
    assert motions["up"] > 200 and motions["down"] == 0 and len(motions) > 5


@pytest.mark.parametrize("name", ["chinese", "plain"])
def test_shares_are_shares(name):
    with pytest.raises(OpenSoraError, match=f"{name} is 1.5; give a share from 0 to 1"):
        ToyboxLatents(**{name: 1.5})
