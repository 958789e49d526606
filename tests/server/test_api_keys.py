"""Keys: who may ask, and whose videos they see."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from server.api_server import OTHER_PROMPT, PROMPT, Api, error_of, picture

from opensora.server.jobs import QueueLimits
from opensora.server.settings import Key, ServerSettings

ADA, BOB = Key("ada", "a" * 24), Key("bob", "b" * 24)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Api]:
    api = Api(ServerSettings(tmp_path / "server", keys=(ADA, BOB), queue=QueueLimits(most_of_owner=2)))
    yield api
    api.store.close()


@pytest.mark.parametrize("secret", [None, "", "c" * 24, "a" * 23, "a" * 25, "ä", "ada"])
def test_without_a_key_nothing_is_told(keyed: Api, secret: str | None) -> None:
    client = keyed.client()
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}".encode()}
    for answer in (
        client.post("/v1/videos", json={"prompt": PROMPT}, headers=headers),
        client.get("/v1/videos", headers=headers),
        client.get("/v1/queue", headers=headers),
        client.get("/v1/models", headers=headers),
        client.get("/v1/events", headers=headers),
        client.get("/metrics", headers=headers),
    ):
        assert error_of(answer)[:2] == (401, "invalid_api_key") and answer.headers["www-authenticate"] == "Bearer"
    assert keyed.store.jobs() == []
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_every_key_sees_its_own(keyed: Api) -> None:
    ada, bob = keyed.client(ADA.secret), keyed.client(BOB.secret)
    video_id = ada.post("/v1/videos", data={"prompt": PROMPT}, files={"image": picture()}).json()["id"]
    bobs = bob.post("/v1/videos", json={"prompt": OTHER_PROMPT}).json()["id"]
    assert [video["id"] for video in ada.get("/v1/videos").json()["data"]] == [video_id]
    assert [video["id"] for video in bob.get("/v1/videos").json()["data"]] == [bobs]
    queue = bob.get("/v1/queue").json()
    assert [(entry["place"], entry["video"]["id"]) for entry in queue["data"]] == [(1, bobs)]
    address = f"/v1/videos/{video_id}"

    def try_all() -> None:
        for answer in (
            bob.get(address),
            bob.get(f"{address}/content"),
            bob.get(f"{address}/preview"),
            bob.delete(address),
            *(bob.post(f"{address}/{action}") for action in ("cancel", "retry", "hold", "release")),
            *(bob.post(f"{address}/{action}", json={"prompt": PROMPT}) for action in ("remix", "extend", "edit")),
            bob.post(f"{address}/priority", json={"priority": -1}),
            bob.post(f"{address}/move", json={"before": None}),
            bob.post(f"/v1/videos/{bobs}/move", json={"before": video_id}),
            bob.post("/v1/videos/edits", json={"prompt": PROMPT, "video": {"id": video_id}}),
            bob.get("/v1/videos", params={"after": video_id}),
        ):
            assert error_of(answer)[:2] == (404, "not_found"), answer.request.url

    before = keyed.store.get(video_id)
    try_all()
    assert keyed.store.get(video_id) == before
    keyed.finish(keyed.begin())
    before = keyed.store.get(video_id)
    try_all()
    assert keyed.store.get(video_id) == before and ada.get(f"{address}/content").status_code == 200


def test_idempotency_keys_are_each_owners(keyed: Api) -> None:
    ids = {
        keyed.client(key.secret)
        .post("/v1/videos", json={"prompt": PROMPT}, headers={"Idempotency-Key": "1"})
        .json()["id"]
        for key in (ADA, BOB)
    }
    assert len(ids) == 2


def test_every_key_has_its_share_of_the_queue(keyed: Api) -> None:
    ada, bob = keyed.client(ADA.secret), keyed.client(BOB.secret)
    assert [ada.post("/v1/videos", json={"prompt": PROMPT}).status_code for _ in range(3)] == [200, 200, 429]
    assert bob.post("/v1/videos", json={"prompt": PROMPT}).status_code == 200


def test_the_queue_of_all_is_the_operators(keyed: Api) -> None:
    ada, bob = keyed.client(ADA.secret), keyed.client(BOB.secret)
    bobs = bob.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    for answer in (
        bob.post("/v1/queue/pause"),
        bob.post("/v1/videos", json={"prompt": PROMPT, "priority": 1}),
        bob.post(f"/v1/videos/{bobs}/priority", json={"priority": 1}),
    ):
        assert error_of(answer)[:2] == (403, "not_allowed")
    assert bob.post(f"/v1/videos/{bobs}/priority", json={"priority": -1}).status_code == 200
    assert ada.post("/v1/queue/pause").json()["is_paused"] and keyed.store.head()[1]
    assert ada.post("/v1/videos", json={"prompt": PROMPT, "priority": 1}).status_code == 200


def test_the_secret_is_never_told(keyed: Api) -> None:
    assert ADA.secret not in repr(keyed.settings)
    answer = keyed.client(ADA.secret).post("/v1/videos", json={"prompt": PROMPT})
    assert ADA.secret not in answer.text and ADA.secret not in str(answer.headers)
