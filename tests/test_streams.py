"""The check of stream order finds the faults that it is for, and no others."""

from __future__ import annotations

import threading

import pytest
import torch
from streams import Streams


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.mark.parametrize("order", ["event", "stream", "host", "device", None])
def test_a_result_of_another_stream_needs_a_wait(order: str | None, streams: Streams) -> None:
    with streams.installed():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            result = torch.ones(4) * 3
            event = torch.cuda.Event()
            event.record()
        if order == "event":
            torch.cuda.current_stream().wait_event(event)
        elif order == "stream":
            torch.cuda.current_stream().wait_stream(side)
        elif order == "host":
            event.synchronize()
        elif order == "device":
            torch.cuda.synchronize()
        result + 1
    assert bool(streams.faults) == (order is None), streams.faults
    assert sum(streams.host_waits.values()) == (order in ("host", "device"))


@pytest.mark.parametrize("is_recorded", [True, False])
def test_memory_is_freed_after_other_streams_have_used_it(is_recorded: bool, streams: Streams) -> None:
    with streams.installed():
        value = torch.ones(4) * 2
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value * 3
        if is_recorded:
            value.record_stream(side)
        del value
    assert bool(streams.faults) != is_recorded


def test_only_overlapping_bytes_conflict(streams: Streams) -> None:
    with streams.installed():
        whole = torch.zeros(8)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            whole[:4].add_(1)
        whole[4:].add_(1)
        assert not streams.faults
        whole[3:5].add_(1)
        assert streams.faults


@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_value_read_by_the_host_orders_its_stream_unless_ignored(is_ordered: bool) -> None:
    streams = Streams(ordered_by_reads=is_ordered)
    with streams.installed():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            value = torch.ones(1) * 2
            value.item()
        value.add_(1)
    assert bool(streams.faults) != is_ordered and sum(streams.host_waits.values()) == 1


def test_threads_have_streams_of_their_own(streams: Streams) -> None:
    with streams.installed():
        value = torch.zeros(4)

        def write() -> None:
            with streams.recording(), torch.cuda.stream(torch.cuda.Stream()):
                value.add_(1)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len(streams.faults) == 1


@pytest.mark.parametrize("wait", ["blocking", "stream", "device", None])
def test_the_host_waits_before_it_reads_a_copy(wait: str | None, streams: Streams) -> None:
    with streams.installed():
        values, pinned = torch.ones(4), torch.empty(4, pin_memory=True)
        assert pinned.is_pinned() and not values.is_pinned()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pinned.copy_(values, non_blocking=wait != "blocking")
        if wait == "stream":
            side.synchronize()
        elif wait == "device":
            torch.cuda.synchronize()
        assert (pinned + 1).is_pinned()
    assert bool(streams.faults) == (wait is None), streams.faults
    assert sum(streams.host_waits.values()) == (wait is not None)


def test_host_memory_is_written_after_copies_from_it(streams: Streams) -> None:
    with streams.installed():
        pinned = torch.zeros(4, pin_memory=True)
        copy = pinned.to("cuda", non_blocking=True)
        assert copy.data_ptr() != pinned.data_ptr() and not copy.is_pinned()
        pinned[:2].add_(1)
        assert len(streams.faults) == 1
        # a copy that starts after the host has written
        pinned.to("cuda", non_blocking=True)
        assert len(streams.faults) == 1


@pytest.mark.parametrize("waits_for_thread", [True, False])
def test_a_copy_of_another_thread_orders_what_waits_for_it(waits_for_thread: bool, streams: Streams) -> None:
    with streams.installed():
        value = torch.zeros(4)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())

        def save() -> None:
            with streams.recording(of_host=True), torch.cuda.stream(side):
                torch.empty(4).copy_(value)

        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        if waits_for_thread:
            streams.wait_for_thread()
        value.add_(1)
    assert bool(streams.faults) != waits_for_thread


@pytest.mark.parametrize("waits", [True, False])
def test_new_memory_may_still_be_in_use_on_its_stream(waits: bool, streams: Streams) -> None:
    with streams.installed():
        value, side = torch.empty(4), torch.cuda.Stream()
        if waits:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value.fill_(1)
        torch.cuda.current_stream().wait_stream(side)
        del value
    assert bool(streams.faults) != waits
