"""`--serve`: the report of a run as a page, for a browser.

It answers GET and HEAD for one path, reads the folder of the run, and writes nothing.  One thread serves all
clients (`clients.py`), with bounds on their number and on each request's size and duration: none waits for
another that is slow, memory is bounded, and training goes on whatever clients do.
"""

import contextlib
import datetime
import errno
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from pathlib import Path
from socket import AF_INET, AF_INET6

from lance_device.clients import Clients
from lance_device.following import ENDED, Follower, Sight
from lance_device.svg import svg
from lance_edge.errors import DataError, PlatformError
from lance_edge.report.content import compose
from lance_edge.report.page import render
from lance_edge.report.plots import Section

REFRESH_S = 10
FRESH_S = 2.0  # for which a page is given again instead of made anew
OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES, errno.EPERM)  # why nobody can listen, whatever the address
REQUEST_LINE = re.compile(rb"(\S+) (\S+) HTTP/1\.[0-9]\r?")
END_OF_HEADER = re.compile(rb"\n\r?\n")
HOST = re.compile(rb"^host:(.*)$", re.IGNORECASE | re.MULTILINE)
NO_REQUEST = b"expected a request of HTTP/1, such as: GET / HTTP/1.1\n"
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
        self._page, self._made_at, self._state = b"", float("-inf"), ""

    def page(self) -> bytes:
        """The present page.

        Raises:
            DataError: if what the run writes cannot be read.
        """
        if time.monotonic() - self._made_at < FRESH_S:
            return self._page
        before, self._state = self._state, ""  # until there is a page: what failed is tried again
        sight = self._follower.look()
        if sight.is_new or sight.state != before:
            page = _waiting if self._follower.view.is_empty else _report
            self._page = page(self._follower, sight).encode("utf-8", "replace")
        self._state = sight.state
        self._made_at = time.monotonic()
        return self._page


def _report(follower: Follower, sight: Sight) -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
    refresh_s = None if sight.state in ENDED else REFRESH_S  # a lost run may be taken up
    return render(compose([follower.view], now, NO_PACKAGE, refresh_s=refresh_s), svg)


def _waiting(follower: Follower, sight: Sight) -> str:
    how = f"{sight.state}, and no step was made" if sight.has_ended else "no step was made yet"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>lance-edge</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f"</head><body><p>{escape(str(follower.path))}: {how}.</p></body></html>"
    )


@dataclass(frozen=True)
class Site:
    """What is answered: the page, or a line that says why not."""

    address: Address
    pages: RunPages

    def respond(self, received: bytes) -> tuple[bytes, bytes] | None:
        """Header and body for a request; `None` while more of it is to come."""
        first, newline, fields = received.partition(b"\n")
        line = REQUEST_LINE.fullmatch(first) if newline else None
        if newline and line is None:
            return _answer(HTTPStatus.BAD_REQUEST, NO_REQUEST)
        if line is None or END_OF_HEADER.search(received) is None:
            return None
        verb, target = line.groups()
        hosts = [host.decode("latin-1") for host in HOST.findall(fields)]
        header, body = self._answer_to(verb, target, hosts)
        return header, b"" if verb == b"HEAD" else body

    def _answer_to(self, verb: bytes, target: bytes, hosts: list[str]) -> tuple[bytes, bytes]:
        if verb not in (b"GET", b"HEAD"):
            return _answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET and HEAD only\n")
        if not all(map(self.address.answers_to, hosts)):
            return _answer(HTTPStatus.MISDIRECTED_REQUEST, NOT_OURS)
        if target.partition(b"?")[0] != b"/":
            return _answer(HTTPStatus.NOT_FOUND, b"there is one page: /\n")
        try:
            return _answer(HTTPStatus.OK, self.pages.page(), "text/html; charset=utf-8")
        except DataError as error:
            return _answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode("utf-8", "replace"))
        except Exception as error:  # whatever it is: the run goes on, and the next page may be made
            reason = f"the page could not be made ({type(error).__name__}: {error})\n"
            return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason.encode("utf-8", "replace"))


def _answer(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> tuple[bytes, bytes]:
    """Header and body."""
    fields = {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields["Allow"] = "GET, HEAD"
    lines = (f"HTTP/1.0 {status.value} {status.phrase}", *(f"{name}: {text}" for name, text in fields.items()))
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii"), body


def _listener(address: Address) -> socket.socket:
    try:
        return _bound(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no machine can have
        reason = getattr(error, "strerror", None) or error
        is_port = getattr(error, "errno", None) in OF_THE_PORT
        advice = "another port" if is_port else "an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        raise PlatformError(f"--serve {address}: cannot listen there ({reason}); choose {advice}") from None


def _bound(address: Address) -> socket.socket:
    listener = socket.socket(AF_INET6 if ":" in address.host else AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def serving(address: Address, folder: Path) -> Iterator[Address]:
    """Serve the page of a run while the block lasts; gives the address, with the port that was free.

    Raises:
        DataError: if the folder is a file.
        PlatformError: if nobody can listen there.
    """
    pages = RunPages(folder)
    with _listener(address) as listener:
        clients = Clients(listener, Site(address, pages).respond)
        stopped = threading.Event()
        thread = threading.Thread(target=clients.serve_until, args=(stopped,), daemon=True)
        thread.start()
        try:
            yield Address(address.host, listener.getsockname()[1])
        finally:
            stopped.set()
            thread.join()
