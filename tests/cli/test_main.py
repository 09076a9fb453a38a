"""The ``streamtrain`` command itself: help, version, exit statuses, completion, and the scripts of tools/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT, exit_status, run_command
from drawn_images import draw_folder
from ranks import ROOT

from streamtrain import __version__
from streamtrain.cli.main import COMMANDS, parse_arguments
from streamtrain.run.resume_policy import separate_overrides


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"config"}))
def test_the_help_of_a_command_describes_its_options_and_shows_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith(f"usage: streamtrain {name}") and f"\n  streamtrain {name} " in text.partition("examples:")[2]
    )
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"config"}))
def test_the_examples_of_a_command_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_status([name, "--help"])
    examples = capsys.readouterr().out.partition("examples:")[2].strip().splitlines()
    assert len(examples) >= 2
    for example in examples:
        assert parse_arguments(example.replace("'", "").split()[1:]).command == name


def test_the_help_lists_every_command_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS) and "75   stopped on request" in text
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out == f"streamtrain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["verify", "set", "--wrokers", "2"], "error: unrecognized arguments: --wrokers"),
        (["verify", "set", "a.b=1"], "error: unrecognized arguments: a.b=1"),
        (["verify", "nowhere"], "error: no shard set at nowhere"),
        (["plan", "--config", "vits16.yaml", "--gpus", "0", "--gpu-memory", "8GB"], "'0' is not a whole number"),
    ],
)
def test_an_error_has_exit_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert exit_status(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1] and output.out == ""


def test_overrides_keep_their_order_around_options() -> None:
    words = ["train", "a.b=1", "--gpus", "2", "a.b=2", "--config", "vits16.yaml", "c.d=-1", "a.b=3"]
    assert parse_arguments(words).overrides == ["a.b=1", "a.b=2", "c.d=-1", "a.b=3"]


def test_an_interrupt_has_exit_status_130_and_no_traceback(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 2000)
    packed = run_command("pack", "--src", tmp_path / "images", "--out", tmp_path / "set")
    assert packed.returncode == 0, packed.stderr
    process = subprocess.Popen(
        [*COMMAND, "verify", str(tmp_path / "set"), "--workers", "1"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # the signal must not arrive before the command handles it: wait until it reads the set
    while process.poll() is None and not _has_open(process.pid, tmp_path / "set"):
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("this machine verifies faster than it can be interrupted")
    assert process.returncode == 130 and "Traceback" not in errors and errors.splitlines()[-1] == "interrupted"


def _has_open(pid: int, folder: Path) -> bool:
    """Return whether a process has a file of a folder open."""
    with suppress(OSError):
        return any(os.readlink(link).startswith(str(folder)) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_completion_lists_commands_and_options() -> None:
    """Complete like argcomplete's shell function, which passes the line in variables."""

    def complete(line: str) -> list[str]:
        environment = {
            **ENVIRONMENT, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line,
            "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
        }  # fmt: skip
        code = "import sys; sys.argv[0] = 'streamtrain'; from streamtrain.cli.main import main; main([])"
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return [word.strip() for word in ended.stdout.split()]

    assert complete("streamtrain ex") == ["export"]
    assert {"--gpus", "--hostfile"} <= set(complete("streamtrain train --"))


def test_scripts_of_tools_call_the_same_commands(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 3)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    for script, words, message in (
        ("make_shards.py", ["--src", "images", "--out", "set", "--workers", "1"], "packed 3 images"),
        ("verify_shards.py", ["set"], "no faults"),
        ("index_shards.py", ["--src", "set/shards", "--out", "indexed"], "indexed 3 images"),
    ):
        command = [sys.executable, str(ROOT / "tools" / script), *words]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0 and message in ended.stdout, ended.stderr
    assert os.listdir(tmp_path / "set" / "shards") == ["000000.tar"]


@pytest.mark.parametrize("order", [("=3", "=2", "=3"), ("=2", "=3"), ("=3", "=3", "=2", "=3")])
def test_the_last_override_wins_though_words_repeat(order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--config", "vits16.yaml", "--accept", "run.seed", *(f"optim.clip{word}" for word in order)]
    monkeypatch.setattr(sys, "argv", ["streamtrain", *words])
    arguments = parse_arguments(words)
    separate_overrides(arguments)
    assert arguments.accept == ["run.seed"] and arguments.overrides[-1] == "optim.clip=3"


def test_a_reader_that_closes_the_output_is_no_error() -> None:
    command = f"{sys.executable} -m streamtrain.cli.main config --markdown | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
