"""Write the features of many images to files, in parts; an interrupted command resumes at the first missing part."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from shards.errors import printable
from shards.format.files import create_file, partial_path, read_json, remove_tree, sync, write_whole
from shards.format.folder_lock import FolderInUse, lock_folder
from shards.format.pixels import Range
from shards.packing.items import sample_key
from streamtrain.data.batch import normalise
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.feature_cache import weights_digest
from streamtrain.evaluation.features import crop_batches
from streamtrain.evaluation.images import LabelledImages
from streamtrain.model.vit import Features, VisionTransformer
from streamtrain.run.machine import available_cores
from streamtrain.run.progress import progress_bar

DESCRIPTION, KEYS, UNUSABLE = "embed.json", "keys.txt", "unusable.txt"
# maximum size of the features of a part, which are held in memory
_PART_BYTES = 64 << 20
_MAX_PART_IMAGES = 4096
_PARTS, _LOCK = ".parts", ".lock"
# with the longest extension, .patches.npy, at most the 100 characters of a name in a tar
_TAR_KEY = re.compile("[A-Za-z0-9_-][A-Za-z0-9_/-]{,87}")
logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class EmbedOptions:
    """What to compute from which pixels, and how to store it.

    Attributes:
        size, resize: side of the network's input, and shorter side before the centre crop, in pixels.
        mean, std, value_range: per channel, as in training.
        features: ``cls``, ``mean``, ``patches``: CLS, the mean of the patches, and all patches, row by row.
        format: ``npy`` (one array for each feature, and keys.txt), ``parquet`` (a folder of files) or ``tar``
            (WebDataset shards).
        dtype: of the stored values.
        batch_size: images per forward.
        share: compute only the parts whose number is ``share[0]`` modulo ``share[1]``.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[Range, ...]
    features: tuple[str, ...] = ("cls",)
    format: str = "npy"
    dtype: str = "float32"
    batch_size: int = 64
    share: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Written:
    """Images that a call of ``write_features`` computed, and counts of the folder once all parts are done.

    ``rows`` is None while parts of other shares are missing.
    """

    computed: int = 0
    rows: int | None = None
    unusable: int = 0


