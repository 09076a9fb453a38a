"""``setup_env.sh`` with a stand-in for pip: its installations and its error messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs Python, except for `-m pip`, whose arguments it writes to a log, and the check of the installed torch.
PYTHON_SHIM = """#!/bin/sh
case "$*" in *"import sys, torch"*) exit ;; esac
if [ "$1 $2" = "-m pip" ]; then echo "$@" >>"{log}"; exit; fi
exec "{python}" "$@"
"""


class Checkout:
    """A folder with the script, pyproject.toml, the lock file, and a `.venv` whose pip installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.commands = folder, folder / "pip.log", folder / "commands"
        for sub in ("tools", ".venv/bin", "commands", "requirements"):
            (folder / sub).mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "setup_env.sh", folder / "tools")
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.lock = folder / "requirements" / "test.lock"
        self.lock.write_text("# Python 1.0\nnumpy==1.0\n")
        self.command(".venv/bin/python", PYTHON_SHIM.format(log=self.log, python=sys.executable))

    def command(self, path: str, text: str) -> None:
        """An executable script."""
        (self.folder / path).write_text(text)
        (self.folder / path).chmod(0o755)

    def driver(self, cuda: str) -> None:
        """Pretend to have a driver that supports this CUDA version."""
        self.command("commands/nvidia-smi", f"#!/bin/sh\necho '| Driver Version: 1.2  CUDA Version: {cuda}  |'\n")

    def run(self, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script from elsewhere."""
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        inherited = {key: value for key, value in os.environ.items() if key != "STREAMTRAIN_TORCH_INDEX"}
        environment = {**inherited, "PATH": path, **variables}
        script = str(self.folder / "tools" / "setup_env.sh")
        return subprocess.run(["bash", script, *extras], cwd="/", env=environment, capture_output=True, text=True)

    def installs(self) -> list[str]:
        """Return the arguments of every `pip install` so far, without the common options."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        common = "-m pip install --disable-pip-version-check --progress-bar off "
        return [line.removeprefix(common) for line in lines if line.startswith("-m pip install")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def test_installs_once_and_again_when_the_requirements_change(checkout: Checkout) -> None:
    checkout.driver("13.0")
    assert checkout.run("test").returncode == 0
    assert checkout.run("test").returncode == 0
    assert checkout.run().returncode == 0, "an installation with more extras serves a call with fewer"
    assert checkout.installs() == ["--editable .[cu13,test]"]
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert checkout.installs()[1:] == ["--editable .[cu13]"]


def test_the_lock_file_applies_to_tests_on_its_version_of_python(checkout: Checkout) -> None:
    checkout.driver("13.0")
    checkout.run("test")
    checkout.lock.write_text("# Python {}.{}\n".format(*sys.version_info))
    checkout.run("hf")
    checkout.run("test", "hf")
    assert checkout.installs() == [
        "--editable .[cu13,test]",
        "--editable .[cu13,hf]",
        "--constraint requirements/test.lock --editable .[cu13,test,hf]",
    ]


def test_the_lock_file_pins_the_environment_but_not_the_build_of_torch() -> None:
    header, *lines = (ROOT / "requirements" / "test.lock").read_text().splitlines()
    assert header.startswith("# Python 3.")
    pins = [line.partition("==")[0].lower() for line in lines if not line.startswith("#")]
    assert all("==" in line or line.startswith("#") for line in lines)
    assert {"deepspeed", "numpy", "pydantic", "pytest", "ruff", "mypy"} <= set(pins)
    assert not [name for name in pins if name in ("torch", "triton", "streamtrain") or name.startswith("nvidia-cu")]


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cu12"), ("13.1", "cu13")])
def test_dali_follows_the_driver(checkout: Checkout, cuda: str, extra: str) -> None:
    checkout.driver(cuda)
    checkout.run()
    assert checkout.installs() == [f"--editable .[{extra}]"]


def test_torch_comes_from_the_index_of_the_variable(checkout: Checkout, tmp_path: Path) -> None:
    checkout.driver("13.0")
    torch = next(part for part in (ROOT / "pyproject.toml").read_text().split('"') if part.startswith("torch>="))
    checkout.run(STREAMTRAIN_TORCH_INDEX="scheme://index")
    checkout.run(STREAMTRAIN_TORCH_INDEX=str(tmp_path))
    assert checkout.installs()[0] == f"--no-deps --index-url scheme://index {torch}"
    assert checkout.installs()[2] == f"--no-deps --no-index --find-links {tmp_path} {torch}"


def test_a_missing_python_is_a_one_line_error(checkout: Checkout) -> None:
    shutil.rmtree(checkout.folder / ".venv")
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python"):
        checkout.command(f"commands/{name}", "#!/bin/sh\nexit 1\n")
    done = checkout.run()
    assert done.returncode == 1
    assert "Python >= 3.10" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_failed_installation_names_its_log(checkout: Checkout) -> None:
    shim = '#!/bin/sh\n[ "$3" = install ] && echo "ERROR: no such thing" && exit 1\nexit 0\n'
    checkout.command(".venv/bin/python", shim)
    done = checkout.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "ERROR: no such thing"
    assert "install.log" in done.stderr.splitlines()[-1]
    assert not list((checkout.folder / ".venv").glob("installed-*"))
