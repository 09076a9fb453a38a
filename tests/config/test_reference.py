"""The reference of all settings, its page, and ``streamtrain config``."""

from __future__ import annotations

import argparse
import re

import pytest
from pydantic import BaseModel
from ranks import ROOT

from streamtrain.cli import config as command
from streamtrain.config.reference import RULES, Setting, describe_settings, describe_shared, render_markdown
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import RESUME_RULE, Section
from streamtrain.config.tree import Config, setting_key, walk_settings
from streamtrain.errors import ConfigError

SETTINGS: dict[str, Setting] = {each.key: each for section in describe_settings().values() for each in section}


def subclasses(section: type[BaseModel] = Section) -> list[type[BaseModel]]:
    return [found for child in section.__subclasses__() for found in (child, *subclasses(child))]


def test_every_field_has_a_description_and_a_resume_rule() -> None:
    sections = [section for section in subclasses() if section.__module__.startswith("streamtrain.config.")]
    assert {Config, Schedule} < set(sections) and len(sections) > 25
    for section in sections:
        assert len(section.__doc__ or "") > 15, section
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section) and kind is not Schedule:
                continue
            assert field.description and len(field.description) > 15, (section, name)
            assert field.description.endswith(".") and field.description[0].isupper(), (section, name)
            assert isinstance(field.json_schema_extra, dict), (section, name)
            assert field.json_schema_extra[RESUME_RULE] in RULES, (section, name)


def test_the_reference_has_every_setting_once() -> None:
    assert list(SETTINGS) == [key for key, _ in walk_settings()] and len(SETTINGS) > 150
    assert all(each.default and each.type for each in SETTINGS.values())
    assert set(describe_settings()) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("key", "default", "kind", "rule"),
    [
        ("run.seed", "0", "whole number >= 0", "fixed"),
        ("run.steps", "1000", 'steps (or "N epochs") >= 1', "free"),
        ("optim.clip", "3", "number >= 0", "accept"),
        ("model.drop_path", "0.3", "number >= 0 and < 1", "accept"),
        ("model.mlp", "gelu", "gelu, swiglu", "fixed"),
        ("data.cache.limit", "null", "bytes (such as 200GB) >= 1, or null", "free"),
        ("schedules.weight_decay", "{kind: cosine, peak: 0.04, end: 0.4}", "number or schedule", "accept"),
        ("objective.koleo.weight", "0.1", "number or schedule", "accept"),
        ("crops.blur.sigma", "[0.1, 2]", "list of 2 numbers", "accept"),
        ("crops.sizes", "[]", "list of mappings", "accept"),
        ("monitor.trackers", "[]", "list of wandb, mlflow", "free"),
        ("engine.compile", "auto", "true or false, or auto", "free"),
    ],
)
def test_types_ranges_defaults_and_rules(key: str, default: str, kind: str, rule: str) -> None:
    assert SETTINGS[key] == Setting(key, default, kind, rule, SETTINGS[key].description)


def test_a_key_below_a_schedule_belongs_to_the_schedule() -> None:
    assert setting_key("schedules.lr.peak") == setting_key("schedules.lr") == "schedules.lr"
    assert setting_key("objective.gram") is setting_key("nothing") is setting_key("") is None


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == render_markdown(), "run: streamtrain config --markdown > docs/config.md"
    assert all(f"| `{key}` |" in page for key in SETTINGS)
    assert all(f"| `{each.key}` |" in page for each in describe_shared()["schedule"])


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["config", *words])
    return command.run(arguments)


def test_the_command_prints_all_settings_one_or_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert all(f"  {key} = {each.default}    ({each.type}; on resume: {each.rule})" in printed
               for key, each in SETTINGS.items())  # fmt: skip
    assert run("--explain", "objective.koleo.weight") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("  objective.koleo.weight = 0.1 ") and "Weight of KoLeo" in printed
    assert RULES["accept"] in printed and "warmup: Steps of the warm-up." in printed
    assert run("--explain", "optim.clip") == 0 and "warmup" not in capsys.readouterr().out
    assert run("--explain", "data.cache") == 0
    printed = capsys.readouterr().out
    assert "data.cache.limit = null" in printed and "data.remote" not in printed and "data.shards" not in printed
    assert run("--markdown") == 0 and capsys.readouterr().out == render_markdown()


def test_an_unknown_key_suggests_the_closest_one() -> None:
    for word, message in (
        ("objective.koleo.wieght", "unknown key objective.koleo.wieght; did you mean objective.koleo.weight?"),
        ("objective.kolo.weight", "unknown key objective.kolo.weight; did you mean objective.koleo.weight?"),
        ("optim.lr", "unknown key optim.lr; did you mean schedules.lr?"),
        ("objectives", "unknown key objectives; did you mean objective?"),
        ("run.dir.x", "unknown key run.dir.x"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            run("--explain", word)
