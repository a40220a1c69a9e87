"""The page of a run that is still training, served to this machine alone."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from .library import Library
from .page import index_of, served_page
from .records import dump_record

HOST = "127.0.0.1"


def make_server(library: Library, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page of `library` on 127.0.0.1, which looks for new trees when the page asks.

    Args:
        library: the runs.
        port: 0 takes a free one; `server.server_address` says which.
    """
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of elsewhere that makes its name lead here is not answered.
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(403)
                return
            with lock:
                self._answer()

        def _answer(self) -> None:
            news = re.fullmatch(r"/index\?version=(\d{1,9})&since=(\d{1,9})", self.path)
            tree = re.fullmatch(r"/tree/(\d{1,9})/(\d{1,9})", self.path)
            if self.path == "/":
                library.refresh()
                self._send(served_page(library), "text/html")
            elif news:
                library.refresh()
                version, since = map(int, news.groups())
                self._send(
                    json.dumps(index_of(library, since if version == library.version else 0)), "application/json"
                )
            elif tree and int(tree[1]) == library.version and int(tree[2]) < len(library.entries):
                try:
                    self._send(dump_record(library.record(int(tree[2]))), "application/json")
                except (OSError, ValueError):  # it was replaced a moment ago
                    self.send_error(410)
            else:
                self.send_error(404)

        def _send(self, text: str, kind: str) -> None:
            body = text.encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """Requests are not of interest."""

    return ThreadingHTTPServer((HOST, port), Handler)
