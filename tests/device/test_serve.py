"""`--serve`: one page, to this machine, by GET, whatever clients do."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request

import pytest
from device_harness import lance_device, refused, spawn, train, train_words
from report_rows import RECORD, step_rows, write_rows, write_run

from lance_device import serve
from lance_device.serve import Address, RunPages, serving
from lance_edge.errors import PlatformError
from lance_edge.profiles import StepRow

LOOPBACK = "127.0.0.1"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", steps=5, record={**RECORD, "status": "running"})


@pytest.fixture
def address(run):
    with serving(Address(LOOPBACK, 0), run) as found:
        yield found


def ask(address, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(LOOPBACK, address.port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def raw(address, data, wait_s=20):
    with socket.create_connection((LOOPBACK, address.port), timeout=wait_s) as client:
        client.sendall(data)
        received = b""
        while part := client.recv(65536):
            received += part
        return received


def test_the_page_shows_the_run_and_is_made_anew(run, address, monkeypatch):
    response, body = ask(address)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"5 of 20" in body
    assert b'http-equiv="refresh" content="10"' in body
    assert body.count(b"<figure ") >= 6
    write_rows(run / "steps.csv", StepRow, step_rows(step=6), mode="a")
    assert ask(address)[1] == body  # a moment later: the same page
    monkeypatch.setattr(serve, "FRESH_S", 0.0)
    assert b"6 of 20" in ask(address)[1]
    (run / "run.json").write_text(json.dumps(RECORD))
    assert b"http-equiv" not in ask(address)[1]  # finished: nothing more to come


def test_before_the_run_there_is_a_page_that_waits(tmp_path):
    page = RunPages(tmp_path / "run").page().decode()
    assert "run: no step was made yet." in page
    assert 'http-equiv="refresh"' in page


def test_only_get_is_answered(run, address):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        response, _ = ask(address, method=method)
        assert response.status == 405, method
        assert response.headers["Allow"] == "GET"
    assert ask(address, method="BREW")[0].status == 501
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


PATHS = (
    "/run.json",
    "/steps.csv",
    "/../run.json",
    "/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/./",
    "/?a=b",
    "*",
    "/\\..",
)


@pytest.mark.parametrize("path", PATHS)
def test_no_path_beyond_the_page(address, path):
    answer = raw(address, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 404 ")
    assert answer.endswith(b"\r\n\r\nthere is one page: /\n")


EVIL = (
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "pi.evil.example",
    "1.2.3.4.evil.example",
    "[::1",
    "",
)


def test_other_sites_cannot_read_the_page_in_a_browser(address):
    """A name of theirs that leads to 127.0.0.1 (DNS rebinding) arrives as the Host of the request."""
    for host in EVIL:
        response, body = ask(address, Host=host)
        assert response.status == 421
        assert body == (b"not a name of this machine: ask by its IP address, or start with --serve NAME:PORT\n")
    for host in (
        "localhost",
        "LOCALHOST",
        "localhost:9999",
        "127.0.0.1:1",
        "[::1]:8080",
        "localhost.",
        "127.0.0.2",
    ):
        assert ask(address, Host=host)[0].status == 200, host
    headers = ask(address)[0].headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "script-src" not in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200) + b"\n",  # TLS
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000,
        b"GET / HTTP/1.1\r\nHost: " + b"h" * 30_000 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_no_request_harms_the_server(address, data, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 1.0)
    try:
        answer = raw(address, data)
    except ConnectionError:  # it hung up before all was sent
        answer = b""
    assert b"<figure" not in answer
    assert ask(address)[0].status == 200


def test_a_slow_client_is_cut_off(address, monkeypatch):
    """A byte now and then: each comes in time, the request as a whole does not."""
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.5)
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
        assert ask(address)[0].status == 200  # the next one is served all the same
        stop.set()
        thread.join()


def test_what_cannot_be_read_is_said_and_serving_goes_on(run, address, monkeypatch):
    monkeypatch.setattr(serve, "FRESH_S", 0.0)
    (run / "run.json").write_text("{")
    response, body = ask(address)
    assert response.status == 503
    assert b"run.json line 1, column 2: not JSON" in body
    (run / "run.json").write_text(json.dumps(RECORD))
    assert ask(address)[0].status == 200


def test_it_listens_on_loopback_unless_told_otherwise(run):
    assert Address(LOOPBACK, 1).is_loopback
    assert Address("::1", 1).is_loopback
    assert Address("localhost", 1).is_loopback
    assert not Address("0.0.0.0", 1).is_loopback
    assert not Address("pi.local", 1).is_loopback
    assert str(Address("::1", 80)) == "[::1]:80"
    assert Address("LocalHost", 1).is_loopback


def test_to_others_it_answers_by_address_and_by_its_own_names(run, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Pi.fritz.box")
    with serving(Address("0.0.0.0", 0), run) as found:
        for host in (
            "pi",
            "pi.local",
            "PI.fritz.box:8080",
            "192.168.1.20:8080",
            "[fe80::1]",
            "localhost",
            "0.0.0.0",
        ):
            assert ask(found, Host=host)[0].status == 200, host
        for host in EVIL:
            assert ask(found, Host=host)[0].status == 421, host


def test_it_answers_at_the_address_that_it_announces(run):
    with serving(Address("127.0.0.2", 0), run) as found:
        page = urllib.request.urlopen(f"http://{found}/", timeout=20)
        assert page.status == 200
    assert Address("board.example", 80).answers_to("board.example")
    assert not Address("board.example", 80).answers_to("other.example")


def test_a_taken_port_is_an_error_before_the_run(package, images, tmp_path):
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(train(package, images, tmp_path / "run", "--steps", 1, "--serve", port), 9)
        assert line == (
            f"error: --serve 127.0.0.1:{port}: cannot listen there (Address already in use); choose another"
            " port"
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(PlatformError, match="cannot listen there"), serving(Address("192.0.2.1", 0), tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "http", ":8080", "70000", "-1", "a:b", "8080x"])
def test_addresses_that_are_none(tmp_path, text):
    result = lance_device("watch", tmp_path, "--serve", text)
    assert result.exit_code == 2
    assert "expected a port such as 8080, or 0.0.0.0:8080, found" in result.stderr


def test_train_serves_its_page_while_it_trains(package, images, tmp_path):
    out = tmp_path / "run"
    process = spawn(*train_words(package, images, out), "--epochs", 100_000, "--serve", 0)
    found = None
    while found is None:
        line = process.stderr.readline()
        assert line, process.communicate()
        found = re.search(r"the run's page is at (http://127\.0\.0\.1:\d+/)$", line.rstrip())
    page, deadline = "", time.monotonic() + 60
    while "Training loss, step by step" not in page:
        assert time.monotonic() < deadline
        page = urllib.request.urlopen(found[1], timeout=20).read().decode()
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors


def test_without_serve_no_server_is_imported(package, images, tmp_path):
    """It would cost 7 MiB."""
    code = "import atexit, sys; atexit.register(lambda: print('http.server' in sys.modules))"
    process = spawn(*train_words(package, images, tmp_path / "run"), "--steps", 1, prelude=code)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "False"


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("interrupted", 10)])
def test_watch_serves_a_run_that_has_ended_until_ctrl_c(tmp_path, status, code):
    out = write_run(tmp_path / "run", record={**RECORD, "status": status})
    process = spawn("watch", out, "--serve", 0)
    lines = iter(process.stderr.readline, "")
    said = next(line for line in lines if "the run has ended" in line)
    found = re.fullmatch(
        r"the run has ended; its page stays at (http://127\.0\.0\.1:\d+/) until Ctrl-C", said.strip()
    )
    for _ in range(2):
        assert b"<figure " in urllib.request.urlopen(found[1], timeout=20).read()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert output.startswith(f"{out}: {status} after 20 of 20 steps in ")
