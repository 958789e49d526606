"""A small server of /v1 for clients, and ComfyUI itself where it was fetched."""

from collections.abc import Iterator

import pytest
from comfyui_process import COMFYUI, ComfyUI
from video_server import VideoServer


@pytest.fixture
def video_server() -> Iterator[VideoServer]:
    server = VideoServer(b"a clip")
    yield server
    server.close()


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A test that needs it is skipped where `make comfyui` has not been run."""
    if not (COMFYUI / ".complete").exists():
        pytest.skip(f"no ComfyUI in {COMFYUI}; run `make comfyui`")
    running = ComfyUI(tmp_path_factory.mktemp("comfyui"))
    yield running
    running.close()
