"""Features written to files: their values, and the same bytes after any interruption."""

from __future__ import annotations

import io
import itertools
import json
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import COMMAND, ENVIRONMENT, exit_status, run_command
from drawn_images import draw_folder, packed_set
from ranks import ROOT
from tiny_backbone import tiny_backbone, tiny_weights

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation import embed
from streamtrain.evaluation.embed import EmbedOptions, write_features
from streamtrain.evaluation.features import compute_features
from streamtrain.evaluation.images import LabelledImages, open_source
from streamtrain.interop.load import Backbone

FORMATS = ("npy", "parquet", "tar")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> LabelledImages:
    """Twenty images; two of them cannot be decoded."""
    folder = draw_folder(tmp_path_factory.mktemp("embed") / "images", 20, ("a", "b"))
    for name in ("a/image 004.jpg", "b/image 011.jpg"):
        (folder / name).write_bytes(b"not an image")
    return open_source(str(folder), backbone.config.background, backbone.config.pixels)


@pytest.fixture()
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in a part."""
    monkeypatch.setattr(embed, "_MAX_PART_IMAGES", 3)


def options(backbone: Backbone, **changed: Any) -> EmbedOptions:
    config = backbone.config
    size = config.image_size
    return replace(EmbedOptions(size, size, config.mean, config.std, config.value_range, batch_size=2), **changed)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_are_the_features_of_the_usable_images(
    backbone: Backbone, images: LabelledImages, small_parts: None, tmp_path: Path
) -> None:
    chosen = options(backbone, features=("cls", "mean", "patches"))
    written = write_features(backbone.model, images, tmp_path, chosen, {})
    assert (written.computed, written.rows, written.unusable) == (20, 18, 2)
    size, config = backbone.config.image_size, backbone.config
    expected, is_usable = compute_features(backbone.model, images, size=size, mean=config.mean, std=config.std)
    assert np.allclose(np.load(tmp_path / "cls.npy"), expected[is_usable], atol=1e-5)
    patches = np.load(tmp_path / "patches.npy")
    assert patches.shape == (18, 16, 32)
    assert np.allclose(np.load(tmp_path / "mean.npy"), patches.mean(1), atol=1e-5)
    keys = (tmp_path / "keys.txt").read_text().splitlines()
    assert keys == [f"{name}/image {number:03d}.jpg" for name, first in (("a", 0), ("b", 1))
                    for number in range(first, 20, 2) if number not in (4, 11)]  # fmt: skip
    assert (tmp_path / "unusable.txt").read_text().splitlines() == ["a/image 004.jpg", "b/image 011.jpg"]
    description = json.loads((tmp_path / "embed.json").read_text())
    assert (description["rows"], description["shapes"]["patches"]) == (18, [18, 16, 32])
    assert sorted(contents(tmp_path)) == [
        "cls.npy", "embed.json", "keys.txt", "mean.npy", "patches.npy", "unusable.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_the_same_whichever_write_fails(
    kind: str, backbone: Backbone, images: LabelledImages, small_parts: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    chosen = options(backbone, format=kind)
    write_features(backbone.model, images, tmp_path / "whole", chosen, {})
    replace_file = embed.os.replace
    num_failures = 0
    for fatal in itertools.count():
        calls = itertools.count()

        def fail(*paths: Any, fatal: int = fatal, calls: Any = calls) -> None:
            if next(calls) == fatal:
                raise OSError(28, "No space left on device", paths[1])
            replace_file(*paths)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", fail)
            try:
                write_features(backbone.model, images, tmp_path / str(fatal), chosen, {})
                break
            except OSError:
                num_failures += 1
        resumed = write_features(backbone.model, images, tmp_path / str(fatal), chosen, {})
        assert resumed.rows == 18 and resumed.computed <= 20
        assert contents(tmp_path / str(fatal)) == contents(tmp_path / "whole")
    assert num_failures > 8
    again = write_features(backbone.model, images, tmp_path / "whole", chosen, {})
    assert (again.computed, again.rows) == (0, 18)
    elsewhere = write_features(backbone.model, replace(images, name="../images"), tmp_path / "whole", chosen, {})
    assert (elsewhere.computed, elsewhere.rows) == (0, 18)


@pytest.mark.parametrize("kind", FORMATS)
def test_shares_in_any_order_write_what_one_command_writes(
    kind: str, backbone: Backbone, images: LabelledImages, small_parts: None, tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    write_features(backbone.model, images, tmp_path / "whole", options(backbone, format=kind), {})
    for share in (2, 0, 1):
        chosen = options(backbone, format=kind, share=(share, 3))
        written = write_features(backbone.model, images, tmp_path / "shares", chosen, {})
        assert (written.rows is None) == (share != 1)
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")


def test_parquet_and_tar_have_the_values_of_npy(
    backbone: Backbone, images: LabelledImages, small_parts: None, tmp_path: Path
) -> None:
    dataset, webdataset = pytest.importorskip("pyarrow.dataset"), pytest.importorskip("webdataset")
    for kind in FORMATS:
        chosen = options(backbone, format=kind, features=("cls", "patches"), dtype="float16")
        write_features(backbone.model, images, tmp_path / kind, chosen, {})
    cls, patches = (np.load(tmp_path / "npy" / f"{name}.npy") for name in ("cls", "patches"))
    assert cls.dtype == patches.dtype == np.float16
    table = dataset.dataset(sorted(map(str, (tmp_path / "parquet").glob("*.parquet")))).to_table()
    assert table["key"].to_pylist() == (tmp_path / "npy/keys.txt").read_text().splitlines()
    assert np.array_equal(np.array(table["patches"].to_pylist(), np.float16).reshape(patches.shape), patches)
    tars = sorted(map(str, (tmp_path / "tar").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert samples[0]["__key__"] == "000000000_a_image_000"
    for name, expected in (("cls", cls), ("patches", patches)):
        assert np.array_equal(np.stack([np.load(io.BytesIO(sample[f"{name}.npy"])) for sample in samples]), expected)


@pytest.mark.parametrize("length", [1, 88, 89, 200])
def test_names_in_a_tar_fit_for_keys_of_any_length(
    length: int, backbone: Backbone, images: LabelledImages, tmp_path: Path
) -> None:
    named = replace(images, sample_key=lambda index: f"{index:0{length}d}"[-length:])
    write_features(backbone.model, named, tmp_path, options(backbone, format="tar", features=("patches",)), {})
    with tarfile.open(tmp_path / "part-000000.tar") as tar:
        first = tar.getnames()[0]
    assert first == ("0" * length if length <= 88 else first.partition(".")[0]) + ".patches.npy" and len(first) <= 100


def test_keys_of_a_set_are_kept(backbone: Backbone, tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 5)
    images = open_source(str(tmp_path / "set"), None, backbone.config.pixels)
    write_features(backbone.model, images, tmp_path / "out", options(backbone), {})
    keys = (tmp_path / "out/keys.txt").read_text().splitlines()
    assert keys == [
        shard_set.key(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)
    ]


def test_a_shard_that_is_missing_stops_the_command(backbone: Backbone, tmp_path: Path) -> None:
    packed_set(tmp_path, 5)
    images = open_source(str(tmp_path / "set"), None, backbone.config.pixels)
    for path in (tmp_path / "set/shards").iterdir():
        path.unlink()
    with pytest.raises(ShardError):
        write_features(backbone.model, images, tmp_path / "out", options(backbone), {})
    assert not list((tmp_path / "out/.parts").iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: (out / "other").write_text(""), r"is not empty \(it has other\)"),
        (lambda out: (out / "embed.json").write_text("[]"), "is not a description of features"),
        (lambda out: (out / "embed.json").write_text("{"), r"embed.json cannot be read"),
        (lambda out: (out / "embed.json").write_text("{}"), r"was started with other settings \(images\)"),
    ],
)
def test_other_folders_are_kept(
    change: Callable[[Path], Any], reason: str, backbone: Backbone, images: LabelledImages, tmp_path: Path
) -> None:
    change(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StreamtrainError, match=reason):
        write_features(backbone.model, images, tmp_path, options(backbone), {})
    assert contents(tmp_path) == before


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_weights(Path("weights"))
    draw_folder(Path("images"), 4)
    Path("list.txt").write_text("images/image 002.jpg\nimages/image 000.jpg\n")
    command = ["--weights", "weights", "--out"]
    assert exit_status(["embed", "images", *command, "out", "--features", "mean", "cls"]) == 0
    assert capsys.readouterr().out == "wrote out (cls, mean of 4 images)\n"
    assert exit_status(["embed", "list.txt", *command, "listed", "--compute", "bfloat16"]) == 0
    one, two = (np.load(f"{name}/cls.npy") for name in ("out", "listed"))
    assert one.dtype == two.dtype == np.float32 and np.abs(one[[2, 0]] - two).max() < 0.1
    for words, reason in (
        (["images", *command, "out", "--dtype", "float16"], "other settings (features)"),
        (["images", *command, "other", "--size", "30"], "--size 30 is not a multiple of the patch size"),
        (["images", *command, "other", "--share", "4/4"], "is not I/N"),
        (["nothing", *command, "other"], "error: nothing does not exist"),
        (["weights", *command, "other"], "no images"),
        (["images", *command, "list.txt"], "cannot write list.txt"),
        (["images", *command, "other", "--device", "gpu"], "device 'gpu' is not one of"),
    ):
        capsys.readouterr()
        assert exit_status(["embed", *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and reason in lines[0], lines
    for path in Path("images").iterdir():
        path.write_bytes(b"")
    capsys.readouterr()
    assert exit_status(["embed", "images", *command, "empty"]) == 2
    assert "none of the 4 images of images can be used" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_thousand_images_resume_after_three_kills(tmp_path: Path) -> None:
    tiny_weights(tmp_path / "weights")
    draw_folder(tmp_path / "images", 8000)
    words = ["embed", tmp_path / "images", "--weights", tmp_path / "weights", "--features", "cls", "patches", "--out"]
    began = time.monotonic()
    assert run_command(*words, tmp_path / "whole").returncode == 0
    seconds = time.monotonic() - began
    draw, parts = random.Random(0), tmp_path / "killed/.parts"
    for kill in range(3):
        command = [*COMMAND, *map(str, words), str(tmp_path / "killed")]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        # of two parts; the second kill comes after the first one is complete
        while kill == 1 and not list(parts.glob("*.json")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 0.3) * seconds if kill != 1 else 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.communicate()
    assert run_command(*words, tmp_path / "killed").returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert torch.tensor(np.load(tmp_path / "whole/cls.npy")).shape == (8000, 32)
