"""Looking after videos over HTTP, and what is made of those that are there."""

import json

import pytest
from server.api_server import OTHER_PROMPT, PROMPT, Api, clip, error_of, picture
from starlette.testclient import TestClient

from opensora.server.jobs import JobError
from opensora.server.store import new_id


def ask(client: TestClient, prompt: str = PROMPT, **fields) -> str:
    answer = client.post("/v1/videos", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_a_video_tells_how_far_it_is(api: Api, client: TestClient) -> None:
    video_id = ask(client)
    waiting = client.get(f"/v1/videos/{video_id}")
    assert waiting.json()["status"] == "queued" and int(waiting.headers["openai-poll-after-ms"]) > 0
    job = api.begin()
    running = client.get(f"/v1/videos/{video_id}")
    assert (running.json()["status"], running.json()["progress"]) == ("in_progress", 50)
    assert running.json()["progress_details"]["stage"] == "denoising"
    assert int(running.headers["openai-poll-after-ms"]) > 0
    preview = client.get(running.json()["links"]["preview"])
    assert preview.headers["content-type"] == "image/webp" and preview.content[8:12] == b"WEBP"
    api.finish(job)
    done = client.get(f"/v1/videos/{video_id}")
    video = done.json()
    assert (video["status"], video["progress"], video["seconds"], video["size"]) == ("completed", 100, "0.625", "32x32")
    assert video["result"]["num_frames"] == 5 and video["completed_at"] and "openai-poll-after-ms" not in done.headers
    assert set(video["links"]) == {"self", "content", "thumbnail", "spritesheet", "channels", "metadata"}
    assert all(client.get(link).status_code == 200 for link in video["links"].values())


def test_what_failed_says_why(api: Api, client: TestClient) -> None:
    video_id = ask(client)
    api.store.fail(api.begin(), JobError("invalid_request", "`height` is 65"))
    video = client.get(f"/v1/videos/{video_id}").json()
    assert (video["status"], video["state"]) == ("failed", "failed")
    assert video["error"] == {"code": "invalid_request", "message": "`height` is 65"}


def test_files_of_a_clip(api: Api, client: TestClient) -> None:
    video_id = ask(client)
    assert error_of(client.get(f"/v1/videos/{video_id}/content"))[:2] == (409, "video_not_ready")
    assert error_of(client.get(f"/v1/videos/{video_id}/preview"))[:2] == (409, "video_not_ready")
    api.make_all()
    whole = client.get(f"/v1/videos/{video_id}/content")
    assert whole.headers["content-type"] == "video/mp4" and whole.content[4:8] == b"ftyp"
    assert whole.headers["content-disposition"].startswith("inline")
    for variant, kind in (("thumbnail", "image/webp"), ("spritesheet", "image/jpeg"), ("metadata", "application/json")):
        answer = client.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert json.loads(answer.content) == {"prompt": PROMPT}
    assert error_of(client.get(f"/v1/videos/{video_id}/content?variant=sound"))[:2] == (400, "invalid_request")


@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "mkv", "gif", "webp", "png"])
def test_every_format_is_told(api: Api, client: TestClient, format: str) -> None:
    video_id = ask(client, format=format)
    api.make_all()
    answer = client.get(f"/v1/videos/{video_id}/content")
    kinds = {"mov": "video/quicktime", "mkv": "video/matroska"}
    kind = kinds.get(format, f"{'image' if format in ('gif', 'webp', 'png') else 'video'}/{format}")
    assert answer.headers["content-type"] == kind and f".{format}" in answer.headers["content-disposition"]


