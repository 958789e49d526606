"""The nodes in ComfyUI's own engine, on a CPU."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui_process import PACK, ROOT, ComfyUI
from PIL import Image
from running_server import running_server
from video_server import VideoServer

from opensora.media.read import read_video
from opensora.media.write import write_video

pytestmark = [pytest.mark.slow, pytest.mark.multi]


def example(name: str) -> dict[str, Any]:
    return json.loads((PACK / "examples" / f"{name}.json").read_text())


def command_line(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "opensora", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)


def frames(path: str | Path) -> np.ndarray:
    return read_video(Path(path))[0]


def test_every_schema_is_valid_and_explains_itself(comfyui: ComfyUI):
    assert len(comfyui.schemas) == 9
    for name, schema in comfyui.schemas.items():
        assert schema["name"] == name and schema["display_name"].startswith("Open-Sora ")
        assert schema["category"].startswith("Open-Sora") and schema["description"]
        assert schema["output_node"] == (name == "OpenSoraSaveClip")
    used = {
        node["class_type"]
        for path in (PACK / "examples").glob("*.json")
        for node in json.loads(path.read_text()).values()
    }
    assert comfyui.schemas.keys() <= used  # each is shown in an example


def test_a_workflow_makes_the_command_lines_clip(comfyui: ComfyUI, tmp_path: Path):
    told = comfyui.run(example("text_to_video"))
    assert told["success"], told
    clip = tmp_path / "clip.mkv"
    prompt = "a small red ball rolls left over the grass"
    command_line("generate", prompt, "--seed", "7", "--guidance-scale", "3", "--cfg-channels", "0,1", "--output", clip)
    assert np.array_equal(frames(told["saved"][0]), frames(clip))
    assert told["steps"][-1] == [20, 20] and len(told["steps"]) > 2


def test_the_saved_record_makes_the_frames_again(comfyui: ComfyUI, tmp_path: Path):
    saved = comfyui.run(
        example("text_to_video")
        | {
            "7": {
                "class_type": "OpenSoraSaveClip",
                "inputs": {"clip": ["5", 0], "filename_prefix": "opensora/again", "format": "mkv"},
            }
        }
    )["saved"][-1]
    command_line("generate", "--from", saved, "--output", tmp_path / "again.mkv")
    assert np.array_equal(frames(saved), frames(tmp_path / "again.mkv"))


def test_a_picture_begins_the_command_lines_clip(comfyui: ComfyUI, tmp_path: Path):
    told = comfyui.run(example("picture_to_video"))
    assert told["success"], told
    picture, clip = tmp_path / "ball.png", tmp_path / "bounce.mkv"
    command_line("generate", "a large red ball over the grass", "--num-frames", "1", "--output", picture)
    command_line("generate", "a large red ball bounces over the grass", "--image", picture, "--output", clip)
    assert np.array_equal(frames(told["saved"][0]), frames(clip))


def test_a_video_is_edited_as_the_command_line_does(comfyui: ComfyUI, tmp_path: Path):
    told = comfyui.run(example("edit_video"))
    assert told["success"], told
    before, after = tmp_path / "before.mkv", tmp_path / "after.mkv"
    command_line("generate", "a large red ball bounces over the grass", "--output", before)
    prompt = "a large yellow ring bounces over the grass"
    command_line("generate", prompt, "--edit", before, "--strength", "0.7", "--output", after)
    assert np.array_equal(frames(told["saved"][0]), frames(after))


def test_another_seed_reads_the_prompt_no_second_time(comfyui: ComfyUI):
    workflow = example("text_to_video")
    first = comfyui.run(workflow)
    workflow["4"]["inputs"]["seed"] = 8
    second = comfyui.run(workflow)
    assert second["ran"] == ["OpenSoraSample", "OpenSoraDecode", "OpenSoraSaveClip"]
    assert not np.array_equal(frames(first["saved"][0]), frames(second["saved"][0]))


def test_the_stop_button_stops_sampling(comfyui: ComfyUI):
    workflow = example("text_to_video")
    workflow["4"]["inputs"] |= {"seed": 9, "steps": 500}
    told = comfyui.run(workflow, stop_at=1)
    assert told["interrupted"] and not told["success"]
    assert told["steps"] == [[1, 500]]
    workflow["4"]["inputs"]["steps"] = 2  # and the next one runs
    assert comfyui.run(workflow)["success"]


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("1", {"model": "toybx"}, "did you mean 'toybox'"),
        ("2", {"prompt": "a red elephant"}, "elephant"),
        ("3", {"channel_scales": "0:7"}, "leave out `guidance_scale`"),
        ("4", {"num_frames": "many"}, "num_frames 'many'"),
    ],
)
def test_a_mistake_is_told_in_a_line(comfyui: ComfyUI, node: str, inputs: dict[str, Any], message: str):
    workflow = example("text_to_video")
    workflow[node]["inputs"] |= inputs
    told = comfyui.run(workflow)
    assert not told["success"] and not told["saved"]
    assert message in told["message"] and "\n" not in told["message"].strip()


def test_the_engine_refuses_what_no_widget_holds(comfyui: ComfyUI):
    workflow = example("text_to_video")
    workflow["4"]["inputs"] |= {"fast": "very", "text": ["3", 0]}
    assert "errors" in comfyui.run(workflow)


def test_a_server_makes_the_clip(comfyui: ComfyUI, video_server: VideoServer, tmp_path: Path):
    made = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "made.mp4", made, 8)
    video_server.clip = (tmp_path / "made.mp4").read_bytes()
    video_server.script = [
        {"status": "queued", "progress": 0},
        503,
        {"status": "in_progress", "progress": 40},
        {"status": "completed", "progress": 100},
    ]
    (tmp_path / "key").write_text("secret\n")
    workflow = example("server")
    workflow["1"]["inputs"] = {"url": video_server.url, "key_file": str(tmp_path / "key")}
    told = comfyui.run(workflow)
    assert told["success"], told
    assert [40, 100] in told["steps"]
    assert np.array_equal(frames(told["saved"][0]), frames(tmp_path / "made.mp4"))
    assert video_server.created() == {
        "prompt": "a small red ball rolls left over the grass",
        "seed": 7,
        "guidance_scale": 3.0,
        "cfg_channels": "all",
    }
    assert all(headers["authorization"] == "Bearer secret" for _, _, headers, _ in video_server.asked)
    assert b"secret" not in Path(told["saved"][0]).read_bytes()


def test_our_server_makes_the_command_lines_clips(comfyui: ComfyUI, tmp_path: Path):
    workflow = example("server")
    picture, ball, bounce = (tmp_path / name for name in ("ball.png", "ball.mp4", "bounce.mp4"))
    prompt = workflow["3"]["inputs"]["prompt"]
    command_line("generate", "a large red ball over the grass", "--num-frames", "1", "--output", picture)
    command_line("generate", prompt, "--seed", "7", "--guidance-scale", "3", "--cfg-channels", "all", "--output", ball)
    command_line("generate", "a large red ball bounces over the grass", "--image", picture, "--output", bounce)
    shutil.copy(picture, comfyui.folder / "input" / "ball.png")
    with running_server(tmp_path / "server") as url:
        workflow["1"]["inputs"]["url"] = url
        told = comfyui.run(workflow)
        assert told["success"], told
        assert np.array_equal(frames(told["saved"][0]), frames(ball))
        workflow["3"]["inputs"] |= {"prompt": "a large red ball bounces over the grass", "seed": 42}
        workflow["3"]["inputs"]["first_image"] = ["5", 0]
        workflow["5"] = {"class_type": "LoadImage", "inputs": {"image": "ball.png"}}
        del workflow["3"]["inputs"]["guidance"]
        told = comfyui.run(workflow)
        assert told["success"], told
        assert np.array_equal(frames(told["saved"][0]), frames(bounce))


def test_a_server_is_shown_the_picture_to_the_bit(comfyui: ComfyUI, video_server: VideoServer):
    picture = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    write_video(comfyui.folder / "input" / "picture.png", picture[None], 1)
    workflow = example("server")
    workflow["1"]["inputs"] = {"url": video_server.url, "key_file": ""}
    workflow["3"]["inputs"]["first_image"] = ["9", 0]
    workflow["9"] = {"class_type": "LoadImage", "inputs": {"image": "picture.png"}}
    comfyui.run(workflow)
    url = video_server.created()["input_reference"]["image_url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), picture)


def test_to_stop_here_cancels_there(comfyui: ComfyUI, video_server: VideoServer):
    video_server.script = [{"status": "in_progress", "progress": 3}]
    workflow = example("server")
    workflow["1"]["inputs"] = {"url": video_server.url, "key_file": ""}
    told = comfyui.run(workflow, stop_at=3)
    assert told["interrupted"]
    assert ("POST", "/v1/videos/video_1/cancel") in [(method, path) for method, path, _, _ in video_server.asked]


def test_a_failure_tells_no_key(comfyui: ComfyUI, video_server: VideoServer, tmp_path: Path):
    video_server.refusal = (400, "the prompt is empty; say what the video should show")
    (tmp_path / "key").write_text("secret")
    workflow = example("server")
    workflow["1"]["inputs"] = {"url": video_server.url, "key_file": str(tmp_path / "key")}
    told = comfyui.run(workflow)
    assert "the prompt is empty" in told["message"]
    assert video_server.url in told["given"] and "secret" not in told["given"]
