"""``streamtrain pack`` and ``verify`` as users run them: one-line errors, and interrupted packings that resume."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT, exit_status, run_command
from drawn_images import draw_folder, file_contents, overwrite

from shards.errors import ShardError
from shards.reading.shard_set import ShardSet

_PACK = [*COMMAND, "pack"]


def test_pack_verify_damage_verify(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 20, ("cat", "dog"))
    (tmp_path / "images" / "cat" / "text.jpg").write_text("hello")
    options = ("--workers", 2, "--shard-size", "20KB")
    packed = run_command("pack", "--src", "images", "--out", "a/set", *options, cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    lines = packed.stdout.splitlines()
    assert lines[0] == "found 21 images in 2 classes: cat 11, dog 10"
    assert lines[1:3] == ["rejected 1 image, listed in a/set/rejected.jsonl:", "  1 x not an image: an unknown format"]
    assert [line.partition(":")[0] for line in lines[3:-1]] == ["sizes", "formats"]
    shard_set = ShardSet.open(tmp_path / "a" / "set")
    assert f"packed 20 images in {len(shard_set.sizes)} shards" in packed.stdout
    assert "; 1 rejected, " in lines[-1]
    assert shard_set.digest in packed.stdout

    again = run_command("pack", "--src", "images", "--out", "a/set", *options, "--preview", "sheet.png", cwd=tmp_path)
    assert again.stdout.splitlines()[-1].startswith("already packed: 20 images")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "images").rename(tmp_path / "train")
    (tmp_path / "parts").mkdir()
    (tmp_path / "train").rename(tmp_path / "parts" / "train")
    draw_folder(tmp_path / "parts" / "val", 2)
    parts = run_command("pack", "--src", "parts", "--out", "b", "--preview", "no/such/folder.png", cwd=tmp_path)
    assert parts.returncode == 2 and "choose another --preview" in parts.stderr
    assert "warning: the classes are called train, val: these are parts of a data set" in parts.stderr

    whole = run_command("verify", "a/set", "--workers", 1, cwd=tmp_path)
    assert (whole.returncode, whole.stdout.splitlines()[-1]) == (
        0,
        f"read 20 images in {len(shard_set.sizes)} shards: no faults",
    )
    overwrite(shard_set, 1, 0, b"damage")
    damaged = run_command("verify", "a/set", "--workers", 1, cwd=tmp_path)
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines()[1].startswith("shards/000001.tar, sample 0 (key '")
    assert damaged.stdout.splitlines()[-1].endswith("2 faults")
    shard_set.index_path(1).with_suffix(".idx").unlink()
    overwrite(shard_set, 1, 0, b"\xff\xd8\xff\xe0\x00\x10")
    fixed = run_command("verify", "a/set", "--workers", 1, cwd=tmp_path)
    assert fixed.stdout.splitlines()[-1].endswith(": 1 fault")


def test_user_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_folder(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.jpg").write_text("not an image")
    (tmp_path / "junk.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "junk.tar.xz").write_bytes(b"no tar" * 1000)
    (tmp_path / "junk.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "junk.bin").write_bytes(bytes(range(256)))
    (tmp_path / "list.txt").write_text("missing.jpg\n")
    (tmp_path / "file").write_text("")
    cases = [
        (["--src", "nowhere", "--out", "set"], "nowhere does not exist"),
        (["--src", "empty", "--out", "set"], "no images in empty"),
        (["--src", "texts", "--out", "set"], "none of the 3 images in texts can be used; the first: 0.jpg: not an im"),
        (["--src", "junk.tar", "--out", "set"], "junk.tar is not a complete tar"),
        (["--src", "junk.tar.xz", "--out", "set"], "junk.tar.xz cannot be decompressed"),
        (["--src", "", "--out", "set"], "--src is empty"),
        (["--src", "images", "--out", ""], "--out is empty"),
        (["--src", "texts/0.jpg", "--out", "set"], "texts/0.jpg is a single image; give its folder"),
        (["--src", "junk.tar.zst", "--out", "set"], "junk.tar.zst: zstd is not supported"),
        (["--src", "file", "--out", "set"], "file lists no images"),
        (["--src", "junk.bin", "--out", "set"], "neither a folder, a tar nor a text file"),
        (["--src", "list.txt", "--out", "set"], "missing.jpg: No such file"),
        (["--src", "images", "--out", "images"], "has other files"),
        (["--src", "images", "--out", "file"], "cannot be written to"),
        (["--src", "images", "--out", "file/set"], "cannot be written to"),
        (["--src", "images", "--out", "/proc/set"], "cannot be written to"),
        (["--src", "images", "--out", "set", "--shard-size", "many"], "is not a size such as 64MB"),
        (["--src", "images", "--out", "set", "--overlap", "0"], "--overlap applies to tiles; add --tiles SIDE"),
        (["--src", "images", "--out", "set", "--tiles", "8"], "--tiles 8 is not a number of pixels from 16 to 65535"),
        (["--src", "images", "--out", "set", "--tiles", "16", "--tile-contrast", "1"], "10 tiles of images are backgr"),
        (["--src", "images", "--out", "set", "--workers", "0"], "not a whole number above 0"),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for arguments, message in cases:
        assert exit_status(["pack", "--workers", "1", *arguments]) == 2, arguments
        last = capsys.readouterr().err.splitlines()[-1]
        assert message in last and "error: " in last, (arguments, last)
        assert not (tmp_path / "set").exists(), arguments
    missing = run_command("verify", "set", cwd=tmp_path)
    assert missing.returncode == 2
    assert "error: no shard set at set" in missing.stderr


def _start_and_wait_for_shard(number: int, folder: Path, out: Path) -> subprocess.Popen[str]:
    """Start a long packing, and wait until it has completed this shard, but not all."""
    command = [*_PACK, "--src", str(folder), "--out", str(out), "--workers", "2", "--shard-size", "40KB"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(f"shards/{number:06d}.tar")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def _session_members(session: int) -> list[int]:
    """Return the running processes of a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_packings_leave_no_set_and_no_process_and_resume_to_the_same_bytes(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "images", 1200)
    out, unbroken = tmp_path / "set", tmp_path / "unbroken"
    for number, stop in enumerate((signal.SIGKILL, signal.SIGINT)):
        process = _start_and_wait_for_shard(number, folder, out)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does for Ctrl-C
        else:
            process.send_signal(stop)
        _, said = process.communicate(timeout=30)
        if process.returncode == 0:
            pytest.skip("this machine packs faster than it can be interrupted")
        assert process.returncode == (-9 if stop == signal.SIGKILL else 130), said
        assert "Traceback" not in said
        with pytest.raises(ShardError, match="not a finished shard set"):
            ShardSet.open(out)
        deadline = time.monotonic() + 20
        while left := _session_members(process.pid):
            assert time.monotonic() < deadline, f"workers outlive their parent: {left}"
            time.sleep(0.05)
        for shard in sorted(out.glob("shards/[0-9]*.tar"))[1:]:
            shard.unlink()  # so that the next start has something left to do
        journal = out / "packing.jsonl"
        journal.write_text("\n".join(journal.read_text().splitlines()[:2]) + "\n")
    for target in (out, unbroken):
        options = ("--shard-size", "40KB", "--workers", 1)
        ended = run_command("pack", "--src", folder, "--out", target, *options, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert file_contents(out) == file_contents(unbroken)


def _kill_at_random(command: list[str], out: Path, unbroken: dict[str, bytes], kills: int, longest: float) -> None:
    """Start a packing and kill it at random moments; if it ends before a kill, compare its files and start again."""
    draw = random.Random(7)
    while kills:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=draw.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
            continue
        assert process.returncode == 0, said
        assert file_contents(out) == unbroken
        shutil.rmtree(out)
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert file_contents(out) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("target_kind", ["folder", "url"])
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, target_kind: str) -> None:
    folder = draw_folder(tmp_path / "images", 3000, ("a", "b"))
    (folder / "a" / "broken.jpg").write_bytes(b"text")
    shutil.copy(folder / "b" / "image 2001.jpg", folder / "b" / "same.jpg")
    options = ["--src", str(folder), "--shard-size", "100KB", "--workers", "2", "--shuffle", "1", "--dedup"]
    began = time.monotonic()
    ended = run_command("pack", *options, "--out", tmp_path / "unbroken", cwd=tmp_path)
    seconds = time.monotonic() - began
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "set"
    target = out.as_uri() if target_kind == "url" else str(out)
    command = [*_PACK, *options, "--out", target, "--scratch", str(tmp_path / "scratch")]
    _kill_at_random(command, out, file_contents(tmp_path / "unbroken"), 20, seconds / 4)
    assert not (tmp_path / "scratch").exists()


def test_help_explains_sources_and_shows_examples() -> None:
    text = run_command("pack", "--help").stdout
    for word in ("--src", "--max-side", "rejected.jsonl", "examples:", "class subfolders"):
        assert word in text
