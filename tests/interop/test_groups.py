"""The preferred network of a file is taken, whatever it is nested in; another architecture is refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import exit_status
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_backbone import tiny_backbone
from torch import Tensor

from streamtrain.errors import StreamtrainError
from streamtrain.interop.groups import find_groups
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.interop.naming import to_timm

State = dict[str, Tensor]
FIRST = tiny_backbone().model.state_dict()
SECOND = {name: value + 1 for name, value in FIRST.items()}
SHAPES = {name: value.shape for name, value in FIRST.items()}


def below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def taken(path: Path, minimum: float = 0.9) -> tuple[State, str]:
    with load_pretrained_backbone(path, SHAPES, minimum) as (read, report):
        values = {name: read(name) for name in SHAPES}
    return {name: value for name, value in values.items() if value is not None}, report.text()


# FIRST is the student, SECOND the average, under the names of many trainers
PAIRS: dict[str, dict[str, Any]] = {
    "dino": {"student": below("module.backbone.", FIRST), "teacher": below("backbone.", SECOND), "epoch": 3},
    "flat": {"model": below("student.backbone.", FIRST) | below("teacher.backbone.", SECOND)},
    "timm": {"state_dict": FIRST, "state_dict_ema": SECOND, "arch": "vit"},
    "deit": {"model": below("module.", FIRST), "model_ema": below("module.", SECOND)},
    "lightning": {
        "state_dict": below("student_embedding_model.wrapped_model._model.", FIRST)
        | below("teacher_embedding_model.wrapped_model._model.", SECOND)
    },
    "byol": {"state_dict": below("online_network.", FIRST) | below("target_network.", SECOND)},
    "moco": {"state_dict": below("module.encoder_q.", FIRST) | below("module.encoder_k.", SECOND)},
    "distilled": {"teacher": below("backbone.", FIRST), "model_ema": below("backbone.", SECOND)},
    "gram": {"gram_teacher": below("backbone.", FIRST), "teacher": below("backbone.", SECOND)},
    "optimiser": {"optimizer": {"exp_avg": FIRST}, "exp_avg_sq": FIRST, "model": SECOND},
    "deep": {"a": {"b": [{"student": FIRST}, {"c": {"ema": SECOND}}]}},
    "families": {"student": FIRST, "teacher": to_timm(SECOND)},
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("reverse", [False, True])
def test_an_average_is_preferred_and_named(kind: str, reverse: bool, tmp_path: Path) -> None:
    content = dict(reversed(PAIRS[kind].items())) if reverse else PAIRS[kind]
    torch.save(content, tmp_path / "weights.pth")
    values, text = taken(tmp_path / "weights.pth")
    assert all(torch.equal(value, SECOND[name]) for name, value in values.items())
    assert len(text.splitlines()) <= 6 and "taken: " in text
    if kind != "optimiser":
        assert "also there: no other" not in text


WORDS = st.sampled_from(["model", "module", "backbone", "state_dict", "encoder", "net", "_orig_mod", "0"])


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=3), st.sampled_from(["teacher", "ema", "model_ema"]))
def test_any_nesting_finds_the_same_tensors(outer: list[str], inner: list[str], role: str) -> None:
    prefix, suffix = "".join(f"{word}." for word in outer), "".join(f"{word}." for word in inner)
    names = below(f"{prefix}{role}.{suffix}", SHAPES) | below(f"{prefix}student.{suffix}", SHAPES)
    best = min(find_groups(names), key=lambda group: group.rank)
    assert best.prefix == f"{prefix}{role}.{suffix}"
    assert {name: parts[0] for name, parts in best.sources.items()} == {
        name: best.prefix + name for name in SHAPES
    }  # fmt: skip


def test_equal_networks_are_refused_with_their_names(tmp_path: Path) -> None:
    torch.save({"one": FIRST, "other": SECOND}, tmp_path / "w.pth")
    with pytest.raises(StreamtrainError, match=r"2 backbones that fit equally: one \(35 tensors\), other"):
        taken(tmp_path / "w.pth")


def test_a_teacher_of_another_size_leaves_the_student(tmp_path: Path) -> None:
    large = tiny_backbone(dim=64).model.state_dict()
    torch.save({"teacher": large, "student": FIRST}, tmp_path / "w.pth")
    values, text = taken(tmp_path / "w.pth")
    assert torch.equal(values["norm.bias"], FIRST["norm.bias"])
    assert "taken: student (student, 35 tensors); also there: teacher (teacher, 35 tensors)" in text


def test_settings_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    class Unknown:
        pass

    Unknown.__qualname__ = Unknown.__name__ = "Missing"
    extras = {
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), "accuracy": np.float64(0.5), "loss": np.float32(2),
        "order": np.arange(3), "path": Path("x"), "counts": __import__("collections").defaultdict(list, a=[1]),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save({**extras, "teacher": FIRST}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        values, _ = taken(tmp_path / "w.pth")
        assert len(values) == len(SHAPES)


def changed(**tensors: Tensor | None) -> State:
    renamed = {key.replace("__", "."): value for key, value in tensors.items()}
    return {name: value for name, value in {**to_timm(FIRST), **renamed}.items() if value is not None}


FAULTS: dict[str, tuple[State, str]] = {
    "positions": (changed(pos_embed=torch.zeros(1, 17, 32)), r"position embeddings \(pos_embed\)"),
    **{
        name: (changed(**{name: torch.zeros(1, 17, 32)}), rf"position embeddings \({name}\)")
        for name in ("abs_pos_embed", "patch_embed.pos_embed", "posemb", "pos_encoding", "positional_encoding",
                     "learned_pos", "embed.pos", "pe", "rel_pos_bias.relative_position_bias_table")
    },
    "encoder": (
        {"embeddings.position_embeddings": torch.zeros(1, 5, 32), **below("encoder.", changed(
            patch_embed__proj__weight=None, patch_embed__proj__bias=None))},
        r"position embeddings \(embeddings.position_embeddings\)",
    ),
    "no patches": (changed(patch_embed__proj__weight=None), "has no patch embedding"),
    "other patches": (changed(patch_embed__proj__weight=torch.ones(32, 3, 14, 14)), r"\[32, 3, 14, 14\]"),
    "fewer blocks": ({n: v for n, v in changed().items() if not n.startswith("blocks.1.")}, "has 1 block, this"),
    "more blocks": (
        changed() | {n.replace("blocks.1", "blocks.2"): v for n, v in changed().items() if "blocks.1" in n},
        "has 3 blocks, this model 2",
    ),
    "nan": (changed(norm__bias=torch.full((32,), float("nan"))), "has norm.bias with NaN"),
    "inf": (changed(norm__bias=torch.full((32,), float("inf"))), "has norm.bias with values up to inf"),
    "absurd": (changed(blocks__0__gamma_1=torch.full((32,), -1e20)), "scale1.gamma with values up to 1e"),
    "zeros": (changed(blocks__1__norm2__weight=torch.zeros(32)), "norm2.weight with only zeros"),
    "whole numbers": (changed(norm__bias=torch.zeros(32, dtype=torch.int64)), "norm.bias as int64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_architectures_and_damaged_values_are_refused_by_name(kind: str, suffix: str, tmp_path: Path) -> None:
    state, words = FAULTS[kind]
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(StreamtrainError, match=words) as caught:
        taken(path)
    assert "\n" not in str(caught.value)


def test_unusual_tensors_are_refused_by_name(tmp_path: Path) -> None:
    for value, words in (
        (torch.zeros(1).expand(32), "norm.bias with 32 elements, but fewer values"),
        (torch.zeros(32).to_sparse(), "norm.bias as sparse float32"),
        (torch.zeros(32, dtype=torch.complex64), "norm.bias as complex64"),
        (torch.empty(32, device="meta"), "norm.bias as float32"),
    ):
        torch.save(changed(norm__bias=value), tmp_path / "w.pth")
        with pytest.raises(StreamtrainError, match=words):
            taken(tmp_path / "w.pth")


def test_a_file_without_a_backbone_lists_what_it_holds(tmp_path: Path) -> None:
    names = {f"layer\x1b[2J{index}": torch.zeros(2) for index in range(8)}
    torch.save({"model": names, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(StreamtrainError, match=r"8 other tensors; it holds model \(dict of 8\), epoch \(int\)$"):
        taken(tmp_path / "w.pth")
    torch.save(names, tmp_path / "w.pth")
    with pytest.raises(StreamtrainError, match=r"layer\\x1b\[2J0 \(float32 \[2\]\), .* and 3 more$"):
        taken(tmp_path / "w.pth")


def test_evaluation_refuses_what_a_start_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "weights"
    assert exit_status(["export", "--untrained", "--config", "quickstart", "--to", "timm", "--out", folder]) == 0
    state = load_file(folder / "model.safetensors")
    for extra, words in (
        ({"pos_embed": torch.zeros(1, 5, 8)}, "position embeddings"),
        ({"norm.bias": state["norm.bias"] + float("nan")}, "with NaN"),
    ):
        save_file(state | extra, folder / "model.safetensors")
        assert exit_status(["export", "--weights", folder, "--to", "safetensors", "--out", tmp_path / "out"]) == 2
        assert words in (error := capsys.readouterr().err) and error.count("\n") == 1
