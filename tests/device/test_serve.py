"""`--serve`: one page, to this machine, by GET or HEAD."""

import errno
import json
import os
import re
import signal
import socket
import time
import urllib.request

import pytest
from device_harness import lance_device, refused, spawn, train, train_words
from page_harness import LOOPBACK, ask, raw
from report_rows import RECORD, step_rows, write_rows, write_run

from lance_device import following, serve
from lance_device.run_folder import RunFolder
from lance_device.serve import Address, RunPages, serving
from lance_edge.errors import PlatformError
from lance_edge.profiles import StepRow


def assert_ours(headers):
    assert {name: headers[name] for name in serve.HEADERS} == serve.HEADERS
    assert headers["Content-Type"] == "text/plain; charset=utf-8"


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


def test_a_run_that_is_lost_before_a_step_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(following, "PATIENCE_S", 0.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({**RECORD, "status": "running"}))
    assert "run: lost, and no step was made." in RunPages(tmp_path / "run").page().decode()


def test_the_page_says_that_the_process_is_gone(run, monkeypatch):
    """And is made anew for that alone: nothing is written when a process is killed."""
    monkeypatch.setattr(serve, "FRESH_S", 0.0)
    pages = RunPages(run)
    with RunFolder(run).held(create=False):
        monkeypatch.setattr(following, "PATIENCE_S", 0.0)
        assert "run had not ended when this was made" in pages.page().decode()
    lost = pages.page().decode()
    assert "had not ended" not in lost
    assert "running" not in lost
    assert "run is lost, no process on this machine is training into it: take it up with --resume." in lost
    assert 'http-equiv="refresh"' in lost  # it may be taken up
    with RunFolder(run).held(create=False):
        assert "run had not ended when this was made" in pages.page().decode()


def test_a_first_look_late_finds_the_process_gone_at_once(run, monkeypatch):
    """What is new to the page is not new: the files say when the run wrote."""
    pages = RunPages(run), RunPages(run)
    assert "run had not ended" in pages[0].page().decode()
    for path in run.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 31))
    assert "run is lost" in pages[1].page().decode()


def test_a_run_elsewhere_that_goes_on_is_not_lost_to_a_late_first_look(run, monkeypatch):
    """Its process holds no lock that this machine knows of; it has written just now."""
    pages, now = RunPages(run), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31.0)
    assert "run had not ended" in pages.page().decode()


def test_a_page_that_could_not_be_made_is_made_when_next_asked_for(run, monkeypatch):
    pages = RunPages(run)
    with monkeypatch.context() as patch:
        patch.setattr(serve, "compose", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pages.page()
    assert b"5 of 20" in pages.page()


def test_only_get_and_head_are_answered(run, address):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"):
        response, body = ask(address, method=method)
        assert response.status == 405, method
        assert response.headers["Allow"] == "GET, HEAD"
        assert body == b"GET and HEAD only\n"
        assert_ours(response.headers)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_head_is_get_without_the_body(address):
    page, body = ask(address)
    head, nothing = ask(address, method="HEAD")
    assert (head.status, nothing) == (200, b"")
    assert head.getheaders() == page.getheaders()
    assert head.headers["Content-Length"] == str(len(body))
    assert ask(address, "/other", method="HEAD")[0].status == 404


def test_a_query_is_ignored(address):
    assert b"5 of 20" in ask(address, "/?x=1")[1]


PATHS = (
    "/run.json",
    "/steps.csv",
    "/../run.json",
    "/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/./",
    "/other?a=/",
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
    assert raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").split()[1] == b"421"
    headers = ask(address)[0].headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "script-src" not in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"hello\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / x HTTP/1.1\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_told_so_in_a_line(address, data):
    header, _, body = raw(address, data).partition(b"\r\n\r\n")
    status, *lines = header.decode().split("\r\n")
    assert status == "HTTP/1.0 400 Bad Request"
    assert body == b"expected a request of HTTP/1, such as: GET / HTTP/1.1\n"
    assert_ours(dict(line.split(": ", 1) for line in lines))


def test_what_cannot_be_read_is_said_and_serving_goes_on(run, address, monkeypatch):
    monkeypatch.setattr(serve, "FRESH_S", 0.0)
    (run / "run.json").write_text("{")
    response, body = ask(address)
    assert response.status == 503
    assert b"run.json line 1, column 2: not JSON" in body
    (run / "run.json").write_text(json.dumps(RECORD))
    assert ask(address)[0].status == 200


def test_a_fault_of_the_page_ends_neither_serving_nor_run(address, monkeypatch):
    monkeypatch.setattr(RunPages, "page", lambda self: 1 // 0)
    response, body = ask(address)
    assert response.status == 500
    assert body == b"the page could not be made (ZeroDivisionError: integer division or modulo by zero)\n"
    monkeypatch.undo()
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


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Cannot assign requested address"),  # RFC 5737: nobody's
        ("no.such.host.invalid", ".+"),  # RFC 6761; the reason depends on there being a name server
        ("a..b", ".+"),
    ],
)
def test_an_address_of_another_machine_is_said_to_be_that(tmp_path, host, reason):
    with pytest.raises(PlatformError) as refusal, serving(Address(host, 0), tmp_path):
        pass
    assert re.fullmatch(
        rf"--serve {re.escape(host)}:0: cannot listen there \({reason}\); choose an address of this machine,"
        r" such as 127\.0\.0\.1 or 0\.0\.0\.0",
        str(refusal.value),
    )


def test_a_port_that_is_not_ours_to_take_asks_for_another(tmp_path, monkeypatch):
    def refuse(self, address):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {"bind": refuse}))
    with (
        pytest.raises(PlatformError, match=r"\(Permission denied\); choose another port$"),
        serving(Address(LOOPBACK, 80), tmp_path),
    ):
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
    """It would cost 2 MiB."""
    code = "import atexit, sys; atexit.register(lambda: print('lance_device.serve' in sys.modules))"
    process = spawn(*train_words(package, images, tmp_path / "run"), "--steps", 1, prelude=code)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "False"


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("interrupted", 10), ("lost", 12)])
def test_watch_serves_a_run_that_has_ended_until_ctrl_c(tmp_path, status, code):
    out = write_run(tmp_path / "run", record={**RECORD, "status": "running" if status == "lost" else status})
    impatient = "from lance_device import following; following.PATIENCE_S = 0.0"
    process = spawn("watch", out, "--serve", 0, prelude=impatient)
    lines = iter(process.stderr.readline, "")
    said = next(line for line in lines if "the run has ended" in line)
    found = re.fullmatch(
        r"the run has ended; its page stays at (http://127\.0\.0\.1:\d+/) until Ctrl-C", said.strip()
    )
    for _ in range(2):
        page = urllib.request.urlopen(found[1], timeout=20).read()
        assert b"<figure " in page
        assert (b"run is lost" in page) == (status == "lost")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert output.startswith(f"{out}: {status} after 20 of 20 steps in ")
