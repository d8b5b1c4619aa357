"""`--serve`: the report of a run as a page, for a browser.

It answers GET for one path, reads the folder of the run, and writes nothing.  One request is served at a time,
with bounds on its size and duration, so memory is bounded and training goes on whatever clients do.
"""

import contextlib
import datetime
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any

from lance_device.following import Follower
from lance_device.svg import svg
from lance_edge.errors import DataError, PlatformError
from lance_edge.report.content import compose
from lance_edge.report.page import render
from lance_edge.report.plots import Section

REFRESH_S = 10
FRESH_S = 2.0  # for which a page is given again instead of made anew
REQUEST_SECONDS, REQUEST_BYTES = 5.0, 16 << 10
NOT_OURS = b"not a name of this machine: ask by its IP address, or start with --serve NAME:PORT\n"
NO_PACKAGE = Section(
    "Ranks and spectra",
    "What calibration found of each trained layer.",
    (),
    missing="The workstation shows them: lance-host report run/ --artifact pkg.tar.",
)
HEADERS = {
    # Nothing but the page's own style and pictures: no script, no other server, no frame around it.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def __str__(self) -> str:
        """`127.0.0.1:8080`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def answers_to(self, asked: str) -> bool:
        """Whether the `Host` of a request is this machine: any IP address, or a name that is its own.

        A site whose name was made to lead here (DNS rebinding) sends that name, and must not read the page in a
        browser.
        """
        parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+?)\.?)(?::[0-9]*)?", asked.strip().lower())
        if parts is None:
            return False
        try:
            ipaddress.ip_address(parts[1] or parts[2])
        except ValueError:
            return parts[2] in {self.host.lower(), *own_names()}
        return True


def own_names() -> tuple[str, ...]:
    """What this machine is called, in lower case, without asking any name server."""
    name = socket.gethostname().lower()
    first = name.partition(".")[0]
    return ("localhost", name, first, f"{first}.local")


class RunPages:
    """The page of a run, made anew when there is something new and somebody asks."""

    def __init__(self, folder: Path) -> None:
        self._follower = Follower(folder)
        self._page, self._made_at = b"", float("-inf")

    def page(self) -> bytes:
        """The present page.

        Raises:
            DataError: if what the run writes cannot be read.
        """
        if time.monotonic() - self._made_at < FRESH_S:
            return self._page
        sight = self._follower.look()
        if sight.is_new or not self._page:
            view = self._follower.view
            page = _waiting(self._follower.path) if view.is_empty else _report(self._follower, sight.has_ended)
            self._page = page.encode("utf-8", "replace")
        self._made_at = time.monotonic()
        return self._page


def _report(follower: Follower, has_ended: bool) -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
    return render(compose([follower.view], now, NO_PACKAGE, refresh_s=None if has_ended else REFRESH_S), svg)


def _waiting(folder: Path) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>lance-edge</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f"</head><body><p>{escape(str(folder))}: no step was made yet.</p></body></html>"
    )


class Handler(BaseHTTPRequestHandler):
    """One connection, one answer."""

    timeout = REQUEST_SECONDS
    rbufsize = 0  # see `_Request`
    server_version, sys_version = "lance-device", ""
    server: "PageServer"

    def setup(self) -> None:
        """Bound what the client may send."""
        super().setup()
        self.rfile: Any = _Request(self.rfile)

    def do_GET(self) -> None:
        """The page, for the one path that there is."""
        if not self.server.address.answers_to(self.headers.get("Host", "localhost")):
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, NOT_OURS)
        if self.path != "/":
            return self._answer(HTTPStatus.NOT_FOUND, b"there is one page: /\n")
        try:
            page = self.server.pages.page()
        except DataError as error:
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode("utf-8", "replace"))
        return self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8")

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:  # noqa: A002 - the name that it overrides
        """Nothing: the terminal is for the run."""


class _Request:
    """The bytes of a request, up to so many, up to so long; read singly, as the end must be seen at once."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._left = raw, REQUEST_BYTES
        self._until = time.monotonic() + REQUEST_SECONDS

    def readline(self, limit: int = -1) -> bytes:
        """A line.

        Raises:
            TimeoutError: if it is too long, or comes too slowly; the connection is closed then.
        """
        line = bytearray()
        while not line.endswith(b"\n") and (limit < 0 or len(line) < limit):
            if self._left == 0 or time.monotonic() > self._until:
                raise TimeoutError("the request is too long, or too slow")
            byte = self._raw.read(1)
            if not byte:
                break
            line += byte
            self._left -= 1
        return bytes(line)

    def close(self) -> None:
        """Done."""
        self._raw.close()


class PageServer(HTTPServer):
    """Serves one request after the other."""

    def __init__(self, address: Address, pages: RunPages) -> None:
        self.address, self.pages = address, pages
        self.address_family = AF_INET6 if ":" in address.host else AF_INET
        super().__init__((address.host, address.port), Handler)

    def server_bind(self) -> None:
        """Without asking any name server who we are, as `HTTPServer` does."""
        self.allow_reuse_address = True
        super(HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.address.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the run."""


@contextlib.contextmanager
def serving(address: Address, folder: Path) -> Iterator[Address]:
    """Serve the page of a run while the block lasts; gives the address, with the port that was free.

    Raises:
        PlatformError: if nobody can listen there.
    """
    try:
        server = PageServer(address, RunPages(folder))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlatformError(f"--serve {address}: cannot listen there ({reason}); choose another port") from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield Address(address.host, server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
