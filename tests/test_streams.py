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
