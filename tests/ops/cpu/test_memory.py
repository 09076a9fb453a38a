"""The kernels' allocator: which tensors reuse freed memory, how much it keeps and for how long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cpu_kernels import needs_kernels

ROOT = Path(__file__).resolve().parents[3]
MB = 2**20
# the allocator is selected for a whole process, so each test starts one
BEGIN = f"""
import os, signal, threading, torch
from streamtrain.ops.cpu.build import is_enabled
assert is_enabled(torch.float32)
MB, keep = {MB}, torch.ops.streamtrain.keep_memory
def make(size):
    return torch.empty(round(size * MB), dtype=torch.uint8)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB
"""
CASES = {
    "the next tensor of the same size reuses it": """
keep(64 * MB)
first = make(4).fill_(7); place = first.data_ptr(); del first
assert make(4).data_ptr() == place and make(2.5).data_ptr() == place
small = make(1.5)
assert small.data_ptr() != place, "less than half of it"
assert make(4).data_ptr() == place
""",
    "the requested size is kept": """
keep(300 * MB)
tensors = [make(50).fill_(1) for _ in range(10)]
full = resident(); tensors.clear()
assert 180 < full - resident() < 280, (full, resident())
keep(0)
assert full - resident() > 480, (full, resident())
""",
    "unused memory is returned": """
keep(300 * MB)
unwanted = make(200).fill_(1); full = resident(); del unwanted
assert resident() > full - 20
for _ in range(4200):
    make(1)
assert resident() < full - 180
""",
    "from other threads and in children": """
keep(64 * MB)
tensors = [make(8).fill_(number) for number in range(8)]
def free():
    for _ in range(2000):
        own = make(2).fill_(5)
        assert bool((own[::4096] == 5).all())
    tensors.pop()
threads = [threading.Thread(target=free) for _ in range(4)]
[each.start() for each in threads]; [each.join() for each in threads]
assert [int(each[0]) for each in tensors] == [0, 1, 2, 3]
stop = threading.Event()
def busy():
    while not stop.is_set():
        make(1)
threads = [threading.Thread(target=busy) for _ in range(2)]
[each.start() for each in threads]
for _ in range(20):
    child = os.fork()
    if not child:
        signal.alarm(20)
        make(3).fill_(2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set(); [each.join() for each in threads]
""",
    "tensors from before, resized, shared and as arrays": """
before = make(8).fill_(3)
keep(64 * MB)
after = make(4).fill_(4); after.resize_(9 * MB)
assert int(before[-1]) == 3 and int(after[4 * MB - 1]) == 4
array = make(2).fill_(6).numpy(); make(2).fill_(0)
assert array[-1] == 6
shared = make(4).fill_(8).share_memory_()
assert int(shared[-1]) == 8
del before, after, array, shared
""",
}


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_freed_memory(case: str) -> None:
    run = subprocess.run([sys.executable, "-c", BEGIN + CASES[case]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
