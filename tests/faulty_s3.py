"""S3-compatible server on loopback that injects faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.core.base_backend import BackendDict
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class FaultyS3:
    """A WSGI application in front of moto's S3; ``faults`` lists the faults of the next GETs of objects.

    Faults: "503", "stall" (sends half, then nothing), "cut" (closes in the middle), "short" (fewer bytes, with a
    matching length), "whole" (ignores the range). ``served`` logs the faults; ``gone`` has the missing paths.
    """

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self.faults: list[str | None] = []
        self.served: list[str] = []
        self.gone: set[str] = set()
        self.closing = threading.Event()
        self.url = ""

    def set_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set the variables with which clients find this server."""
        variables = {"ENDPOINT_URL": self.url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
        for name, value in (variables | {"DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET" or path.count("/") < 2:
            return self._s3(environ, start_response)
        if path in self.gone:
            fault = "404"
        else:
            fault = self.faults.pop(0) if self.faults else None
        if fault == "whole":
            environ.pop("HTTP_RANGE", None)
        if fault in (None, "whole"):
            return self._s3(environ, start_response)
        self.served.append(fault)
        if fault in ("404", "503"):
            code = {"404": "NoSuchKey", "503": "SlowDown"}[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response(f"{fault} injected", headers)
            return [body]
        return self._broken(fault, environ, start_response)

    def _broken(self, fault: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        response: list[Any] = []
        body = b"".join(self._s3(environ, lambda status, headers, *_: response.extend([status, headers])))
        half, (status, headers) = body[: len(body) // 2], response
        length = half if fault == "short" else body
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(length)))])
        yield half
        if fault == "stall":
            self.closing.wait(20)
        if fault != "short":
            raise ConnectionResetError("injected")


class _Handler(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass

    def connection_dropped(self, error: BaseException, environ: dict[str, Any] | None = None) -> None:
        self.close_connection = True


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """Run an empty server; clients need ``set_environment``."""
    BackendDict.reset()  # moto keeps buckets for the life of the process: those of an earlier test
    application = FaultyS3()
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Handler)
    application.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield application
    finally:
        application.closing.set()
        server.shutdown()
        server.server_close()
