"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, whoever raised them."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.server.database import NoJob, StoreAway
from opensora.server.service import NotAllowed, NotReady, TooLarge, UnfitFile
from opensora.server.store import KeyUsed, NotPossible, QueueFull

RETRY_S = 10
"""When there may be room, or a store, again."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="A line for people: what came, what was expected, what to do.")
    type: str = Field(description="A word for a kind of error.")
    param: str | None = Field(description="The field that it is about.")
    code: str = Field(description="A word for programs.")


class ErrorEnvelope(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


class Refused(OpenSoraError):
    """A request that never reaches the jobs.

    Args:
        status: of the answer.
        code: for programs.
        message: for people.
        headers: besides.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


_STATUS: dict[type[OpenSoraError], tuple[int, str]] = {
    NotAllowed: (403, "not_allowed"),
    NoJob: (404, "not_found"),
    NotReady: (409, "video_not_ready"),
    NotPossible: (409, "not_possible"),
    KeyUsed: (409, "idempotency_key_used"),
    TooLarge: (413, "too_large"),
    UnfitFile: (415, "unsupported_file"),
    QueueFull: (429, "queue_full"),
    StoreAway: (503, "store_away"),
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}
_WORDS = {
    400: "The request cannot be granted.",
    401: "No key came, or one that the server does not know.",
    403: "Not for this key, this host or this origin.",
    404: "There is no such video of this key's.",
    405: "Another method is expected.",
    408: "The body took too long to arrive.",
    409: "The video is in no state for that.",
    413: "More was sent than may be.",
    415: "A body or a file of another kind is expected.",
    416: "The file has no such bytes.",
    429: "As many jobs wait as may.",
    500: "The server made a mistake.",
    503: "The store does not answer.",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the documentation: an endpoint may answer with these errors, besides those that every one may."""
    numbers = sorted({400, 401, 403, 500, 503, *statuses})
    return {number: {"model": ErrorEnvelope, "description": _WORDS[number]} for number in numbers}


def envelope(
    status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer that is no success."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=dict(headers or {}))


def envelope_of(error: OpenSoraError) -> JSONResponse:
    """The answer that an error of ours is."""
    message = " ".join(str(error).split())
    if isinstance(error, Refused):
        return envelope(error.status, error.code, message, param=_param(message), headers=error.headers)
    known = [answer for kind, answer in _STATUS.items() if isinstance(error, kind)]
    status, code = known[0] if known else (400, "invalid_request")
    headers = {}
    if status in (429, 503):
        headers = {"retry-after": str(RETRY_S)}
    elif status == 409:
        headers = {"x-should-retry": "false"}  # which clients of OpenAI's would do: it changes nothing
    return envelope(status, code, message, param=_param(message), headers=headers)


def _param(message: str) -> str | None:
    """Our messages name fields in backticks."""
    named = re.search(r"`(\w+)`", message)
    return named[1] if named else None


def install(app: FastAPI) -> None:
    """Makes an app answer so, whatever is raised."""

    @app.exception_handler(OpenSoraError)
    async def _ours(_: Request, error: OpenSoraError) -> JSONResponse:
        return envelope_of(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"`{param}`: {first['msg']}" if param else first["msg"]
        return envelope(400, "invalid_request", message, param=param)

    @app.exception_handler(HTTPException)
    async def _theirs(request: Request, error: HTTPException) -> JSONResponse:
        path, headers = request.url.path, error.headers
        words = {404: f"there is nothing at {shown(path)}", 405: f"{request.method} is not for this address"}
        if error.status_code == 405:
            headers = {"allow": ", ".join(_methods_at(path, app.openapi()))}
        message = words.get(error.status_code, str(error.detail))
        code = _CODES.get(error.status_code, "invalid_request")
        return envelope(error.status_code, code, message, headers=headers)

    @app.exception_handler(Exception)
    async def _mistake(_: Request, error: Exception) -> JSONResponse:
        return envelope(500, "internal_error", "the server made a mistake; its log tells which")


def _methods_at(path: str, document: Mapping[str, Any]) -> list[str]:
    """All that an address takes, whichever endpoints they are of; one that is named as it stands comes first."""
    paths = document["paths"]
    named = [template for template in paths if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)]
    own = [template for template in named if template == path] or named
    return sorted({method.upper() for template in own for method in paths[template]})
