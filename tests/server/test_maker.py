"""From a job to a clip by the bundled model: what is larger than it may be ends there, in one line."""

import threading
from pathlib import Path

import pytest
from server.api_server import PROMPT, Api, picture

from opensora.server.child import ChildSettings
from opensora.server.maker import ClipMaker
from opensora.server.settings import InputLimits, ServerSettings
from opensora.server.worker import Worker

pytestmark = pytest.mark.slow


def test_what_is_too_large_is_found_before_it_is_made(tmp_path: Path) -> None:
    limits = InputLimits(pixels=64 * 64, clip_pixels=64 * 64 * 17)
    api = Api(ServerSettings(tmp_path / "server", inputs=limits))
    client, steps = api.client(), {"prompt": PROMPT, "num_inference_steps": "1"}
    fits = client.post("/v1/videos", data=steps, files={"image": picture((64, 64))}).json()["id"]
    picture_id = client.post("/v1/videos", data=steps, files={"image": picture((65, 64))}).json()["id"]
    # The API does not know what a named resolution comes to.
    clip_id = client.post("/v1/videos", json={"prompt": PROMPT, "resolution": "144p"}).json()["id"]
    stopped = threading.Event()
    maker = ClipMaker.of(ChildSettings(api.settings, "w"))
    worker = Worker("w", api.store, api.folder, maker, api.settings, stopped)
    while api.store.queue():
        job = api.store.claim("w", 30.0)
        assert job is not None
        worker.work(job)
    states = {video["id"]: (video["state"], video["error"]) for video in client.get("/v1/videos").json()["data"]}
    assert states[fits] == ("completed", None)
    for job_id, words in ((picture_id, "`image`"), (clip_id, "expected at most 69,632")):
        state, error = states[job_id]
        assert (state, error["code"]) == ("failed", "invalid_request") and words in error["message"]
        assert str(tmp_path) not in error["message"]
