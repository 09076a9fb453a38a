from __future__ import annotations

import pytest

from streamtrain.config.load import build, load_config, preset_folders
from streamtrain.config.recipes import nearest_recipe
from streamtrain.config.tree import Config


@pytest.mark.parametrize("name", sorted(path.name for path in preset_folders()[0].glob("*.yaml")))
def test_every_recipe_is_found_with_the_settings_changed(name: str) -> None:
    assert nearest_recipe(load_config(name, ["run.dir=runs/x", "data.shards=sets/x"])) == (name, {})
    changed = load_config(name, ["run.dir=runs/x", "optim.clip=7.5", "run.seed=41"])
    assert nearest_recipe(changed) == (name, {"optim.clip": 7.5, "run.seed": 41})


def test_without_recipes_settings_are_compared_with_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtrain.config.recipes._recipes", dict)
    assert nearest_recipe(Config()) == ("", {})
    assert nearest_recipe(build({"run": {"seed": 3}})) == ("", {"run.seed": 3})
