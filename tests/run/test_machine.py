"""Memory and disk space of a machine, with control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtrain.run.machine import Space, available_cores, disk_space, folder_bytes, host_memory

GB = 10**9


def machine(folder: Path, groups: str) -> tuple[Path, Path]:
    """Return stand-ins for /proc and /sys/fs/cgroup of a machine of 64 GB, 40 of them free."""
    proc, cgroup = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {40 * GB // 1024} kB\nPages: 3\n")
    (proc / "self" / "cgroup").write_text(groups)
    cgroup.mkdir()
    return proc, cgroup


def write_v2(group: Path, limit: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "memory.max": limit,
        "memory.current": str(5 * GB),
        "memory.stat": f"anon 1\ninactive_file {GB}",
    }.items():
        (group / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("groups", "file", "text", "cores"),
    [
        ("0::/a/b\n", "a/cpu.max", "350000 100000", 3),
        ("0::/a/b\n", "a/b/cpu.max", "50000 100000", 1),
        ("0::/a/b\n", "cpu.max", "max 100000", 16),
        ("0::/a/b\n", "cpu.max", "6400000 100000", 16),
        ("0::/a/b\n", "cpu.max", "", 16),
        # a container sees its group as the root
        ("0::/docker/1\n", "cpu.max", "400000 100000", 4),
        ("9:cpu,cpuacct:/x\n0::/\n", "cpu/x/cpu.cfs_quota_us", "250000", 2),
        ("9:cpu,cpuacct:/x\n0::/\n", "cpu/x/cpu.cfs_quota_us", "-1", 16),
    ],
)
def test_a_quota_limits_the_cores(
    groups: str, file: str, text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    proc, cgroup = machine(tmp_path, groups)
    assert available_cores(proc, cgroup) == available_cores(tmp_path / "absent", cgroup) == 16
    path = cgroup / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (path.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(proc, cgroup) == cores


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "0::/user.slice\n")
    assert host_memory(proc, cgroup) == Space(64 * GB, 40 * GB)
    write_v2(cgroup / "user.slice", "max")
    assert host_memory(proc, cgroup) == Space(64 * GB, 40 * GB)
    assert host_memory(tmp_path / "absent", cgroup) is None


@pytest.mark.parametrize("group", ["", "a", "a/b"])
def test_the_limit_of_any_group_above_the_process_counts(group: str, tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "0::/a/b\n")
    write_v2(cgroup / "a/b", "max")
    write_v2(cgroup / group, str(16 * GB))
    assert host_memory(proc, cgroup) == Space(16 * GB, 12 * GB)


def test_a_container_may_see_its_group_as_the_root(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "0::/docker/1234\n")
    write_v2(cgroup, str(8 * GB))
    assert host_memory(proc, cgroup) == Space(8 * GB, 4 * GB)


def test_version_1_has_other_files(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/job/1\n0::/\n")
    group = cgroup / "memory" / "job" / "1"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{10 * GB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{11 * GB}\n")
    (group / "memory.stat").write_text("inactive_file 0\ntotal_inactive_file 0\n")
    # the use may exceed the limit for a moment
    assert host_memory(proc, cgroup) == Space(10 * GB, 0)
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host_memory(proc, cgroup) == Space(64 * GB, 40 * GB)


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    memory, disk = host_memory(), disk_space(tmp_path / "not" / "there")
    assert memory is None or 0 < memory.free <= memory.total
    assert disk is not None and 0 < disk.free <= disk.total
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 3 and folder_bytes(tmp_path / "absent") == 0
