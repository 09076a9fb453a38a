"""A self-contained HTML report of a run: its verdict, curves, pictures and settings in one file.

The run directory is untrusted: all text is escaped, and a file that cannot be read is left out with a
warning.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import printable, printable_lines
from shards.format.files import read_json
from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.config.recipes import nearest_recipe
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.charts import Baseline, svg_chart
from streamtrain.evaluation.health import judge_health
from streamtrain.evaluation.reference_curve import MAX_CHANGED, Comparison, find_comparison
from streamtrain.evaluation.report_html import Page, Picture, render
from streamtrain.evaluation.uncertainty import accuracy_margin
from streamtrain.evaluation.verdict import (
    KnownBaselines,
    headline_tag,
    image_count,
    judge_drift,
    judge_learning,
    judge_stability,
    read_baselines,
)
from streamtrain.planning.images import configured_images
from streamtrain.planning.memory import plan
from streamtrain.planning.units import duration, significant, size
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, TENSORBOARD_NAME, saved_steps
from streamtrain.run.machine import folder_bytes
from streamtrain.run.provenance import ENVIRONMENT_NAME, PLANNED_PEAK
from streamtrain.run.tags import describe_tag, pinned_cards_url

logger = logging.getLogger(__name__)
Records = Sequence[Mapping[str, Any]]
_MAX_RANKS, _MAX_SECONDS, _MAX_IMAGES = 1 << 20, 1e12, 1 << 50
# curves that are always shown, after the evaluation; the first ones that the run logged
_MAIN_TAGS = (
    "loss/total", "features/rank", "optim/gradient_norm", "speed/images_per_second", "teacher/entropy", "optim/lr",
)  # fmt: skip
_MAX_MAIN = 5
# titles of the folded curves by the tags' first part, in order
_TOPICS = {
    "eval": "Evaluation", "reference": "Reference set", "drift": "Drift from the start",
    "loss": "Losses", "features": "Features", "teacher": "Teacher", "optim": "Optimizer",
    "watch": "Optimizer", "speed": "Speed", "data": "Data", "memory": "Memory",
}  # fmt: skip
_CAPTIONS = {
    "features/pca": "First three principal components of the patch features, up to step {step:,}",
    "features/similarity": "Cosine similarity to the marked patch, up to step {step:,}",
    "data/crops": "Inputs of the network at step {step:,}",
}
# charts on a page, in all and of one group
MAX_CHARTS, MAX_CHARTS_OF_GROUP = 120, 60
MAX_PICTURES, MAX_ROWS, MAX_CHANGES = 100, 100, 5
_MAX_TEXT_BYTES, _MAX_FACT = 1 << 20, 300


def report_page(
    run: Path,
    records: Records,
    images: Mapping[str, tuple[int, bytes]],
    warnings: Sequence[tuple[int, str]] | None = None,
    period: tuple[float | None, float | None] = (None, None),
) -> str:
    """Return the report of a run directory as HTML.

    Args:
        records: of its ``metrics.jsonl``.
        images: step and PNG or JPEG of the latest image by TensorBoard tag; other images are left out.
        warnings: step and text of the run's warnings; None if they were not kept.
        period: when the run began and last wrote, in seconds since 1970; None if unknown.

    Raises:
        StreamtrainError: if ``run`` is not a run directory, or has no completed step.
    """
    if not (run / RESOLVED_NAME).is_file():
        reason = f"it has no {RESOLVED_NAME}" if run.is_dir() else "it does not exist"
        raise StreamtrainError(f"{run} is not a run directory: {reason}")
    if not records:
        raise StreamtrainError(f"{run} has nothing to report yet: its {METRICS_NAME} has no step")
    config, environment, tables = None, {}, {}
    try:
        environment, config = _read_environment(run), read_resolved(run)
        tables["Plan and measurement"] = _plan_table(run, config, environment, records)
    # planning with settings of an untrusted run can raise any exception
    except Exception as error:
        logger.warning("the plan is left out: %s", printable(str(error) or type(error).__name__)[:300])
    baselines, headline = read_baselines(run), headline_tag(records, config.evaluation.best if config else None)
    if len(evaluated := _evaluation_table(records, baselines)) > 1:
        tables = {"Evaluation while training": evaluated, **tables}
    # older runs do not record whether their start was trained
    is_trained = baselines.is_trained or (config is not None and config.init.weights is not None)
    start_name = "initial" if is_trained else "untrained"
    comparison = find_comparison(config, baselines) if config is not None else None
    charts, more, note = _draw_curves(records, headline, baselines, start_name, comparison)
    page = Page(
        title=f"Run {run.resolve().name}",
        facts=_facts(run, config, environment, records, period),
        findings=[
            judge_learning(records, headline, baselines, start_name),
            judge_health(records, config),
            *filter(None, [judge_drift(records, baselines)]),
            judge_stability(records, warnings),
        ],
        numbers=_summary(records),
        charts=charts,
        more_charts=more,
        caption=comparison.caption(sorted({tag for record in records for tag in record})) if comparison else "",
        note=note,
        pictures=_pictures(images),
        tables=tables,
        texts=_texts(run, warnings or (), headline),
    )
    return render(page)


def _draw_curves(
    records: Records, headline: str | None, baselines: KnownBaselines, start_name: str, comparison: Comparison | None
) -> tuple[list[str], dict[str, list[str]], str]:
    """Return the main charts, the others by topic, and a note about tags that are left out."""
    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=_tag_order)
    shown = _select_tags(tags)

    def draw(tag: str, is_wide: bool = False) -> str:
        named = {start_name: baselines.start.get(tag), "pixels": baselines.pixels.get(tag)}
        lines = [Baseline(name, value) for name, value in named.items() if value is not None]
        count, start = image_count(tag, baselines), baselines.start.get(tag)
        widths = None
        if count and start is not None:
            points = [(baselines.step, start), *((record["step"], record.get(tag)) for record in records)]
            shares = {step: value for step, value in points if value is not None and 0 <= value <= 1}
            widths = {step: accuracy_margin(value, count) for step, value in shares.items()}
        begin = None if start is None else (baselines.step, start)
        return svg_chart(tag, records, lines, begin, widths, is_wide, comparison.line(tag) if comparison else None)

    main = _main_tags(headline, tags)
    topics: dict[str, list[str]] = {}
    for tag in shown:
        if tag not in main:
            topics.setdefault(_TOPICS.get(tag.partition("/")[0], "Other"), []).append(draw(tag))
    note = f"and {len(tags) - len(shown):,} more tags in {METRICS_NAME}" if len(shown) < len(tags) else ""
    return [draw(tag, index == 0 and len(main) % 2 == 1) for index, tag in enumerate(main)], topics, note


def _main_tags(headline: str | None, tags: Collection[str]) -> list[str]:
    return [tag for tag in (headline, *_MAIN_TAGS) if tag is not None and tag in tags][:_MAX_MAIN]


def _select_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags to draw: at most ``MAX_CHARTS``, of one group at most ``MAX_CHARTS_OF_GROUP``."""
    counts: Counter[str] = Counter()
    selected = []
    for tag in tags:
        group = tag.partition("/")[0]
        counts[group] += 1
        if counts[group] <= MAX_CHARTS_OF_GROUP:
            selected.append(tag)
    return selected[:MAX_CHARTS]


