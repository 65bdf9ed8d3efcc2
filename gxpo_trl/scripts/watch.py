"""The page of a run while it goes on, served on this machine; it loads itself again.

    gxpo watch out/tiny-gxpo                                    # http://127.0.0.1:8321

Reads the run's folder and writes nothing. Others on the network see it only if you ask for that: `--host 0.0.0.0`.
"""

import argparse
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..reporting.arms import load_runs
from ..reporting.page import render
from ..reporting.sections import make_sections


def make_server(names: list[str], host: str, port: int, every: int) -> ThreadingHTTPServer:
    """A server of one page, at `/`.

    Args:
        names (`list[str]`): Runs, as for `gxpo report`.
        host (`str`), port (`int`): Where it listens; port 0 takes any that is free.
        every (`int`): Seconds after which the page loads itself again.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/":
                self.send_error(404)
                return
            try:
                runs = load_runs(names)
                page, status = render(runs, make_sections(runs), refresh=every), 200
            except ValueError as error:  # such as a run that is only beginning
                page, status = f'<meta http-equiv="refresh" content="{every}"><pre>{error}</pre>', 503
            body = page.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return ThreadingHTTPServer((host, port), Handler)


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for `gxpo report`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on")
    parser.add_argument("--every", type=int, default=15, help="seconds between two looks")
    options = parser.parse_args(arguments)
    try:
        server = make_server(options.runs, options.host, options.port, options.every)
    except OSError as error:
        sys.exit(f"error: {options.host}:{options.port} can't be listened on: {error}. Choose another `--port`.")
    print(f"http://{options.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
