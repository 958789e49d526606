"""What the API is sent by those who mean it no good: every one is answered, and nothing of it stays."""

import contextlib
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server.api_server import PROMPT, Api, clip, error_of, live, picture
from starlette.testclient import TestClient

from opensora.errors import OpenSoraError
from opensora.generation.inputs import InputFiles
from opensora.generation.request import ClipRequest
from opensora.server.settings import InputLimits, ServerSettings

LIMITS = InputLimits(
    image_bytes=2_000,
    clip_bytes=20_000,
    field_bytes=500,
    num_fields=8,
    num_files=2,
    body_bytes=30_000,
    head_s=0.5,
    body_s=0.5,
)
TIMEOUT_S = 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Api]:
    """A server that takes little."""
    api = Api(ServerSettings(tmp_path / "server", inputs=LIMITS))
    yield api
    api.store.close()


def nothing_is_left(api: Api) -> bool:
    return api.files() == set() and api.store.jobs() == [] and list(api.folder.uploads.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/etc/x.png", "..\\x.png", "x" * 4000 + ".png", "x\0.png", "%2e%2e%2fx.png", "~/.bashrc", ""],
)
def test_names_of_files_are_read_by_nobody(api: Api, client: TestClient, name: str) -> None:
    before = {path for path in api.folder.path.parent.rglob("*") if "sqlite" not in path.name}
    head = f'--b\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    prompt = f'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{PROMPT}\r\n'.encode()
    body = prompt + head + picture() + b"\r\n--b--\r\n"
    answer = client.post("/v1/videos", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200, answer.text
    after = {path for path in api.folder.path.parent.rglob("*") if "sqlite" not in path.name}
    own = api.folder.inputs_of(answer.json()["id"])
    assert {path.relative_to(own.parent).parts[0] for path in after - before} == {own.name}
    assert all(path.name == own.name or path.suffix == ".image" for path in after - before)


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT + ' {"reference_path": "/etc/passwd", "mask_strategy": "0"}',
        PROMPT + ' {"reference_path": "jobs.sqlite3"}',
        PROMPT + ' {"mask_strategy": "0"} {"reference_path": "/etc/passwd"}',
    ],
)
def test_a_prompt_names_no_files_of_the_server(api: Api, client: TestClient, prompt: str) -> None:
    assert error_of(client.post("/v1/videos", json={"prompt": prompt}))[0] == 400
    video_id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    assert error_of(client.post(f"/v1/videos/{video_id}/remix", json={"prompt": prompt}))[0] == 400
    assert len(api.store.jobs()) == 1


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7:8000", "[::2]", "", "a b"]
)
def test_other_names_of_this_machine(client: TestClient, host: str) -> None:
    for address in ("/v1/videos", "/healthz", "/docs", "/openapi.json"):
        assert error_of(client.get(address, headers={"Host": host}))[:2] == (403, "unknown_host")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "video.example"])
