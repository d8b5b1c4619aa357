"""The clients of `--serve`: whatever they do, none waits for another, and no more than so many stay."""

import contextlib
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from page_harness import LOOPBACK, ask, raw, read_all

from lance_device import clients
from lance_device.clients import MOST_CLIENTS
from lance_device.serve import Address, RunPages, serving


def test_a_body_is_read_although_the_answer_is_given(address, monkeypatch):
    """Hanging up on what was not read would take the answer back."""
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 1000.0)
    with socket.create_connection((LOOPBACK, address.port), timeout=20) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n")
        assert read_all(client).endswith(b"\r\n\r\nGET and HEAD only\n")
        for _ in range(30):  # were it not read, this would break off
            client.sendall(b"x" * 2000)
            ask(address, "/other")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),  # TLS
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000,
        b"GET / HTTP/1.1\r\nHost: " + b"h" * 30_000 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_no_request_harms_the_server(address, data, monkeypatch):
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 1.0)
    try:
        answer = raw(address, data)
    except ConnectionError:  # it hung up before all was sent
        answer = b""
    assert b"<figure" not in answer
    assert ask(address)[0].status == 200


def test_a_slow_client_is_cut_off(address, monkeypatch):
    """A byte now and then: each comes in time, the request as a whole does not."""
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 0.5)
    with socket.create_connection((LOOPBACK, address.port), timeout=20) as client:
        client.sendall(b"GET / HT")
        stop = threading.Event()

        def drip():
            while not stop.wait(0.1):
                try:
                    client.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
        stop.set()
        thread.join()


@contextlib.contextmanager
def connected(address, number, sent=b""):
    """Clients that send so much, and then nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connecting(address, sent)) for _ in range(number)]


def connecting(address, sent):
    client = socket.create_connection((LOOPBACK, address.port), timeout=20)
    client.sendall(sent)
    return client


def descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


@pytest.mark.parametrize("sent", [b"", b"GET / HT"], ids=["idle", "half a request"])
@pytest.mark.parametrize("number", [1, 3 * MOST_CLIENTS])
def test_clients_that_say_nothing_keep_nobody_waiting(address, monkeypatch, number, sent):
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 1000.0)  # nobody is helped by their being cut off
    before, threads = descriptors(), threading.active_count()
    with connected(address, number, sent):
        for _ in range(3):
            assert ask(address)[0].status == 200
        assert descriptors() - before <= number + MOST_CLIENTS
        assert threading.active_count() == threads


def test_who_waits_while_a_page_is_made_is_not_late(run, monkeypatch):
    """A page that takes longer to make than a request may take: a small board, in the midst of a step."""
    passed_s = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed_s))
    monkeypatch.setattr(clients, "time", clock)
    with (
        serving(Address(LOOPBACK, 0), run) as address,
        connected(address, 1, b"GET / HTTP/1.1\r\n") as (other,),
    ):

        def page(self):
            if not passed_s:
                other.sendall(b"\r\n")
                passed_s.append(2 * clients.REQUEST_SECONDS)
            return b"page"

        monkeypatch.setattr(RunPages, "page", page)
        assert ask(address)[1] == b"page"
        assert other.recv(8) == b"HTTP/1.0"


def test_clients_that_do_not_read_keep_nobody_waiting(run, monkeypatch):
    """A page larger than any buffer of the kernel cannot be sent to them."""
    monkeypatch.setattr(clients, "ANSWER_SECONDS", 1000.0)
    page = b"x" * (32 << 20)
    monkeypatch.setattr(RunPages, "page", lambda self: page)
    request = b"GET / HTTP/1.1\r\n\r\n"
    with serving(Address(LOOPBACK, 0), run) as address, connected(address, 5, request) as readers:
        assert readers[0].recv(8) == b"HTTP/1.0"
        assert ask(address, method="HEAD")[0].status == 200
        assert ask(address)[1] == page  # in as many pieces as it takes


def test_the_oldest_goes_when_there_are_too_many(address, monkeypatch):
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 1000.0)
    with connected(address, MOST_CLIENTS + 1) as idle:
        assert idle[0].recv(1) == b""
        idle[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert idle[1].recv(8) == b"HTTP/1.0"


def test_who_is_being_answered_does_not_go_for_those_who_are_silent(run, monkeypatch):
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 1000.0)
    page = b"x" * (32 << 20)  # more than the kernel takes at once
    monkeypatch.setattr(RunPages, "page", lambda self: page)
    request = b"GET / HTTP/1.1\r\n\r\n"
    with serving(Address(LOOPBACK, 0), run) as address, connected(address, 1, request) as (reader,):
        begin = reader.recv(8)
        with connected(address, 2 * MOST_CLIENTS):
            assert (begin + read_all(reader)).endswith(page)


def test_a_request_in_too_many_pieces_is_cut_off(monkeypatch):
    """Each piece is a look at all that came: bytes one by one would keep the board busy."""
    looks = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = clients._Client(ours)
        for number in range(clients.MOST_PIECES + 1):
            theirs.sendall(b"x\n")
            state = client.go_on(lambda received: looks.append(received))
            assert (state == clients.GONE) == (number == clients.MOST_PIECES)
    assert len(looks) == clients.MOST_PIECES


def test_who_does_not_hang_up_is_hung_up_on(address, monkeypatch):
    """After an answer as before it."""
    before = descriptors()
    monkeypatch.setattr(clients, "REQUEST_SECONDS", 0.2)
    with connected(address, 2) as idle, connected(address, 2, b"GET / HTTP/1.1\r\n\r\n") as answered:
        for client in (*idle, *answered):
            with contextlib.suppress(ConnectionError):
                while client.recv(1 << 16):
                    pass
        deadline = time.monotonic() + 20
        while descriptors() - before > 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
