"""Whether the server can work, its figures, and its documents."""

import re
from pathlib import Path

import pytest
from server.api_server import PROMPT, Api, error_of
from starlette.testclient import TestClient

from opensora.server.database import StoreAway
from opensora.server.settings import Key, ServerSettings


def test_a_server_that_can_work_says_so(client: TestClient) -> None:
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}


def test_a_store_that_is_away(api: Api, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreAway("the database does not answer: connection refused")

    for name in ("head", "jobs", "get", "add", "summary"):
        monkeypatch.setattr(api.store, name, away)
    for answer in (client.get("/readyz"), client.get("/v1/videos"), client.post("/v1/videos", json={"prompt": PROMPT})):
        assert error_of(answer)[:2] == (503, "store_away") and int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200


def test_a_mistake_of_ours_is_told_without_its_words(
    api: Api, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.store, "jobs", lambda **_: 1 / 0)
    status, code, message = error_of(client.get("/v1/videos"))
    assert (status, code) == (500, "internal_error") and "division" not in message


def test_figures(api: Api, client: TestClient) -> None:
    video_id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    for address in (f"/v1/videos/{video_id}", "/v1/videos/other", "/nothing/here"):
        client.get(address)
    api.begin()
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'opensora_jobs{state="queued"} 0.0' in lines and 'opensora_jobs{state="in_progress"} 1.0' in lines
    assert 'opensora_requests_total{method="GET",route="/v1/videos/{video_id}",status="200"} 1.0' in lines
    assert 'opensora_requests_total{method="GET",route="/v1/videos/{video_id}",status="404"} 1.0' in lines
    assert 'opensora_requests_total{method="GET",route="other",status="404"} 1.0' in lines
    assert video_id not in answer.text


def test_models(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["toybox"]
    assert models["data"][0]["defaults"]["height"] == 64


def test_addresses_and_methods_that_there_are_not(client: TestClient) -> None:
    assert error_of(client.get("/v2/videos"))[:2] == (404, "not_found")
    answer = client.put("/v1/videos")
    assert error_of(answer)[:2] == (405, "method_not_allowed") and answer.headers["allow"] == "GET, POST"


def test_every_answer_is_documented(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    create = document["paths"]["/v1/videos"]["post"]
    assert set(create["responses"]) >= {"200", "400", "401", "403", "408", "409", "413", "415", "429", "500", "503"}
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    fields = create["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "seconds", "size", "seed", "scores", "format"} <= set(fields) and "device" not in fields
    for path, methods in document["paths"].items():
        for method, endpoint in methods.items():
            assert endpoint["description"] and "422" not in endpoint["responses"], (path, method)
            assert "security" not in endpoint  # without keys


def test_keys_are_documented_where_there_are_some(tmp_path: Path) -> None:
    keyed = Api(ServerSettings(tmp_path, keys=(Key("ada", "a" * 24),))).client()
    paths = keyed.get("/openapi.json").json()["paths"]
    assert paths["/v1/videos"]["post"]["security"] and "security" not in paths["/healthz"]["get"]


def test_a_page_shows_the_document_without_the_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "/openapi.json" in page and "https://" not in page
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(address).status_code == 200
