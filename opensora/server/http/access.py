"""Who may ask: the host a request comes to, the page it comes from, and the key it comes with."""

import hmac
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from opensora.contents import shown
from opensora.server.http.errors import Refused, envelope_of
from opensora.server.service import JobService
from opensora.server.settings import LOOPBACK, Key, ServerSettings

_BEARER = HTTPBearer(auto_error=False, description="A secret of the server's key file.")
_ANY_ADDRESS = ("0.0.0.0", "::")


def service_of(request: Request) -> JobService:
    """What the endpoints of an app work on."""
    return request.app.state.service


def owner_of(secret: str | None, keys: Sequence[Key]) -> str | None:
    """Whose key that is; None where there are no keys.

    Raises:
        Refused: there are keys, and this is none of them.
    """
    if not keys:
        return None
    given = (secret or "").encode()
    owners = [key.owner for key in keys if hmac.compare_digest(key.secret.encode(), given)]
    if not owners:
        raise Refused(
            401,
            "invalid_api_key",
            "this server needs a key; send one of its own as `Authorization: Bearer KEY`",
            {"www-authenticate": "Bearer"},
        )
    return owners[0]


async def _service(request: Request) -> JobService:
    return service_of(request)


async def _owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> str | None:
    return owner_of(credentials and credentials.credentials, service_of(request).settings.keys)


Service = Annotated[JobService, Depends(_service)]
Owner = Annotated[str | None, Depends(_owner)]


class KnownHosts:
    """Middleware: refuses requests to names that are not this server's, and from pages of others.

    A page from elsewhere can have its own name point to this machine (DNS rebinding), or send forms here; then Host or
    Origin say so.

    Args:
        app: behind it.
        settings: of the server.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        own = () if settings.host in _ANY_ADDRESS else (settings.host,)
        self._names = {name.lower() for name in (*LOOPBACK, *own, *settings.hosts)}
        self._public = {name.lower() for name in settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on what may pass."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except Refused as refused:
                await envelope_of(refused)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name(f"//{host}") not in self._names:
            raise Refused(
                403,
                "unknown_host",
                f"the request is for the host {shown(host)!r}; start the server with --allow-host to let it be known",
            )
        if origin is None:
            return
        is_own = origin.lower().partition("://")[2] == host.lower() or _name(origin) in self._public
        if not is_own:
            raise Refused(403, "unknown_origin", f"pages of {shown(origin)!r} may not use this server")


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
