"""Starting workers is not interrupted half way, whichever thread receives the signal."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from shards.packing.parallel import _interrupts_blocked, ordered_map


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_another_thread_waits_for_the_block(number: signal.Signals) -> None:
    end = threading.Event()
    other = threading.Thread(target=end.wait)  # does not block the signal, so it receives it
    other.start()
    before = signal.signal(number, signal.default_int_handler)
    reached = []
    try:
        with pytest.raises(KeyboardInterrupt):
            with _interrupts_blocked():
                os.kill(os.getpid(), number)
                time.sleep(0.1)
                reached.append("end of the block")
        assert signal.getsignal(number) is signal.default_int_handler
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & {number}
    finally:
        signal.signal(number, before)
        end.set()
        other.join()
    assert reached == ["end of the block"]


def test_a_signal_is_not_lost_if_the_block_fails() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with _interrupts_blocked():
                os.kill(os.getpid(), signal.SIGTERM)
                raise OSError
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _interrupts_blocked():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(workers: int) -> None:
    assert list(ordered_map(abs, range(-20, 0), workers)) == list(range(20, 0, -1))