def write_features(
    model: VisionTransformer, images: LabelledImages, out: Path, options: EmbedOptions, origin: Mapping[str, Any]
) -> Written:
    """Write the features of all images to the folder ``out``, in their order, without unusable images.

    Each part is written whole, so the files are the same however often the command is killed. The share that finds all
    parts done joins them and completes ``out``/embed.json.

    Args:
        model: the backbone, in eval mode; its device and dtype are used.
        origin: provenance of the weights, stored in embed.json.

    Raises:
        StreamtrainError: ``out`` has other files, or features of other images, weights or options; or no image is
            usable.
        ShardError: a shard cannot be reached; only damaged images are left out.
        OSError: ``out`` cannot be written.
    """
    shapes = _shapes(model, options)
    image_bytes = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(options.dtype).itemsize
    part_images = min(max(_PART_BYTES // image_bytes, 1), _MAX_PART_IMAGES)
    parts = [range(start, min(start + part_images, len(images))) for start in range(0, len(images), part_images)]
    description = _prepare(out, _describe(model, images, options, origin))
    mine = list(range(options.share[0], len(parts), options.share[1]))
    missing = [] if "rows" in description else [number for number in mine if not _marker(out, number).is_file()]
    num_done = sum(len(parts[number]) for number in set(mine) - set(missing))
    write = partial(_write_part, out, images, options.format, shapes)
    with progress_bar(f"embedding {images.name}", sum(len(parts[number]) for number in mine), "images") as bar:
        bar.update(num_done)
        # one part is written while the next is computed
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending: Future[None] | None = None
            for number, features, is_usable in _compute(model, images, options, parts, missing, bar.update):
                if pending is not None:
                    pending.result()
                pending = pool.submit(write, number, parts[number], features, is_usable)
            if pending is not None:
                pending.result()
    if reasons := images.unusable.new_reasons():
        logger.warning("some images of %s could not be used: %s", images.name, reasons)
    written = _finish(out, len(parts), options, shapes)
    return replace(written, computed=sum(len(parts[number]) for number in missing))


def _describe(
    model: VisionTransformer, images: LabelledImages, options: EmbedOptions, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all settings and inputs that the files depend on, as JSON values."""
    assert images.identify is not None
    chosen = {key: value for key, value in asdict(options).items() if key != "share"}
    described = {
        "source": images.name, "images": len(images), "source_digest": images.identify(), "origin": dict(origin),
        "weights_digest": weights_digest(model), **chosen, "background": images.background,
        "channels": images.pixels.channels, "image_dtype": images.pixels.dtype,
        "compute_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    return dict(json.loads(json.dumps(described)))


def _shapes(model: VisionTransformer, options: EmbedOptions) -> dict[str, tuple[int, ...]]:
    """Return the shape of each feature of an image."""
    dim, num_patches = model.embedding.cls_token.shape[1], (options.size // model.patch_size) ** 2
    shapes = {"cls": (dim,), "mean": (dim,), "patches": (num_patches, dim)}
    return {name: shapes[name] for name in options.features}


def _prepare(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Create ``out``, or check that it has features with these settings, and return its description."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / DESCRIPTION
    with _locked(out):
        if not path.is_file():
            own = (_PARTS, _LOCK, partial_path(path).name)
            if found := sorted(entry.name for entry in out.iterdir() if entry.name not in own):
                raise StreamtrainError(f"{out} is not empty (it has {printable(found[0])}); choose another --out")
            (out / _PARTS).mkdir(exist_ok=True)
            write_whole(path, _json(settings))
            return settings
    stated = _read_description(path)
    # the same images may be given by another relative path
    if other := [key for key, value in settings.items() if key != "source" and stated.get(key) != value]:
        raise StreamtrainError(
            f"{out} was started with other settings ({other[0].replace('_', ' ')}); delete it, or choose another --out"
        )
    return stated


def _read_description(path: Path) -> dict[str, Any]:
    try:
        stated = read_json(path)
    except (ValueError, OSError) as error:
        raise StreamtrainError(f"{path} cannot be read ({error}); delete {path.parent}") from None
    if not isinstance(stated, dict):
        raise StreamtrainError(f"{path} is not a description of features; choose another --out")
    return stated


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock ``out``, waiting for other shares, which hold the lock only while they start or join the parts."""
    while True:
        with suppress(FolderInUse), lock_folder(out, _LOCK):
            try:
                yield
            finally:
                # the folder may belong to something else
                (out / _LOCK).unlink(missing_ok=True)
            return
        time.sleep(0.05)


def _compute(
    model: VisionTransformer, images: LabelledImages, options: EmbedOptions, parts: Sequence[range],
    missing: Sequence[int], progress: Callable[[int], Any],
) -> Iterator[tuple[int, Arrays, Tensor]]:  # fmt: skip
    """Yield the number and features of each missing part, and bool [images of the part]: whether each is usable."""
    spans = [
        range(start, min(start + options.batch_size, parts[number].stop))
        for number in missing
        for start in range(parts[number].start, parts[number].stop, options.batch_size)
    ]
    reachable = replace(images, stops_if_unreachable=True)
    parameter = next(model.parameters())
    batches = crop_batches(
        reachable, options.resize, options.size, options.batch_size, min(available_cores(), 16), spans
    )
    for number in missing:
        pieces: list[dict[str, Tensor]] = []
        usable: list[Tensor] = []
        while sum(map(len, usable)) < len(parts[number]):
            crops, is_usable = next(batches)
            inputs = crops.to(parameter.device, non_blocking=True)
            with torch.inference_mode():
                inputs = normalise(inputs, options.mean, options.std, parameter.dtype, options.value_range)
                pieces.append(_select(model.forward_features(inputs), is_usable, options))
            usable.append(is_usable)
            progress(len(crops))
        yield (
            number,
            {name: torch.cat([piece[name] for piece in pieces]).numpy() for name in pieces[0]},
            torch.cat(usable),
        )


def _select(features: Features, is_usable: Tensor, options: EmbedOptions) -> dict[str, Tensor]:
    """Return the wanted features of the usable images of a batch, on the CPU."""
    wanted: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: features.cls,
        "mean": lambda: features.patches.float().mean(1),
        "patches": lambda: features.patches,
    }
    # converted first, because fewer bytes leave the GPU
    return {name: wanted[name]().to(getattr(torch, options.dtype)).cpu()[is_usable] for name in options.features}


def _write_part(
    out: Path, images: LabelledImages, kind: str, shapes: Shapes, number: int, part: range, features: Arrays,
    is_usable: Tensor,
) -> None:  # fmt: skip
    """Write the features of a part, and then its marker."""
    keys = [images.sample_key(index) for index in part]
    usable = [key for key, is_good in zip(keys, is_usable.tolist(), strict=True) if is_good]
    if kind == "npy":
        for name, array in features.items():
            write_whole(out / _PARTS / f"{number:06d}.{name}.npy", _npy(array))
    elif usable:
        content = _parquet(usable, features, shapes) if kind == "parquet" else _tar(usable, features, part.start)
        write_whole(out / f"part-{number:06d}.{kind}", content)
    unusable = [key for key, is_good in zip(keys, is_usable.tolist(), strict=True) if not is_good]
    write_whole(_marker(out, number), _json({"keys": usable if kind == "npy" else len(usable), "unusable": unusable}))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _parquet(keys: Sequence[str], features: Arrays, shapes: Shapes) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"key": pyarrow.array([printable(key) for key in keys])}
    for name, array in features.items():
        values = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, int(np.prod(shapes[name])))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, metadata={"shapes": json.dumps(shapes)}), file)
    return file.getvalue()


