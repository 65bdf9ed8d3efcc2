"""The page of runs under way: what it shows, whom it is for, and clients that are slow or many."""

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gxpo_trl.reporting.page import POLICY
from gxpo_trl.scripts import watch
from gxpo_trl.scripts.watch import PageServer, make_server


def write_run(folder: Path, *rewards: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"step": step, "reward": 0.5, "eval_reward": reward} for step, reward in enumerate(rewards)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "run.json").write_text(json.dumps({"settings": {"update_rule": "gxpo", "seed": 0}}))
    return folder


@contextlib.contextmanager
def serving(*names: Path | str, host: str = "127.0.0.1") -> Iterator[PageServer]:
    server = make_server([str(name) for name in names], host, 0, every=7)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(server: PageServer, path: str = "/", method: str = "GET", host: str | None = None, timeout: float = 60.0):
    """The status, the page and the headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers


def test_a_run_is_watched_while_it_grows(tmp_path):
    with serving(tmp_path / "run") as server:
        assert ask(server)[0] == 503  # nothing there yet
        write_run(tmp_path / "run", 0.2, 0.4)
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        status, page, _ = ask(server)
        assert status == 200 and '<meta http-equiv="refresh" content="7">' in page and "0.600" not in page
        assert ask(server, "/run.json")[0] == ask(server, "/../run/run.json")[0] == 404
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
        write_run(tmp_path / "run", 0.2, 0.6)
        assert "0.600" in ask(server)[1]


def test_every_answer_has_the_policy_and_no_markup_of_others(tmp_path):
    with serving(f"{tmp_path}/<script>alert(1)</script>") as server:
        answers = [ask(server), ask(server, "/<script>"), ask(server, method="PUT"), ask(server, host="evil.example")]
        answers += [ask(server, "/" + "a" * 70_000), ask(server, method="<script>")]
    assert [status for status, _, _ in answers] == [503, 404, 501, 403, 414, 501]
    for _, page, headers in answers:
        assert headers["Content-Security-Policy"] == POLICY and headers["X-Content-Type-Options"] == "nosniff"
        assert "<script" not in page
    assert POLICY in answers[0][1] and "&lt;script&gt;" in answers[0][1]


def test_head_is_get_without_a_body(tmp_path):
    with serving(write_run(tmp_path / "run", 0.2)) as server:
        status, page, headers = ask(server, method="HEAD")
    assert (status, page) == (200, "") and int(headers["Content-Length"]) > 1000


def test_only_requests_for_this_host_are_answered(tmp_path):
    with serving(write_run(tmp_path / "run", 0.2)) as server:
        port = server.server_port
        own = ["localhost", "LOCALHOST:1", f"127.0.0.1:{port}", "127.0.0.1", f"[::1]:{port}", "[::1]", "localhost."]
        others = [
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "10.0.0.1",
        ]
        assert {host: ask(server, "/x", host=host)[0] for host in own} == dict.fromkeys(own, 404)
        assert {host: ask(server, host=host)[0] for host in others} == dict.fromkeys(others, 403)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.0 403")


def test_a_server_for_others_is_reached_by_its_addresses(tmp_path):
    with serving(write_run(tmp_path / "run", 0.2), host="0.0.0.0") as server:
        hosts = ["10.0.0.1:80", "[fe80::1]", socket.gethostname(), "evil.example"]
        assert [ask(server, "/x", host=host)[0] for host in hosts] == [404, 404, 404, 403]


def test_clients_that_say_nothing_are_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MOST_CONNECTIONS", 4)
    before = threading.active_count()
    with serving(write_run(tmp_path / "run", 0.2)) as server, contextlib.ExitStack() as stack:
        for i in range(60):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            client.sendall(b"GET / HTTP/1.1\r\nHost: loc"[: i % 20])
        assert ask(server)[0] == 200
        assert threading.active_count() - before <= 1 + 2 * watch.MOST_CONNECTIONS


@pytest.mark.parametrize("request_begins", [b"", b"GET / HTTP/1.1\r\n"])
def test_a_client_has_so_much_time_to_ask(tmp_path, monkeypatch, request_begins):
    """A little now and then is not enough."""
    monkeypatch.setattr(watch, "TIME_LIMIT", 0.5)
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(request_begins)
        client.settimeout(0.2)
        ended = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ended:
                try:
                    client.sendall(b"X")
                    if client.recv(1000) == b"":
                        break
                except TimeoutError:
                    pass
        assert time.monotonic() < ended


def test_a_client_that_does_not_take_the_page_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "TIME_LIMIT", 0.5)
    with serving(tmp_path) as server:
        server._draw = lambda: ("x" * 50_000_000, 200)
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            ended = time.monotonic() + 20
            time.sleep(0.2)
            while server._count and time.monotonic() < ended:
                time.sleep(0.05)
            assert not server._count


def test_those_who_ask_at_once_get_one_page(tmp_path):
    drawn = []

    def draw():
        drawn.append(1)
        time.sleep(0.3)
        return "page", 200

    with serving(tmp_path) as server:
        server._draw = draw
        clients = [threading.Thread(target=ask, args=(server,)) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert 1 <= len(drawn) <= 3


@pytest.mark.parametrize("name", ["log.jsonl", "run.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "huge", "no text", "no JSON"])
def test_what_can_not_be_read_costs_its_run(tmp_path, name, kind):
    good, bad = write_run(tmp_path / "good", 0.2), write_run(tmp_path / "<bad>", 0.2)
    path = bad / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(b'{"a": "\xff"}\n{}' if kind == "no text" else b"{]}\n{}")
    with serving(good, bad) as server:
        status, page, _ = ask(server)
        assert status == 200 and "Unreadable" in page and f"&lt;bad&gt;/{name}" in page and "0.200" in page
    with serving(bad) as server:
        status, page, _ = ask(server)
        assert status == 503 and f"&lt;bad&gt;/{name}" in page


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_costs_its_run(tmp_path):
    good, bad = write_run(tmp_path / "good", 0.2), write_run(tmp_path / "bad", 0.2)
    bad.chmod(0)
    with serving(good, bad) as server:
        assert ask(server)[0] == 200
    bad.chmod(0o700)