def _pictures(images: Mapping[str, tuple[int, bytes]]) -> list[Picture]:
    """Return the usable pictures, feature maps first."""
    order = {tag: index for index, tag in enumerate(_CAPTIONS)}
    pictures = [
        Picture(content, _CAPTIONS.get(tag, "").format(step=step) or f"{tag}, step {step}")
        for tag, (step, content) in sorted(images.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    ]
    usable = [picture for picture in pictures if picture.kind][:MAX_PICTURES]
    if len(usable) < len(pictures):
        logger.warning("%d pictures are left out: more than %d, or neither PNG nor JPEG", len(pictures) - len(usable),
                       MAX_PICTURES)  # fmt: skip
    return usable


def _texts(run: Path, warnings: Sequence[tuple[int, str]], headline: str | None) -> dict[str, str]:
    texts = {}
    if warnings:
        texts["Warnings"] = "\n".join(printable(text)[:2000] for _, text in warnings[-MAX_ROWS:])
    if (run / TENSORBOARD_NAME).is_dir():
        url = pinned_cards_url(_main_tags(headline, (headline or "", *_MAIN_TAGS)))
        command = f"tensorboard --logdir {shlex.quote(printable(run.resolve()))}"
        texts["TensorBoard, with these curves pinned on top"] = f"{command}\n{url}"
    return texts | {
        name: _read_text(run / name) for name in (RESOLVED_NAME, ENVIRONMENT_NAME) if (run / name).is_file()
    }


def _read_text(path: Path) -> str:
    """Return the beginning of a text file, with everything but its lines escaped."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT_BYTES)
    except OSError as error:
        return f"({error.strerror})"
    return printable_lines(content.decode(errors="backslashreplace"))


def _facts(
    run: Path, config: Config | None, environment: Mapping[str, Any], records: Records,
    period: tuple[float | None, float | None],
) -> dict[str, str]:  # fmt: skip
    """Return the lines at the top of the page by name."""
    facts, last = {}, records[-1]
    step, slot = last["step"], min(max(last.get("slot", 0), 0), _MAX_IMAGES)
    images = environment.get("images")
    images = images if type(images) is int and 0 < images < _MAX_IMAGES else None
    if config is not None:
        crops = config.crops
        facts["Recipe"] = _recipe_text(config)
        model = (
            f"ViT with {config.model.depth} blocks of {config.model.dim}, patches of {config.model.patch_size} pixels"
        )
        facts["Network"] = model
        count = f"{images:,} images" if images else "images"
        views = f"views of {crops.global_size} and {crops.local_size} pixels"
        facts["Data"] = f"{count} from {config.data.shards_text[:_MAX_FACT]}, {views}"
    if environment:
        ranks, device = environment["world_size"], str(environment.get("device", "cpu"))
        name = device if device != "cpu" else str(environment.get("processor") or environment.get("machine") or "CPU")
        cores = environment.get("cores")
        parts = [name[:_MAX_FACT], f"{ranks:,} rank{'s' if ranks > 1 else ''}"]
        parts += [f"{cores:,} cores"] if type(cores) is int and device == "cpu" else []
        facts["Hardware"] = ", ".join([*parts, str(environment.get("dtype", ""))[:_MAX_FACT]]).rstrip(", ")
    began, ended = period
    if began is None:
        began = (run / RESOLVED_NAME).stat().st_mtime
    facts["Started"] = _date(began)
    seconds = sum(record.get("speed/step_seconds") or 0.0 for record in records)
    took = duration(min(seconds, _MAX_SECONDS)) if seconds > 0 else "unknown duration"
    of_all = f" of {config.run.steps:,}" if config is not None else ""
    epochs = f" = {slot / images:,.3g} epochs" if images else ""
    facts["Training"] = f"{took} for {step:,}{of_all} steps, {slot:,} images seen{epochs}"
    # the terminal states both at the end of each start
    facts["Training"] += "; the preparation of each start is not counted"
    if ended is not None and config is not None and step < config.run.steps:
        facts["Last step"] = _date(ended)
    steps = saved_steps(run)
    listed = [f"{each:,}" for each in steps]
    listed = [*listed[:2], "…", *listed[-2:]] if len(listed) > 6 else listed
    facts["Checkpoints"] = f"steps {'; '.join(listed)}" if steps else "none yet"
    return facts


def _recipe_text(config: Config) -> str:
    recipe, changed = nearest_recipe(config)
    if not recipe or len(changed) > MAX_CHANGED:
        closest = f"; the closest shipped one is {recipe}" if recipe else ""
        return f"own recipe{closest} ({len(changed)} settings differ)"
    if not changed:
        return recipe
    first = [f"{key}={value}"[:_MAX_FACT] for key, value in list(changed.items())[:MAX_CHANGES]]
    more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
    return f"{recipe} with {', '.join(first)}{more}"


@np.errstate(all="ignore")
def _summary(records: Records) -> dict[str, str]:
    """Return sentences about speed and memory by title."""
    numbers = {}

    def rows(*tags: str) -> np.ndarray:
        """Return the values of records that have all ``tags``: float64 [tags, records]."""
        found = [[record.get(tag) for tag in tags] for record in records]
        return np.array([row for row in found if None not in row], np.float64).reshape(-1, len(tags)).T

    (seconds,), (speed,) = rows("speed/step_seconds"), rows("speed/images_per_second")
    parts = [f"{np.median(speed):,.1f} images per second"] if len(speed) else []
    if len(seconds):
        middle, slow = np.quantile(seconds, [0.5, 0.99])
        parts.append(f"{middle:.2f} s per step (median; 99th percentile {slow:.2f} s)")
    timed, wait = rows("speed/step_seconds", "data/wait_share")
    if timed.sum() > 0:
        parts.append(f"{wait @ timed / timed.sum():.1%} of the time waiting for data")
    if parts:
        numbers["Speed"] = ", ".join(parts)
    names = (("memory/gpu_bytes", "GPU"), ("memory/peak_rss_bytes", "host"))
    peaks = [f"{size(values.max())} {name} memory" for tag, name in names if len(values := rows(tag)[0])]
    if peaks:
        numbers["Memory"] = f"peak {' and '.join(peaks)}, rank 0"
    (loss,) = rows("loss/total")
    if len(loss):
        numbers["Loss"] = f"{loss[0]:.3f} → {loss[-1]:.3f} from the first to the last step"
    return numbers


def _read_environment(run: Path) -> dict[str, Any]:
    """Return ``environment.json``.

    Raises:
        ValueError: if it is missing or does not describe a run.
    """
    try:
        environment = read_json(run / ENVIRONMENT_NAME)
    except OSError as error:
        raise ValueError(f"{ENVIRONMENT_NAME} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_NAME} cannot be read: {error}") from None
    if not isinstance(environment, dict) or type(world_size := environment.get("world_size")) is not int:
        raise ValueError(f"{ENVIRONMENT_NAME} is damaged")
    if not 0 < world_size <= _MAX_RANKS:
        raise ValueError(f"{ENVIRONMENT_NAME} states {world_size} ranks")
    return environment


def _plan_table(run: Path, config: Config, environment: Mapping[str, Any], records: Records) -> list[list[str]]:
    """Return planned and measured memory, FLOPs and disk space; settings of an untrusted run raise any exception."""
    if config.model.factory is not None:
        # planning would import the code that the run names
        raise ValueError(f"its network is code of the run's author, {config.model.factory}")
    world_size, device = environment["world_size"], str(environment.get("device", "cpu"))
    on_gpu = device != "cpu"
    bf16 = environment.get("dtype") == "bf16"
    planned = plan(config, world_size, on_gpu=on_gpu, bf16=bf16, images=configured_images(config))
    peak = environment.get(PLANNED_PEAK)
    if type(peak) is not int or not 0 < peak < 2**60:
        # of an older version, or damaged
        peak = planned.step_bytes
    tag = "memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"
    peaks = [record[tag] for record in records if record.get(tag) is not None]
    times = [record["speed/step_seconds"] for record in records if record.get("speed/step_seconds") is not None]
    seconds = float(np.median(times)) if times else 0.0
    rate = f"{significant(planned.flops_per_step / seconds / 1e12)} TFLOP/s" if seconds else ""
    return [
        ["", "planned", "measured"],
        [f"peak memory per rank, {device}", size(peak), size(max(peaks)) if peaks else ""],
        ["parameters of the backbone", f"{significant(planned.num_backbone_parameters / 1e6)} M", ""],
        ["parameters with heads", f"{significant(planned.num_parameters / 1e6)} M", ""],
        ["FLOPs of a step, all ranks", f"{significant(planned.flops_per_step / 1e12)} TFLOP", rate],
        ["step time, median", "", duration(seconds) if seconds else ""],
        ["disk space of all checkpoints", size(planned.disk_bytes), size(folder_bytes(run / CHECKPOINTS))],
    ]


def _evaluation_table(records: Records, baselines: KnownBaselines) -> list[list[str]]:
    """Return the baselines and the first, best and last value of each metric; without any, only the header row."""
    has_start, has_pixels = bool(baselines.start), bool(baselines.pixels)
    known = [*(["pixels"] if has_pixels else []), *([f"step {baselines.step}"] if has_start else [])]
    rows = [["", *known, "first", "best", "last"]]
    tags = dict.fromkeys(tag for record in records for tag in record if tag.startswith("eval/"))
    for tag in list(tags)[:MAX_ROWS]:
        values = [(record[tag], record["step"]) for record in records if record.get(tag) is not None]
        if values and tag not in ("eval/seconds", "eval/time_share", "eval/unusable_images"):
            shares = [baselines.pixels.get(tag)] if has_pixels else []
            shares += [baselines.start.get(tag)] if has_start else []
            # an error is no share, and best where it is lowest
            is_share = describe_tag(tag).unit in ("", "share")
            form = ".1%" if is_share else ".3f"
            cells = ["" if value is None else f"{value:{form}}" for value in shares]
            shown = (values[0], (max if is_share else min)(values), values[-1])
            rows.append(
                [tag.removeprefix("eval/"), *cells, *(f"{value:{form}} (step {step})" for value, step in shown)]
            )
    return rows


def _date(seconds: float) -> str:
    try:
        return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _tag_order(tag: str) -> tuple[int, str]:
    group = tag.partition("/")[0]
    return (list(_TOPICS).index(group) if group in _TOPICS else len(_TOPICS), tag)
