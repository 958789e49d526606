"""Asking for a clip over HTTP: in JSON and in forms, by OpenAI's names and ours."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from server.api_server import OTHER_PROMPT, PROMPT, Api, clip, error_of, picture
from starlette.testclient import TestClient

from opensora.generation.request import ClipRequest
from opensora.sampling.forecast_plan import ForecastPlan
from opensora.server.jobs import QueueLimits
from opensora.server.settings import InputLimits, ServerSettings

IMPORTS_NO_TORCH = """
import sys, tempfile
from pathlib import Path
from starlette.testclient import TestClient
from opensora.server.app import create_app
from opensora.server.settings import ServerSettings
from opensora.server.store import store_of

settings = ServerSettings(Path(tempfile.mkdtemp()))
client = TestClient(create_app(settings, store_of(settings)), base_url="http://localhost")
answer = client.post("/v1/videos", json={"prompt": "a red ball rolls left over the grass", "latent_space": 0.2})
assert answer.status_code == 200, answer.text
assert "torch" not in sys.modules, "torch was imported"
"""


def asked_for(api: Api, response) -> ClipRequest:
    assert response.status_code == 200, response.text
    job = api.store.get(response.json()["id"])
    assert job is not None
    return job.request


@pytest.mark.multi
def test_taking_a_job_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS_NO_TORCH], check=True)


def test_openai_names_are_understood(api: Api, client: TestClient) -> None:
    body = {"prompt": PROMPT, "model": "toybox", "seconds": "2", "size": "96x64"}
    form = {name: (None, value) for name, value in body.items()}
    for answer in (client.post("/v1/videos", json=body), client.post("/v1/videos", files=form)):
        request = asked_for(api, answer)
        assert (request.prompt, request.model, request.num_frames) == (PROMPT, "toybox", "2s")
        assert (request.width, request.height) == (96, 64)
        video = answer.json()
        assert (video["object"], video["status"], video["progress"], video["error"]) == ("video", "queued", 0, None)
        assert (video["size"], video["seconds"], video["model"], video["prompt"]) == ("96x64", "2", "toybox", PROMPT)


def test_what_is_left_out_is_the_models_own(api: Api, client: TestClient) -> None:
    video = client.post("/v1/videos", json={"prompt": PROMPT}).json()
    assert (video["size"], video["seconds"], video["model"]) == ("64x64", "2.125", "toybox")
    assert asked_for(api, client.post("/v1/videos", json={"prompt": PROMPT})) == ClipRequest(PROMPT, model="toybox")


def test_fields_of_a_form_are_read_by_their_type(api: Api, client: TestClient) -> None:
    form = {
        "prompt": (None, PROMPT),
        "seed": (None, "7"),
        "num_frames": (None, "17"),
        "num_inference_steps": (None, "ddim50"),
        "guidance_scale": (None, "3"),
        "backwards": (None, "false"),
        "negative_prompt": (None, ""),
        "cfg_channels[]": (None, "0"),
        "scores[flow]": (None, "0.5"),
        "scores[aesthetic]": (None, ""),
        "forecast": (None, '{"steps": "all none all"}'),
        "priority": (None, "-2"),
        "format": (None, "webm"),
    }
    answer = client.post("/v1/videos", files=form)
    request = asked_for(api, answer)
    assert request == ClipRequest(
        PROMPT,
        seed=7,
        model="toybox",
        num_frames=17,
        num_inference_steps="ddim50",
        guidance_scale=3.0,
        cfg_channels=[0],
        scores={"flow": 0.5, "aesthetic": None},
        forecast=ForecastPlan("all none all"),
    )
    assert (answer.json()["format"], answer.json()["priority"]) == ("webm", -2)


def test_json_and_form_are_the_same_request(api: Api, client: TestClient) -> None:
    fields = {"seed": 3, "height": 64, "width": 64, "fps": 8.0, "guider": "apg", "loop": 2, "time_shift": 1.5}
    as_json = asked_for(api, client.post("/v1/videos", json={"prompt": PROMPT, **fields}))
    form = {name: (None, str(value)) for name, value in {"prompt": PROMPT, **fields}.items()}
    assert asked_for(api, client.post("/v1/videos", files=form)) == as_json


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"sed": 1}, "sed", "did you mean seed?"),
        ({"device": "cuda:0"}, "device", "the server's to choose"),
        ({"components": {"transformer": "/etc"}}, "components", "the server's to choose"),
        ({"adapters": [{"path": "/etc"}]}, "adapters", "the server's to choose"),
        ({"calibration": "/etc/passwd"}, "calibration", "the server's to choose"),
        ({"model": "sora-2"}, "model", "this server has toybox"),
        ({"seed": "seven"}, "seed", "expected int"),
        ({"seed": -1}, "seed", "expected a number from 0"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x64", "width": 64}, "width", "two ways"),
        ({"seconds": "four"}, "seconds", "expected a number of seconds"),
        ({"seconds": "4", "num_frames": 17}, "num_frames", "two ways"),
        ({"format": "avi"}, "format", "known:"),
        ({"format": "frames"}, "format", "known:"),
        ({"priority": 99}, "priority", "expected -10 to 10"),
        ({"guidance_scale": -1}, "guidance_scale", "expected 0 or more"),
        ({"strength": 0.5}, "strength", "give the clip as `edit`"),
        ({"image": "/etc/passwd"}, "image", "expected a file of a form"),
        ({"reference_path": ["a.png"]}, "reference_path", "expected a file of a form"),
        ({"height": 4000, "width": 4000, "num_frames": 170}, None, "pixels, expected at most"),
        ({"seconds": "999999"}, None, "pixels, expected at most"),
    ],
)
def test_what_cannot_be_is_said_at_once(client: TestClient, fields: dict, param: str | None, words: str) -> None:
    answer = client.post("/v1/videos", json={"prompt": PROMPT, **fields})
    status, code, message = error_of(answer)
    assert (status, code) == (400, "invalid_request") and words in message
    assert param is None or answer.json()["error"]["param"] == param
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": 1}', b"{}", b'{"prompt": " "}', b'{"prompt":"\xff"}'])
def test_bodies_that_are_none(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert error_of(answer)[:2] == (400, "invalid_request")


def test_other_kinds_of_bodies_are_named(client: TestClient) -> None:
    answer = client.post("/v1/videos", data={"prompt": PROMPT})
    assert error_of(answer)[:2] == (415, "unsupported_media_type")


def test_words_that_a_bundled_model_does_not_know(client: TestClient) -> None:
    status, _, message = error_of(client.post("/v1/videos", json={"prompt": "a zebra rolls left"}))
    assert status == 400 and "does not know: zebra" in message


def test_a_prompt_may_not_be_endless(tmp_path: Path) -> None:
    api = Api(ServerSettings(tmp_path, inputs=InputLimits(prompt_characters=40)))
    for name in ("prompt", "negative_prompt", "refined_prompt"):
        body = {"prompt": PROMPT, name: "ball " * 9}
        status, _, message = error_of(api.client().post("/v1/videos", json=body))
        assert status == 400 and f"`{name}` has 45 characters" in message


def test_files_that_are_sent_are_the_jobs_own(api: Api, client: TestClient) -> None:
    answer = client.post(
        "/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("../../../evil.png", picture())}
    )
    request = asked_for(api, answer)
    name = f"inputs/{answer.json()['id']}/{hashlib.sha256(picture()).hexdigest()[:32]}.image"
    assert request.image == Path(name) and api.files() == {name}
    assert (api.folder.path / name).read_bytes() == picture()
    assert answer.json()["inputs"] == ["image"] and "evil" not in answer.text and "inputs/" not in answer.text


def test_several_references(api: Api, client: TestClient, tmp_path: Path) -> None:
    files = [("reference_path", ("a", picture())), ("reference_path", ("b", clip(tmp_path)))]
    data = {"prompt": PROMPT, "mask_strategy": "0;0,1,0,-1,1"}
    request = asked_for(api, client.post("/v1/videos", data=data, files=files))
    assert [path.suffix for path in request.reference_path] == [".image", ".video"]


def test_a_file_that_is_neither_picture_nor_video(api: Api, client: TestClient) -> None:
    answer = client.post("/v1/videos", data={"prompt": PROMPT}, files={"image": ("a.png", b"PK\x03\x04 and so on")})
    status, code, message = error_of(answer)
    assert (status, code) == (415, "unsupported_file") and "`image` is a zip archive" in message
    assert api.files() == set()


def test_the_same_request_with_its_key_is_the_same_job(api: Api, client: TestClient) -> None:
    def send(prompt: str, seen: bytes) -> object:
        return client.post(
            "/v1/videos", data={"prompt": prompt}, files={"image": seen}, headers={"Idempotency-Key": "k1"}
        )

    first, again = send(PROMPT, picture()), send(PROMPT, picture())
    assert again.status_code == 200 and again.json() == first.json()
    assert len(api.store.jobs()) == 1 and len(api.files()) == 1
    for other in (send(OTHER_PROMPT, picture()), send(PROMPT, picture((8, 8)))):
        assert error_of(other)[:2] == (409, "idempotency_key_used")
        assert other.headers["x-should-retry"] == "false"
    assert len(api.store.jobs()) == 1 and len(api.files()) == 1


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    api = Api(ServerSettings(tmp_path, queue=QueueLimits(most_waiting=2)))
    client = api.client()
    answers = [client.post("/v1/videos", data={"prompt": PROMPT}, files={"image": picture()}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert error_of(answers[2])[1] == "queue_full" and int(answers[2].headers["retry-after"]) > 0
    assert len(api.files()) == 2


def test_what_comes_back_is_asked_for_again(api: Api, client: TestClient) -> None:
    """`request` of a video holds all that makes another one like it."""
    fields = {"seed": 7, "num_frames": "2s", "scores": {"flow": 0.5}, "channel_scales": "0-2:7,3:1"}
    video = client.post("/v1/videos", json={"prompt": PROMPT, **fields}).json()
    assert video["request"] == fields
    again = client.post("/v1/videos", json={"prompt": PROMPT, **video["request"]})
    assert asked_for(api, again) == api.store.get(video["id"]).request
