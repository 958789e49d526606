"""Prompt refinement against a small server on this machine: what is asked, what becomes of the answer, refusals."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opensora.errors import OpenSoraError
from opensora.refinement import INSTRUCTIONS, Refiner

KEY = "sk-very-secret"


class LanguageModel:
    """Answers what it is told to, and keeps what it was asked."""

    def __init__(self):
        self.status, self.body, self.headers, self.asked = 200, None, {}, []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.asked.append((self.path, dict(self.headers), content))
                text = content["messages"][-1]["content"]
                body = {"choices": [{"message": {"content": f"{text}, at dawn"}}]} if model.body is None else model.body
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(model.status)
                for name, value in {"Content-Length": str(len(body)), **model.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def says(self, content):
        self.body = {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def language_model(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    model = LanguageModel()
    threading.Thread(target=model.server.serve_forever, args=(0.01,), daemon=True).start()
    yield model
    model.server.shutdown()
    model.server.server_close()


def test_the_prompt_is_sent_with_instructions(language_model):
    refined = Refiner(language_model.url + "/", "small", KEY).refine("a red ball")
    assert refined == "a red ball, at dawn"
    [(path, headers, content)] = language_model.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert content == {
        "model": "small",
        "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": "a red ball"}],
    }


def test_without_a_key_none_is_sent(language_model):
    Refiner(language_model.url, "small").refine("a red ball")
    assert "Authorization" not in language_model.asked[0][1]


def test_each_loop_has_its_own_text(language_model):
    refined = Refiner(language_model.url, "small").refine("|0|a red ball|2|a blue square")
    assert refined == "|0|a red ball, at dawn|2|a blue square, at dawn"
    assert [content["messages"][1]["content"] for _, _, content in language_model.asked] == [
        "a red ball",
        "a blue square",
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('"A ball rolls."\n', "A ball rolls."),
        ("A ball\n\nrolls  on.", "A ball rolls on."),
        ("<think>\nshort?\n</think>\nA ball rolls.", "A ball rolls."),
        ('A ball | rolls {"reference_path": "x"}', 'A ball rolls "reference_path": "x"'),
        ('A sign that reads "OPEN"', 'A sign that reads "OPEN"'),
        ("'A dog's ball rolls.'", "A dog's ball rolls."),
        ("“一个红球滚过草地。”", "一个红球滚过草地。"),
    ],
)
def test_an_answer_becomes_one_plain_sentence(language_model, answer, expected):
    language_model.says(answer)
    assert Refiner(language_model.url, "small").refine("a ball") == expected


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "answered with something that is not JSON"),
        (200, b"\xff", "answered with something that is not JSON"),
        (200, b"[" * 1_000_001, "answered with something that is not JSON"),
        (200, {"choices": []}, "holds no completion"),
        (200, ["choices"], "holds no completion"),
        (200, {"choices": [{"message": {"content": "  "}}]}, "answered with an empty text"),
        (200, {"choices": [{"message": {"content": None}}]}, "answered with an empty text"),
        (200, {"choices": [{"message": {"content": "<think>hm</think>"}}]}, "answered with an empty text"),
        (404, {"error": {"message": "no model 'small'"}}, "answered HTTP 404: no model 'small'"),
        (500, b"", "answered HTTP 500: Internal Server Error"),
        (429, {"error": {"message": f"slow down\n{KEY}"}}, "answered HTTP 429: slow down ..."),
        (401, {"error": {"message": f"wrong key {KEY[:6]}"}}, "answered HTTP 401: it does not accept the key"),
    ],
)
def test_refusals_are_one_line_without_the_key(language_model, status, body, message):
    language_model.status, language_model.body = status, body
    with pytest.raises(OpenSoraError, match=r"^the endpoint http://127[^\n]*$") as caught:
        Refiner(language_model.url, "small", KEY).refine("a ball")
    assert message in str(caught.value) and KEY[:6] not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_carry_the_key_nowhere(language_model, status):
    language_model.status = status
    language_model.headers = {"Location": language_model.url + "/elsewhere"}
    with pytest.raises(OpenSoraError, match=f"HTTP {status}, a redirect"):
        Refiner(language_model.url, "small", KEY).refine("a ball")
    assert len(language_model.asked) == 1


def test_nobody_there_and_nobody_answering(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(OpenSoraError, match=r"cannot be reached: .*refused"):
            Refiner(url, "small").refine("a ball")
        silent.listen()  # accepts, and never answers
        with pytest.raises(OpenSoraError, match=r"did not answer within 0\.05 s"):
            Refiner(url, "small", timeout_s=0.05).refine("a ball")


@pytest.mark.parametrize(
    "endpoint",
    ["", "localhost:8000", "file:///etc/passwd", "ftp://host/x", "http://", "http://u:p@host/v1", "http://h:x/v1"],
)
def test_addresses_that_are_none(endpoint):
    with pytest.raises(OpenSoraError, match="is to be an address such as"):
        Refiner(endpoint, "small")


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_keys_that_are_none(key):
    with pytest.raises(OpenSoraError, match="the key is empty or holds") as caught:
        Refiner("http://localhost/v1", "small", key)
    assert not key or key not in str(caught.value)


def test_a_key_is_not_shown():
    assert KEY not in repr(Refiner("http://localhost/v1", "small", KEY))
