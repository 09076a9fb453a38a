"""A folder in which the commands of the documentation run at toy size.

It has the files and folders that the pages name: `photos`, `sets/photos`, `runs/photos`, `WEIGHTS`, and so on. Each
recipe is a file of its name that extends the shipped one with a small network and few steps; `--config` prefers it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import tifffile
from doc_blocks import ROOT
from PIL import Image
from tiny_backbone import class_folder

HEAD = {"prototypes": 32, "hidden": 32, "bottleneck": 16}
# patches of 16 pixels and heads of width 64, as in the presets
TOY = {
    "model": {"preset": None, "dim": 64, "depth": 2, "num_heads": 1, "patch_size": 16, "drop_path": 0.0},
    "crops": {"global_size": 32, "local_size": 16, "local_count": 1},
    "data": {"micro_batch": 4, "global_batch": None, "lanes": 2, "decode_threads": 1},
    "objective": {"global_loss": {"head": HEAD}, "patch_loss": {"head": HEAD}},
    "engine": {"cpu_threads": 1, "dtype": "fp32"},
    "run": {"steps": 2, "checkpoint_every": 2},
    "monitor": {"progress": False, "tensorboard": False},
}
# what differs from it
RECIPES = {
    "distil_features.yaml": {"objective": {}},
    "continue.yaml": {"evaluation": {"stop_if_below": None}},
    "continue_lora.yaml": {"evaluation": {"stop_if_below": None}},
    "giant_gram.yaml": {"crops": {}},
    "giant_highres.yaml": {"crops": {}},
}
# programs that the tests do not start: they need the network, do not end, or change the shell
STUBS = "tensorboard() { :; }; pip() { :; }; source() { :; }\n"


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # features of evaluations stay in the folder; compiled kernels are shared
    cache = Path(kept.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = kept.get("TORCH_EXTENSIONS_DIR") or str(cache / "torch_extensions")
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), kept["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCH_EXTENSIONS_DIR": kernels, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip


def run_shell(script: str, folder: Path) -> None:
    """Run a script of bash in the folder; AssertionError with the end of its output if a command fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", STUBS + script], cwd=folder, env=environment(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}"


def build(folder: Path) -> Path:
    """Make the folder."""
    (folder / "bin").mkdir(parents=True)
    command = folder / "bin" / "streamtrain"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m streamtrain.cli.main "$@"\n')
    command.chmod(0o755)
    for name in ("tools", "streamtrain", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        recipe = {"extends": str(path), **TOY, **RECIPES.get(path.name, {})}
        (folder / path.name).write_text(json.dumps(recipe, indent=1))
    _draw(folder)
    run_shell(
        """
        streamtrain pack --src photos --out sets/photos
        for name in reference streets; do cp -r sets/photos sets/$name; done
        cp -r sets/photos SET
        for name in photos other; do
            streamtrain train --config vits16.yaml data.shards=sets/photos run.dir=runs/$name
        done
        streamtrain export --run runs/photos --to safetensors --out WEIGHTS
        mkdir weights && cp -r WEIGHTS weights/dinov3-vitl16 && cp -r WEIGHTS exported
        """,
        folder,
    )
    return folder


def _draw(folder: Path) -> None:
    class_folder(folder / "photos", ("across", "down"), each=20)
    _draw_maps(folder)
    for name in ("cat", "dog"):
        shutil.copy(folder / "photos" / "down" / "000.png", folder / f"{name}.jpg")
    rng = np.random.default_rng(0)
    for name in ("tiles", "slides", "scenes"):
        (folder / name).mkdir()
    for number in range(12):
        bands = rng.integers(0, 9000, (40, 40, 13), dtype=np.uint16)
        for name, values in {"tiles": bands, "scenes": bands[..., :4]}.items():
            tifffile.imwrite(folder / name / f"{number}.tif", values, photometric="minisblack", planarconfig="contig")
    with tarfile.open(folder / "scenes" / "000.tar", "w") as tar:
        for path in sorted((folder / "scenes").glob("*.tif")):
            tar.add(path, path.name)
    tifffile.imwrite(folder / "slides" / "0.tif", rng.integers(0, 255, (600, 600, 3), dtype=np.uint8), tile=(256, 256))


def _draw_maps(folder: Path) -> None:
    """Write `images`, and a mask and a depth map of each: the left and the right half."""
    shutil.copytree(folder / "photos", folder / "images")
    for path in sorted((folder / "images").rglob("*.png")):
        with Image.open(path) as image:
            right = np.arange(image.width)[None].repeat(image.height, 0) > image.width // 2
        for name in ("masks", "depth"):
            (folder / name / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(right.astype(np.uint8)).save(folder / "masks" / path.parent.name / path.name)
        np.save(folder / "depth" / path.parent.name / f"{path.stem}.npy", 1 + right.astype(np.float32))
