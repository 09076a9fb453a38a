"""``streamtrain train`` starts the ranks, stops them after a checkpoint and returns their exit status."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT, run_command, started
from drawn_images import packed_set
from ranks import ROOT, free_port, run_ranks
from tiny_run import command, logged

from streamtrain.run.directory import saved_steps

# all that a run may print; a line of a library fits none of these
LINES = [
    r"vits16\.yaml: ViT of width 32 and depth 2; 24 images in \S+; batch [^;]+; lr 0\.01; \d+ steps on \d CPU ranks?; "
    r"run directory \S+",
    r"compiling the CPU kernels: once per machine, .*",
    r"warning: (KoLeo searches|the set has 24 images, which is too few|run\.steps \d+ is too short) .*",
    r"no evaluation of data.shards: .*",
    r"no evaluation by labels: .*",
    r"plan: .*",
    r"resuming at step \d+ from \S+",
    r"step \d+/\d+: loss \d+\.\d{4}(, \d+\.\d images/s)?(, \d\d:\d\d left)?",
    r"memory: measured .*",
    r"health: .*",
    r"completed \d+ steps?; this start: \d+ in \S+ \w+, \S+ \w+ in all",
    r"results in \S+: checkpoints/step-\d{9}, metrics\.jsonl, tensorboard/",
    r"next:",
    r"  streamtrain (evaluate knn|report|export|train) .*",
    r"stopping: saving a checkpoint(; press Ctrl-C again to stop without saving)?",
    r"stopped at step \d+, checkpoint saved; run the same command again to resume",
]


def unexpected(lines: list[str], *more: str) -> list[str]:
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in (*LINES, *more))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("train"), 24).path


def train_words(shards: Path | str, run_dir: Path, *overrides: str) -> list[str]:
    """The options and overrides of a tiny run, without the script."""
    return command(shards, run_dir, *overrides)[1:]


def wait_for_step(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_ranks_train_and_overrides_may_come_anywhere(shards: Path, tmp_path: Path) -> None:
    words = train_words(shards, tmp_path / "run", "run.steps=2", "monitor.progress=true", "engine.moments=8bit")
    ended = run_command("train", "run.seed=3", "--gpus", 2, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = (ended.stdout + ended.stderr).splitlines()
    assert not unexpected(lines) and len(lines) == len(set(lines)), lines
    assert len(re.findall("^step ", ended.stderr, re.MULTILINE)) == 2 and "completed 2 steps" in ended.stdout
    assert len(logged(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000000002" / "rank-00001-of-00002.safetensors").is_file()
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
    again = run_command("train", "run.seed=3", "--ranks", 2, *words)
    assert again.returncode == 0 and "run.steps" in again.stdout and again.stderr == ""


def test_a_run_without_a_directory_says_where_it_is_and_removes_an_old_stop_file(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "default"
    run_dir.mkdir(parents=True)
    (run_dir / "STOP").touch()
    words = [word for word in train_words(shards.resolve(), run_dir, "run.steps=2") if not word.startswith("run.dir=")]
    ended = run_command("train", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    assert "run.dir is not given, so the run is in runs/default" in lines
    assert "removed runs/default/STOP, which is older than this start" in lines
    assert any(line.startswith("completed 2 steps; this start: 2 in ") for line in lines)
    assert saved_steps(run_dir)[-1] == 2 and not (run_dir / "STOP").exists()


def run_in_terminal(words: list[str], columns: int, **variables: str) -> tuple[int, str]:
    """Run a command in a terminal of this width; returns its exit status and output."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    process = subprocess.Popen(
        words, cwd=ROOT, env={**ENVIRONMENT, **variables}, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    written = b""
    try:
        while True:
            try:
                written += os.read(screen, 65536)
            except OSError:  # all that had the terminal open have ended
                break
        return process.wait(60), written.decode()
    finally:
        process.kill()
        os.close(screen)


