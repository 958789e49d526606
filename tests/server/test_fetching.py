"""Files that a request names by URL: from hosts that the operator named, at public addresses, and no further."""

import base64
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from server.api_server import PROMPT, Api, error_of, picture

from opensora.errors import OpenSoraError
from opensora.server.http import fetching
from opensora.server.http.fetching import Fetcher
from opensora.server.service import TooLarge
from opensora.server.settings import InputLimits, ServerSettings

PUBLIC = "93.184.215.14"
URL = "https://pictures.example/cat.png?size=8"
Answer = Callable[[httpx.Request], httpx.Response]


def fetcher(folder: Path, answer: Answer, *addresses: str, clip_bytes: int = 10_000) -> Fetcher:
    return Fetcher(
        folder,
        ("pictures.example",),
        InputLimits(clip_bytes=clip_bytes),
        addresses=lambda _: list(addresses or (PUBLIC,)),
        transport=httpx.MockTransport(answer),
    )


def refuse(request: httpx.Request) -> httpx.Response:
    pytest.fail(f"{request.url} was asked for")


def test_the_address_that_was_checked_is_asked_and_no_other(tmp_path: Path) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=iter([picture()]))

    path = fetcher(tmp_path, answer).fetch(URL, "image")
    assert path.read_bytes() == picture() and path.parent == tmp_path
    (request,) = asked
    assert (request.url.host, request.url.raw_path) == (PUBLIC, b"/cat.png?size=8")
    assert request.headers["host"] == request.extensions["sni_hostname"] == "pictures.example"


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/cat.png",
        "https://pictures.example.evil.example/cat.png",
        "https://pictures.example@evil.example/cat.png",
        "https://evil.example#@pictures.example/cat.png",
        "https://evil.example\\@pictures.example/cat.png",
        "https://user:word@pictures.example/cat.png",
        "https://pictures.example:8443/cat.png",
        "http://pictures.example/cat.png",
        "https://127.0.0.1/cat.png",
        "https://[::1]/cat.png",
        "https://[/cat.png",
        "https://pictures.example:port/cat.png",
        "https://",
        "file:///etc/passwd",
        "ftp://pictures.example/cat.png",
    ],
)
def test_urls_that_are_not_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(OpenSoraError, match="`image`"):
        fetcher(tmp_path, refuse).fetch(url, "image")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::", "fe80::1%eth0"),
    ],
)
def test_a_host_that_is_not_public(tmp_path: Path, address: str) -> None:
    for addresses in ((address,), (PUBLIC, address)):
        with pytest.raises(OpenSoraError, match="no public address"):
            fetcher(tmp_path, refuse, *addresses).fetch(URL, "image")


def test_a_host_that_is_not_found(tmp_path: Path) -> None:
    def lost(_: str) -> list[str]:
        raise OSError("no such host")

    with pytest.raises(OpenSoraError, match="was not found"):
        Fetcher(tmp_path, ("pictures.example",), InputLimits(), addresses=lost).fetch(URL, "image")


@pytest.mark.parametrize("status", [301, 302, 307, 404, 500])
def test_redirects_and_errors_are_not_followed(tmp_path: Path, status: int) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers={"location": "https://127.0.0.1/"})

    with pytest.raises(OpenSoraError, match=f"answered {status}"):
        fetcher(tmp_path, answer).fetch(URL, "image")


def test_more_than_may_come(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=(bytes(1_000) for _ in range(10**6)))

    with pytest.raises(TooLarge):
        fetcher(tmp_path, answer).fetch(URL, "image")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000


def test_what_comes_too_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FETCH_S", -1.0)
    with pytest.raises(OpenSoraError, match="did not arrive"):
        fetcher(tmp_path, lambda _: httpx.Response(200, content=iter([bytes(10)]))).fetch(URL, "image")


def test_a_host_that_does_not_answer(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("secret details")

    with pytest.raises(OpenSoraError, match=r"cannot be fetched from pictures\.example: ConnectTimeout"):
        fetcher(tmp_path, answer).fetch(URL, "image")


def test_nothing_is_fetched_unless_the_operator_said_so(api: Api) -> None:
    client = api.client()
    for body in ({"image": URL}, {"input_reference": {"image_url": URL}}, {"extend": URL}, {"reference_path": [URL]}):
        status, code, message = error_of(client.post("/v1/videos", json={"prompt": PROMPT, **body}))
        assert (status, code) == (400, "invalid_request") and "does not fetch from" in message


def test_a_picture_may_be_in_its_url(api: Api) -> None:
    data = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    client = api.client()
    for sent in (
        {"json": {"prompt": PROMPT, "input_reference": {"image_url": data}}},
        {"json": {"prompt": PROMPT, "image": data}},
        {"files": {"prompt": (None, PROMPT), "input_reference[image_url]": (None, data)}},
    ):
        answer = client.post("/v1/videos", **sent)
        assert answer.status_code == 200 and answer.json()["inputs"] == ["image"]
        request = api.folder.rooted(api.store.get(answer.json()["id"]).request)
        assert request.image.read_bytes() == picture()
    for wrong in (
        "data:image/png;base64,@@@",
        "data:image/png,abc",
        "data:",
        "data:;base64",
        {"file_id": "f"},
        "a.png",
    ):
        answer = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": wrong})
        assert error_of(answer)[0] == 400


def test_what_is_fetched_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(ServerSettings(tmp_path, fetch_hosts=("pictures.example",)))
    monkeypatch.setattr(Fetcher, "_public_address", lambda *_: PUBLIC)
    answers = iter((picture(), b"<html>", picture()))
    monkeypatch.setattr(
        httpx.HTTPTransport, "handle_request", lambda *_: httpx.Response(200, content=iter([next(answers)]))
    )
    client = api.client()
    assert client.post("/v1/videos", json={"prompt": PROMPT, "image": URL}).json()["inputs"] == ["image"]
    assert error_of(client.post("/v1/videos", json={"prompt": PROMPT, "image": URL}))[:2] == (415, "unsupported_file")
    assert len(api.files()) == 1
