"""Clips of the bundled model, asked for in a browser; and a server with keys."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect
from running_server import ENVIRONMENT
from studio_server import StudioServer

from opensora.media.frames import ClipFile
from opensora.media.write import write_video

pytestmark = pytest.mark.browser
expect.set_options(timeout=120_000)

Opening = Callable[..., Any]
PROMPT = "a small red ball rolls left over the grass"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    server = StudioServer(tmp_path_factory.mktemp("studio"), worker="opensora.server.worker")
    yield server
    server.close()


def ask(page: Any, steps: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Steps", exact=True).fill(steps)
    page.get_by_role("button", name="Generate", exact=True).click()


def test_a_clip_is_seen_while_it_is_made_and_plays_then(server: StudioServer, open_page: Opening) -> None:
    page = open_page(server.url)
    ask(page, steps="200")
    page.locator(".stage img.preview").wait_for(timeout=180_000)
    before = page.locator(".generate progress").evaluate("bar => bar.value")
    page.reload()
    page.locator(".stage img.preview").wait_for()  # a reload loses nothing
    assert page.locator(".generate progress").evaluate("bar => bar.value") >= before
    page.locator(".stage video").wait_for(timeout=180_000)
    page.wait_for_function(
        "(video => video.currentTime > 0.2 && video.videoWidth === 64)(document.querySelector('.stage video'))"
    )
    page.get_by_text("How it was made").click()
    record = page.locator(".record table")
    expect(record).to_contain_text("sampling.num_inference_steps")
    expect(record).to_contain_text(PROMPT)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert ClipFile(download.value.path()).num_frames() == 17
    # Each latent channel is shown, and those that the model guides are marked.
    page.wait_for_function("document.querySelector('.latent').style.backgroundImage.includes('channels')")
    expect(page.locator(".channel.guided")).to_have_count(4)
    page.get_by_label("Model", exact=True).select_option("toybox-iddpm")
    expect(page.locator(".channel.guided")).to_have_count(3)
    expect(page.locator(".needs")).to_contain_text("GB, fits")
    page.get_by_role("tab", name="Plan").click()
    expect(page.locator(".plan-tab dl")).to_contain_text("17 frames of 64x64")
    expect(page.locator(".ways tbody tr")).not_to_have_count(0)


def test_a_clip_of_the_page_is_the_clip_of_the_command_line(
    server: StudioServer, open_page: Opening, tmp_path: Path
) -> None:
    page = open_page(server.url)
    page.get_by_label("Seed", exact=True).fill("11")
    ask(page, steps="3")
    page.locator(".stage video").wait_for(timeout=180_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    output = tmp_path / "command.mp4"
    options = ["--seed", "11", "--num-inference-steps", "3", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "opensora", "generate", PROMPT, *options], check=True, env=ENVIRONMENT)
    by_page, by_command = (list(ClipFile(path).frames(range(17))) for path in (download.value.path(), output))
    assert np.array_equal(by_page, by_command)


def test_a_picture_is_dropped_and_its_frames_are_marked(
    server: StudioServer, open_page: Opening, tmp_path: Path
) -> None:
    colour = np.full((1, 64, 64, 3), (40, 90, 200), np.uint8)
    write_video(tmp_path / "blue.png", colour, 1)
    page = open_page(server.url)
    dropped = page.evaluate_handle(
        """data => { const files = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
          files.items.add(new File([bytes], "blue.png", { type: "image/png" })); return files }""",
        base64.b64encode((tmp_path / "blue.png").read_bytes()).decode(),
    )
    page.dispatch_event("[data-field=frames]", "drop", {"dataTransfer": dropped})
    cells = page.locator(".timeline button")
    expect(cells).to_have_count(5)
    expect(cells.first).to_have_class("known")  # a picture is the first frame, unless it is placed
    page.get_by_label("How the file is used").select_option("place")
    cells.nth(4).click()
    cells.nth(0).click()
    expect(page.locator(".timeline .known small")).to_have_text(["13–16"])
    page.reload()  # files and marks are kept
    expect(page.locator(".timeline .known small")).to_have_text(["13–16"])
    with page.expect_response("**/v1/videos") as answer:
        ask(page, steps="4")
    job_id = answer.value.json()["id"]
    page.wait_for_function(f"document.querySelector('.stage video')?.src.includes('{job_id}')")
    job = server.store.get(job_id)
    assert job.request.mask_strategy == "0,0,0,4,1,0" and len(job.request.reference_path) == 1
    first, last = (frame.mean(axis=(0, 1)) for frame in ClipFile(server.folder.clip(job.result)).frames([0, 16]))
    assert first[1] > first[2] + 20 and last[2] > last[1] + 20  # grass, and then the blue that was given


def test_a_clip_is_gone_on_from(server: StudioServer, open_page: Opening) -> None:
    parent = next(job for job in server.store.jobs() if job.state == "completed")
    page = open_page(server.url)
    page.get_by_role("tab", name="Gallery").click()
    page.locator(f".gallery [data-id={parent.id}] .open").click()
    page.get_by_role("dialog").get_by_role("button", name="Extend").click()
    expect(page.locator(".source")).to_contain_text("Goes on where")
    page.get_by_label("Steps", exact=True).fill("2")
    with page.expect_response("**/extend") as answer:
        page.get_by_role("button", name="Generate", exact=True).click()
    made = answer.value.json()
    assert (made["kind"], made["parent"]) == ("extend", parent.id)
    page.get_by_role("tab", name="Gallery").click()
    expect(page.locator(f".gallery [data-id={made['id']}]")).to_be_visible()


def test_a_clip_of_given_frames_is_remixed_with_them_and_edited(server: StudioServer, open_page: Opening) -> None:
    parent = next(job for job in server.store.jobs() if job.request.mask_strategy)
    page = open_page(server.url)

    def ask_from_gallery(button: str) -> None:
        page.get_by_role("tab", name="Gallery").click()
        page.locator(f".gallery [data-id={parent.id}] .open").click()
        page.get_by_role("dialog").get_by_role("button", name=button).click()

    ask_from_gallery("Use these settings")  # its frames lie on the server
    expect(page.locator(".source")).to_contain_text("A remix of")
    page.get_by_label("Steps", exact=True).fill("")
    page.get_by_label("Seed", exact=True).fill("3")
    server.store.pause(True)
    with page.expect_response("**/remix") as answer:
        page.get_by_role("button", name="Generate", exact=True).click()
    remix = server.store.get(answer.value.json()["id"])
    assert (remix.kind, remix.parent, remix.request.mask_strategy) == ("remix", parent.id, "0,0,0,4,1,0")
    assert (remix.request.num_inference_steps, remix.request.seed) == (None, 3)  # what is empty is the model's own
    ask_from_gallery("Edit")
    page.locator(".source input").fill("0.3")
    with page.expect_response("**/edit") as answer:
        page.get_by_role("button", name="Generate", exact=True).click()
    edit = server.store.get(answer.value.json()["id"])
    assert (edit.kind, edit.request.strength, edit.request.num_inference_steps) == ("edit", 0.3, 4)
    for job in (remix, edit):
        server.store.cancel(job.id)
    server.store.pause(False)


def test_training_runs_are_shown(server: StudioServer, open_page: Opening) -> None:
    run = server.folder.path / "runs" / "first"
    write_video(run / "previews" / "step-00000002-0.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2)))
    page = open_page(server.url)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator(".chart figcaption")).to_contain_text(["loss0.5 @ 2"])
    page.wait_for_function("document.querySelector('.previews video')?.videoWidth === 32")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3, "loss": 0.25}\n')
    expect(page.locator(".chart figcaption")).to_contain_text(["loss0.25 @ 3"])


def test_a_server_with_keys_asks_for_one_once(tmp_path: Path, browser: Any) -> None:
    (tmp_path / "keys").write_text("ann:a-secret-of-sixteen\n")
    server = StudioServer(tmp_path / "server", keys=tmp_path / "keys")
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(server.url)
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("This server needs a key").fill("wrong")
        dialog.get_by_role("button", name="Use it").click()
        expect(dialog).to_contain_text("does not know this key")
        dialog.get_by_label("This server needs a key").fill("a-secret-of-sixteen")
        dialog.get_by_role("button", name="Use it").click()
        ask(page, steps="4")
        page.locator(".stage video").wait_for()
        page.wait_for_function("document.querySelector('.stage video').videoWidth === 32")
        assert [job.owner for job in server.store.jobs()] == ["ann"]
        page.reload()
        page.locator(".stage video").wait_for()  # the key is kept
        assert "a-secret" not in page.content()
    finally:
        context.close()
        server.close()
