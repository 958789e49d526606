"""The page as it is served: tabs of Gradio's, scripts beside them, nothing from elsewhere, and the API as it was."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from opensora.server.settings import Key, ServerSettings
from opensora.server.store import store_of
from opensora.studio.app import FILES, create_studio_app
from opensora.studio.page import TABS, build_page, page_options

SECRET = "a-secret-of-sixteen"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = ServerSettings(tmp_path_factory.mktemp("server"), keys=(Key("ann", SECRET),))
    with TestClient(create_studio_app(settings, store_of(settings)), base_url="http://localhost") as client:
        yield client


def test_every_tab_has_a_script_that_shows_it() -> None:
    components = build_page().get_config_file()["components"]
    assert [one["props"]["id"] for one in components if one["type"] == "tabitem"] == list(TABS)
    for name in (*TABS, "header"):
        assert re.search(r"^export (async )?function show\(root", (FILES / f"{name}.js").read_text(), re.MULTILINE)


def test_nothing_of_the_page_runs_in_gradio_and_nothing_is_told_to_its_makers() -> None:
    page = build_page()
    assert not page.analytics_enabled
    assert page.get_config_file()["dependencies"]
    assert all(not dependency["backend_fn"] for dependency in page.get_config_file()["dependencies"])


def test_fonts_are_those_of_the_system() -> None:
    theme = page_options()["theme"]
    assert not [url for url in theme._stylesheets if "//" in url]
    assert "font-face" not in theme._font_css[0] if theme._font_css else True


def test_the_page_is_there_without_a_key_and_its_data_are_not(client: TestClient) -> None:
    page = client.get("/")
    assert "Open-Sora studio" in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/studio/page/texts.json").json()["generate"]
    for path in ("/v1/videos", "/studio/runs", "/studio/fidelity?made=a&reference=b"):
        assert client.get(path).status_code == 401
    assert client.post("/studio/sketch", json={"request": {}}).status_code == 401


def test_what_is_wrong_with_a_request_is_still_said_by_the_api(client: TestClient) -> None:
    for answer in (client.get("/v1/nothing"), client.put("/v1/videos"), client.get("/studio/nothing")):
        assert answer.json()["error"]["message"]
    assert client.put("/v1/videos").status_code == 405


def test_gradio_takes_and_tells_nothing(client: TestClient) -> None:
    paths = ("file=/etc/hostname", "info", "heartbeat/a", "proxy=http://127.0.0.1/", "queue/status")
    answers = [client.get(f"/gradio_api/{path}") for path in paths]
    answers.append(client.post("/gradio_api/upload", files={"files": ("a.png", b"12345678")}))
    assert [answer.status_code for answer in answers] == [404] * 6
    assert all(answer.json()["error"]["code"] == "not_found" for answer in answers)


@pytest.mark.multi
def test_the_process_of_the_page_imports_no_torch() -> None:
    asked = (
        "import opensora.studio.process, sys; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, env={**os.environ, "PYTHONPATH": paths})
    assert found.stdout == b"[]\n"


def test_no_script_names_another_host() -> None:
    named = {path.name: re.findall(r"(?:https?:)?//[\w-]+\.[\w.]+", path.read_text()) for path in FILES.iterdir()}
    assert {name: urls for name, urls in named.items() if urls} == {"chart.js": ["http://www.w3.org"]}  # a name of SVG


def test_scripts_are_of_a_length_that_is_read_in_one_go() -> None:
    assert all(len(path.read_text().splitlines()) <= 400 for path in Path(FILES).glob("*.*s"))
