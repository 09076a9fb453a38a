"""The Python API; its functions are attributes of ``streamtrain``."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamtrain.errors import StreamtrainError, TrainingError

if TYPE_CHECKING:
    import numpy as np

    from shards.format.set_manifest import SetManifest
    from streamtrain.interop.load import Backbone

_ROOT = Path(__file__).resolve().parents[1]


def pack(src: Path | str, out: Path | str, *, workers: int | None = None, **options: Any) -> SetManifest:
    """Pack images into a shard set, like ``streamtrain pack``, and return its manifest.

    Worker processes import the main module, so a script calls this below ``if __name__ == "__main__":``.

    Args:
        src: folder, list file, tar, parquet file or folder, or URL of the images.
        out: folder or URL of the set.
        workers: decoding processes; default: all cores.
        options: fields of ``shards.packing.pack.PackOptions``, such as ``max_side=512``, or
            ``pixels=shards.format.pixels.PixelFormat(13, "uint16")`` for other channels and depths, or
            ``tiles=shards.packing.tiles.Tiling(512)``; ``seg`` and ``depth`` are folders of maps.

    Raises:
        ShardError: if there is nothing to pack, or ``out`` cannot be written.
        StreamtrainError: for an unknown option, or ``workers`` below 1.
    """
    from shards.packing.pack import PackOptions
    from shards.packing.pack import pack as pack_images

    known = [field.name for field in dataclasses.fields(PackOptions)]
    if unknown := sorted(options.keys() - set(known)):
        raise StreamtrainError(f"pack has no option {', '.join(unknown)}; it has {', '.join(known)}")
    options |= {name: _expand(options[name]) for name in ("seg", "depth") if options.get(name) is not None}
    source, target = _expand(src), _expand(out)
    report = pack_images(source, target, PackOptions(**options), workers=_check_workers(workers), progress=True)
    return report.manifest


def verify(shards: Path | str, *, workers: int | None = None) -> list[str]:
    """Check everything in a shard set and return one line per fault; a script needs a main guard as for ``pack``.

    Raises:
        ShardError: if there is no readable set.
    """
    from shards.packing.verify import verify as verify_set

    return [str(fault) for fault in verify_set(_expand(shards), workers=_check_workers(workers), progress=True)]


def train(
    config: Path | str,
    *,
    shards: Path | str,
    run: Path | str,
    gpus: int | None = None,
    steps: int | None = None,
    resume: Path | str | None = None,
    accept: Sequence[str] = (),
    **overrides: Any,
) -> Path:
    """Train in child processes until the run is complete, print their output, and return the run directory.

    Call again with the same arguments to resume from the latest checkpoint.

    Args:
        config: path of a YAML file, or the name of a recipe such as ``vits16.yaml``.
        shards: folder or URL of the shard set (``data.shards``).
        run: run directory (``run.dir``).
        gpus: number of ranks; default: all visible GPUs, or one rank on the CPU.
        steps: number of steps (``run.steps``).
        resume: another run, whose latest checkpoint to start from.
        accept: settings that may differ from the checkpoint, such as ``["schedules.lr"]``.
        overrides: further settings by section, such as ``data={"micro_batch": 32}``; a dotted key goes into a mapping:
            ``**{"model.drop_path": 0.1}``.

    Raises:
        TrainingError: if the run failed, or was stopped before its last step; the message is the last error line.
    """
    run = _expand(run)
    command = [sys.executable, "-m", "streamtrain.cli.main", "train", "--config", str(config)]
    command += ["--ranks", str(gpus)] if gpus is not None else []
    command += ["--resume", str(resume)] if resume is not None else []
    command += ["--accept", *([accept] if isinstance(accept, str) else accept)] if accept else []
    settings = {"data.shards": str(shards), "run.dir": run} | ({"run.steps": steps} if steps is not None else {})
    # JSON is YAML, which the values of overrides are
    command += [
        f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in (settings | overrides).items()
    ]
    status, error = _run_and_print(command)
    if status:
        stopped = status in (75, 130)
        message = f"{run} was stopped early; call train again to resume" if stopped else error
        raise TrainingError(message or f"training ended with exit status {status}")
    return Path(run)


def _run_and_print(command: list[str]) -> tuple[int, str]:
    """Run a command, print its output line by line, and return its exit status and last error line."""
    from streamtrain.cli.launch import stop_with_parent
    from streamtrain.engine.rendezvous import AGENT_STORE

    environment = dict(os.environ)
    # the child is not a rank, even if this process is
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", AGENT_STORE):
        environment.pop(name, None)
    if _ROOT.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True, preexec_fn=stop_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    error = last = ""
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
                if line.startswith("error: "):
                    error = line.removeprefix("error: ").strip()
            return process.wait(), error or last
        except KeyboardInterrupt:
            # in a notebook: stop the run after a checkpoint, and print until it ends
            process.send_signal(signal.SIGINT)


def load_backbone(
    path: Path | str, *, step: int | str | None = None, which: str = "teacher", factory: str | None = None
) -> Backbone:
    """Load the backbone of a run, an exported folder, a Hugging Face or timm folder, or a ``.safetensors`` file.

    Args:
        path: of the run, folder or file.
        step: of a run: the checkpoint's step, or ``"best"``; default: the latest.
        which: of a run: ``teacher`` or ``student``.
        factory: ``module:Class`` of a network trained with ``model.factory``; its code is executed.

    Raises:
        StreamtrainError: if there is no backbone at ``path``, or ``step`` or ``which`` selects none.
    """
    from streamtrain.interop import load

    if not (step is None or step == "best" or (isinstance(step, int) and not isinstance(step, bool) and step >= 0)):
        raise StreamtrainError(f"step {step!r} is neither a number of steps nor 'best'")
    if which not in ("teacher", "student"):
        raise StreamtrainError(f"which {which!r} is neither 'teacher' nor 'student'")
    return load.load_backbone(_expand(path), step, which, factory)


def embed(
    backbone: Backbone, source: Path | str, *, batch_size: int = 64, device: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Compute the CLS features of every image, in memory. For many images, see ``embed_files``.

    Args:
        backbone: as returned by ``load_backbone``.
        source: shard set, folder, list file, tar or zip of images of the channels and dtype of the backbone.
        batch_size: images per forward.
        device: default: a GPU if there is one.

    Returns:
        float32 [images, dim], and the key of each image, in a folder its relative path; without unusable images, which
        are logged.

    Raises:
        ShardError: if ``source`` cannot be read, or has no images.
        StreamtrainError: if ``batch_size`` is below 1, this machine does not have ``device``, or too many images are
            unusable.
    """
    from streamtrain.cli.backbone import choose_device
    from streamtrain.evaluation.features import compute_features, report_unusable
    from streamtrain.evaluation.images import open_source

    if not isinstance(batch_size, int) or batch_size < 1:
        raise StreamtrainError(f"batch_size {batch_size!r} is not a whole number above 0")
    chosen = choose_device(str(device or "auto"))
    config = backbone.config
    images = open_source(_expand(source), config.background, config.pixels)
    images.require_pixels(config.pixels)
    features, is_usable = compute_features(
        backbone.to(chosen).model, images, size=config.image_size, resize=config.resize, mean=config.mean,
        std=config.std, value_range=config.value_range, batch_size=batch_size, progress=True,
    )  # fmt: skip
    report_unusable(images, is_usable)
    return features[is_usable].numpy(), [images.sample_key(index) for index in is_usable.nonzero()[:, 0].tolist()]


