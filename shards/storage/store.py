"""Objects below a URL, read and written through fsspec with retries, a deadline and a timeout per attempt.

Supports ``http(s)://`` (read-only), ``s3://``, ``gs://``, ``hf://`` and every other fsspec protocol. Objects are
fetched in pieces that are retried separately, so a broken connection costs one piece, not the object.
``shards.storage.answers`` bounds the time and memory of one attempt.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import math
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import tenacity

from shards.credentials import add_netrc_login, split_query, strip_credentials
from shards.errors import ShardError, explain_os_error
from shards.storage import answers
from shards.storage.answers import Request
from shards.storage.login import LoginError, is_login_error, login_advice
from shards.storage.object_file import ObjectFile
from shards.storage.pages import list_links, walk_pages

MAX_DOCUMENT_BYTES = 64 << 20  # of a manifest or another small object
_PIECE_BYTES = 4 << 20
# object stores in which fsspec's makedirs would create a bucket
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "oci", "oss")
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to retry a request, in seconds."""

    deadline_seconds: float = 300.0  # for one piece of an object, all attempts together
    stall_seconds: float = 30.0  # for one attempt at a piece of 4 MiB
    first_pause_seconds: float = 0.5  # doubled after each attempt, with a jitter of half its length
    longest_pause_seconds: float = 30.0


# a single attempt to list a bucket or upload a shard may take long
BULK_POLICY = RetryPolicy(deadline_seconds=3600.0, stall_seconds=1200.0)


@dataclass
class Traffic:
    """Bytes received from stores and the number of retries. Safe to share between threads."""

    num_bytes: int = 0
    num_retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, num_bytes: int = 0, num_retries: int = 0) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self.num_retries += num_retries


class DownloadStopped(Exception):
    """The ``stop`` event of a download was set."""


class PermanentError(ShardError):
    """An error that a retry cannot fix."""


# Attempts allowed per kind of error, by the first match; all others are retried until the deadline. A store may report
# a new object as missing for a moment, and a ShardError means that the received bytes are wrong.
_MAX_ATTEMPTS = {
    PermanentError: 1,
    LoginError: 1,
    ShardError: 5,
    FileNotFoundError: 3,
    PermissionError: 3,
    DownloadStopped: 1,
}


