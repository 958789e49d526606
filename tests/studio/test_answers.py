"""What the page is told by the process that knows torch."""

import asyncio
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from opensora.errors import OpenSoraError
from opensora.media.write import write_video
from opensora.studio.answers import answer, fidelity, sketch
from opensora.studio.asking import Asking

PLAN = {"known_frames": False, "device": "cpu", "max_memory_bytes": 2**34}


def test_a_sketch_tells_what_is_left_out() -> None:
    told = sketch({"model": "toybox-iddpm", "num_frames": 34}, **PLAN)
    assert told["own"] == {
        "width": 64,
        "height": 64,
        "num_frames": 34,
        "fps": 8,
        "num_inference_steps": 50,
        "guidance_scale": 3,
    }
    assert (told["channels"], told["cfg_channels"]) == (4, [0, 1, 2])
    assert told["spans"][:3] == [(0, 1), (1, 5), (5, 9)] and told["spans"][-1][1] == 34
    assert told["plan"]["fits"] and told["plan"]["ways"][0]["choices"] == ""
    assert "offload networks" in [way["choices"] for way in told["plan"]["ways"]]


@pytest.mark.slow
def test_a_sketch_tells_what_does_not_fit() -> None:
    told = sketch({"model": "toybox", "height": 72, "width": 72}, **{**PLAN, "max_memory_bytes": 2**20})
    assert not told["plan"]["fits"] and told["plan"]["device_memory_bytes"] == 2**20


def test_what_no_clip_can_be_is_a_line() -> None:
    told = answer({"sketch": {"request": {"model": "toybox", "height": 63}, **PLAN}})
    assert "64" in told["error"] and "\n" not in told["error"]


def test_fidelity_is_that_of_the_lab(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(30, 220, (9, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", frames, 8)
    write_video(tmp_path / "b.mkv", frames[:8] + 10, 8)  # a frame less: those that both have are compared
    same = fidelity(str(tmp_path / "a.mkv"), str(tmp_path / "a.mkv"))
    assert same["psnr_db"] > 100 and same["ssim"] == pytest.approx(1)
    other = fidelity(str(tmp_path / "b.mkv"), str(tmp_path / "a.mkv"))
    assert other["psnr_db"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    write_video(tmp_path / "c.mkv", frames[:, :16], 8)
    with pytest.raises(OpenSoraError, match="32x16 and 32x32"):
        fidelity(str(tmp_path / "c.mkv"), str(tmp_path / "a.mkv"))


@pytest.mark.multi
def test_the_process_answers_and_another_takes_its_place_when_it_is_killed() -> None:
    async def talk() -> None:
        asking = Asking()
        request = {"model": "toybox"}
        try:
            assert (await asking.ask("sketch", request=request, **PLAN))["channels"] == 4
            with pytest.raises(OpenSoraError, match="num_frames"):
                await asking.ask("sketch", request={**request, "num_frames": -1}, **PLAN)
            assert asking._process is not None
            os.kill(asking._process.pid, signal.SIGKILL)
            await asking._process.wait()
            assert (await asking.ask("sketch", request=request, **PLAN))["channels"] == 4
            with pytest.raises(OpenSoraError, match="log"):
                await asking.ask("no such question")
        finally:
            await asking.close()

    asyncio.run(talk())
