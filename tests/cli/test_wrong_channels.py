"""Wrong combinations of channels, depths and tiles in every command are one line with the remedy, and exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from commands import exit_status
from drawn_images import drawn_image, packed_set

pytest.importorskip("tifffile")
from channel_images import ramp, tiff
from interop.test_channels import backbone_of
from ranks import run_ranks
from tiny_backbone import TINY, tiny_weights
from tiny_run import command

import streamtrain.cli.train
import streamtrain.main
from shards.format.pixels import PixelFormat
from shards.format.set_manifest import SetManifest
from shards.packing.pack import PackOptions, pack
from streamtrain.interop.folder import export_safetensors

SETS = {"four": PixelFormat(4, "uint16"), "eight": PixelFormat(4, "uint8"), "two": PixelFormat(2, "uint16")}
FIT = (
    "crops.jitter.probability=0", "crops.grey=0", "crops.solarize.global_probability=[0]", "crops.mean=from_set",
    "crops.std=from_set",
)  # fmt: skip
SMALL = ["crops.global_size=32", "crops.local_size=16", "crops.local_count=1", "data.micro_batch=2"]
SMALL += [f"model.{key}={value}" for key, value in TINY.items()]
SHORT = {
    "PACK": "pack --workers 1 --out new", "INDEX": "index --workers 1 --out new", "FIT": " ".join(FIT),
    "TRAIN": f"train --dry-run --config vits16.yaml run.dir=new run.steps=1 engine.device=cpu {' '.join(SMALL)}",
    "CROPS": "visualize crops --config vits16.yaml --out p.png",
    "RGB": "--weights weights", "FOUR": "--weights weights4",
}  # fmt: skip
SHORT["OWN"] = f"{SHORT['TRAIN']} data.shards=four"
# a command line, then a part of its message
LINES = """
PACK --src src/four --channels 0 | argument --channels: '0' is not a whole number above 0
PACK --src src/four --channels -1 | argument --channels: '-1' is not a whole number
PACK --src src/four --channels 2.5 | argument --channels: '2.5' is not a whole number
PACK --src src/four --channels 5000 | --channels 5000 is not a number from 1 to 512
PACK --src src/four --channels four | argument --channels: 'four' is not a whole number
PACK --src src/four --channels 4 --dtype float64 | argument --dtype: invalid choice: 'float64' (choose from 'uint8',
PACK --src src/four --channels 4 --dtype int16 | argument --dtype: invalid choice: 'int16'
PACK --src src/four --channels 4 --dtype text | argument --dtype: invalid choice: 'text'
PACK --src images --channels 4 | it has 3 channels of uint8, not 4 channels of uint8; check --channels and --dtype
PACK --src src/two --channels 4 --dtype uint16 | it has 2 channels of uint16, not 4 channels of uint16; check --channels
PACK --src src/four --channels 4 --dtype uint8 | it has 4 channels of uint16, not 4 channels of uint8; check --channels
PACK --src src/four | images of other kinds need --channels and --dtype
PACK --src src/four --channels 4 --dtype uint16 --max-side 64 | write 8-bit RGB JPEGs, not 4 channels of uint16; remove
PACK --src src/four --channels 4 --dtype uint16 --orientation apply | write 8-bit RGB JPEGs, not 4 channels of uint16
PACK --src src/four --channels 4 --dtype uint16 --quality 50 | --quality applies to re-encoded JPEGs
PACK --src images --tiles 32 --quality 50 | --quality applies to re-encoded JPEGs
PACK --src images --tiles 0 | argument --tiles: '0' is not a whole number above 0
PACK --src images --tiles 8 | --tiles 8 is not a number of pixels from 16 to
PACK --src images --tiles big | argument --tiles: 'big' is not a whole number
PACK --src images --tiles 16.5 | argument --tiles: '16.5' is not a whole number
PACK --src images --tiles 99999999 | --tiles 99999999 is not a number of pixels
PACK --src images --tiles 32 --overlap 32 | --overlap 32 is not a number of pixels from 0 to 31
PACK --src images --tiles 32 --overlap -1 | argument --overlap: '-1' is not a whole number from 0
PACK --src images --overlap 4 | --overlap applies to tiles; add --tiles SIDE
PACK --src images --tiles 32 --tile-contrast 2 | --tile-contrast 2.0 is not a share from 0 to 1
PACK --src images --tiles 32 --tile-contrast nan | --tile-contrast nan is not a share from 0 to 1
PACK --src images --tile-contrast 0.1 | --tile-contrast applies to tiles; add --tiles SIDE
PACK --src images --tiles 32 --max-side 64 | remove --max-side and --orientation
INDEX --src four/shards --channels 0 | argument --channels: '0' is not a whole number above 0
INDEX --src four/shards --channels 5000 | --channels 5000 is not a number from 1 to 512
INDEX --src four/shards --channels 4 --dtype float64 | argument --dtype: invalid choice
INDEX --src four/shards --channels 4 --dtype uint8 | it has 4 channels of uint16, not 4 channels of uint8; check --chann
INDEX --src four/shards | can be decoded as 3 channels of uint8
INDEX --src set/shards --channels 4 --dtype uint16 | it has 3 channels of uint8, not 4 channels of uint16; check --chann
stats nowhere | no shard set at nowhere; make one with: streamtrain pack
stats empty | empty is not a shard set: it has no manifest.json
stats without_images | without_images has no images
stats src/four | src/four is not a shard set
stats set --workers 0 | argument --workers: '0' is not a whole number above 0
OWN FIT data.channels=3 | data.channels is 3, but four has images of 4 channels of uint16; remove data.channels
OWN FIT data.channels=0 | data.channels is 0, but four has images of 4 channels
OWN FIT data.dtype=uint8 | data.dtype is 'uint8', but four has images of 4 channels of uint16; remove data.dtype
OWN FIT data.dtype=float64 | data.dtype is 'float64', but four has images
OWN FIT model.channels=3 | model.channels is 3, but the images have 4 channels of uint16; set model.channels=4
TRAIN data.shards=set data.channels=4 | data.channels is 4, but set has images of 3 channels of uint8; remove
TRAIN data.channels=0 | data.channels: must be at least 1 (got 0)
TRAIN data.channels=5000 | data.channels: must be at most 512 (got 5000)
TRAIN data.channels=2.5 | data.channels: must be a whole number (got 2.5)
TRAIN data.dtype=float64 | data.dtype: must be 'uint8', 'uint16' or 'float32' (got 'float64')
TRAIN data.shards=[{shards:~four,weight:~1},{shards:~eight,weight:~1}] FIT crops.mean=[0] crops.std=[1] | mix equal
TRAIN data.shards=[{shards:~set,weight:~1},{shards:~four,weight:~1}] | mix equal sets
OWN | crops.mean has 3 numbers, but the images have 4 channels of uint16; give one number per channel, or from_set
OWN FIT crops.grey=0.1 | crops.grey: defined for 8-bit RGB only, but the images have 4 channels of uint16; set
OWN FIT crops.jitter.probability=0.5 | set crops.jitter.probability=0
OWN FIT crops.solarize.global_probability=[0.1] | set crops.solarize.global_probability=[0]
OWN FIT crops.mean=[1,2,3] | crops.mean has 3 numbers, but the images have 4 channels
OWN FIT crops.std=[1,2,3] | crops.std has 3 numbers, but the images have 4 channels
OWN FIT crops.std=[1,2,3,0] | std must be positive
OWN FIT crops.mean=0.4 | crops.mean: must be a list
OWN FIT crops.mean=[.nan] | crops.mean.0: must be a finite number (got nan)
OWN FIT crops.mean=from_sets | crops.mean: must be a list of numbers, or from_set (got 'from_sets')
OWN FIT crops.value_range=[6000,0] | error: crops.value_range: must be ascending numbers [low, high], or a list of such
OWN FIT crops.value_range=[0,.nan] | error: crops.value_range.0.1: must be a finite number (got nan)
OWN FIT crops.value_range=[0] | error: crops.value_range: must be ascending numbers [low, high], or a list of such pairs
OWN FIT crops.value_range=[0,1,2] | error: crops.value_range: must be ascending numbers [low, high], or a list
OWN FIT crops.value_range=5 | error: crops.value_range: must be ascending numbers [low, high], or a list
OWN FIT crops.value_range=[[0,1],[0,1]] | crops.value_range has 2 pairs, but the images have 4 channels
OWN FIT crops.value_range=[[0,1],[0,1],[0,1],[1,0]] | error: crops.value_range: must be ascending numbers
TRAIN data.shards=set FIT | set has no statistics for from_set; compute them: streamtrain stats set
TRAIN FIT | crops.mean: from_set needs a set of images; give data.shards
TRAIN data.shards=constant FIT | channel 0 has the same value in all images, so from_set is 0; give numbers
OWN FIT run.steps=1~epochs data.lanes=0 | error: data.lanes: must be at least 1 (got 0)
OWN FIT monitor.panel_channels=[0,4,1] | monitor.panel_channels must be one or three channels from 0 to 3
OWN FIT monitor.panel_channels=[0,1] | monitor.panel_channels must be one or three channels from 0 to 3
OWN FIT monitor.panel_channels=[] | monitor.panel_channels must be one or three channels from 0 to 3
OWN FIT monitor.panel_channels=[-1] | monitor.panel_channels.0: must be at least 0
OWN FIT crops.rotate90=1.5 | crops.rotate90: must be at most 1.0
OWN FIT crops.flip_vertical=.nan | crops.flip_vertical: must be a finite number (got nan)
OWN FIT crops.brightness=1.5 | crops.brightness: must be at most 1.0
OWN FIT crops.contrast=-0.1 | crops.contrast: must be at least 0.0
OWN FIT crops.noise=.inf | crops.noise: must be a finite number
OWN FIT crops.channel_dropout=1.0 | crops.channel_dropout: must be below 1.0
OWN FIT data.background=black | data.background has an effect only on 8-bit RGB, but the images have 4 channels
OWN FIT init.channels=mean | init.channels has an effect only with init.weights or weights in objective.gram.teacher
OWN FIT init.weights=weights init.channels=invent | init.channels: must be 'refuse', 'repeat', 'mean' or 'zero_extra'
TRAIN data.shards=set init.weights=weights init.channels=mean | init.channels has no effect, because the images have 3
TRAIN data.shards=two FIT init.weights=weights init.channels=repeat | needs at least 3 channels, but the images have 2
OWN FIT teacher.kind=frozen teacher.weights=weights | teacher.weights: weights takes 3 channels, but the images have 4
OWN FIT evaluation.train=set evaluation.every=1 | set has images of 3 channels of uint8, the network takes 4 channels
OWN FIT evaluation.train=eight evaluation.every=1 | eight has images of 4 channels of uint8, the network takes 4
OWN FIT evaluation.train=four evaluation.test=set evaluation.every=1 | set has images of 3 channels of uint8
OWN FIT evaluation.reference=set evaluation.every=1 | set has images of 3 channels of uint8, the network takes 4
TRAIN data.shards=set evaluation.train=four evaluation.every=1 | four has images of 4 channels of uint16, the network
TRAIN data.shards=without_shards FIT | is missing (No such file or directory); copy the set again
plan --config vits16.yaml --gpus 1 --gpu-memory 8GB data.channels=4 | give one number per channel, or from_set
plan --config vits16.yaml --gpus 1 --gpu-memory 8GB data.shards=four data.channels=3 | remove data.channels
CROPS --image four.tif | its pixels cannot be converted to 8-bit RGB
CROPS data.channels=4 FIT crops.mean=[0] crops.std=[1] --image good.png | it has 3 channels of uint8, not 4 channels
visualize pca FOUR --image good.png --out p.png | it has 3 channels of uint8, not 4 channels of uint16
visualize pca FOUR --image four.tif good.png --out p.png | good.png: it has 3 channels of uint8, not 4 channels
visualize pca RGB --image four.tif --out p.png | its pixels cannot be converted to 8-bit RGB
evaluate knn RGB --train four --test two | four has images of 4 channels of uint16, the network takes 3
evaluate knn FOUR --train set --test four | set has images of 3 channels of uint8, the network takes 4
evaluate knn FOUR --train eight --test four | eight has images of 4 channels of uint8, the network takes 4
evaluate knn --pixels --train four --test two | four has images of 4 channels of uint16
"""

WITHOUT_EXTRA = """
PACK --src src/four --channels 4 --dtype uint16
PACK --src images --tiles 32
INDEX --src four/shards --channels 4 --dtype uint16
verify four --workers 1
stats four --workers 1
OWN FIT
visualize pca FOUR --image four.tif --out p.png
CROPS data.channels=4 data.dtype=uint16 FIT crops.mean=[0] crops.std=[1] --image four.tif
evaluate knn FOUR --train four
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    for name, pixels in SETS.items():
        for label in "ab":
            (folder / "src" / name / label).mkdir(parents=True)
            tiff(ramp(pixels, ord(label)), folder / "src" / name / label / "0.tif")
        pack(folder / "src" / name, folder / name, PackOptions(pixels=pixels))
    (folder / "grey").mkdir()
    np.save(folder / "grey" / "0.npy", np.full((20, 20, 1), 7, np.uint16))
    pack(folder / "grey", folder / "constant", PackOptions(pixels=PixelFormat(1, "uint16")))
    packed_set(folder, 4, ("a", "b"))
    drawn_image(0, 60, 60).save(folder / "good.png")
    shutil.copy(folder / "src" / "four" / "a" / "0.tif", folder / "four.tif")
    (folder / "empty").mkdir()
    (folder / "without_images").mkdir()
    SetManifest((), pixels=SETS["four"]).save(folder / "without_images")
    shutil.copytree(folder / "four", folder / "without_shards")
    shutil.rmtree(folder / "without_shards" / "shards")
    tiny_weights(folder / "weights")
    four = backbone_of(4, "uint16")
    export_safetensors(four.model, four.config, folder / "weights4")
    return folder


@pytest.fixture
def fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], str]]:
    """A function that runs a line in this process, checks that it fails in one line, and returns the error."""

    def train(arguments: argparse.Namespace, command: str | None = None) -> None:
        raise SystemExit(streamtrain.main.train_rank(arguments))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(streamtrain.cli.train, "run_process", train)
    for name, value in {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def run(line: str) -> str:
        words = " ".join(SHORT.get(word, word) for word in line.split()).split()
        assert exit_status([word.replace("~", " ") for word in words]) == 2, capfd.readouterr()
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
        assert not (folder / "new").exists() and not (folder / "p.png").exists()
        return error

    # a rank adds its own variables
    with patch.dict(os.environ):
        yield run
    logging.getLogger("streamtrain").handlers.clear()


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_what_does_not_fit_is_one_line(line: str, fails: Callable[[str], str]) -> None:
    words, _, message = line.partition(" | ")
    assert message in (error := fails(words)), error


@pytest.mark.parametrize("line", WITHOUT_EXTRA.strip().splitlines())
def test_without_the_extra_its_name_is_one_line(
    line: str, fails: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'streamtrain[imagery]'" in fails(line)


# the set, other settings, and a part of the message
STARTS = [
    ("four", "init.weights=weights", "init.weights: weights is for RGB, but this model has 4 channels; to adapt"),
    ("four", "init.weights=weights4 init.channels=mean", "has the channels of the images already, so init.channels"),
    ("four", "objective.gram.weight=2 objective.gram.teacher=weights", "objective.gram.teacher: weights is for RGB"),
    ("four", "objective.gram.weight=2 objective.gram.teacher=weights4 init.channels=mean", "so init.channels=mean has"),
    ("four", "teacher.kind=frozen teacher.weights=rgb_run", "teacher.weights: rgb_run takes 3 channels, but the"),
    ("four", "--resume rgb_run", "model.channels is 4, the checkpoint has 3; restore them, or start without --resume"),
    ("four", "run.dir=rgb_run run.steps=2", "model.channels is 4, the checkpoint has 3; restore them, or set run.dir"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "changes", "message"), STARTS)
def test_starts_that_do_not_fit_end_in_one_line(
    shards: str, changes: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "rgb_run" in changes and not (folder / "rgb_run").exists():
        ((code, _, errors),) = run_ranks(command("set", Path("rgb_run"), "run.steps=1", "evaluation.every=0"), 1)
        assert code == 0, errors[-3000:]
    ((code, _, errors),) = run_ranks(command(shards, tmp_path / "run", *FIT, *changes.split()), 1)
    assert code == 2 and message in errors.strip().splitlines()[-1] and "Traceback" not in errors, errors[-3000:]