def test_names_that_are_known(tmp_path: Path, host: str) -> None:
    api = Api(ServerSettings(tmp_path, hosts=("video.example",)))
    assert api.client().get("/v1/videos", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "is_known"),
    [
        ("http://localhost:8000", True),
        ("https://video.example", True),
        ("http://localhost:3000", False),
        ("http://evil.example", False),
        ("http://video.example.evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
    ],
)
def test_pages_of_others(tmp_path: Path, origin: str, is_known: bool) -> None:
    api = Api(ServerSettings(tmp_path, hosts=("video.example",)))
    answer = api.client().post("/v1/videos", json={"prompt": PROMPT}, headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.status_code == 200 if is_known else error_of(answer)[:2] == (403, "unknown_origin")


def test_more_than_may_be_sent(small: Api, tmp_path: Path) -> None:
    client = small.client()
    long, many = "x" * 600, {f"a{number}": "1" for number in range(9)}
    noise = bytes(range(256)) * 100
    for answer in (
        client.post("/v1/videos", files={"prompt": (None, long)}),
        client.post("/v1/videos", data=many, files={"image": picture()}),
        client.post("/v1/videos", data={"prompt": PROMPT}, files=[("image", picture())] * 3),
        client.post("/v1/videos", data={"prompt": PROMPT}, files={"image": picture() + noise[:3000]}),
        client.post("/v1/videos", data={"prompt": PROMPT}, files={"extend": noise}),
        client.post("/v1/videos", data={"prompt": PROMPT}, files=[("image", noise[:1900]), ("extend", noise + noise)]),
        client.post("/v1/videos", content=b"{" + b" " * 4000, headers={"content-type": "application/json"}),
        # Its field may hold a clip, and this is none.
        client.post(
            "/v1/videos",
            data={"prompt": PROMPT, "mask_strategy": "0"},
            files={"reference_path": picture() + noise[:3000]},
        ),
    ):
        assert error_of(answer)[:2] == (413, "too_large")
        assert nothing_is_left(small)


@pytest.mark.parametrize(
    "body",
    [
        b"--b\r\n",
        b"no form at all",
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red ball',
        b"--b\r\nContent-Disposition: form-data\r\n\r\na red ball\r\n--b--\r\n",
        b"--b\r\n\r\na red ball\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na \xff ball\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red\0ball\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="prompt[a][b][c][d]"\r\n\r\na\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n' * 2 + b"--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="scores"\r\n\r\n1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="scores[a]"\r\n\r\n1\r\n--b--\r\n',
        b"--b\r\n" + b"X: " + b"x" * 20_000 + b"\r\n\r\n\r\n--b--\r\n",
        b"--b\r\n" + b"X: x\r\n" * 2_000 + b"\r\n\r\n--b--\r\n",
    ],
)
def test_forms_that_are_none(small: Api, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert error_of(small.client().post("/v1/videos", content=body, headers=headers))[:2] == (400, "invalid_request")
    assert nothing_is_left(small)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 5000, '; boundary="'])
