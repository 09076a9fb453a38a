"""HTTP server on loopback that serves a folder with byte ranges and injects faults."""

from __future__ import annotations

import itertools
import re
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves ``root``; ``faults`` lists the faults of the next GETs, None for no fault.

    Faults: "503", "stall" (sends half, then nothing), "cut" (closes in the middle), "short" (fewer bytes, with a
    matching length), "whole" (ignores the range), "to URL" (redirects), and those of ``HOSTILE``: "range" and "no
    range" (another part of the object, or a part that is not named), "long" (more than asked), "endless" and "chunked"
    (without an end, at full speed), "slow" (a byte at a time), "headers" (without an end), "bomb" (a gzip body of
    zeros), "garbage" (no HTTP), "loop" and "file" (redirects to itself and to a local file). ``gone`` has the missing
    paths; ``gets`` logs (path, fault); ``logins`` logs the Authorization header of each GET.
    """

    HOSTILE = (
        "range", "no range", "long", "endless", "chunked", "slow", "headers", "bomb", "garbage", "loop", "file",
    )  # fmt: skip

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: list[str | None] = []
        self.gone: set[str] = set()
        self.gets: list[tuple[str, str | None]] = []
        self.logins: list[str | None] = []
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
        self.server.logins.append(self.headers.get("Authorization"))
        exists = self.path not in self.server.gone
        fault = self.server.faults.pop(0) if exists and self.server.faults else None
        self.server.gets.append((self.path, fault))
        self._serve(fault, body=True)

    def _serve(self, fault: str | None, body: bool) -> None:
        if fault is not None and fault.startswith("to "):
            self._redirect(fault.removeprefix("to "))
            return
        if fault in FaultyServer.HOSTILE and self._attack(fault):
            return
        name = self.path.partition("?")[0]
        path = self.server.root / name.lstrip("/")
        if name in self.server.gone or not path.is_file():
            self.send_error(404)
            return
        if fault == "503":
            self.send_error(503)
            return
        content = path.read_bytes()
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested and fault != "whole":
            begin, end = int(requested[1]), min(int(requested[2] or len(content) - 1) + 1, len(content))
            if fault in ("range", "no range"):
                begin, end = (begin - 1, end - 1) if begin else (begin + 1, end + 1)
            self.send_response(206)
            if fault != "no range":
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            end += 5 if fault == "long" else 0
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

    def _redirect(self, url: str) -> None:
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _attack(self, fault: str) -> bool:
        """Send an answer that has nothing to do with the object; return whether the fault is of this kind."""
        self.close_connection = True
        if fault in ("loop", "file"):
            self._redirect(self.path if fault == "loop" else "file:///etc/passwd")
            return True
        if fault == "garbage":
            self.wfile.write(b"\x00\x01garbage\r\n\r\n")
            return True
        if fault == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._repeat(b"X-A: b\r\n" * 100)
            return True
        headers = {
            "endless": ("Content-Length", str(10**15)), "chunked": ("Transfer-Encoding", "chunked"),
            "slow": ("Content-Length", "1000000"), "bomb": ("Content-Encoding", "gzip"),
        }  # fmt: skip
        if fault not in headers:
            self.close_connection = False
            return False
        self.send_response(200)
        self.send_header(*headers[fault])
        self.end_headers()
        if fault == "slow":
            self._repeat(b" ", 0.05)
        elif fault == "bomb":
            compressor = zlib.compressobj(9, wbits=31)
            block = bytes(1 << 24)
            self._repeat(b"", blocks=(compressor.compress(block) for _ in range(64)))
        else:
            block = bytes(1 << 20)
            self._repeat(block if fault == "endless" else b"100000\r\n" + block + b"\r\n")
        return True

    def _repeat(self, block: bytes, pause: float = 0.0, blocks: Iterable[bytes] | None = None) -> None:
        """Send a block again and again, or ``blocks``, until the client or the server closes."""
        for each in blocks if blocks is not None else itertools.repeat(block):
            if self.server.closing.is_set():
                return
            self.wfile.write(each)
            self.wfile.flush()
            time.sleep(pause)


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
