"""Objects below a URL, read and written through fsspec with retries, a deadline and a timeout per attempt.

Supports ``http(s)://`` (read-only), ``s3://``, ``gs://``, ``hf://`` and every other fsspec protocol. Objects are
fetched in pieces that are retried separately, so a broken connection costs one piece, not the object.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import tenacity

from shards.errors import ShardError

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
_MAX_ATTEMPTS = {PermanentError: 1, ShardError: 5, FileNotFoundError: 3, PermissionError: 1, DownloadStopped: 1}


class Store:
    """Reads and writes the objects below a URL. Safe to share between threads.

    Args:
        url: with a protocol, such as ``s3://bucket/set``.
        traffic: counter of received bytes and retries.

    Raises:
        ShardError: the protocol is unknown or unsupported, or its package is not installed.
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None, traffic: Traffic | None = None) -> None:
        self.url = url.rstrip("/")
        self.policy, self.traffic = policy or RetryPolicy(), traffic or Traffic()
        self._protocol = self.url.partition("://")[0]
        if url.startswith("pipe:"):
            raise ShardError(f"{url}: pipe: runs shell commands and has no byte ranges; give the URL of the files")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, **_fsspec_options(self._protocol))
        except ImportError as error:
            package = _EXTRAS.get(self._protocol, "the package that fsspec names")
            raise ShardError(f"{url} needs {package}: pip install {package} ({error})") from error
        except ValueError as error:
            raise ShardError(f"{url} cannot be read ({error}); use http(s)://, s3://, gs:// or hf://") from error
        if self._protocol == "s3":
            self._files.retries = 1  # see _fsspec_options

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def load(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """Fetch a small object and return ``parse`` of its bytes; fetch again if ``parse`` raises a ShardError.

        Raises:
            ShardError: the object is missing or the deadline passed (names the object), or raised by ``parse``.
        """

        def fetch() -> Result:
            content = bytes(self._files.cat_file(self._path(name)))
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
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                # fsspec's HTTP raises this for every failure; a read separates missing objects from other errors
                self._files.cat_file(self._path(name), start=0, end=1)
                raise OSError("the server does not report its length") from None

        return self.retry(name, query)

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names of the objects in a folder. Raises as ``read``."""
        paths = self.retry(folder, lambda: list(self._files.ls(self._path(folder), detail=False)))
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)

    def list_tree(self) -> dict[str, int | None]:
        """Return the sorted names of all objects at any depth, with their lengths in bytes where known."""

        def query() -> dict[str, int | None]:
            try:
                entries = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {self._name_of(path): info.get("size") for path, info in entries.items()}

        # some tools represent a folder by an object with the folder's name
        return {name: size for name, size in sorted(self.retry("", query).items()) if name}

    def open(self, name: str) -> BinaryIO:
        """Open an object as a seekable binary file. Raises as ``read``."""
        return cast(BinaryIO, self.retry(name, lambda: self._files.open(self._path(name), "rb")))

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
            OSError: the target cannot be written.
            DownloadStopped: ``stop`` was set.
        """
        for is_fresh in (False, True):
            mode = "r+b" if target.exists() and not is_fresh else "w+b"
            with open(target, mode) as file:
                digest, done = hashlib.sha256(), 0
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    done += len(piece)
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

    def upload(self, source: Path, name: str) -> None:
        """Send a file; an existing object is replaced.

        Raises:
            ShardError: the object cannot be written; names it.
        """

        def send() -> None:
            if self._protocol not in _BUCKET_PROTOCOLS:
                self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(source), self._path(name))

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
            if self._files.exists(self._path(name)):
                self._files.rm_file(self._path(name))

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
            return _call_with_timeout(policy.stall_seconds, attempt)

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
            raise ShardError(
                f"{url} could not be read in {error.last_attempt.attempt_number} attempts over {seconds:.0f} s; "
                f"last error: {_reason(error.last_attempt)}"
            ) from None  # callers read __cause__ to detect missing objects
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist") from error
        except PermissionError as error:
            raise ShardError(f"{url} may not be accessed ({error}); check the credentials") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _name_of(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._root.strip("/")).lstrip("/")

    def _read_piece(self, name: str, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        def fetch() -> bytes:
            piece = bytes(self._files.cat_file(self._path(name), start=begin, end=end))
            if len(piece) > end - begin:
                piece = piece[begin:end]  # a server without range support sends the whole object
            if len(piece) != end - begin:
                raise ShardError(
                    f"{self.url_of(name)} returned {len(piece)} bytes from {begin} instead of {end - begin}; if the "
                    "object is shorter than it should be, upload the set again"
                )
            return piece

        piece = self.retry(name, fetch, stop)
        self.traffic.add(num_bytes=len(piece))
        return piece


def is_url(location: str) -> bool:
    """Return whether a location is read through a ``Store`` rather than as a local path."""
    return "://" in location or location.startswith("pipe:")


def _fsspec_options(protocol: str) -> dict[str, Any]:
    """Return fsspec options that turn off its own retries, which would be neither logged nor bounded."""
    if protocol != "s3":
        return {}
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **configured}}


def _reason(outcome: tenacity.Future | None) -> str:
    assert outcome is not None
    error = outcome.exception()
    if isinstance(error, FileNotFoundError):
        return "not found"
    return " ".join(str(error).split()) or type(error).__name__


def _call_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the function's result, or raise TimeoutError if it takes longer.

    It runs in a thread that is abandoned when it stalls, because few libraries can be interrupted.
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
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]