def test_a_narrow_terminal_without_utf_8_shows_one_bar(shards: Path, tmp_path: Path) -> None:
    words = train_words(shards, tmp_path / "run", "run.steps=4", "monitor.progress=true", "monitor.tensorboard=true")
    status, written = run_in_terminal([*COMMAND, "train", *words], 60, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert status == 0 and written.isascii() and "\x1b" not in written.replace("\x1b[K", ""), written
    lines = [line.split("\r")[-1].removeprefix("\x1b[K").rstrip() for line in written.rstrip().split("\r\n")]
    bar = r"step 4/4, loss \d+\.\d{4}, \d+\.\d images/s, 00:00 left[ #\d]*"
    assert not unexpected(lines, bar), lines
    assert len([line for line in lines if line.startswith("step ")]) == 1
    assert all(len(part.rstrip("\n")) <= 60 for part in written.split("\r") if part.startswith("step "))


def test_one_rank_needs_no_launcher(shards: Path, tmp_path: Path) -> None:
    """Without --gpus and without a GPU there is one rank, in the process of the command."""
    with started("train", *train_words(shards, tmp_path / "run", "run.steps=10000")) as process:
        wait_for_step(tmp_path / "run", process)
        assert not any("main.py" in Path(f"/proc/{child}/cmdline").read_text() for child in children_of(process.pid))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 75 and "Traceback" not in errors


def test_ranks_of_a_hostfile_train(shards: Path, tmp_path: Path) -> None:
    """On this machine, which needs no ssh; two machines are in tests/cluster."""
    (tmp_path / "hosts").write_text("# a comment\nlocalhost slots=2\n")
    words = train_words(shards, tmp_path / "run", "run.steps=1")
    ended = run_command("train", "--hostfile", tmp_path / "hosts", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = (ended.stdout + ended.stderr).splitlines()
    assert not unexpected(lines) and len(lines) == len(set(lines)), lines
    assert (tmp_path / "run" / "checkpoints" / "step-000000001" / "rank-00001-of-00002.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no host"),
        ("# only a comment\n", "lists no host"),
        ("node1 slots=2\nnode1 slots=1\n", "line 2: node1 is listed twice"),
        ("node1\n", "line 1: write the number of ranks, as in 'node1 slots=8'"),
        ("node1 slots=0\n", "line 1: write the number of ranks"),
        ("node1 slots=many\n", "line 1: expected 'NAME slots=N', got 'node1 slots=many'"),
        ("-oProxyCommand=ls slots=1\n", "expected 'NAME slots=N'"),
        ("node1 slots=1\n", "--hostfile needs ssh, which is not installed"),
        ("\xff", "cannot be read"),
        ("node1 slots=1025\n", "1025 ranks on a machine are too many"),
        (f"node1 slots={10**20}\n", "expected 'NAME slots=N'"),
        (
            "\ufeffnode1,node2 slots=1\n".encode().decode("latin-1"),
            "expected 'NAME slots=N', got 'node1,node2 slots=1'",
        ),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_one_line(
    text: str, message: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without ssh
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text.encode("latin-1"))
    ended = run_command("train", "--hostfile", hosts, *train_words(shards, tmp_path / "run"))
    assert ended.returncode == 2 and ended.stdout == "", ended.stdout
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "give both --nodes"),
        (["--node-rank", "0"], "give both --nodes"),
        (["--nodes", "2", "--node-rank", "2"], "--node-rank 2 is not from 0 to 1"),
        (["--nodes", "2", "--node-rank", "-1"], "--node-rank -1 is not from 0 to 1"),
        (["--nodes", "2", "--node-rank", "0"], "--nodes needs MASTER_ADDR and MASTER_PORT"),
        (["--nodes", "2", "--node-rank", "0", "--hostfile", "hosts"], "not both"),
    ],
)
def test_options_of_a_machine_that_cannot_be_used_are_one_line(
    options: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    ended = run_command("train", *options, *train_words(shards, tmp_path / "run"))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr


def test_a_host_that_cannot_be_reached_is_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for ssh that prints the text of a login script, and fails."""
    (tmp_path / "ssh").write_text("#!/bin/sh\necho welcome\nprintf 'no \\033[31mroute\\n\\n' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}")
    (tmp_path / "hosts").write_text("node1 slots=1\nlocalhost slots=1\n")
    ended = run_command("train", "--hostfile", tmp_path / "hosts", *train_words(shards, tmp_path / "run"))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(
        "error: cannot start on node1: no \\x1b[31mroute; each machine needs passwordless ssh"
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nnode2 slots=1\n")
    ended = run_command("train", "--hostfile", tmp_path / "hosts", *train_words(shards, tmp_path / "run"))
    assert ended.returncode == 2 and ended.stderr.startswith("error: other machines cannot reach 127.0.0.1; ")


@pytest.mark.slow
def test_a_host_that_starts_slowly_trains_and_saves_when_the_command_is_killed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for ssh that runs the command here, later than the command tells machines that it is there."""
    script = '[ "$1" = -G ] && echo hostname 127.0.0.1 && exit\nfor last; do :; done\nsleep 6\nexec sh -c "$last"\n'
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}")
    (tmp_path / "hosts").write_text("user@node1 slots=2\n")
    run_dir = tmp_path / "run"
    words = train_words(shards, run_dir, "run.steps=10000", "run.checkpoint_every=0")
    with started("train", "--hostfile", str(tmp_path / "hosts"), *words) as process:
        wait_for_step(run_dir, process)
        ranks = [child for machine in children_of(process.pid) for child in children_of(machine)]
        assert len(ranks) == 2
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}/exe").exists() for rank in ranks):
            assert time.monotonic() < deadline, "ranks outlive the command"
            time.sleep(0.1)
    assert saved_steps(run_dir)[-1] == len(logged(run_dir))


