"""A ModelScope hub on loopback: the routes of a download, and the faults that a test asks for."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MEGABYTE = 1_000_000


class Hub(ThreadingHTTPServer):
    """Serves `files` as owner/tiny at the revisions master and v1."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.listings = 0
        self.sent: list[tuple[str, int]] = []  # each request for a file: its name, its first byte
        # Faults.
        self.refuses = 0  # the HTTP status for every question
        self.sizes: dict[str, int] = {}  # what the list says instead of the true size
        self.corrupt: set[str] = set()  # sent with other bytes
        self.cuts: dict[str, int] = {}  # the connection is cut at this byte, once
        self.go_on = threading.Event()  # a file in `held` is sent to its half until this is set
        self.held: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        """From now on nobody answers at `url`."""
        self.go_on.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        revision_known = query.get("Revision") in ("master", "v1")
        if hub.refuses:
            self.send_error(hub.refuses)
        elif url.path == "/api/v1/models/owner/tiny/repo/files" and revision_known:
            hub.listings += 1
            self._answer(
                {
                    "Files": [
                        {
                            "Path": path,
                            "Name": path.rpartition("/")[2],
                            "Type": "blob",
                            "Size": hub.sizes.get(path, len(data)),
                            "Sha256": hashlib.sha256(data).hexdigest(),
                        }
                        for path, data in hub.files.items()
                    ]
                }
            )
        elif url.path == "/api/v1/models/owner/tiny/revisions":
            branches, tags = [{"Revision": "master"}], [{"Revision": "v1"}]
            self._answer({"RevisionMap": {"Branches": branches, "Tags": tags}})
        elif url.path == "/api/v1/models/owner/tiny/repo" and revision_known:
            self._send_file(query["FilePath"])
        else:
            self.send_error(404)

    def _answer(self, data: object) -> None:
        body = json.dumps({"Code": 200, "Success": True, "Data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, name: str) -> None:
        hub, data = self.server, self.server.files[name]
        if name in hub.corrupt:
            data = bytes(byte ^ 1 for byte in data[:100]) + data[100:]
        start = int((self.headers["Range"] or "bytes=0-")[len("bytes=") : -1])
        hub.sent.append((name, start))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if name in hub.cuts:
            self.wfile.write(data[start : hub.cuts.pop(name)])
            self.close_connection = True
            return
        if name in hub.held:
            self.wfile.write(data[start : len(data) // 2])
            start = len(data) // 2
            hub.go_on.wait(60)
        try:
            self.wfile.write(data[start:])
        except OSError:  # the client was killed
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub with these files, until the end of the block."""
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield hub
    finally:
        hub.close()
