"""Serves the page of a running run on this machine. The page reloads itself.

    gxpo watch out/tiny-gxpo                                    # http://127.0.0.1:8321

Reads the run's folder and writes nothing. Others on the network see it only with `--host 0.0.0.0`.
"""

import argparse
import ipaddress
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..reporting.arms import load_runs
from ..reporting.page import POLICY, render, render_notice
from ..reporting.sections import make_sections
from ..reporting.sections.section import Section


MOST_CONNECTIONS = 32
TIME_LIMIT = 20.0  # seconds for a client to send its request, and again to receive the page


def make_server(names: list[str], host: str, port: int, every: int) -> "PageServer":
    """A server of one page, at `/`.

    Args:
        names (`list[str]`): Runs, as for `gxpo report`.
        host (`str`), port (`int`): Where it listens; port 0 uses any free port.
        every (`int`): Seconds after which the page reloads itself.
    """
    return PageServer(names, host, port, every)


class PageServer(ThreadingHTTPServer):
    """Serves runs to clients that may be slow, many, or sent here by another site's page.

    Each connection has a thread, and serves one request. At `MOST_CONNECTIONS` a new one replaces the oldest that
    still waits for its client.

    Args:
        names, host, port, every: As for `make_server`.
    """

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, names: list[str], host: str, port: int, every: int):
        self.names, self.host, self.every = names, host, every
        self._waiting: dict[socket.socket, float] = {}  # connections that wait for their client, and their deadlines
        self._count = 0
        self._lock = threading.Condition()
        self._page_lock, self._page_begun, self._page = threading.Lock(), float("-inf"), ("", 503)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    # ---- Connections

    def process_request(self, request: socket.socket, client_address) -> None:
        with self._lock:
            if self._count >= MOST_CONNECTIONS and self._waiting:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                _shut(oldest)
            if not self._lock.wait_for(lambda: self._count < MOST_CONNECTIONS, timeout=5.0):  # a page is being made
                return super().shutdown_request(request)
            self._count += 1
        self.wait_for(request)
        super().process_request(request, client_address)

    def wait_for(self, connection: socket.socket) -> None:
        """Starts waiting for the client, with a deadline."""
        with self._lock:
            self._waiting[connection] = time.monotonic() + TIME_LIMIT

    def stop_waiting_for(self, connection: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(connection, None)

    def service_actions(self) -> None:
        """Called twice a second."""
        with self._lock:
            for connection, end in self._waiting.items():
                if time.monotonic() > end:
                    _shut(connection)

    def shutdown_request(self, request: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(request, None)
            self._count -= 1
            self._lock.notify_all()
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # the client has closed the connection
            super().handle_error(request, client_address)

    # ---- The page

    def is_own(self, host: str | None) -> bool:
        """Whether a request is for this server. Another site could read it through a name of its own that resolves to
        here.
        """
        name = (host or "").lower().strip()
        name = name[: name.rfind(":")] if not name.endswith("]") and name.rpartition(":")[2].isdigit() else name
        name = name.removeprefix("[").removesuffix("]").removesuffix(".")
        if not name:
            return False
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            return True
        with suppress(ValueError):  # an address can't be redirected, unlike a name
            return _is_wildcard(self.host) and bool(ipaddress.ip_address(name))
        return _is_wildcard(self.host) and name == socket.gethostname().lower()

    def page(self) -> tuple[str, int]:
        """The page and its status. It is made once for all requests that came before it was begun."""
        asked = time.monotonic()
        with self._page_lock:
            if self._page_begun < asked:
                self._page_begun = time.monotonic()
                self._page = self._draw()
            return self._page

    def _draw(self) -> tuple[str, int]:
        unreadable: list[str] = []
        try:
            runs = load_runs(self.names, unreadable)
            if runs:
                sections = [Section("Unreadable", unreadable)] if unreadable else []
                return render(runs, [*sections, *make_sections(runs)], refresh=self.every), 200
        except ValueError as error:  # such as a run that has just begun
            unreadable.append(str(error))
        return render_notice("No run can be shown", unreadable, refresh=self.every), 503


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "gxpo_trl", ""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.server.is_own(self.headers.get("Host")):
            return True
        self.send_error(403, explain="This page is not for that host.")
        return False

    def do_GET(self) -> None:
        if self.path != "/":
            return self.send_error(404)
        self.server.stop_waiting_for(self.connection)
        page, status = self.server.page()
        self.server.wait_for(self.connection)
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, *args) -> None:
        pass


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for `gxpo report`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on")
    parser.add_argument("--every", type=int, default=15, help="seconds between reloads")
    options = parser.parse_args(arguments)
    try:
        server = make_server(options.runs, options.host, options.port, options.every)
    except (OSError, OverflowError) as error:
        sys.exit(f"error: {options.host}:{options.port} can't be listened on: {error}. Choose another `--port`.")
    print(f"http://{options.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
