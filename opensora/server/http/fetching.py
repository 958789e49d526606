"""Pictures and clips that a request names by URL, fetched from hosts that the operator has named, and from no others.

A URL may be made to reach what only this machine can reach. So hosts are compared by name, their addresses are looked
up once and must be public ones, the connection goes to the address that was checked, and redirects are not followed.
"""

import base64
import binascii
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from opensora.contents import shown
from opensora.errors import OpenSoraError
from opensora.server.service import TooLarge
from opensora.server.settings import InputLimits

FETCH_S = 30.0
"""That a file may take to arrive."""


def addresses_of(host: str) -> list[str]:
    """Where a host is."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


class Fetcher:
    """Fetches files into a folder.

    Args:
        folder: where they are put.
        hosts: names that URLs may have.
        limits: how large files may be.
        addresses: of a host.
        transport: of the HTTP client; None for its own.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str],
        limits: InputLimits,
        addresses: Callable[[str], list[str]] = addresses_of,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._folder, self._hosts, self._limits = folder, {host.lower() for host in hosts}, limits
        self._addresses, self._transport = addresses, transport
        self._number = 0

    def fetch(self, url: str, name: str) -> Path:
        """A file by its URL (`https:` or `data:`).

        Args:
            url: of the file.
            name: of the field, for messages.

        Raises:
            OpenSoraError: another kind of URL, a host that is not named or not public, or no answer.
            TooLarge: more bytes than may be.
        """
        self._number += 1
        path = self._folder / f"fetched-{self._number}"
        if url.startswith("data:"):
            path.write_bytes(_of_data(url, name))
            return path
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise OpenSoraError(f"`{name}` is no URL; send the file itself") from None
        host = parsed.host.lower()
        if host not in self._hosts:
            raise OpenSoraError(
                f"`{name}` names a file at {shown(host)!r}, which this server does not fetch from; send the file itself"
            )
        if parsed.scheme != "https" or parsed.port is not None or parsed.userinfo:
            raise OpenSoraError(f"`{name}` is no plain https URL; send the file itself")
        self._download(parsed.copy_with(host=self._public_address(host, name)), host, name, path)
        return path

    def _public_address(self, host: str, name: str) -> str:
        try:
            addresses = self._addresses(host)
        except OSError:
            raise OpenSoraError(f"`{name}`: the host {shown(host)} was not found") from None
        if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
            raise OpenSoraError(f"`{name}`: the host {shown(host)} has no public address; send the file itself")
        return addresses[0]

    def _download(self, url: httpx.URL, host: str, name: str, path: Path) -> None:
        most, until = self._limits.clip_bytes, time.monotonic() + FETCH_S
        headers = {"host": host, "accept-encoding": "identity"}
        try:
            with (
                httpx.Client(transport=self._transport, trust_env=False, timeout=10, follow_redirects=False) as client,
                client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as answer,
                path.open("wb") as file,
            ):
                if answer.status_code != 200:
                    raise OpenSoraError(f"`{name}`: {host} answered {answer.status_code}, expected the file itself")
                for piece in answer.iter_raw():
                    most -= len(piece)
                    if most < 0:
                        raise TooLarge(f"`{name}` has more than {self._limits.clip_bytes:,} bytes; send a smaller file")
                    if time.monotonic() > until:
                        raise OpenSoraError(f"`{name}` did not arrive from {host} within {FETCH_S:g} s")
                    file.write(piece)
        except httpx.HTTPError as error:
            raise OpenSoraError(f"`{name}` cannot be fetched from {host}: {type(error).__name__}") from None


def _of_data(url: str, name: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise OpenSoraError(f"`{name}` is no data URL in base64; send the file itself")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise OpenSoraError(f"`{name}` is no data URL in base64; send the file itself") from None
