"""Read through fsspec in bounded time and memory, whatever the server sends.

An attempt that takes too long is cancelled, which closes its connection. Answers over HTTP and from S3 are checked
against the request and counted while they arrive, after decompression. The clients of other stores receive an answer in
full before its length can be checked.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

_CHUNK_BYTES = 1 << 20
_MAX_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,20})-(\d{1,20})/(?:\d{1,20}|\*)", re.ASCII)
_UNAUTHORIZED = (401, 403, 407)
_UNSATISFIABLE = 416  # the object ends before the range

Result = TypeVar("Result")
_Receive = Callable[[int], Awaitable[bytes]]


class WrongAnswer(OSError):
    """A server sent something other than was requested; it may recover, as after a lost connection."""


class TooLong(Exception):
    """An object is longer than ``Request.max_bytes``."""


class NoRanges(Exception):
    """A server sends whole objects only."""


@dataclass(frozen=True)
class Request:
    """A read of one object.

    Attributes:
        path: of the object, as its file system names it.
        span: bytes [begin, end) of the object; None for the whole object.
        max_bytes: length of the longest whole object that is accepted.
        needs_ranges: whether to refuse whole objects as answers to a span in the middle.
    """

    path: str
    span: tuple[int, int] | None = None
    max_bytes: int = 0
    needs_ranges: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.span is None else {"Range": f"bytes={self.span[0]}-{self.span[1] - 1}"}


def call(files: Any, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """Call a method of an fsspec file system; raises TimeoutError if it takes longer than ``seconds``."""
    if files.async_impl:
        return _run(files, partial(getattr(files, f"_{method}"), *arguments, **options), seconds=seconds)
    return _call_in_thread(seconds, partial(getattr(files, method), *arguments, **options))


def read(files: Any, request: Request, seconds: float) -> bytes:
    """Return the bytes of an object, limited to the requested number; the object may end before.

    Raises:
        WrongAnswer: the server sent another part of the object, or more than it.
        TooLong: the whole object is longer than ``max_bytes``.
        NoRanges: the server sends whole objects only, and ``needs_ranges`` is set.
        FileNotFoundError, PermissionError: the object is missing or may not be read.
        TimeoutError: it takes longer than ``seconds``.
    """
    if not files.async_impl:
        return _call_in_thread(seconds, partial(_read_blocking, files, request))
    readers = {"http": _read_http, "https": _read_http, "s3": _read_s3, "s3a": _read_s3}
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    reader = next((readers[protocol] for protocol in protocols if protocol in readers), _read_any)
    return bytes(_run(files, partial(reader, files, request), seconds=seconds))


def _run(files: Any, function: Callable[[], Awaitable[Result]], seconds: float) -> Result:
    try:
        result: Result = sync(files.loop, function, timeout=seconds)
    except FSTimeoutError:
        raise _no_answer(seconds) from None
    return result


def _no_answer(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer within {seconds:g} s")


async def _read_http(files: Any, request: Request) -> bytes:
    """Read over HTTP; if the server sends the whole object for a range, skip its beginning."""
    from aiohttp import NonHttpUrlRedirectClientError, TooManyRedirects

    try:
        return await _get(files, request)
    except TooManyRedirects:
        raise WrongAnswer(f"the server redirects more than {_MAX_REDIRECTS} times") from None
    except NonHttpUrlRedirectClientError as error:
        raise WrongAnswer(f"the server redirects to {error}, which is not followed") from None


async def _get(files: Any, request: Request) -> bytes:
    session = await files.set_session()
    options = {**files.kwargs, "headers": {**files.kwargs.get("headers", {}), **request.headers}}
    url = files.encode_url(request.path)
    async with session.get(url, max_redirects=_MAX_REDIRECTS, **options) as response:
        status, length = response.status, response.content_length
        if status == 404:
            raise FileNotFoundError(request.path)
        if status in _UNAUTHORIZED:
            raise PermissionError(f"{status} {response.reason}")
        if status == _UNSATISFIABLE and request.span is not None:
            return b""
        response.raise_for_status()
        if status == 206:
            _check_range(request, response.headers.get("Content-Range"))
        elif request.needs_ranges and request.span is not None and request.span[0] > 0:
            raise NoRanges("the server sends the whole object")
        elif status != 200:
            raise WrongAnswer(f"the server answered with status {status}")
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        announced = length if encoding in ("", "identity") else None
        if status == 200 and request.span is not None:
            await _check_whole(files, request, announced)
        content = await _receive(response.content.read, request, status == 206, announced)
        if not response.content.is_eof():
            response.close()  # the rest is never read
    return content


async def _read_s3(files: Any, request: Request) -> bytes:
    bucket, key, version = files.split_path(request.path)
    options = {**request.headers, **({"VersionId": version} if version else {})}
    answer = await files._call_s3("get_object", Bucket=bucket, Key=key, **options)
    body = answer["Body"]
    try:
        is_range = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
        if is_range:
            _check_range(request, answer.get("ContentRange"))
        return await _receive(body.read, request, is_range, answer.get("ContentLength"))
    finally:
        body.close()


async def _read_any(files: Any, request: Request) -> bytes:
    begin, end = request.span or (0, int((await files._info(request.path))["size"]))
    if request.span is None and end > request.max_bytes:
        raise _too_long(request)
    return bytes(await files._cat_file(request.path, start=begin, end=end))[: end - begin] if end > begin else b""


def _read_blocking(files: Any, request: Request) -> bytes:
    begin, end = request.span or (0, request.max_bytes + 1)
    content = bytes(files.cat_file(request.path, start=begin, end=end))
    if request.span is None and len(content) > request.max_bytes:
        raise _too_long(request)
    return content[: end - begin]


def _check_range(request: Request, content_range: str | None) -> None:
    """Check that a partial answer is the requested part of the object, or ends earlier."""
    found = _CONTENT_RANGE.match(content_range or "")
    if request.span is None or found is None:
        raise WrongAnswer(f"the server sent another part of the object, {content_range!r}")
    begin, end = request.span
    if int(found[1]) != begin or int(found[2]) >= end:
        raise WrongAnswer(f"the server sent {content_range!r} instead of bytes {begin}-{end - 1}")


async def _check_whole(files: Any, request: Request, announced: int | None) -> None:
    """Check that an answer to a range is the whole object, not for example the page of a proxy."""
    assert request.span is not None
    try:
        size = (await files._info(request.path)).get("size")
    except (OSError, ValueError) as error:
        raise WrongAnswer("the server does not answer with a range, nor the object's length") from error
    if announced is None or announced != size or announced < request.span[1]:
        raise WrongAnswer(f"the server sent an answer of {announced} bytes instead of a range of the {size} bytes")


async def _receive(receive: _Receive, request: Request, is_range: bool, announced: int | None) -> bytes:
    """Receive an answer up to its permitted length.

    Args:
        receive: returns up to a number of bytes; none at the end of the answer.
        is_range: whether the answer starts at the requested byte, not at the beginning of the object.
        announced: length of the answer in bytes, if the server gave it.
    """
    begin, end = request.span or (0, request.max_bytes)
    limit, skipped = end - begin, 0 if is_range else begin
    is_whole = request.span is not None and not is_range
    if announced is not None and announced > limit and not is_whole:
        raise _too_long(request)
    while skipped:
        chunk = await receive(min(skipped, _CHUNK_BYTES))
        if not chunk:
            return b""
        skipped -= len(chunk)
    content = bytearray()
    # read the end of the answer too if it is due, so that the connection can be reused
    room = limit if is_whole or announced == limit else limit + 1
    try:
        while len(content) < room:
            chunk = await receive(min(room - len(content), _CHUNK_BYTES))
            if not chunk:
                break
            content += chunk
        if len(content) > limit:
            raise _too_long(request)
        return bytes(content)
    finally:
        content.clear()  # the traceback of an error keeps the variable


def _too_long(request: Request) -> Exception:
    if request.span is None:
        return TooLong(f"the object has more than {request.max_bytes} bytes, the limit for this kind of object")
    return WrongAnswer(f"the server sent more than bytes {request.span[0]}-{request.span[1] - 1}")


def _call_in_thread(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the function's result, or raise TimeoutError if it takes longer.

    It runs in a thread that is abandoned when it stalls, because blocking calls cannot be interrupted.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="store-attempt")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise _no_answer(seconds)
    return results[0]
