"""What a clip looks like in a notebook."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import make_pipeline

from opensora.generation import notebook
from opensora.generation.clip import Clip
from opensora.generation.engine import Engine
from opensora.generation.loading import LoadedModel
from opensora.generation.record import read_record
from opensora.generation.request import ClipRequest
from opensora.media.read import read_video


class Seen(HTMLParser):
    """Elements, with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, dict[str, str | None]] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements[tag] = dict(attrs)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def data_of(address: str | None, kind: str) -> bytes:
    assert address
    return base64.b64decode(address.removeprefix(f"data:{kind};base64,"), validate=True)


@pytest.fixture(scope="module")
def clip() -> Clip:
    engine = Engine(make_pipeline("flow"), LoadedModel("tiny", "a" * 64))
    return engine.generate(ClipRequest("a small red ball", seed=3, num_inference_steps=2))


def test_a_clip_plays_and_can_be_made_again(clip: Clip, tmp_path: Path):
    seen = Seen(clip._repr_html_())
    assert not seen.open
    assert {"controls", "loop", "muted", "playsinline"} <= seen.elements["video"].keys()
    path = tmp_path / "clip.mp4"
    path.write_bytes(data_of(seen.elements["video"]["src"], "video/mp4"))
    frames, fps = read_video(path)
    assert frames.shape == clip.frames.shape and fps == clip.fps
    assert read_record(path) == clip.record
    assert "a small red ball (tiny, seed 3)" in seen.text and "guidance_scale" in seen.text


def test_a_prompt_stays_text(clip: Clip):
    assert clip.record
    prompt = '</pre></details><script>alert("1")</script>'
    seen = Seen(replace(clip, record=replace(clip.record, prompt=prompt))._repr_html_())
    assert set(seen.elements) == {"div", "video", "details", "summary", "pre"}
    assert prompt in seen.text


def test_one_frame_is_a_picture_to_the_bit(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 255, (1, 40, 30, 3), dtype=np.uint8)
    seen = Seen(Clip(frames, 8.0)._repr_html_())
    (tmp_path / "frame.png").write_bytes(data_of(seen.elements["img"]["src"], "image/png"))
    assert np.array_equal(read_video(tmp_path / "frame.png")[0], frames)
    assert "details" not in seen.elements  # nobody knows how it was made


@pytest.mark.parametrize("limit", ["MOST_VIDEO_BYTES", "MOST_FRAME_BYTES"])
def test_a_clip_that_is_too_large_is_a_picture_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, limit: str, tmp_path: Path
):
    frames = np.random.default_rng(0).integers(0, 255, (9, 300, 800, 3), dtype=np.uint8)
    monkeypatch.setattr(notebook, limit, 1000)
    text = Clip(frames, 8.0)._repr_html_()
    seen = Seen(text)
    assert "video" not in seen.elements
    (tmp_path / "frame.png").write_bytes(data_of(seen.elements["img"]["src"], "image/png"))
    assert read_video(tmp_path / "frame.png")[0].shape == (1, 192, 512, 3)
    assert re.search(r'9 frames of 300x800.*too large for a notebook.*clip\.save\("clip\.mp4"\)', seen.text, re.DOTALL)
    assert len(text) < frames.nbytes / 2