def test_forms_without_a_boundary(client: TestClient, boundary: str) -> None:
    answer = client.post("/v1/videos", content=b"--b--", headers={"content-type": f"multipart/form-data{boundary}"})
    assert error_of(answer)[:2] == (400, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "' + rb"a red\u0000ball" + b'"}',
        b'{"prompt": "' + rb"a red \ud800 ball" + b'"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "scores": {"flow": NaN}}',
        b'{"prompt": "a", "scores": {"flow": 1e999}}',
        b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}",
        b'{"prompt": ' + b"[" * 400 + b"]" * 400 + b"}",
    ],
)
def test_json_that_nothing_should_read(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert error_of(answer)[:2] == (400, "invalid_request")
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e999"])
@pytest.mark.parametrize(
    "name", ["guidance_scale", "fps", "time_shift", "scores[flow]", "channel_scales[]", "strength"]
)
def test_numbers_that_are_none(api: Api, client: TestClient, name: str, value: str) -> None:
    answer = client.post("/v1/videos", files={"prompt": (None, PROMPT), name: (None, value)})
    assert error_of(answer)[:2] == (400, "invalid_request") and api.store.jobs() == []


def test_headers_that_are_too_long(client: TestClient) -> None:
    answer = client.post("/v1/videos", json={"prompt": PROMPT}, headers={"Idempotency-Key": "k" * 256})
    assert error_of(answer)[0] == 400
    video_id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    ranges = "bytes=" + ",".join(["0-0"] * 5_000)
    assert client.get(f"/v1/videos/{video_id}/content", headers={"Range": ranges}).status_code == 409


def test_a_thousand_ranges(api: Api, client: TestClient) -> None:
    video_id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    api.make_all()
    ranges = "bytes=" + ",".join(f"{2 * number}-{2 * number}" for number in range(1_000))
    answer = client.get(f"/v1/videos/{video_id}/content", headers={"Range": ranges})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")  # all of it, once


@pytest.mark.parametrize(
    "start",
    [b"PK\x03\x04", b"\x1f\x8b\x08", b"<html>", b"%PDF-1.7", b"\x80\x04", b"#!/bin/sh\n", b"#EXTM3U\n", b"", b"<svg/>"],
)
def test_files_that_are_something_else(api: Api, client: TestClient, start: bytes) -> None:
    sent = {"image": ("a.png", start + b" and more" * bool(start), "image/png")}
    answer = client.post("/v1/videos", data={"prompt": PROMPT}, files=sent)
    assert error_of(answer)[:2] == (415, "unsupported_file") and nothing_is_left(api)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that asks for side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_a_picture_that_is_a_bomb_is_not_decoded(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    with pytest.raises(OpenSoraError, match=r"more pixels than 50,000,000|damaged: Image size"):
        InputFiles(most_pixels=50_000_000).read(ClipRequest(PROMPT, image=path))


def test_a_clip_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(tmp_path))
    with pytest.raises(OpenSoraError, match="32x32 are more pixels than 1,000"):
        InputFiles(most_pixels=1_000).read(ClipRequest(PROMPT, extend=path))
    assert InputFiles(most_pixels=1_024).read(ClipRequest(PROMPT, extend=path))


def said(base: str, *pieces: bytes) -> bytes:
    """What a server answers to bytes as they are, until it closes."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


START = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {}\r\n"
HEAD = START + "Content-Length: {}\r\n\r\n"


def test_a_head_that_never_comes(small: Api) -> None:
    """Nor a second one on a connection that has been answered; all at once, as each is waited for."""
    parts = [b"", b"GET", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "]
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with live(small) as base, ThreadPoolExecutor(2 * len(parts)) as clients:
        first = [clients.submit(said, base, part) for part in parts]
        second = [clients.submit(said, base, whole, part) for part in parts]
        assert [client.result() for client in first] == [b"", b"", b""]
        for answer in (client.result() for client in second):
            assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_head(small: Api) -> None:
    with live(small) as base:
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as stream:
            stream.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert said(base, b"GET") == b""  # begun later, and closed
            TestClient(small.app, base_url="http://localhost").post("/v1/videos", json={"prompt": PROMPT})
            heard = b""
            while b"queued" not in heard:
                piece = stream.recv(65536)
                assert piece, heard
                heard += piece


def test_heads_that_are_none(small: Api) -> None:
    with live(small) as base:
        head, _, body = said(base, b"nonsense\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_request"
        with contextlib.suppress(ConnectionError):  # of which no more is read
            assert said(base, b"GET / HTTP/1.1\r\nX: " + b"x" * 10_000_000).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_body_that_never_comes(small: Api, kind: str) -> None:
    with live(small) as base:
        answer = said(base, HEAD.format(kind, 200).encode(), b"--b\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408") and json.loads(body)["error"]["code"] == "body_timeout"
    assert b"x-should-retry: false" in head and nothing_is_left(small)


def test_a_body_that_breaks_off(small: Api) -> None:
    with live(small) as base:
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
            connection.sendall(HEAD.format("multipart/form-data; boundary=b", 200).encode() + b"--b\r\n")
        assert TestClient(small.app, base_url="http://localhost").get("/healthz").status_code == 200
    assert nothing_is_left(small)


def test_a_body_that_does_not_say_how_long_it_is(small: Api) -> None:
    head = START.format("application/json") + "Transfer-Encoding: chunked\r\n\r\n"
    with live(small) as base:
        answer = said(base, head.encode(), *[b"3e8\r\n" + b" " * 1000 + b"\r\n"] * 4)
    assert answer.startswith(b"HTTP/1.1 413") and nothing_is_left(small)


def test_a_body_that_is_announced_too_large_is_not_waited_for(small: Api) -> None:
    with live(small) as base:
        answer = said(base, HEAD.format("multipart/form-data; boundary=b", 10**12).encode())
    assert answer.startswith(b"HTTP/1.1 413")


def test_the_log_tells_no_prompts_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for logs_prompts in (False, True):
        api = Api(ServerSettings(tmp_path / str(logs_prompts), logs_prompts=logs_prompts))
        api.client().post("/v1/videos", json={"prompt": PROMPT + "\n\x1b"})
        api.client().post("/v1/videos", json={"prompt": "a zebra"})
        said_there = capfd.readouterr().err
        assert (PROMPT in said_there) == logs_prompts and "zebra" not in said_there
        assert "\x1b" not in said_there and len(said_there.splitlines()) == len(api.store.jobs())
