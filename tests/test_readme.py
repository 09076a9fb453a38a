"""The README names every recipe and command, with numbers that are current."""

from __future__ import annotations

import re
from pathlib import Path

from doc_blocks import WRAPPERS

from streamtrain.cli.main import COMMANDS
from streamtrain.config.load import load_config
from streamtrain.planning.memory import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_recipe_and_command_is_named() -> None:
    missing = {path.name for path in (ROOT / "configs").glob("*.yaml") if f"`{path.name}`" not in README}
    scripts = {command: script for script, command in WRAPPERS.items()}
    for command in set(COMMANDS) - {"config"}:
        script = Path(scripts.get(command, "streamtrain/main.py")).name
        if f"streamtrain {command}" not in README and script not in README:
            missing.add(command)
    missing |= {script for script in ("tools/quickstart.sh", "tools/test.sh") if script not in README}
    assert not missing


def test_recipes_have_the_planned_numbers_of_parameters() -> None:
    rows = re.findall(r"^\| `(\w+\.yaml)` \| [^|]+ \| ([\d.]+) \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    for name, millions in rows:
        count = plan(load_config(name, ["data.shards=x"]), 1).num_backbone_parameters
        assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions, name


def test_recipes_have_the_accuracies_of_the_result_files() -> None:
    rows = re.findall(r"^\| `(\w+)\.yaml` \|.* \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == ["quickstart", "photos", "cifar10"]
    files = {"photos": "photos_20000"}
    for name, *accuracies in rows:
        result = (ROOT / "benchmarks" / "results" / f"{files.get(name, name)}.json").read_text(encoding="utf-8")
        assert all(accuracy in result for accuracy in accuracies), name


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_script_of_a_command_is_a_command() -> None:
    assert len(WRAPPERS) == 8 and set(WRAPPERS.values()) < set(COMMANDS)


def test_every_setting_in_the_text_exists() -> None:
    for key in re.findall(r"`((?:data|crops|masks|model|objective|teacher|optim|engine|init|run)\.[a-z_.]+)`", README):
        section = load_config("quickstart.yaml").model_dump()
        for part in key.split("."):
            assert part in section, key
            section = section[part]
