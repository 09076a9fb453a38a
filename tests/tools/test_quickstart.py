"""``quickstart.sh`` with stand-ins for its slow commands: which run again, in which folders, and which errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Writes every command to the log. Packing leaves a set; it has labels if LABELLED is set.
PYTHON = """#!/bin/sh
echo "$*" >>"{log}"
case "$1" in
-c) if [ -z "$LABELLED" ]; then exec "{python}" "$@"; fi ;;
tools/bench.py) echo '{{"step_seconds": 0.5}}' ;;
esac
"""
STREAMTRAIN = """#!/bin/sh
echo "streamtrain $*" >>"{log}"
case "$1" in
pack)
    mkdir -p "$5/shards" && touch 0.jpg 1.jpg && tar -cf "$5/shards/000000.tar" 0.jpg 1.jpg
    echo '"digest": "of '"$3"'"' >"$5/manifest.json"
    ;;
train) exit "${{TRAINING_STATUS:-0}}" ;;
evaluate)
    echo "kNN accuracy 50.0% of $*"
    case "$*" in *--compare*) echo "compared with ${{*##*--compare }}" ;; esac
    ;;
esac
"""


class Checkout:
    """A folder with the script, its recipe, and a `.venv` whose programs only log their commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "commands.log"
        for sub in ("tools", "configs", ".venv/bin"):
            (folder / sub).mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "quickstart.sh", folder / "tools")
        shutil.copy(ROOT / "configs" / "quickstart.yaml", folder / "configs")
        shutil.copy(ROOT / "configs" / "photos.yaml", folder / "configs")
        (folder / "tools" / "make_demo_images.py").write_text("VERSION = 3\n")
        for name, text in (
            ("tools/setup_env.sh", "#!/bin/sh\n"),
            (".venv/bin/python", PYTHON.format(log=self.log, python=sys.executable)),
            (".venv/bin/streamtrain", STREAMTRAIN.format(log=self.log)),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script; the log then has the commands of this run."""
        self.log.write_text("")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        command = ["bash", str(self.folder / "tools" / "quickstart.sh"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=100)

    def trained_in(self) -> list[str]:
        """Return the run directories of the trainings of the latest run."""
        return re.findall(r"^streamtrain train .*run\.dir=(\S+)", self.log.read_text(), re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_each_set_of_images_recipe_and_settings_has_its_own_run_directory(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    (first,) = checkout.trained_in()
    assert f"--run {first}" in checkout.log.read_text() and first in done.stdout
    assert checkout.run().returncode == 0 and checkout.trained_in() == []
    assert checkout.run("run.steps=5").returncode == 0
    (shorter,) = checkout.trained_in()
    with (checkout.folder / "configs" / "quickstart.yaml").open("a") as file:
        file.write("# changed\n")
    checkout.run()
    (other_recipe,) = checkout.trained_in()
    (checkout.folder / "tools" / "make_demo_images.py").write_text("VERSION = 4\n")
    checkout.run()
    (other_images,) = checkout.trained_in()
    assert "--out quickstart/images-v4" in checkout.log.read_text()
    commands = checkout.log.read_text()
    assert "--labels quickstart/labels-v4" in commands and "data.shards=quickstart/mapped-v4" in commands
    assert "--seg quickstart/labels-v4/masks --depth quickstart/labels-v4/depth" in commands
    checkout.run("--ranks", "2")
    (two_ranks,) = checkout.trained_in()
    assert len({first, shorter, other_recipe, other_images, two_ranks}) == 5


def test_own_images_train_with_the_recipe_for_photographs(checkout: Checkout) -> None:
    (checkout.folder / "photos").mkdir()
    done = checkout.run("--images", "photos", "run.steps=20")
    assert done.returncode == 0, done.stderr
    (own,) = checkout.trained_in()
    assert own.startswith("quickstart/own/")
    commands = checkout.log.read_text()
    assert re.search(r"^streamtrain train .*--config photos\.yaml .*run\.steps=20$", commands, re.MULTILINE)
    assert "quickstart.yaml" not in commands
    # how long it takes is said before the training
    assert "20 steps of 0.5 s on this machine: the training takes about 1 min" in done.stdout.split("== train")[0]
    checkout.run()
    assert "photos.yaml" not in checkout.log.read_text() and "bench.py" not in checkout.log.read_text()


def test_the_accuracies_and_both_comparisons_are_printed_at_the_end(checkout: Checkout) -> None:
    done = checkout.run(LABELLED="1")
    assert done.returncode == 0, done.stderr
    end = done.stdout.split("== done")[1]
    (run,) = checkout.trained_in()
    networks = re.findall(r"^   kNN accuracy 50.0% of evaluate knn (.*) --train", end, re.MULTILINE)
    assert networks == ["--pixels", "--untrained --config quickstart.yaml", f"--run {run} --compare untrained"]
    assert re.findall(r"^   compared with (\w+)", end, re.MULTILINE) == ["untrained", "pixels"]


def test_a_stopped_training_resumes_in_its_run_directory(checkout: Checkout) -> None:
    stopped = checkout.run(TRAINING_STATUS="75")
    assert stopped.returncode == 75 and "run the same command again to resume" in stopped.stderr
    started = checkout.trained_in()
    failed = checkout.run(TRAINING_STATUS="2")
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: stage 'train' failed (exit 2)")
    assert checkout.run().returncode == 0 and checkout.trained_in() == started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images"], "--images needs a value"),
        (["--images", "nowhere"], "nowhere is not a folder"),
        (["--ranks", "two"], "--ranks two is not a number of processes"),
        (["--ranks", "0"], "--ranks 0 is not a number of processes"),
        (["run.dir=elsewhere"], "run.dir is set by this script"),
        (["--epochs"], "unknown argument --epochs"),
    ],
)
def test_a_usage_error_is_one_line_before_any_work(checkout: Checkout, arguments: list[str], message: str) -> None:
    done = checkout.run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (checkout.folder / "quickstart").exists()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "setup_env.sh"])
def test_help_runs_no_command(script: str, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / script, tmp_path / "tools")
    done = subprocess.run(["bash", str(tmp_path / "tools" / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and f"tools/{script}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]