class Store:
    """Reads and writes the objects below a URL. Safe to share between threads.

    Args:
        url: with a protocol, such as ``s3://bucket/set``. Its user, password and query are sent with every
            request and never shown. An HTTP URL without a user gets the login of ``~/.netrc``.
        traffic: counter of received bytes and retries.

    Attributes:
        url: without credentials, for messages.

    Raises:
        ShardError: the protocol is unknown or unsupported, or its package is not installed.
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None, traffic: Traffic | None = None) -> None:
        url = url.rstrip("/")
        self.url = strip_credentials(url)
        self.policy, self.traffic = policy or RetryPolicy(), traffic or Traffic()
        self._protocol = url.partition("://")[0].lower()
        if url.startswith("pipe:"):
            raise ShardError(f"{self.url}: pipe: runs shell commands and has no byte ranges; give the files' URL")
        self._query = ""
        if self._is_http:
            url, self._query = split_query(url)
            url = add_netrc_login(url.rstrip("/"))
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **_fsspec_options(self._protocol))
        except ImportError as error:
            package = _EXTRAS.get(self._protocol, "the package that fsspec names")
            raise ShardError(f"{self.url} needs {package}: pip install {package} ({error})") from error
        except ValueError as error:
            raise ShardError(f"{self.url} cannot be read ({error}); use http(s)://, s3://, gs:// or hf://") from error
        if self._protocol == "s3":
            self._files.retries = 1  # see _fsspec_options

    @property
    def _is_http(self) -> bool:
        return self._protocol in ("http", "https")

    def url_of(self, name: str) -> str:
        """Return the URL of an object without credentials, for messages and names."""
        return strip_credentials(f"{self.url}/{name}") if name else self.url

    def load(self, name: str, parse: Callable[[bytes], Result], max_bytes: int = MAX_DOCUMENT_BYTES) -> Result:
        """Fetch an object and return ``parse`` of its bytes; fetch again if ``parse`` raises a ShardError.

        Args:
            max_bytes: length of the longest object that is accepted; no more is received.

        Raises:
            ShardError: the object is missing or too long, or the deadline passed (names the object), or raised by
                ``parse``.
        """

        def fetch() -> Result:
            content = self._read(Request(self._path(name), max_bytes=max_bytes), name)
            self.traffic.add(num_bytes=len(content))
            return parse(content)

        return self.retry(name, fetch)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of an object.

        Raises:
            ShardError: the object is missing or shorter, or the deadline passed; names the object.
        """
        starts = range(begin, max(end, begin + 1), _PIECE_BYTES)
        pieces = [self._read_piece(name, start, min(start + _PIECE_BYTES, end)) for start in starts]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, name: str) -> int:
        """Return the length of an object in bytes. Raises as ``read``."""

        def query() -> int:
            try:
                size = self._call("info", self._path(name))["size"]
            except FileNotFoundError:
                # fsspec's HTTP raises this for every failure; a read separates missing objects from other errors
                self._read(Request(self._path(name), (0, 1)), name)
                raise OSError("the server does not report its length") from None
            if not isinstance(size, int) or size < 0:
                raise PermanentError(f"{self.url_of(name)}: the server does not report its length; give a local copy")
            return size

        return self.retry(name, query)

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names of the objects in a folder. Raises as ``read``."""
        if self._is_http:
            return sorted(link.rstrip("/") for link in self._list_page(folder, MAX_DOCUMENT_BYTES)[0])
        paths = self.retry(folder, lambda: list(self._call("ls", self._path(folder), detail=False)))
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)

    def list_tree(self) -> dict[str, int | None]:
        """Return the sorted names of all objects at any depth, with their lengths in bytes where known."""
        if self._is_http:
            return dict.fromkeys(walk_pages(self._list_page, MAX_DOCUMENT_BYTES))

        def query() -> dict[str, int | None]:
            try:
                entries = self._call("find", self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {self._name_of(path): info.get("size") for path, info in entries.items()}

        # some tools represent a folder by an object with the folder's name
        return {name: size for name, size in sorted(self.retry("", query).items()) if name}

    def open(self, name: str) -> BinaryIO:
        """Open an object as a seekable binary file; its reads are retried.

        Raises:
            ShardError: as ``read``, or the server has no byte ranges. Reads of the file raise the same.
        """
        read = partial(self._read_piece, name, needs_ranges=True)
        return cast(BinaryIO, io.BufferedReader(ObjectFile(read, self.size(name), _PIECE_BYTES), _PIECE_BYTES))

    def download(
        self, name: str, target: Path, num_bytes: int, sha256: str | None = None, stop: threading.Event | None = None
    ) -> None:
        """Fetch an object to a file, continuing from the bytes that the file already holds.

        Args:
            target: written piece by piece; complete only when this returns.
            num_bytes: required length of the object.
            sha256: required checksum, as hex; None skips the check.
            stop: once set, ends the download within one attempt at a piece and keeps the bytes received so far.

        Raises:
            ShardError: the object is missing or different, or the deadline passed; names the object.
            OSError: the target cannot be written, or its disk has too little space for the object.
            DownloadStopped: ``stop`` was set.
        """
        for is_fresh in (False, True):
            mode = "r+b" if target.exists() and not is_fresh else "w+b"
            with open(target, mode) as file:
                digest, done = hashlib.sha256(), 0
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    done += len(piece)
                _require_space(file.fileno(), num_bytes - done)
                while done < num_bytes:
                    piece = self._read_piece(name, done, min(done + _PIECE_BYTES, num_bytes), stop)
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
            if done == num_bytes and sha256 in (None, digest.hexdigest()):
                return
            logger.warning("%s: the downloaded file does not match the manifest", self.url_of(name))
        target.unlink()
        raise ShardError(f"{self.url_of(name)} does not match its manifest; upload the set again")

    def copy(self, name: str, target: Path) -> None:
        """Fetch an object of any length to a new file, which is removed if that fails.

        Raises:
            ShardError: the object cannot be read, or the file cannot be written; names the object.
        """
        num_bytes = self.size(name)
        try:
            target.unlink(missing_ok=True)
            self.download(name, target, num_bytes)
        except OSError as error:
            target.unlink(missing_ok=True)
            raise ShardError(
                f"{self.url_of(name)} ({num_bytes} bytes) cannot be stored in {target.parent} "
                f"({explain_os_error(error)}); free space there, or choose a folder on another disk"
            ) from error
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def upload(self, source: Path, name: str) -> None:
        """Send a file; an existing object is replaced.

        Raises:
            ShardError: the object cannot be written; names it.
        """

        def send() -> None:
            if self._protocol not in _BUCKET_PROTOCOLS:
                self._call("makedirs", self._path(name).rpartition("/")[0], exist_ok=True)
            self._call("put_file", str(source), self._path(name))

        try:
            self.retry(name, send)
        except ShardError as error:
            is_missing = isinstance(error.__cause__, FileNotFoundError)
            reason = "the bucket does not exist" if is_missing else str(error)
            url = self.url_of(name)
            raise ShardError(f"{url} cannot be written ({reason}); fix that and re-run to resume") from error

    def remove(self, name: str) -> None:
        """Delete an object, if it exists."""

        def delete() -> None:
            if self._call("exists", self._path(name)):
                self._call("rm_file", self._path(name))

        self.retry(name, delete)

    def retry(self, name: str, attempt: Callable[[], Result], stop: threading.Event | None = None) -> Result:
        """Call ``attempt`` until it succeeds, the error is permanent, or the deadline passes; log each retry.

        Raises:
            ShardError: as raised by ``attempt``, or names the object ``name`` and the last error.
            DownloadStopped: ``stop`` was set.
        """
        policy, url, stop = self.policy, self.url_of(name), stop or threading.Event()
        failures: Counter[type[Exception]] = Counter()

        def run() -> Result:
            if stop.is_set():
                raise DownloadStopped(url)
            try:
                return attempt()
            except Exception as error:
                if is_login_error(error):
                    raise LoginError(str(error)) from error
                raise

        def is_retryable(error: BaseException) -> bool:
            kind = next((kind for kind in _MAX_ATTEMPTS if isinstance(error, kind)), Exception)
            failures[kind] += 1
            return isinstance(error, Exception) and failures[kind] < _MAX_ATTEMPTS.get(kind, math.inf)

        def pause(state: tenacity.RetryCallState) -> float:
            return backoff(state) * random.uniform(0.5, 1.5)

        def log_retry(state: tenacity.RetryCallState) -> None:
            logger.warning("%s: attempt %d failed (%s)", url, state.attempt_number, _reason(state.outcome))
            self.traffic.add(num_retries=1)

        backoff = tenacity.wait_exponential(policy.first_pause_seconds, policy.longest_pause_seconds)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_retryable),
            wait=pause,
            stop=tenacity.stop_before_delay(policy.deadline_seconds),
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=log_retry,
        )
        try:
            return retrying(run)
        except tenacity.RetryError as error:
            seconds = retrying.statistics["delay_since_first_attempt"]
            raise PermanentError(
                f"{url} could not be read in {error.last_attempt.attempt_number} attempts over {seconds:.0f} s; "
                f"last error: {_reason(error.last_attempt)}"
            ) from None  # callers read __cause__ to detect missing objects
        except FileNotFoundError as error:
            raise PermanentError(f"{url} does not exist") from error
        except (PermissionError, LoginError) as error:
            reason, advice = " ".join(str(error).split()), login_advice(self._protocol)
            raise PermanentError(f"{url} may not be accessed ({reason}); for credentials, {advice}") from error

    def _path(self, name: str) -> str:
        path = f"{self._root.rstrip('/')}/{name}" if name else self._root
        return f"{path}{'&' if '?' in name else '?'}{self._query}" if self._query else path

    def _name_of(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._root.strip("/")).lstrip("/")

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return answers.call(self._files, method, *arguments, seconds=self.policy.stall_seconds, **options)

    def _read(self, request: Request, name: str) -> bytes:
        try:
            return answers.read(self._files, request, self.policy.stall_seconds)
        except answers.TooLong as error:
            raise ShardError(f"{self.url_of(name)}: {error}") from error

    def _read_piece(
        self, name: str, begin: int, end: int, stop: threading.Event | None = None, needs_ranges: bool = False
    ) -> bytes:
        if begin == end:
            return b""
        request = Request(self._path(name), (begin, end), needs_ranges=needs_ranges)

        def fetch() -> bytes:
            try:
                piece = self._read(request, name)
            except answers.NoRanges as error:
                raise PermanentError(
                    f"{self.url_of(name)} cannot be read by byte ranges ({error}); give a local copy"
                ) from error
            if len(piece) != end - begin:
                raise ShardError(
                    f"{self.url_of(name)} returned {len(piece)} bytes from {begin} instead of {end - begin}; if the "
                    "object is shorter than it should be, upload the set again"
                )
            return piece

        piece = self.retry(name, fetch, stop)
        self.traffic.add(num_bytes=len(piece))
        return piece

    def _list_page(self, folder: str, max_bytes: int) -> tuple[list[str], int]:
        """Return the names that the web page of a folder links to, as ``list_links``, and the page's length."""
        path, _ = split_query(self._path(folder))
        page = self.load(folder, bytes, max_bytes)
        return list_links(page, path), len(page)


def is_url(location: str) -> bool:
    """Return whether a location is read through a ``Store`` rather than as a local path."""
    return "://" in location or location.startswith("pipe:")


def _require_space(descriptor: int, num_bytes: int) -> None:
    """Raise an OSError if the disk of an open file has less than ``num_bytes`` bytes left."""
    free = shutil.disk_usage(descriptor).free
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes} bytes are needed, {free} are free")


def _fsspec_options(protocol: str) -> dict[str, Any]:
    """Return fsspec options that disable unlogged retries and compressed answers."""
    configured = fsspec.config.conf.get(protocol, {})
    if protocol == "s3":
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **configured.get("config_kwargs", {})}}
    if protocol in ("http", "https"):
        # a byte range of a compressed answer is not one of the object
        client = configured.get("client_kwargs", {})
        return {"client_kwargs": {**client, "headers": {"Accept-Encoding": "identity", **client.get("headers", {})}}}
    return {}


def _reason(outcome: tenacity.Future | None) -> str:
    assert outcome is not None
    error = outcome.exception()
    if isinstance(error, FileNotFoundError):
        return "not found"
    return " ".join(str(error).split()) or type(error).__name__