def test_bytes_of_a_clip(api: Api, client: TestClient) -> None:
    video_id = ask(client)
    api.make_all()
    address = f"/v1/videos/{video_id}/content"
    whole = client.get(address)
    part = client.get(address, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    same = client.get(address, headers={"Range": "bytes=10-19", "If-Range": whole.headers["etag"]})
    other = client.get(address, headers={"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (same.status_code, other.status_code) == (206, 200)
    beyond = client.get(address, headers={"Range": "bytes=99999999-"})
    assert error_of(beyond)[:2] == (416, "invalid_range")
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert error_of(client.get(address, headers={"Range": "lines=1-2"}))[:2] == (400, "invalid_range")


def test_videos_are_listed_page_by_page(api: Api, client: TestClient) -> None:
    ids = [ask(client, seed=seed) for seed in range(5)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == ids[:2:-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    rest = client.get("/v1/videos", params={"limit": 3, "after": page["last_id"]}).json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1] and not rest["has_more"]
    oldest = client.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
    assert oldest["data"][0]["id"] == ids[0]
    client.post(f"/v1/videos/{ids[1]}/cancel")
    cancelled = client.get("/v1/videos", params={"state": ["cancelled", "failed"]}).json()
    assert [video["id"] for video in cancelled["data"]] == [ids[1]]
    assert error_of(client.get("/v1/videos", params={"after": new_id()}))[:2] == (404, "not_found")
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"state": "lost"}):
        assert error_of(client.get("/v1/videos", params=wrong))[0] == 400


def test_what_is_cancelled_can_be_tried_again(api: Api, client: TestClient) -> None:
    video_id, other_id = ask(client), ask(client)
    api.begin()
    video = client.post(f"/v1/videos/{video_id}/cancel").json()
    assert (video["status"], video["state"], video["error"]["code"]) == ("failed", "cancelled", "cancelled")
    assert client.get(f"/v1/videos/{other_id}").json()["status"] == "queued"
    assert client.post(f"/v1/videos/{video_id}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/videos/{video_id}/retry").json()["state"] == "queued"
    status, code, message = error_of(client.post(f"/v1/videos/{video_id}/retry"))
    assert (status, code) == (409, "not_possible") and "the job is queued" in message
    api.make_all()
    assert client.post(f"/v1/videos/{video_id}/cancel").json()["state"] == "completed"


def test_what_is_deleted_leaves_nothing(api: Api, client: TestClient) -> None:
    answer = client.post("/v1/videos", data={"prompt": PROMPT}, files={"image": picture()})
    video_id = answer.json()["id"]
    api.make_all()
    assert len(api.files()) == 7
    gone = client.delete(f"/v1/videos/{video_id}")
    assert gone.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    assert api.files() == set()
    for answer in (client.get(f"/v1/videos/{video_id}"), client.delete(f"/v1/videos/{video_id}")):
        assert error_of(answer)[:2] == (404, "not_found")


def test_the_order_of_the_queue(api: Api, client: TestClient) -> None:
    a, b, c = (ask(client, seed=seed) for seed in range(3))

    def order() -> list[str]:
        return [entry["video"]["id"] for entry in client.get("/v1/queue").json()["data"]]

    assert order() == [a, b, c]
    assert client.post(f"/v1/videos/{c}/move", json={"before": a}).status_code == 200
    assert order() == [c, a, b]
    assert client.post(f"/v1/videos/{c}/move", json={"before": None}).status_code == 200
    assert order() == [a, b, c]
    assert client.post(f"/v1/videos/{b}/priority", json={"priority": 5}).json()["priority"] == 5
    assert order() == [b, a, c]
    assert client.post(f"/v1/videos/{b}/hold").json()["is_held"] is True
    assert api.begin().id == a
    assert client.post(f"/v1/videos/{b}/release").json()["is_held"] is False
    assert order() == [a, b, c] and client.get("/v1/queue").json()["num_waiting"] == 3
    for answer in (
        client.post(f"/v1/videos/{a}/hold"),
        client.post(f"/v1/videos/{a}/priority", json={"priority": 1}),
        client.post(f"/v1/videos/{c}/move", json={"before": a}),
    ):
        assert error_of(answer)[:2] == (409, "not_possible")
    assert error_of(client.post(f"/v1/videos/{c}/move", json={"before": new_id()}))[0] == 404
    assert error_of(client.post(f"/v1/videos/{c}/move", json={"ahead": a}))[0] == 400
    assert error_of(client.post(f"/v1/videos/{c}/move", json={}))[0] == 400
    assert error_of(client.post(f"/v1/videos/{c}/priority", json={"priority": "high"}))[0] == 400


def test_the_queue_pauses(api: Api, client: TestClient) -> None:
    ask(client)
    assert client.post("/v1/queue/pause").json()["is_paused"] is True
    assert api.store.claim("w", 30.0) is None and client.get("/v1/queue").json()["is_paused"] is True
    assert client.post("/v1/queue/resume").json()["is_paused"] is False
    assert api.store.claim("w", 30.0) is not None


def test_a_remix_is_the_same_with_another_prompt(api: Api, client: TestClient) -> None:
    sent = {"prompt": PROMPT, "seed": "7", "format": "webm"}
    parent = client.post("/v1/videos", data=sent, files={"image": picture()}).json()
    remix = client.post(f"/v1/videos/{parent['id']}/remix", json={"prompt": OTHER_PROMPT}).json()
    assert (remix["kind"], remix["parent"], remix["remixed_from_video_id"]) == ("remix", parent["id"], parent["id"])
    assert (remix["prompt"], remix["request"], remix["format"]) == (OTHER_PROMPT, parent["request"], "webm")
    client.delete(f"/v1/videos/{parent['id']}")
    request = api.folder.rooted(api.store.get(remix["id"]).request)
    assert request.image.read_bytes() == picture()
    changed = client.post(f"/v1/videos/{remix['id']}/remix", json={"prompt": PROMPT, "seed": 8, "format": "gif"}).json()
    assert (changed["request"], changed["format"], changed["inputs"]) == ({"seed": 8}, "gif", ["image"])
    refined = {"prompt": PROMPT, "refined_prompt": OTHER_PROMPT}
    again = client.post(f"/v1/videos/{remix['id']}/remix", json=refined).json()
    assert again["request"] == {"seed": 7, "refined_prompt": OTHER_PROMPT}
    last = client.post(f"/v1/videos/{again['id']}/remix", json={"prompt": PROMPT}).json()
    assert last["request"] == {"seed": 7}
    assert error_of(client.post(f"/v1/videos/{remix['id']}/remix", json={}))[0] == 400


@pytest.mark.parametrize("kind", ["extend", "edit"])
def test_a_clip_goes_on_or_is_edited(api: Api, client: TestClient, kind: str) -> None:
    sent = {"prompt": PROMPT, "seed": "7", "loop": "2"}
    parent = client.post("/v1/videos", data=sent, files={"image": picture()}).json()["id"]
    address = f"/v1/videos/{parent}/{kind}"
    assert error_of(client.post(address, json={"prompt": OTHER_PROMPT}))[:2] == (409, "video_not_ready")
    api.make_all()
    whole = client.get(f"/v1/videos/{parent}/content").content
    plural = {"extend": "extensions", "edit": "edits"}[kind]
    by_path = client.post(address, json={"prompt": OTHER_PROMPT})
    by_id = client.post(f"/v1/videos/{plural}", json={"prompt": OTHER_PROMPT, "video": {"id": parent}})
    as_form = {"prompt": (None, OTHER_PROMPT), "video[id]": (None, parent)}
    by_form = client.post(f"/v1/videos/{plural}", files=as_form)
    by_file = client.post(
        f"/v1/videos/{plural}", data={"prompt": OTHER_PROMPT, "seed": "7"}, files={"video": ("a.mp4", whole)}
    )
    client.delete(f"/v1/videos/{parent}")
    for answer in (by_path, by_id, by_form, by_file):
        assert answer.status_code == 200, answer.text
        video = answer.json()
        assert (video["kind"], video["inputs"], video["request"]["seed"]) == (kind, [kind], 7)
        assert (video["parent"], video["remixed_from_video_id"]) == (None if answer is by_file else parent, None)
        request = api.folder.rooted(api.store.get(video["id"]).request)
        assert getattr(request, kind).read_bytes() == whole and request.loop is None
        assert (request.strength is not None) == (kind == "edit")
    missing = client.post(f"/v1/videos/{plural}", json={"prompt": PROMPT})
    assert error_of(missing)[0] == 400 and "`video` is missing" in error_of(missing)[2]


def test_a_video_that_is_sent_is_no_picture(client: TestClient, tmp_path) -> None:
    answer = client.post("/v1/videos", data={"prompt": PROMPT}, files={"video": clip(tmp_path)})
    assert error_of(answer)[0] == 400 and "unknown field `video`" in error_of(answer)[2]


@pytest.mark.parametrize(
    "video_id", ["video_" + "0" * 32, "video_1", "..", "%00", "%2e%2e%2fetc", "a" * 500, "extensions"]
)
def test_videos_that_there_are_not(client: TestClient, video_id: str) -> None:
    answer = client.get(f"/v1/videos/{video_id}/content")
    assert answer.status_code == 404 and error_of(answer)[1] == "not_found"
    for action in ("cancel", "retry", "hold", "release"):
        assert error_of(client.post(f"/v1/videos/{video_id}/{action}"))[0] == 404
