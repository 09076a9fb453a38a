"""Objects under a URL, read through fsspec with patience: retries, backoff, a deadline and a stall time-out.

``http(s)://``, ``s3://``, ``gs://``, ``hf://`` and whatever else fsspec knows. An object is fetched in pieces, each of
which is asked for again until it comes whole, so that a broken connection costs one piece, not the object.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from shards.errors import ShardError

_PIECE_BYTES = 4 << 20
_TIMES_TO_BELIEVE_ABSENCE = 3
_TIMES_TO_BELIEVE_DAMAGE = 5
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long to try."""

    deadline_seconds: float = 300.0  # for one piece of an object, all attempts together
    stall_seconds: float = 30.0  # for one attempt at a piece of 4 MiB
    first_pause_seconds: float = 0.5  # doubled from attempt to attempt, and varied by half
    longest_pause_seconds: float = 30.0


@dataclass
class Traffic:
    """What has come from stores, and what had to be asked for again. Safe to share between threads."""

    num_bytes: int = 0
    num_retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, num_bytes: int = 0, num_retries: int = 0) -> None:
        """Count more."""
        with self._lock:
            self.num_bytes += num_bytes
            self.num_retries += num_retries


class Interrupted(Exception):
    """A download was told to stop."""


class Store:
    """Reads objects below a URL. Safe to share between threads.

    Args:
        url: with a protocol, such as ``s3://bucket/set``.
        patience: how long to try.
        traffic: counts what comes.

    Raises:
        ShardError: the protocol is unknown, refused, or needs a package that is not installed.
    """

    def __init__(self, url: str, patience: Patience | None = None, traffic: Traffic | None = None) -> None:
        self.url = url.rstrip("/")
        self.patience, self.traffic = patience or Patience(), traffic or Traffic()
        protocol = self.url.partition("://")[0]
        if url.startswith("pipe:"):
            raise ShardError(f"{url}: pipe: runs shell commands and cannot be read in ranges; give a URL of the files")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, **_options(protocol))
        except ImportError as error:
            package = _EXTRAS.get(protocol, "the package that fsspec names")
            raise ShardError(f"{url} needs {package}: pip install {package} ({error})") from error
        except ValueError as error:
            raise ShardError(f"{url} cannot be read ({error}); use http(s)://, s3://, gs:// or hf://") from error
        if protocol == "s3":
            self._files.retries = 1  # as in _options

    def load(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """A small object as ``parse`` makes it of all its bytes; fetched again where ``parse`` raises a ShardError.

        Raises:
            ShardError: it does not exist, or did not come before the deadline (names the object); or as ``parse``.
        """

        def fetch() -> Result:
            content = bytes(self._files.cat_file(self._path(name)))
            self.traffic.add(num_bytes=len(content))
            return parse(content)

        return self._persist(name, fetch)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of an object.

        Raises:
            ShardError: it does not exist, or did not come whole before the deadline; names the object.
        """
        pieces = [
            self._piece(name, at, min(at + _PIECE_BYTES, end)) for at in range(begin, max(end, begin + 1), _PIECE_BYTES)
        ]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, name: str) -> int:
        """The length of an object in bytes. Raises as ``read`` does."""

        def ask() -> int:
            try:
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                # fsspec's HTTP says so of any failure; a read tells absence from trouble.
                self._files.cat_file(self._path(name), start=0, end=1)
                raise OSError("its length is not known") from None

        return self._persist(name, ask)

    def names(self, folder: str) -> list[str]:
        """The names of the objects in a folder, sorted. Raises as ``read`` does."""
        listed = self._persist(folder, lambda: list(self._files.ls(self._path(folder), detail=False)))
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in listed)

    def download(
        self,
        name: str,
        target: Path,
        num_bytes: int,
        sha256: str | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Fetch an object to a file, going on where an earlier attempt left off.

        Args:
            target: where the bytes go as they come; complete only when this returns.
            num_bytes: the length that the object must have.
            sha256: of its bytes, as hex; None leaves that unchecked.
            stop: once set, ends the download within one attempt at a piece; what has come so far stays.

        Raises:
            ShardError: it does not exist, is another, or did not come whole before the deadline; names the object.
            OSError: the target cannot be written.
            Interrupted: ``stop`` was set.
        """
        for fresh in (False, True):
            mode = "r+b" if target.exists() and not fresh else "w+b"
            with open(target, mode) as file:
                digest, done = hashlib.sha256(), 0
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    done += len(piece)
                while done < num_bytes:
                    piece = self._piece(name, done, min(done + _PIECE_BYTES, num_bytes), stop)
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
            if done == num_bytes and sha256 in (None, digest.hexdigest()):
                return
            _log.warning("%s: what came is not what the manifest describes", self.url_of(name))
        target.unlink()
        raise ShardError(f"{self.url_of(name)} is not the file that its manifest describes; upload the set again")

    def url_of(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _piece(self, name: str, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        def fetch() -> bytes:
            piece = bytes(self._files.cat_file(self._path(name), start=begin, end=end))
            if len(piece) > end - begin:
                piece = piece[begin:end]  # a server without ranges sends the whole object
            if len(piece) != end - begin:
                raise ShardError(
                    f"{self.url_of(name)} gives {len(piece)} bytes from {begin} on instead of {end - begin}; if that "
                    "is all of it, upload the set again"
                )
            return piece

        piece = self._persist(name, fetch, stop)
        self.traffic.add(num_bytes=len(piece))
        return piece

    def _persist(self, name: str, attempt: Callable[[], Result], stop: threading.Event | None = None) -> Result:
        """Try until it works, the object is known to be absent or damaged, or the deadline is over."""
        patience, url = self.patience, self.url_of(name)
        began, pause = time.monotonic(), patience.first_pause_seconds
        absences = damages = 0
        stop = stop or threading.Event()
        for number in itertools.count(1):
            if stop.is_set():
                raise Interrupted(url)
            try:
                return _within(patience.stall_seconds, attempt)
            except FileNotFoundError as error:
                absences += 1
                if absences >= _TIMES_TO_BELIEVE_ABSENCE:
                    raise ShardError(f"{url} does not exist") from error
                reason = "not found"
            except ShardError as error:
                damages += 1
                if damages >= _TIMES_TO_BELIEVE_DAMAGE:
                    raise
                reason = str(error)
            except PermissionError as error:
                raise ShardError(f"{url} may not be read ({error}); check the credentials") from error
            except Exception as error:  # every library below fsspec has errors of its own
                reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s: attempt %d failed (%s)", url, number, reason)
            self.traffic.add(num_retries=1)
            wait = pause * random.uniform(0.5, 1.5)
            if time.monotonic() + wait - began > patience.deadline_seconds:
                raise ShardError(
                    f"{url} could not be read in {number} attempts over {time.monotonic() - began:.0f} s; "
                    f"the last: {reason}"
                )
            stop.wait(wait)
            pause = min(2 * pause, patience.longest_pause_seconds)
        raise AssertionError("unreachable")


def _options(protocol: str) -> dict[str, Any]:
    """How fsspec is to open a store: without retries below ours, which would be neither logged nor bounded."""
    if protocol != "s3":
        return {}
    users = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **users}}


def _within(seconds: float, function: Callable[[], Result]) -> Result:
    """The function's result, or TimeoutError if it takes longer.

    It runs in a thread of its own, which is left behind when it stalls: few libraries let themselves be interrupted.
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
        raise TimeoutError(f"nothing came for {seconds:g} s")
    return results[0]
