"""Many clients, one thread: each is read and written when it is ready, so none waits for another.

A client sends one request, gets one answer, and is gone.  How much it may send, how long it may take and how
many there may be are bounded; of too many, the oldest goes that has not asked yet.
"""

import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, EVENT_WRITE

MOST_CLIENTS = 32
REQUEST_SECONDS, REQUEST_BYTES = 5.0, 16 << 10
MOST_PIECES = 64  # of a request: each is a look at all of it
ANSWER_SECONDS = 30.0
TICK_S = 0.2  # between looks at the clock
GONE = 0  # what nobody waits for

# The answer to what was received so far, in parts; `None` while the request is not complete.
Respond = Callable[[bytes], Sequence[bytes] | None]


class _Client:
    """A connection: its request comes in, its answer goes out, the client hangs up."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.until = time.monotonic() + REQUEST_SECONDS
        self.is_answered = False
        self._request, self._pieces = bytearray(), 0
        self._unsent: list[memoryview] = []  # views: clients that read slowly share the bytes of a page

    def go_on(self, respond: Respond) -> int:
        """Do what needs no waiting; gives what to wait for then: `EVENT_READ`, `EVENT_WRITE` or `GONE`.

        Raises:
            OSError: if the client broke off.
        """
        if self._unsent:
            return self._send()
        data = self.connection.recv(4096)
        if not data:
            return GONE
        if self.is_answered:
            return EVENT_READ  # a request's body: hanging up on it unread could take the answer back
        self._request += data
        self._pieces += 1
        if len(self._request) > REQUEST_BYTES or self._pieces > MOST_PIECES:
            return GONE
        parts = respond(bytes(self._request))
        if parts is None:
            return EVENT_READ
        self._request.clear()
        self.is_answered, self._unsent = True, [memoryview(part) for part in parts if part]
        self.until = time.monotonic() + ANSWER_SECONDS
        return self._send()

    def _send(self) -> int:
        while self._unsent:
            try:
                sent = self.connection.send(self._unsent[0])
            except BlockingIOError:
                return EVENT_WRITE
            self._unsent[0] = self._unsent[0][sent:]
            if not self._unsent[0]:
                del self._unsent[0]
        self.connection.shutdown(socket.SHUT_WR)
        self.until = time.monotonic() + REQUEST_SECONDS  # for the client to hang up
        return EVENT_READ


class Clients:
    """Those who are connected, the oldest first."""

    def __init__(self, listener: socket.socket, respond: Respond) -> None:
        listener.setblocking(False)
        self._listener, self._respond = listener, respond
        self._clients: list[_Client] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, EVENT_READ)

    def serve_until(self, stopped: threading.Event) -> None:
        """Answer whoever comes."""
        try:
            self._serve_until(stopped)
        finally:
            for client in self._clients.copy():
                self._drop(client)
            self._selector.close()

    def _serve_until(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            ready = [key.data for key, _ in self._selector.select(TICK_S)]
            now = time.monotonic()  # before a page is made: nobody is late for what was here already
            for client in ready:
                if client is not None:
                    self._attend(client)
            if None in ready:  # one at a time: who has sent a request is answered before another makes it go
                self._welcome(stopped)
            for client in [client for client in self._clients if now > client.until]:
                self._drop(client)

    def _welcome(self, stopped: threading.Event) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it went away again, or the process may open no more files: not to be tried at once
            stopped.wait(TICK_S)
            return
        if len(self._clients) == MOST_CLIENTS:
            silent = (client for client in self._clients if not client.is_answered)
            self._drop(next(silent, self._clients[0]))
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, EVENT_READ, client)

    def _attend(self, client: _Client) -> None:
        try:
            events = client.go_on(self._respond)
        except OSError:  # a client that goes away is no error of the run
            events = GONE
        if events == GONE:
            self._drop(client)
        else:
            self._selector.modify(client.connection, events, client)

    def _drop(self, client: _Client) -> None:
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()
