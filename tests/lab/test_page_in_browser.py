"""The page of a comparison as a browser shows it: all clips play in step, and nobody is asked for anything."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import opened

from opensora.cli.main import main
from opensora.media.write import write_video

pytestmark = pytest.mark.browser

FPS = 8
SHOWN = "videos.filter(one => one.shown).map(one => one.video)"
SETTLED = f"""{SHOWN}.every(video => video.paused && !video.seeking
  && Math.abs(video.currentTime - Math.min(place, video.duration - 1e-3)) < 0.01)"""


def wait_for(shown: Any, condition: str) -> None:
    """Until the page says so; asked by the page itself, which lets nobody evaluate text."""
    asking = f"const ask = () => ({condition}) ? done(true) : performance.now() > 6e4 ? done(false) : next()"
    waiting = f"new Promise(done => {{ const next = () => requestAnimationFrame(ask); {asking}; ask(); }})"
    assert shown.evaluate(waiting), f"not within a minute: {condition}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of eight clips each; the last ones of each folder are shorter."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    for column in "abc":
        for name in range(8):
            noise = rng.integers(0, 255, (17 if name < 5 else 9, 32, 32, 3), np.uint8)
            write_video(folder / column / f"a clip <b>called<b> {name}.mp4", noise, FPS)
    folders = [str(folder / column) for column in "abc"]
    metrics = ["--metrics", "colour", "sharpness"]
    assert main(["compare", "--clips", *folders, "--output", str(folder / "out"), *metrics]) == 0
    return folder / "out" / "index.html"


def test_all_clips_play_in_step_without_asking_anybody(page: Path) -> None:
    with opened(page, height=2400) as (shown, requests, errors):
        shown.evaluate("$('bar').scrollIntoView()")
        wait_for(shown, "performance.now() > 10000 && place > 0.3 && place < 0.8")
        times, place = shown.evaluate(f"[{SHOWN}.map(video => video.currentTime), place]")
        assert len(times) == 24
        assert max(times) - min(times) < 1 / FPS and all(abs(time - place) < 1 / FPS for time in times)
        assert shown.evaluate(f"{SHOWN}.filter(video => video.paused && place < video.duration - 0.3).length") == 0
        assert not errors
        assert {request.split(":")[0] for request in requests} <= {"file", "data", "blob"}
        assert [request for request in requests if request.startswith("file:")] == [page.as_uri()]


def test_clips_stop_step_and_jump_together(page: Path) -> None:
    with opened(page, height=2400) as (shown, _, errors):
        shown.evaluate("$('bar').scrollIntoView()")
        wait_for(shown, f"{SHOWN}.length == 24 && {SHOWN}.every(video => video.readyState > 1)")
        shown.evaluate("$('place').value = 0.5; $('place').dispatchEvent(new Event('input'))")
        wait_for(shown, SETTLED)
        before = shown.evaluate("place")
        assert before == pytest.approx(17 / FPS / 2, abs=0.02)
        shown.evaluate("document.activeElement.blur()")
        shown.keyboard.press("ArrowRight")
        wait_for(shown, SETTLED)
        assert shown.evaluate("place") - before == pytest.approx(1 / FPS)
        times = shown.evaluate(f"{SHOWN}.filter(video => video.duration < 1.5).map(video => video.currentTime)")
        assert len(times) == 9 and all(time <= 9 / FPS for time in times)
        assert not errors


def test_names_of_clips_are_text_and_figures_stand_below(page: Path) -> None:
    with opened(page) as (shown, _, errors):
        assert shown.locator("#clips tbody td").first.inner_text().startswith("a clip <b>called<b> 0")
        shown.locator("#below").select_option("saturation")
        assert shown.locator("#clips tbody td small").nth(1).inner_text().startswith("saturation 0.")
        assert shown.locator("#figures tbody tr").count() == shown.locator("#plots figure").count() > 2
        assert not errors


def test_a_phone_shows_it_without_scrolling_the_page_sideways(page: Path) -> None:
    with opened(page, width=390, height=844) as (shown, _, _):
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
