"""HTTP server on loopback that serves a folder with byte ranges and injects faults."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves ``root``; ``faults`` lists the faults of the next GETs, None for no fault.

    Faults: "503", "stall" (sends half, then nothing), "cut" (closes in the middle), "short" (fewer bytes, with a
    matching length), "whole" (ignores the range). ``gone`` has the missing paths; ``gets`` logs (path, fault).
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: list[str | None] = []
        self.gone: set[str] = set()
        self.gets: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its header
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(None, body=False)

    def do_GET(self) -> None:
        exists = self.path not in self.server.gone
        fault = self.server.faults.pop(0) if exists and self.server.faults else None
        self.server.gets.append((self.path, fault))
        self._serve(fault, body=True)

    def _serve(self, fault: str | None, body: bool) -> None:
        path = self.server.root / self.path.lstrip("/")
        if self.path in self.server.gone or not path.is_file():
            self.send_error(404)
            return
        if fault == "503":
            self.send_error(503)
            return
        content = path.read_bytes()
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested and fault != "whole":
            begin, end = int(requested[1]), min(int(requested[2] or len(content) - 1) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            content = content[begin:end]
        else:
            self.send_response(200)
        if fault == "short":
            content = content[: len(content) // 2]
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        if fault in ("cut", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.closing.wait(20)
            self.close_connection = True
            return
        self.wfile.write(content)


@contextmanager
def faulty_server(root: Path) -> Iterator[FaultyServer]:
    """Run a server."""
    server = FaultyServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        time.sleep(0)