def test_a_machine_under_two_names_is_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}")
    (tmp_path / "hosts").write_text("localhost slots=1\nuser@node1 slots=1\n")
    ended = run_command("train", "--hostfile", tmp_path / "hosts", *train_words(shards, tmp_path / "run"))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: localhost and user@node1 are the same machine; keep one line of the host file\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_with_a_rank_runs_as_that_rank(shards: Path, tmp_path: Path) -> None:
    """As in ``srun streamtrain train ...``, with RANK and the other variables set."""
    words = ["-m", "streamtrain.cli.main", "train", *train_words(shards, tmp_path / "run", "run.steps=1")]
    results = run_ranks(words, 2, fresh=True)
    assert [status for status, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert (tmp_path / "run" / "checkpoints" / "step-000000001" / "rank-00001-of-00002.safetensors").is_file()


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            ["deepspeed", "--num_gpus", "1", "--master_port", "{port}", "--module"],
            id="deepspeed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["torchrun", "--nproc_per_node", "1", "--master_port", "{port}", "-m"],
            id="torchrun",
            marks=pytest.mark.slow,
        ),
        ["python", "-m"],
    ],
    ids=lambda words: words[0],
)
def test_launchers_start_the_module(launcher: list[str], shards: Path, tmp_path: Path) -> None:
    """From another folder, so that the module cannot come from the working directory."""
    bin_folder = Path(sys.executable).parent
    environment = {**ENVIRONMENT, "PATH": f"{bin_folder}{os.pathsep}{ENVIRONMENT['PATH']}"}
    words = [word.format(port=free_port()) for word in launcher]
    command = [*words, "streamtrain.main", *train_words(shards, tmp_path / "run", "run.steps=1")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert list(logged(tmp_path / "run")) == [1]


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_to_the_command_stops_all_ranks_after_a_checkpoint(
    number: signal.Signals, status: int, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = train_words(shards, run_dir, "run.steps=10000", "run.checkpoint_every=0")
    typed = ["train", words[-1], "--gpus", "2", *words[:-1]]
    with started(*typed) as process:
        wait_for_step(run_dir, process)
        ranks = children_of(process.pid)
        process.send_signal(number)
        output, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors[-3000:]
    lines = output.splitlines()
    assert not unexpected(lines + errors.splitlines()), lines + errors.splitlines()
    stopping, stopped, again = lines[-3:]
    assert stopping.startswith("stopping: ") and stopped.startswith("stopped at step ")
    assert shlex.split(again) == ["streamtrain", *typed]
    assert saved_steps(run_dir)[-1] == len(logged(run_dir)) > 0
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_ranks_stop_after_a_checkpoint_when_the_command_is_killed(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = train_words(shards, run_dir, "run.steps=10000", "run.checkpoint_every=0")
    with started("train", "--ranks", "2", *words) as process:
        wait_for_step(run_dir, process)
        ranks = children_of(process.pid)
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}/exe").exists() for rank in ranks):
            assert time.monotonic() < deadline, "ranks outlive the command"
            time.sleep(0.1)
    assert saved_steps(run_dir)


def test_a_killed_rank_ends_the_others_and_sets_the_exit_status(shards: Path, tmp_path: Path) -> None:
    with started("train", "--ranks", "2", *train_words(shards, tmp_path / "run", "run.steps=10000")) as process:
        wait_for_step(tmp_path / "run", process)
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGKILL
    lines = errors.splitlines()
    assert not unexpected(lines[:-2]) and "error: rank 0: a collective operation failed (" in lines[-2], errors
    assert lines[-1].startswith("error: rank 1 ended with exit status 137: it was killed"), errors


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        ([], ["data.shards=nowhere"], "no shard set at nowhere"),
        (["--ranks", "2"], ["data.shards=nowhere"], "no shard set at nowhere"),
        (["--ranks", "2"], ["model.dpeth=3"], "did you mean model.depth"),
        (["--ranks", "2"], ["data.global_batch=7"], "global_batch"),
        (["--hostfile", "nowhere"], [], "--hostfile nowhere does not exist"),
    ],
)
def test_a_user_error_is_one_line(
    ranks: list[str], overrides: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    ended = run_command("train", *ranks, *train_words(shards, tmp_path / "run", *overrides))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr
    assert not (tmp_path / "run").exists()
