"""Loading of recipes and overrides, and the messages for invalid keys and values."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from drawn_images import draw_folder
from hypothesis import given
from hypothesis import strategies as st

from shards.packing.pack import PackOptions, pack
from streamtrain.config.load import (
    build,
    describe_shape,
    load_config,
    merge,
    parse_override,
    parse_yaml,
    preset_folders,
    read_resolved,
    to_yaml,
)
from streamtrain.errors import ConfigError

RECIPES = sorted(path.name for folder in preset_folders() for path in folder.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_equals_its_resolved_form(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_resolved(tmp_path) == config


def test_overrides_are_parsed_as_yaml_and_1e_4_is_a_number() -> None:
    config = load_config("vits16.yaml", ["schedules.lr=1e-4", "crops.global_scale=[0.5, 1]", "data.global_batch=null"])
    assert config.schedules.lr.peak == 1e-4
    assert config.crops.global_scale == (0.5, 1.0) and config.data.global_batch is None


@pytest.mark.parametrize("form", ["command line", "file", "mapping"])
def test_a_number_replaces_the_peak_and_keeps_the_shape_of_the_recipe(form: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: vits16\nschedules: {lr: 5.0e-4, weight_decay: 0.1}\n")
    name, overrides = {
        "command line": ("vits16", ["schedules.lr=5e-4", "schedules.weight_decay=0.1"]),
        "mapping": ("vits16", ['schedules={"lr": 0.0005, "weight_decay": 0.1}']),
        "file": (str(tmp_path / "mine.yaml"), []),
    }[form]
    reshaped: set[str] = set()
    config = load_config(name, overrides, reshaped=reshaped)
    before, lr = load_config("vits16").schedules.lr, config.schedules.lr
    assert lr == before.model_copy(update={"peak": 5e-4}) and lr.kind == "cosine" and lr.warmup == 1000
    assert reshaped == {"schedules.lr", "schedules.weight_decay"}
    line = describe_shape("schedules.lr", config)
    assert line is not None and "peak 0.0005; the recipe's shape is kept (cosine, end 1e-06, warmup 1000)" in line
    # the override that the line proposes makes a constant
    constant = re.search(r"'(schedules\.lr=.*)'", line)
    assert constant is not None
    again = load_config(name, [*overrides, constant[1]])
    assert again.schedules.lr == build({"schedules": {"lr": 5e-4}}).schedules.lr
    assert describe_shape("schedules.lr", again) is None


def test_a_number_is_a_constant_over_a_constant_in_a_recipe_and_for_zero(tmp_path: Path) -> None:
    (tmp_path / "root.yaml").write_text("schedules: {lr: 5.0e-4, teacher_temperature: 0.05}\n")
    reshaped: set[str] = set()
    config = load_config(str(tmp_path / "root.yaml"), ["schedules.teacher_temperature=0.06"], reshaped=reshaped)
    assert config == build({"schedules": {"lr": 5e-4, "teacher_temperature": 0.06}})
    config = load_config("vits16", ["schedules.lr=0", "objective.koleo.weight=0.2"], reshaped=reshaped)
    assert config.schedules.lr == build({"schedules": {"lr": 0}}).schedules.lr and not reshaped
    # a recipe without the key has the default's shape
    config = load_config(str(tmp_path / "root.yaml"), ["schedules.momentum=0.9"], reshaped=reshaped)
    assert (config.schedules.momentum.kind, config.schedules.momentum.end) == ("cosine", 1.0)
    assert reshaped == {"schedules.momentum"}


def test_recipes_are_found_with_and_without_suffix_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: vits16\nrun: {steps: 7}\nmodel: {drop_path: 0.2}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.run.steps, config.model.drop_path, config.model.dim) == (7, 0.2, 384)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.step=3", "unknown key run.step; did you mean run.steps?"),
        ("optim.lr=3", "unknown key optim.lr; did you mean schedules.lr?"),
        ("schedules.lr.peek=3", "unknown key schedules.lr.peek; did you mean schedules.lr.peak?"),
        ("schedules.lr=abc", "schedules.lr: must be a number or a schedule"),
        ("model.preset=vitx", "unknown preset 'vitx'; choose one of vits16"),
        ("crops.global_size=225", "crops.global_size 225 is not a multiple of model.patch_size 16"),
        ("crops.local_size=[30, 32]", "crops.local_size 30x32 is not a multiple of model.patch_size 16"),
        *(
            (f"crops.global_size={value}", "crops.global_size: must be a whole number of pixels above 0, or two: [")
            for value in ("[0, 32]", "[32]", "[32, 32, 32]", "text", ".nan", "[.nan, 32]", "{a: 1}", "null")
        ),
        ("crops.sizes=[{share: 1, local_size: [0, 16]}]", "crops.sizes.0.local_size: must be a whole number of pixels"),
        ("objective.gram.size=[16]", "objective.gram.size: must be a whole number of pixels above 0"),
        ("crops.global_scale=[0.9, 0.1]", "crops.global_scale"),
        ("data.micro_batch=0", "data.micro_batch: must be at least 1 (got 0)"),
        ("run.steps=0", "run.steps: must be at least 1 (got 0)"),
        ("run.steps=-1", "run.steps: must be at least 1 (got -1)"),
        ("run.steps=1.5", "run.steps: must be a whole number (got 1.5)"),
        ("optim.eps=0", "optim.eps: must be above 0.0 (got 0)"),
        ("optim.eps=small", "optim.eps: must be a number (got 'small')"),
        ("masks.probability=2", "masks.probability: must be at most 1.0 (got 2)"),
        ("monitor.progress=7", "monitor.progress: must be true or false (got 7)"),
        ("run.dir=7", "run.dir: must be text (got 7)"),
        ("engine.dtype=fp16", "engine.dtype: must be 'auto', 'bf16' or 'fp32' (got 'fp16')"),
        ("crops.global_scale=0.5", "crops.global_scale: must be a list, such as [0.5, 1] (got 0.5)"),
        ("schedules.lr=-1", "lr has the value -1; it must be at least 0"),
        ("schedules.momentum=1.5", "momentum has the value 1.5; it must be within [0, 1]"),
        ("schedules.teacher_temperature=0", "teacher_temperature has the value 0; it must be above 0"),
        ("data.max_pixels=12", "data.max_pixels: must be at least 784 (got 12)"),
        ("data.micro_batch", "does not have the form section.key=value"),
        ("run.dir=[", "is not YAML"),
    ],
)
def test_an_invalid_override_raises_a_one_line_error(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("vits16.yaml", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_square_crops_are_recorded_as_numbers_and_rectangles_as_lists() -> None:
    """As in the run directories of earlier versions."""
    sizes = [{"share": 1, "global_size": [32, 32]}, {"share": 2, "local_size": [48, 16]}]
    config = build({"crops": {"global_size": [64, 64], "local_size": [32, 48], "sizes": sizes}})
    raw = parse_yaml(to_yaml(config).encode())
    assert raw["crops"]["global_size"] == 64 and raw["crops"]["local_size"] == [32, 48]
    assert [entry["global_size"] for entry in raw["crops"]["sizes"]] == [32, None]
    assert build(raw) == build(config.model_dump()) == config
    assert raw["objective"]["gram"]["size"] is None


@pytest.mark.parametrize(
    "text",
    [
        "- a\n", "a: [", "extends: self.yaml\n", "!!python/object/apply:os.getcwd []\n", "extends:\n", "extends: 5\n",
        "extends: [vits16, null]\n", "extends: {a: 1}\n", f"extends: {'a' * 5000}\n", 'extends: "a\\0b"\n',
    ],
)  # fmt: skip
def test_an_invalid_file_raises_a_one_line_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "self.yaml"))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_config(str(tmp_path))


def test_a_missing_recipe_raises_an_error_that_lists_the_recipes() -> None:
    for name in ("foto", "foto.yaml"):
        with pytest.raises(ConfigError, match=r"^no config 'foto.*did you mean photos\.yaml\?$"):
            load_config(name)
    with pytest.raises(ConfigError, match=r"no config 'absent'.*vits16\.yaml"):
        load_config("absent")


def test_the_global_batch_must_be_a_multiple_of_the_ranks_micro_batches() -> None:
    config = load_config("vits16.yaml", ["data.micro_batch=4", "data.global_batch=12"])
    assert config.batch_split(3) == (12, 1) and config.batch_split(1) == (12, 3)
    with pytest.raises(ConfigError, match=r"12 is not a multiple of data.micro_batch 4 x 2 ranks = 8"):
        config.batch_split(2)


def test_lengths_in_epochs_become_steps(tmp_path: Path) -> None:
    pack(draw_folder(tmp_path / "images", 12), tmp_path / "set", PackOptions())
    given = [f"data.shards={tmp_path / 'set'}", "data.micro_batch=2", "run.steps=10 epochs",
             "schedules.lr.warmup=0.5 epochs"]  # fmt: skip
    config = load_config("vits16.yaml", given)
    assert (config.run.steps, config.schedules.lr.warmup) == (60, 3)
    assert load_config("vits16.yaml", given, world_size=3).run.steps == 20
    assert load_config("vits16.yaml", [*given, "data.global_batch=4"], world_size=2).run.steps == 30
    with pytest.raises(ConfigError, match=r"run.steps: .*no set here|run.steps: .*absent"):
        load_config("vits16.yaml", [*given, f"data.shards={tmp_path / 'absent'}"])
    with pytest.raises(ConfigError, match=r"run.steps: a length in epochs needs a set .* give data.shards"):
        load_config("vits16.yaml", ["run.steps=3 epochs"])
    with pytest.raises(ConfigError, match=r"schedules.lr.peak"):
        load_config("vits16.yaml", [*given, "schedules.lr.peak=3 epochs"])


def test_koleo_groups_must_fit_the_ranks_micro_batches() -> None:
    koleo = build({"objective": {"koleo": {"distributed": True, "group_size": 8}}}).objective.koleo
    assert koleo.samples(4, 4) == koleo.samples(16, 1) == 8
    assert build({"objective": {"koleo": {"distributed": True}}}).objective.koleo.samples(4, 4) == 16
    assert build({}).objective.koleo.samples(4, 4) == 4
    with pytest.raises(ConfigError, match=r"group_size 8 does not fit data.micro_batch 3 x 2 ranks"):
        koleo.samples(3, 2)
    with pytest.raises(ConfigError, match=r"group_size has an effect only with distributed"):
        build({"objective": {"koleo": {"group_size": 8}}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"fp8": True, "dtype": "fp32"}}, r"fp8 needs bf16"),
        ({"engine": {"fp8": True}, "model": {"dim": 24, "num_heads": 2}}, r"model.dim is 24; with engine.fp8"),
        ({"engine": {"fp8": True}, "model": {"mlp_hidden": 100}}, r"model.mlp_hidden is 100; with engine.fp8"),
    ],
)
def test_fp8_needs_bf16_and_multiples_of_16(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(sections)


@pytest.mark.parametrize(("word", "expected"), [("on", (True, True)), ("off", (False, False)), ("auto", (True, False))])
def test_compile_auto_depends_on_the_device(word: str, expected: tuple[bool, bool]) -> None:
    engine = load_config("vits16.yaml", [f"engine.compile={word}"]).engine
    assert (engine.compiles(on_gpu=True), engine.compiles(on_gpu=False)) == expected


_TREES = st.recursive(
    st.integers() | st.none() | st.lists(st.integers()),
    lambda children: st.dictionaries(st.sampled_from("abcd"), children, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


@given(_TREES, _TREES, _TREES)
def test_merge_is_associative_and_idempotent_with_the_empty_mapping_as_identity(a: dict, b: dict, c: dict) -> None:
    # associative if no key is a mapping in one tree and a value in another one: a value replaces a whole mapping
    assert merge(a, {}) == a == merge({}, a)
    assert merge(a, a) == a
    if not _kinds_clash(a, b) and not _kinds_clash(b, c) and not _kinds_clash(a, c):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


def _kinds_clash(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_kinds_clash(a[key], b[key]) for key in a.keys() & b.keys())
    return isinstance(a, dict) != isinstance(b, dict)


@given(st.lists(st.sampled_from(["run", "x", "steps"]), min_size=1, max_size=40), st.integers())
def test_an_override_becomes_a_nested_mapping(path: list[str], value: int) -> None:
    nested = parse_override(f"{'.'.join(path)}={value}")
    for key in path:
        assert list(nested) == [key]
        nested = nested[key]
    assert nested == value


def test_the_configuration_is_frozen_and_its_yaml_has_plain_types_only() -> None:
    config = build({})
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 5  # type: ignore[misc]
    assert yaml.safe_load(to_yaml(config))["run"]["seed"] == 0


def test_shards_are_a_path_or_a_list_with_weights(tmp_path: Path) -> None:
    one, several = (load_config("vits16.yaml", [f"data.shards={value}"]) for value in (
        "s3://bucket/set", "[{shards: a, weight: 3}, {shards: b, weight: 1}]",
    ))  # fmt: skip
    assert one.data.shards == "s3://bucket/set" and len(one.data.shares) == 1
    assert [(share.shards, share.weight) for share in several.data.shares] == [("a", 3.0), ("b", 1.0)]
    assert (one.data.shards_text, several.data.shards_text) == ("s3://bucket/set", "75.0% of a, 25.0% of b")
    (tmp_path / "config.yaml").write_text(to_yaml(several))
    assert read_resolved(tmp_path) == several
    for value, message in (
        ("3", "data.shards: give the path or the URL of a shard set, or a list of"),
        ("[]", "data.shards: must have at least 1 item"),
        ("[{shards: a}]", "data.shards.0.weight: Field required"),
        ("[{shards: a, weight: 0}]", "data.shards.0.weight: must be above 0.0 (got 0)"),
        ("[{shards: a, weight: .inf}]", "data.shards.0.weight: must be a finite number"),
        ("[{shards: '', weight: 1}]", "data.shards.0.shards: String should have at least 1 character"),
        ("[{shards: a, weigth: 1, weight: 1}]", "unknown key data.shards.0.weigth"),
        ("[a, b]", "data.shards.0: must be a mapping, {key: value, ...} (got 'a')"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config("vits16.yaml", [f"data.shards={value}"])


def test_an_epoch_of_a_mixture_has_as_many_images_as_its_sets(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 10)):
        pack(draw_folder(tmp_path / f"{name} images", count), tmp_path / name, PackOptions())
    shards = f"data.shards=[{{shards: {tmp_path / 'a'}, weight: 1}}, {{shards: {tmp_path / 'b'}, weight: 9}}]"
    assert load_config("vits16.yaml", [shards, "data.micro_batch=4", "run.steps=3 epochs"]).run.steps == 12


def test_sizes_are_parsed_with_units() -> None:
    for text, limit in (("200GB", 200 * 10**9), ("1.5 MiB", 3 << 19), ("1000", 1000), ("7 kb", 7000)):
        config = load_config("vits16.yaml", [f"data.cache={{dir: copies, limit: {text}}}"])
        assert config.data.cache.limit == limit
    for value, message in (
        ("{dir: copies, limit: much}", "data.cache.limit: must be a size such as 80GB"),
        ("{dir: copies, limit: 80}", "80 without a unit is 80 bytes; write 80MB or 80GB"),
        ("{dir: copies, limit: 2.5}", "2.5 without a unit is 2.5 bytes; write 2.5MB or 2.5GB"),
        ("{dir: copies, limit: 0B}", "data.cache.limit: must be at least 1"),
        ("{dir: copies}", "data.cache: dir and limit must be set together"),
        ("{limit: 1GB}", "data.cache: dir and limit must be set together"),
        ("{downloads: 2}", "data.cache: downloads has an effect only with dir"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config("vits16.yaml", [f"data.cache={value}"])


@pytest.mark.parametrize("key", ["data.read_ahead_bytes", "engine.reduce_bucket_bytes", "objective.chunk_bytes"])
def test_every_size_in_bytes_may_have_a_unit_and_needs_one_if_it_is_small(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: 64 without a unit is 64 bytes; write 64MB or 64GB"):
        load_config("vits16", [f"{key}=64"])
    assert load_config("vits16", [f"{key}=64MB"]) == load_config("vits16", [f"{key}=64000000"])


HOSTILE = {
    "flow": b"[" * 2**20, "mappings": b"a: " + b"{" * 2**19, "dashes": b"- " * 2**19, "questions": b"? " * 2**19,
    "folded": b">\n" + b" a\n\n" * 2**18, "plain lines": b"a: " + b"b\n  " * 2**18, "sexagesimal": b"1:" * 2**19 + b"1",
    "digits": b"1" * 2**20, "values": b"".join(b"k%d: 1\n" % index for index in range(50_000)),
    "laughs": b"a: &a [1, 2]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n", "too large": b" " * (2**20 + 1),
    "bytes": b"\xff\xfe\x00", "date": b"a: 2001-13-45", "tag": b"!!bool x", "unhashable": b"{[a]: 1}",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_or_read_within_seconds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(HOSTILE[kind])
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert time.process_time() - began < 10 and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@given(st.binary(max_size=200) | st.text("[]{}:,-?!&*|>'\"#%@ \n\t.01ax~<", max_size=80).map(str.encode))
def test_any_bytes_are_a_value_or_one_line(content: bytes) -> None:
    try:
        parse_yaml(content)
    except ValueError as error:
        assert len(str(error).splitlines()) <= 1


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("run: {steps: 3}\nmodel: {depth: 2}\nrun: {seed: 1}\n")
    with pytest.raises(ConfigError, match="the key 'run' occurs twice"):
        load_config(str(tmp_path / "twice.yaml"))


def test_files_that_extend_each_other_exponentially_are_refused(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.yaml").write_text(f"extends: [{index + 1}.yaml, {index + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"0\.yaml extends more than 100 files"):
        load_config(str(tmp_path / "0.yaml"))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_not_finite_are_refused(value: str) -> None:
    for key in ("schedules.lr", "model.layerscale", "optim.eps"):
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_config("vits16.yaml", [f"{key}={value}"])


def test_an_override_with_many_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not have the form"):
        load_config("vits16.yaml", ["a." * 100_000 + "b=1"])


def test_a_colour_of_the_command_line_is_no_comment() -> None:
    assert build(parse_override("data.background=#ff8800")).data.background == "#ff8800"
    assert build(parse_override("data.background=null")).data.background is None


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"])
def test_yaml_builds_no_python_objects(tag: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    value = f"!!{tag} [{str(made)!r}]" if "name" not in tag else f"!!{tag} ''"
    run = tmp_path / "run"
    run.mkdir()
    # a recipe, and another person's run directory
    for name in ("recipe.yaml", "run/config.yaml"):
        (tmp_path / name).write_text(f"run: {{dir: {value}}}\n")
    for read in (
        lambda: load_config(str(tmp_path / "recipe.yaml")),
        lambda: read_resolved(run),
        lambda: parse_override(f"run.dir={value}"),
    ):
        with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
            read()
    assert not made.exists()
