"""Every setting and every option that is a path expands ``~`` and variables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from commands import ENVIRONMENT, run_command
from drawn_images import packed_set
from tiny_run import command

from streamtrain.cli.main import COMMANDS, build_parser
from streamtrain.config.data import SetShare
from streamtrain.config.load import RESOLVED_NAME, build, merge, parse_override, read_resolved, to_yaml
from streamtrain.config.section import is_path
from streamtrain.config.tree import path_settings, walk_settings
from streamtrain.errors import ConfigError
from streamtrain.run.command_line import local_path, path_or_url
from streamtrain.run.directory import saved_steps
from streamtrain.run.resume_policy import build_provenance, check_resume

# settings with text that is no path
TEXTS = {
    "engine.environment",
    "model.preset",
    "model.factory",
    "data.augmentations",
    "monitor.project",
    "evaluation.best",
    "data.background",
    "teacher.model",
}
# other settings that a path needs
NEEDED: dict[str, dict[str, Any]] = {
    "data.cache.dir": {"data": {"cache": {"limit": "1GB"}}}, "engine.moments_dir": {"engine": {"moments": "disk"}},
    "teacher.weights": {"teacher": {"kind": "frozen"}}, "evaluation.test": {"evaluation": {"train": "x"}},
}  # fmt: skip
# options with text that is no path: names, columns, devices, code, and --config, which is looked up as a recipe too
OPTIONS = {
    "config", "device", "overrides", "accept", "tags", "explain", "image_column", "label_column", "factory",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)


def holds_text(kind: Any) -> bool:
    return kind is str or any(map(holds_text, get_args(kind)))


def test_a_new_setting_with_text_must_be_declared_a_path_or_not() -> None:
    texts = {key for key, field in walk_settings() if holds_text(field.annotation)}
    assert texts == set(path_settings()) | TEXTS and not set(path_settings()) & TEXTS
    assert is_path(SetShare.model_fields["shards"])


@pytest.mark.parametrize("key", sorted(path_settings()))
def test_every_path_is_expanded(key: str) -> None:
    for text, expected in (("~/x", "/people/me/x"), ("$DATA/${DATA}", "/data//data"), ("$DATA/x", "/data/x")):
        config = build(merge(NEEDED.get(key, {}), parse_override(f"{key}={text}")))
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        assert value == expected
        # the resolved configuration is saved expanded, and reads the same
        assert build(yaml.safe_load(to_yaml(config))) == config and "~" not in to_yaml(config)
    with pytest.raises(ConfigError, match=f"^{key}: .*UNSET, which is not set"):
        build(merge(NEEDED.get(key, {}), parse_override(f"{key}=$UNSET/x")))


@pytest.mark.parametrize("key", sorted(set(path_settings()) - {"data.shards"}))
def test_a_url_is_no_local_path(key: str) -> None:
    for url in ("s3://bucket/x", "file:///x", "http://host/x"):
        with pytest.raises(ConfigError, match=f"^{key}: .* is a URL; give a local path"):
            build(merge(NEEDED.get(key, {}), parse_override(f"{key}={url}")))


def test_every_set_of_a_mixture_is_expanded() -> None:
    sets = "[{shards: ~/a, weight: 1}, {shards: '$DATA/b', weight: 2}, {shards: 's3://c/~', weight: 3}]"
    config = build(parse_override(f"data.shards={sets}"))
    assert [share.shards for share in config.data.shares] == ["/people/me/a", "/data/b", "s3://c/~"]


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from actions(child)
        else:
            yield action


def test_every_option_with_text_is_declared_a_path_or_not() -> None:
    found = set()
    for action in actions(build_parser(COMMANDS)):
        if action.nargs == 0 or action.choices is not None:
            continue
        if action.type is None:
            assert action.dest in OPTIONS, action
        if action.type in (local_path, path_or_url):
            found.add(action.dest)
    assert {"src", "out", "run", "weights", "train", "test", "set", "image", "resume", "hostfile", "scratch"} <= found


def test_a_run_resumes_with_paths_that_an_older_version_recorded_unexpanded(tmp_path: Path) -> None:
    raw = {"run": {"dir": str(tmp_path)}, "objective": {"gram": {"weight": 1.0, "teacher": "~/teacher"}}}
    config = build(raw)
    saved = {**build_provenance(config, "fp32"), "world_size": 1}
    saved["config"]["objective"]["gram"]["teacher"] = "~/teacher"
    source = tmp_path / "checkpoints" / "step-000000001"
    assert check_resume(config, source, saved, 1) == []


def test_a_run_below_the_home_folder_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    packed_set(home, 8)
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(home))
    (packed,) = {path.parent for path in home.rglob("manifest.json")}
    # kernels would be compiled anew in this home folder
    words = ["train", *command(f"~/{packed.relative_to(home)}", Path("$HOME/run"), "engine.cpu_kernels=false")[1:]]
    first = run_command(*words, "run.steps=1", cwd=here)
    assert first.returncode == 0, first.stderr
    again = run_command(*words, "run.steps=1", "run.dir=~/run", cwd=here)
    assert again.returncode == 0 and f"1 steps in {home / 'run'}" in again.stdout, again.stderr
    assert saved_steps(home / "run")[-1] == 1
    monkeypatch.setenv("HOME", str(home))
    assert read_resolved("/".join([str(home), "run"])).run.dir == str(home / "run")
    assert "~" not in (home / "run" / RESOLVED_NAME).read_text() and list(here.iterdir()) == []
    state = json.loads(next((home / "run").rglob("state.json")).read_text())
    assert state["config"]["data"]["shards"] == str(packed)
