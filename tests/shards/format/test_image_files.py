"""One module opens image files, by content, from a list of formats that run no programs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drawn_images import drawn_image, encoded
from PIL import features
from ranks import ROOT

from shards.errors import ShardError
from shards.format.image_files import FORMATS, find_format, open_image

_OPENER = "shards/format/image_files.py"
# modules that open image files, and names of Pillow that do
_FOREIGN = {"imageio", "cv2", "skimage", "matplotlib.image", "torchvision", "tifffile", "imagecodecs"}
_OPENERS = {"open", "init", "preinit", "register_open", "OPEN"}
_ENDLESS_POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{ 1 pop } loop\nshowpage\n%%EOF\n"
)


def _faults(path: Path) -> list[str]:
    """Return the uses of any other opener of images in a module."""
    tree, faults = ast.parse(path.read_text()), []
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name in ("PIL.Image", "PIL")}
            faults += [alias.name for alias in node.names if alias.name in _FOREIGN]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name: alias.asname or alias.name for alias in node.names}
            if node.module in _FOREIGN or ((node.module or "").startswith("PIL.") and _OPENERS & set(names)):
                faults.append(f"from {node.module}")
            if node.module == "PIL":
                modules |= {shown for name, shown in names.items() if name == "Image"}
                faults += [name for name in names if name.endswith("ImagePlugin") or name == "ImageGrab"]
            faults += [f"{node.module}.{name}" for name in names if f"{node.module}.{name}" in _FOREIGN]
        elif isinstance(node, ast.Attribute) and node.attr in _OPENERS:
            if ast.unparse(node.value) in modules | {"PIL.Image"}:
                faults.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and node.attr in ("imread", "exif_transpose"):
            faults.append(ast.unparse(node))
    return faults


def test_no_other_module_opens_image_files() -> None:
    sources = [path for folder in ("shards", "streamtrain", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    # the benchmark's rival is Pillow on its own
    allowed = {
        _OPENER,
        "tools/benchmarks/webdataset_loader.py",
        "shards/format/image_header.py",
        "shards/format/imagery.py",
    }
    found = {name: _faults(path) for path in sources if (name := str(path.relative_to(ROOT))) not in allowed}
    # one decodes frames without a file around them, one encodes, one reads names of compressions
    assert {name: faults for name, faults in found.items() if faults} == {
        "shards/format/dicom.py": ["imagecodecs"],
        "shards/format/images.py": ["imagecodecs"],
        "shards/format/windows.py": ["tifffile"],
    }
    assert _faults(ROOT / _OPENER)


def test_the_walk_finds_each_way_to_open(tmp_path: Path) -> None:
    for line in (
        "from PIL import Image\nImage.open(x)", "import PIL.Image\nPIL.Image.open(x)",
        "from PIL import Image as I\nI.open(x)",
        "from PIL.Image import open", "import cv2", "import imageio", "import matplotlib.pyplot as p\np.imread(x)",
        "from PIL import EpsImagePlugin", "from PIL import Image\nImage.init()",
    ):  # fmt: skip
        (tmp_path / "a.py").write_text(line)
        assert _faults(tmp_path / "a.py"), line


@pytest.mark.parametrize("kind", FORMATS)
def test_every_listed_format_is_recognised_by_content(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for mode in ("RGB", "L"):
        payload = encoded(drawn_image(0).convert(mode), kind)
        assert find_format(payload) == kind
        assert open_image(payload).size == (40, 30)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI", "ICNS", "DDS", "MSP", "IM", "SPIDER"])
def test_other_formats_of_pillow_are_refused(kind: str) -> None:
    modes = {"MSP": "1", "SPIDER": "F"}
    with pytest.raises(ShardError, match="not an image"):
        open_image(encoded(drawn_image(0).convert(modes.get(kind, "RGB")), kind))


def test_formats_that_are_refused_are_named() -> None:
    for start, name in ((b"%!PS-Adobe", "PostScript"), (b"%PDF-1.7", "PDF"), (b" \n<svg width='1'>", "SVG"),
                        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"<!DOCTYPE html>", "HTML"),
                        (b"", "empty")):  # fmt: skip
        with pytest.raises(ShardError, match=name):
            open_image(start)


def test_a_program_in_an_image_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat.jpg").write_bytes(_ENDLESS_POSTSCRIPT)
    (tmp_path / "in" / "dog.jpg").write_bytes(encoded(drawn_image(0)))
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    ghostscript.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    pack = [sys.executable, str(ROOT / "tools/make_shards.py"), "--workers", "1"]
    done = subprocess.run(
        [*pack, "--src", str(tmp_path / "in"), "--out", str(tmp_path / "set")], env=environment, timeout=120, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PostScript" in (tmp_path / "set" / "rejected.jsonl").read_text()
    assert not (tmp_path / "called").exists()