def _tar(keys: Sequence[str], features: Arrays, start: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, key in enumerate(keys):
            # WebDataset splits names at dots
            stem = key if _TAR_KEY.fullmatch(key) else sample_key(start + row, printable(key))
            members = {f"{name}.npy": _npy(array[row]) for name, array in features.items()}
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{stem}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def _finish(out: Path, num_parts: int, options: EmbedOptions, shapes: Shapes) -> Written:
    """Complete the folder if all parts are done; it may be complete already."""
    with _locked(out):
        description = _read_description(out / DESCRIPTION)
        if "rows" not in description:
            if not all(_marker(out, number).is_file() for number in range(num_parts)):
                return Written()
            rows, num_unusable = _join(out, num_parts, options, shapes)
            if not rows:
                raise StreamtrainError(f"none of the {num_unusable} images of {description['source']} can be used")
            shown = {name: [rows, *shape] for name, shape in shapes.items()}
            description |= {"rows": rows, "unusable": num_unusable, "shapes": shown}
            write_whole(out / DESCRIPTION, _json(description))
        # a command that was killed here left them behind
        remove_tree(out / _PARTS)
    return Written(rows=description["rows"], unusable=description["unusable"])


def _join(out: Path, num_parts: int, options: EmbedOptions, shapes: Shapes) -> tuple[int, int]:
    """Write keys.txt, unusable.txt and the joined arrays; return the numbers of usable and unusable images."""
    is_npy = options.format == "npy"

    def markers() -> Iterator[dict[str, Any]]:
        return (read_json(_marker(out, number)) for number in range(num_parts))

    counts = [(len(marker["keys"]) if is_npy else marker["keys"], len(marker["unusable"])) for marker in markers()]
    rows, num_unusable = (sum(each) for each in zip(*counts, strict=True))
    if is_npy:
        with _replacing(out / KEYS) as file:
            for marker in markers():
                file.writelines(f"{printable(key)}\n".encode() for key in marker["keys"])
        for name, shape in shapes.items():
            header = {"descr": np.dtype(options.dtype).str, "fortran_order": False, "shape": (rows, *shape)}
            with _replacing(out / f"{name}.npy") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number in range(num_parts):
                    if counts[number][0]:
                        file.write(np.load(out / _PARTS / f"{number:06d}.{name}.npy").data)
    if num_unusable:
        with _replacing(out / UNUSABLE) as file:
            for marker in markers():
                file.writelines(f"{printable(key)}\n".encode() for key in marker["unusable"])
    return rows, num_unusable


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces ``path`` after the ``with`` block."""
    with open(create_file(partial_path(path)), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_path(path), path)
    sync(path.parent)


def _marker(out: Path, number: int) -> Path:
    return out / _PARTS / f"{number:06d}.json"


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
