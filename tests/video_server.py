"""A small server of /v1 that tells of a video what a test has it tell."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class VideoServer:
    """A server that has one clip, and tells of it in the steps of a script.

    Attributes:
        clip: bytes of the file.
        script: what is said of the video, one each time that it is asked for; the last one stays. A number is a status
            without a video.
        asked: (method, path, headers, body) of all requests.
    """

    def __init__(self, clip: bytes) -> None:
        self.clip, self.asked = clip, []
        self.script: list[Any] = [{"status": "completed", "progress": 100}]
        self.refusal: tuple[int, str] | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                server._note(self)
                if self.path.endswith("/content"):
                    self._answer(200, server.clip, {"content-type": "video/mp4"})
                    return
                said = server.script[0] if len(server.script) == 1 else server.script.pop(0)
                if isinstance(said, int):
                    self._answer(said, {"error": {"message": "not now"}})
                else:
                    self._answer(200, {"id": "video_1", **said}, {"openai-poll-after-ms": "10"})

            def do_POST(self) -> None:
                server._note(self)
                if server.refusal is not None:
                    status, message = server.refusal
                    self._answer(status, {"error": {"message": message}}, {"location": "http://127.0.0.1:9/v1/videos"})
                else:
                    self._answer(200, {"id": "video_1", "status": "queued", "progress": 0})

            def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def _note(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        self.asked.append((handler.command, handler.path, handler.headers, json.loads(body) if body else None))

    def created(self) -> dict[str, Any]:
        """The body of the one request for a video."""
        (body,) = [body for method, path, _, body in self.asked if (method, path) == ("POST", "/v1/videos")]
        return body

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