def embed_files(source: Path | str, out: Path | str, **options: Any) -> Path:
    """Write the features of every image to files, like ``streamtrain embed``; call again to resume.

    Args:
        source: as in ``embed``, or the URL of a set.
        out: folder to write.
        options: options of the command, such as ``run="runs/photos"``, ``features=["cls", "patches"]`` or
            ``format="parquet"``.

    Returns:
        ``out``.

    Raises:
        StreamtrainError: for an unknown option, or images or weights that cannot be used.
        ShardError: if ``source`` cannot be read.
    """
    from streamtrain.cli.embed import write_selected

    write_selected(_command_arguments("embed", [str(source)], {**options, "out": out}))
    return Path(_expand(out))


def evaluate(
    task: str, *, train: Path | str | None = None, test: Path | str | None = None, **options: Any
) -> dict[str, Any]:
    """Measure features on labelled images, like ``streamtrain evaluate``, and return its JSON object.

    Args:
        task: ``knn``, ``linear`` or ``logistic``; ``segmentation`` or ``depth``, of a set with maps, or of a folder
            with the option ``labels``; ``correspondence``, with the option ``pairs`` alone.
        train: shard set, or folder with one subfolder per class, to learn from; any folder if there are ``labels``.
        test: images to predict; default: a fixed fifth of ``train`` is held out.
        options: options of the command, such as ``run="runs/photos"`` or ``weights="exported"``.

    Raises:
        StreamtrainError: for an unknown option, or images or weights that cannot be used.
    """
    from streamtrain.cli.evaluate import DENSE_TASKS, PAIR_TASKS, TASKS, measure

    if task not in (tasks := TASKS + DENSE_TASKS + PAIR_TASKS):
        raise StreamtrainError(f"task {task!r} is not one of {', '.join(tasks)}")
    given = {**options, "train": train, "test": test}
    return measure(_command_arguments("evaluate", [task], given))[0]


def export(
    run: Path | str, out: Path | str, *, to: str = "hf", step: int | str | None = None, factory: str | None = None
) -> Path:
    """Write the backbone of a run for another library, like ``streamtrain export``, and return the path of the weights.

    Args:
        run: run directory.
        out: folder to write; new, empty, or an earlier export.
        to: ``hf`` (transformers), ``timm``, ``safetensors`` or ``onnx``.
        step: of the checkpoint, or ``"best"``; default: the latest.
        factory: as in ``load_backbone``.

    Raises:
        StreamtrainError: if the run has no such checkpoint, or ``out`` cannot be written.
    """
    from streamtrain.cli.export import export_selected

    given = {"run": run, "out": out, "to": to, "step": step, "factory": factory}
    return export_selected(_command_arguments("export", [], given))[0]


def _expand(path: Path | str) -> str:
    from shards.storage.paths import expand_path

    return expand_path(os.fspath(path))


def _check_workers(workers: int | None) -> int:
    if workers is None:
        from streamtrain.run.machine import available_cores

        return available_cores()
    if not isinstance(workers, int) or workers < 1:
        raise StreamtrainError(f"workers {workers!r} is not a whole number above 0")
    return workers


def _command_arguments(command: str, words: list[str], options: Mapping[str, Any]) -> argparse.Namespace:
    """Parse Python values as the options of a command; None and False leave an option out.

    Raises:
        StreamtrainError: for an option that the command does not have, or a value that it rejects.
    """
    from streamtrain.cli.main import build_parser

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    for name, value in given.items():
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        words = [*words, f"--{name.replace('_', '-')}", *map(str, values)]
    with redirect_stderr(io.StringIO()) as stderr:
        try:
            return build_parser([command]).parse_args([command, *words])
        except SystemExit:
            raise StreamtrainError(stderr.getvalue().removeprefix("error: ").rpartition("; see ")[0]) from None
