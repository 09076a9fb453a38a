"""Wrong arguments of every command are one line on stderr with the remedy, and exit status 2."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from commands import exit_status
from drawn_images import drawn_image, packed_set

import streamtrain
from shards.errors import ShardError
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import Backbone

OPTIONS = {"UNTRAINED": "--untrained --config vits16.yaml", "RECIPE": "--config vits16.yaml"}
LINES = """
trian
--nope
pack
pack --src nowhere --out new
pack --src images --out text
pack --src images --out text/x
pack --src empty --out new
pack --src $UNSET/x --out new
pack --src images --out ~not-a-user/x
pack --src images --out new --workers 0
pack --src images --out new --quality 500
pack --src images --out new --shard-size -5
pack --src images --out new a.b=1
pack --src images --out s3://
pack --src images --out new --orientation up
pack --src unknown://x --out new
index
index --src nowhere --out new
index --src text --out new
index --src images --out s3://bucket
index --src set/shards --out new --workers none
verify
verify nowhere
verify text
verify empty
verify set --workers 0
verify set extra
plan
plan --config nowhere --gpus 1 --gpu-memory 8GB
plan RECIPE --gpus 0 --gpu-memory 8GB
plan RECIPE --gpus 1 --gpu-memory much
plan RECIPE --gpus 1 --gpu-memory 8GB model.dpeth=3
plan RECIPE --gpus 1 --gpu-memory 8GB junk
train
train --config nowhere
train --config text
train RECIPE --ranks two
train RECIPE --hostfile nowhere
train RECIPE run.dir=$UNSET/run
evaluate
evaluate nope --train set
evaluate knn --train set
evaluate knn --train text --pixels
evaluate knn --train broken.jpg --pixels
evaluate knn --train nowhere --pixels
evaluate knn --train empty --pixels
evaluate knn --train set --pixels --device tpu
evaluate knn --train set UNTRAINED --device cuda:99
evaluate knn --train set UNTRAINED --size 17
evaluate knn --train set --run nowhere
evaluate knn --train set --weights broken.jpg
evaluate knn --train set --weights s3://bucket/x
evaluate knn --train set --pixels --batch 0
evaluate knn --train set --pixels --resize 2
evaluate knn --train set UNTRAINED --step x
visualize
visualize nope
visualize pca UNTRAINED --image missing.jpg --out p.png
visualize pca UNTRAINED --image broken.jpg --out p.png
visualize pca UNTRAINED --image text --out p.png
visualize pca UNTRAINED --image images --out p.png
visualize pca UNTRAINED --image good.png --out p
visualize pca UNTRAINED --image good.png --out p.psd
visualize pca UNTRAINED --image good.png --size 3 --out p.png
visualize pca UNTRAINED --image good.png --device tpu --out p.png
visualize pca --image good.png --out p.png
visualize similarity UNTRAINED --image good.png --patch 99,99 --out p.png
visualize crops --image good.png --out p.png
visualize crops RECIPE --image missing.jpg --out p.png
visualize crops RECIPE --image good.png --draws 0 --out p.png
visualize crops --run nowhere --image good.png --out p.png
visualize curves --run nowhere --out p.png
report
report --run nowhere
report --run text
export
export --to hf --out new
export --run nowhere --to hf --out new
export --run empty --to nope --out new
export --weights text --to hf --out new
export UNTRAINED --to timm --out images
export --run x --step y --to hf --out new
config --explain nope
config extra
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arguments")
    packed_set(folder, 9, ("a", "b"))
    (folder / "empty").mkdir()
    (folder / "text").write_text("plain text\n")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    drawn_image(0, 300, 300).save(folder / "good.png")
    return folder


@pytest.mark.parametrize("line", LINES.splitlines())
def test_wrong_arguments_are_one_line(
    line: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("UNSET", raising=False)
    for name, options in OPTIONS.items():
        line = line.replace(name, options)
    assert exit_status(line.split()) == 2
    output = capfd.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and len(output.err) > 20, output.err
    assert "Traceback" not in output.err and output.out == ""
    assert not (folder / "new").exists() and not (folder / "p.png").exists() and not (folder / "s3:").exists()
    logging.getLogger("streamtrain").handlers.clear()


def test_the_error_of_an_option_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["verify", "set", "--workers", "\x1b[31m"]) == 2
    assert capsys.readouterr().err == (
        "error: argument --workers: '\\x1b[31m' is not a whole number above 0; see streamtrain verify --help\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "foo"}, "step 'foo' is neither"), ({"step": -1}, "step -1"), ({"step": True}, "step True"),
        ({"step": 1.5}, "step 1.5"), ({"which": "foo"}, "which 'foo' is neither"),
    ],
)  # fmt: skip
def test_load_backbone_checks_its_arguments(arguments: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(StreamtrainError, match=message):
        streamtrain.load_backbone(folder, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"), ({"batch_size": 1.5}, "batch_size 1.5"),
        ({"device": "foo"}, "device 'foo'"),
        ({"device": "cuda:99"}, "device cuda:99 does not exist"), ({"device": "cuda:x"}, "device 'cuda:x'"),
    ],
)  # fmt: skip
def test_embed_checks_its_arguments(arguments: dict[str, object], message: str, folder: Path) -> None:
    from tiny_backbone import tiny_backbone

    backbone: Backbone = tiny_backbone()
    with pytest.raises(StreamtrainError, match=message):
        streamtrain.embed(backbone, folder / "set", **arguments)


def test_functions_expand_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert streamtrain.verify("~/set", workers=1) == []
    assert streamtrain.pack(Path("$HOME/images"), "~/packed", workers=1).num_samples == 9
    with pytest.raises(ShardError, match="UNSET"):
        streamtrain.load_backbone("$UNSET/run")
    with pytest.raises(StreamtrainError, match="workers 0"):
        streamtrain.verify("~/set", workers=0)
    with pytest.raises(StreamtrainError, match="no option max_sied"):
        streamtrain.pack("~/images", "~/other", max_sied=3)
