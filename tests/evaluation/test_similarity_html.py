"""The similarity page: its values, and that a browser shows them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import exit_status
from drawn_images import drawn_image, encoded
from tiny_backbone import tiny_weights

from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.maps import similarity_maps
from streamtrain.evaluation.matching import mutual_matches
from streamtrain.evaluation.similarity_html import similarity_html

NAMES = ("a.jpg", "</script><script>alert(1)</script>.jpg")


def page(dim: int, has_matches: bool = False) -> tuple[bytes, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(dim)
    grids = ((3, 4), (5, 2))
    features = [F.normalize(torch.randn(*grid, dim, generator=generator), dim=-1) for grid in grids]
    images = [drawn_image(number, 40 * columns, 40 * rows) for number, (rows, columns) in enumerate(grids)]
    matches = mutual_matches(*features) if has_matches else None
    return similarity_html(images, NAMES, features, (1, 2), "a < b", matches=matches), features


@pytest.mark.parametrize("dim", [32, 1024])
def test_stored_features_give_the_similarities(dim: int) -> None:
    content, features = page(dim)
    text = content.decode()
    assert text.count("</script>") == 2 and "a &lt; b" in text and "http" not in text
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(found)
    assert data["patch"] == [1, 2] and [image["name"] for image in data["images"]] == list(NAMES)
    stored = []
    for image, feature in zip(data["images"], features, strict=True):
        values = np.frombuffer(base64.b64decode(image["features"]), np.int8).astype(np.float32)
        stored.append(F.normalize(torch.from_numpy(values).reshape(feature.shape), dim=-1))
    for exact, approximate in zip(similarity_maps(features, (1, 2)), similarity_maps(stored, (1, 2)), strict=True):
        assert np.abs(exact - approximate).max() < 0.01


def test_a_patch_outside_the_image_is_refused() -> None:
    with pytest.raises(StreamtrainError, match="patch 3,0 is outside"):
        similarity_html([drawn_image(0)], ["a"], [torch.ones(3, 4, 8)], (3, 0), "")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_weights(Path("weights"))
    Path("a.jpg").write_bytes(encoded(drawn_image(0)))
    command = ["visualize", "similarity", "--weights", "weights", "--image", "a.jpg", "--out"]
    assert exit_status([*command, "pages/a.html", "--patch", "2,3", "--smooth"]) == 0
    assert capsys.readouterr().out.startswith("wrote pages/a.html (0.")
    text = Path("pages/a.html").read_text()
    assert '"patch": [2, 3]' in text and 'type="checkbox" checked' in text
    for words, reason in (
        ([*command, "b.html", "--patch", "2,3", "1,1"], "starts with one --patch"),
        ([*command, "b.html", "--patch", "200,3"], "patch 200,3 is outside"),
        (["visualize", "pca", *command[2:], "b.html"], "b.html has no image suffix"),
    ):
        capsys.readouterr()
        assert exit_status(words) == 2 and reason in capsys.readouterr().err and not Path("b.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("has_matches", [False, True])
def test_a_browser_draws_the_page(has_matches: bool, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    content, features = page(64, has_matches)
    (tmp_path / "page.html").write_bytes(content)
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    assert (b'id="dots"' in content) == has_matches
    ended = subprocess.run([*words, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", ended.stdout)
    values = similarity_maps(features, (1, 2))[1]
    row, column = np.unravel_index(values.argmax(), values.shape)
    shown = "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;.jpg"
    assert captions == [
        "a.jpg · patch 1,2", f"{shown} · most similar: patch {row},{column}, {values.max():.2f}",
    ]  # fmt: skip
