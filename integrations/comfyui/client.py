"""A client of `opensora serve`, with the standard library alone: ask for a video, wait for it, fetch it."""

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

TIMEOUT_S = 30.0
"""Until an answer begins."""
AWAY_S = 120.0
"""A server that is started anew goes on with what was asked for; so long it may be away."""
POLL_S, LONGEST_POLL_S = 1.0, 10.0


class ServerError(Exception):
    """The server refused, failed, or is not there; one line."""


class Stopped(Exception):
    """The caller asked to stop; the server was told."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address might be anybody's, and the key would go there too."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


@dataclass(frozen=True)
class Server:
    """Where clips are made.

    Attributes:
        url: of the server, with or without /v1.
        key: its secret; empty for a server that needs none.
    """

    url: str
    key: str = field(default="", repr=False)  # ComfyUI shows what nodes were given when one fails

    def create(self, fields: dict[str, Any]) -> str:
        """Asks for a video, and returns its id.

        Raises:
            ServerError: it was refused, or there is no server.
        """
        body = json.dumps(fields).encode()
        return self._json("POST", "/videos", body)[0]["id"]

    def wait(
        self, video_id: str, on_progress: Callable[[int], None], stopped: Callable[[], bool], tick_s: float = 0.25
    ) -> dict[str, Any]:
        """Waits until a video is there, and returns what the server says of it.

        Args:
            video_id: of the video.
            on_progress: told how many percent are done.
            stopped: asked all the time; when it says so the video is cancelled.
            tick_s: between two times that it is asked.

        Raises:
            ServerError: there will be no video, or the server is away for too long.
            Stopped: `stopped` said so.
        """
        heard = time.monotonic()
        while True:
            poll_s = POLL_S
            try:
                video, headers = self._json("GET", f"/videos/{quote(video_id, safe='')}")
            except _Away as error:
                if time.monotonic() - heard > AWAY_S:
                    raise ServerError(str(error)) from None
            else:
                heard = time.monotonic()
                on_progress(video["progress"])
                if video["status"] == "completed":
                    return video
                if video["status"] not in ("queued", "in_progress"):
                    raise ServerError((video.get("error") or {}).get("message") or f"the video {video_id} failed")
                told_ms = headers.get("openai-poll-after-ms", "")
                poll_s = min(int(told_ms) / 1000, LONGEST_POLL_S) if told_ms.isdecimal() else POLL_S
            until = time.monotonic() + poll_s
            while (left := until - time.monotonic()) > 0:
                if stopped():
                    self.cancel(video_id)
                    raise Stopped
                time.sleep(min(tick_s, left))

    def cancel(self, video_id: str) -> None:
        """Stops a video.

        Raises:
            ServerError: the server could not be told.
        """
        self._json("POST", f"/videos/{quote(video_id, safe='')}/cancel", b"{}")

    def download(self, video_id: str, path: Path) -> Path:
        """Writes the file of a video, whole or not at all.

        Raises:
            ServerError: it could not be fetched.
        """
        unfinished = path.with_name(f"{path.name}.part")
        try:
            with (
                self._open("GET", f"/videos/{quote(video_id, safe='')}/content") as answer,
                unfinished.open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
                announced = answer.headers.get("content-length")
                if announced is not None and file.tell() != int(announced):
                    raise ServerError(f"{self.url} sent {file.tell()} bytes of {announced}; try again")
            unfinished.replace(path)
        except OSError as error:
            raise ServerError(f"the video {video_id} could not be fetched: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    def _json(self, method: str, path: str, body: bytes | None = None) -> tuple[dict[str, Any], Message]:
        with self._open(method, path, body) as answer:
            try:
                return json.load(answer), answer.headers
            except ValueError:
                raise ServerError(f"{self.url} answers no JSON; is it the address of an `opensora serve`?") from None

    def _open(self, method: str, path: str, body: bytes | None = None) -> Any:
        root = self.url.strip().rstrip("/").removesuffix("/v1")
        if not root.startswith(("http://", "https://")):
            raise ServerError(f"the address is {self.url!r}, expected one such as http://127.0.0.1:8000")
        headers = {"Accept": "*/*"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{root}/v1{path}", data=body, headers=headers, method=method)
        try:
            return urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error)
            kind = _Away if error.code in (502, 503, 504) else ServerError
            raise kind(f"{root} refused ({error.code}): {message}") from None
        except (HTTPException, OSError) as error:  # URLError is one of the latter
            reason = getattr(error, "reason", error)
            raise _Away(
                f"{root} does not answer ({reason}); start it with `opensora serve`, or correct the address"
            ) from None


class _Away(ServerError):
    """The server may be there again in a moment."""


def _message(error: urllib.error.HTTPError) -> str:
    """The line of an error envelope."""
    try:
        return " ".join(str(json.load(error)["error"]["message"]).split())
    except (ValueError, LookupError, TypeError, OSError):
        return str(error.reason)
