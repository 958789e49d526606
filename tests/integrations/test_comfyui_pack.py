"""What of the pack needs no ComfyUI: its client, how it finds the package, and what it asks to be installed."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from comfyui_process import PACK, ROOT
from video_server import VideoServer


def module(name: str) -> ModuleType:
    spec = spec_from_file_location(f"pack_{name}", PACK / f"{name}.py")
    assert spec and spec.loader
    loaded = module_from_spec(spec)
    sys.modules[spec.name] = loaded  # which dataclasses ask for
    spec.loader.exec_module(loaded)
    return loaded


client = module("client")


def never() -> bool:
    return False


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_video_is_asked_for_waited_for_and_fetched(video_server: VideoServer, tmp_path: Path, ending: str):
    video_server.script = [{"status": "queued", "progress": 0}, {"status": "completed", "progress": 100}]
    server, told = client.Server(video_server.url + ending, "secret"), []
    video_id = server.create({"prompt": "a red ball"})
    server.wait(video_id, told.append, never)
    path = server.download(video_id, tmp_path / "clip.mp4")
    assert path.read_bytes() == b"a clip" and list(tmp_path.iterdir()) == [path]
    assert told == [0, 100]
    assert [(method, address) for method, address, _, _ in video_server.asked] == [
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos/video_1"),
        ("GET", "/v1/videos/video_1"),
        ("GET", "/v1/videos/video_1/content"),
    ]
    assert {headers["authorization"] for _, _, headers, _ in video_server.asked} == {"Bearer secret"}


def test_a_server_that_is_away_for_a_moment_is_waited_for(video_server: VideoServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "POLL_S", 0.01)
    video_server.script = [503, 502, {"status": "completed", "progress": 100}]
    client.Server(video_server.url).wait("video_1", lambda _: None, never, tick_s=0.01)
    assert len(video_server.asked) == 3


def test_a_server_that_stays_away_is_not_waited_for(video_server: VideoServer, monkeypatch: pytest.MonkeyPatch):
    video_server.close()
    monkeypatch.setattr(client, "AWAY_S", 0.0)
    with pytest.raises(client.ServerError, match=r"does not answer.*opensora serve"):
        client.Server(video_server.url).wait("video_1", lambda _: None, never)


def test_a_video_that_fails_says_why(video_server: VideoServer):
    video_server.script = [{"status": "failed", "progress": 0, "error": {"message": "out of memory for 51 frames"}}]
    with pytest.raises(client.ServerError, match="out of memory for 51 frames"):
        client.Server(video_server.url).wait("video_1", lambda _: None, never)


def test_who_stops_has_the_video_cancelled(video_server: VideoServer):
    video_server.script = [{"status": "in_progress", "progress": 1}]
    with pytest.raises(client.Stopped):
        client.Server(video_server.url).wait("video_1", lambda _: None, lambda: True)
    assert video_server.asked[-1][:2] == ("POST", "/v1/videos/video_1/cancel")


def test_a_refusal_is_one_line(video_server: VideoServer):
    video_server.refusal = (429, "the queue is full,\n try again in 10 s")
    with pytest.raises(client.ServerError) as error:
        client.Server(video_server.url).create({"prompt": "a red ball"})
    assert str(error.value) == f"{video_server.url} refused (429): the queue is full, try again in 10 s"


def test_no_redirect_takes_the_key_elsewhere(video_server: VideoServer):
    video_server.refusal = (307, "elsewhere")
    with pytest.raises(client.ServerError, match="refused \\(307\\)"):
        client.Server(video_server.url, "secret").create({"prompt": "a red ball"})


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "ftp://here"])
def test_an_address_that_is_none_is_told(url: str):
    with pytest.raises(client.ServerError, match=r"expected one such as http://127\.0\.0\.1:8000"):
        client.Server(url).create({})


def test_a_key_is_never_shown():
    assert "secret" not in repr(client.Server("http://here", "secret"))


def test_a_file_that_is_cut_off_is_not_kept(video_server: VideoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client.shutil, "copyfileobj", lambda source, target: target.write(source.read(3)))
    with pytest.raises(client.ServerError, match="3 bytes of 6"):
        client.Server(video_server.url).download("video_1", tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_package_is_found():
    import opensora

    assert module("package").the_package() is opensora


@pytest.mark.parametrize("is_namespace", [True, False])
def test_the_package_of_another_project_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_namespace: bool):
    other = tmp_path / "opensora"
    other.mkdir()
    if not is_namespace:
        (other / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=re.escape(str(other)) + ".*another project's"):
        module("package").the_package()
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opensora", None)
    with pytest.raises(RuntimeError, match="not installed where ComfyUI runs"):
        module("package").the_package()


# --- what is installed ------------------------------------------------------------------------------------------------


def names(requirements: list[str]) -> set[str]:
    lines = [line.strip() for line in requirements]
    return {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in lines if line and line[0] != "#"}


def test_the_requirements_are_all_that_the_package_needs_but_torch():
    listed = names((PACK / "requirements.txt").read_text().splitlines())
    needed = names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert listed == needed - {"torch"}
    told = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert names(told["project"]["dependencies"]) == listed and told["tool"]["comfy"]["DisplayName"]


@pytest.mark.parametrize("path", sorted(PACK.glob("*.py")), ids=lambda path: path.stem)
def test_loading_the_pack_imports_neither_torch_nor_the_package(path: Path):
    at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in at_once if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in at_once if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    assert not {name.split(".")[0] for name in imported} & {"torch", "opensora", "diffusers", "transformers"}


def test_the_client_needs_nothing_but_python():
    code = f"import sys; sys.path.insert(0, {str(PACK)!r}); import client, package; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "opensora"} & set(json.loads(done.stdout.replace("'", '"')))
