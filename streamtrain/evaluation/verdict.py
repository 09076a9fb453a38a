"""A verdict in words on the metrics of a run: whether it learned, whether it was stable. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.format.files import read_json
from shards.format.set_manifest import counted
from streamtrain.evaluation.uncertainty import accuracy_margin, difference_margin
from streamtrain.run.directory import BASELINES_NAME
from streamtrain.run.messages import describe_drift
from streamtrain.run.tags import HEADLINES, describe_tag

Records = Sequence[Mapping[str, Any]]
# number of collapse metrics out of bounds
_COLLAPSE_TAG = "watch/collapse"
# share of the start's kNN accuracy below which a continued network counts as lost, and a fall that may be chance
_KEPT_SHARE, _KEPT_MARGIN = 0.9, 0.02


@dataclass(frozen=True)
class KnownBaselines:
    """Content of ``baselines.json``: values in 0..1 by tag, and the number of test images (0: unknown).

    Attributes:
        images: what identifies each set of images; without an entry that is not known.
        step: completed steps at the start, above 0 after ``--resume``.
        is_trained: whether the starting network was trained; None: not known.
    """

    start: Mapping[str, float] = field(default_factory=dict)
    pixels: Mapping[str, float] = field(default_factory=dict)
    test_images: int = 0
    images: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    is_trained: bool | None = None


@dataclass(frozen=True)
class Finding:
    """One sentence or two about a run; ``kind`` chooses the colour of its mark."""

    kind: Literal["good", "bad", "open"]
    title: str
    text: str


def read_baselines(run: Path) -> KnownBaselines:
    """Read a run's baselines; without a sound file they are unknown."""
    try:
        content = read_json(run / BASELINES_NAME)
        start, pixels = (
            {str(tag): float(value) for tag, value in content[name].items() if 0 <= value <= _largest(tag)}
            for name in ("start", "pixels")
        )
        count = content["test_images"]
        images = {str(name): str(value) for name, value in content.get("images", {}).items()}
        step, is_trained = content.get("step"), content.get("is_trained")
        return KnownBaselines(
            start, pixels, _count(count), images, _count(step), is_trained if isinstance(is_trained, bool) else None
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return KnownBaselines()


def _largest(tag: str) -> float:
    """Return the largest sound value of a metric; all but errors are shares."""
    return 1e9 if describe_tag(tag).unit not in ("", "share") else 1.0


def _count(value: object) -> int:
    return value if type(value) is int and 0 < value < 2**40 else 0


def headline_tag(records: Records, best: str | None) -> str | None:
    """Return the tag of the most telling evaluation that the run logged; ``best``: of ``evaluation.best``."""
    candidates = ([f"eval/{best}"] if best else []) + list(HEADLINES)
    logged = {tag for record in records for tag in record if record[tag] is not None}
    return next((tag for tag in candidates if tag in logged), None)


def image_count(tag: str, baselines: KnownBaselines) -> int:
    """Return the number of images whose share ``tag`` is; 0 if unknown, or if it counts patches or pixels."""
    return baselines.test_images if tag in ("eval/knn_10", "eval/knn_20", "eval/linear") else 0


def judge_learning(records: Records, tag: str | None, baselines: KnownBaselines, start_name: str) -> Finding:
    """Compare the last evaluation with the starting network, named ``start_name``, and with the pixels."""
    if tag is None:
        return Finding(
            "open", "Learning was not measured",
            "The run has no evaluation, and a falling loss alone does not show that the features improve. Set "
            "evaluation.train to a labelled set, and evaluation.every to fewer steps than the run has.",
        )  # fmt: skip
    values = [(record["step"], record[tag]) for record in records if record.get(tag) is not None]
    step, last = values[-1]
    start, pixels = baselines.start.get(tag), baselines.pixels.get(tag)
    count, name = image_count(tag, baselines), describe_tag(tag).title
    reached = f"{name} is {last:.1%}{f' ± {accuracy_margin(last, count):.1%}' if count else ''} at step {step:,}"
    if start is None:
        first_step, first = values[0]
        since = f"; the first evaluation, at step {first_step:,}, gave {first:.1%}" if len(values) > 1 else ""
        return Finding("open", "No baseline", f"{reached}{since}. The starting network was not evaluated.")

    def margin(other: float) -> float:
        return difference_margin(last, other, count) if count else 0.0

    others = [f"{start:.1%} for the {start_name} network"] + (
        [f"{pixels:.1%} for pixels"] if pixels is not None else []
    )
    text = f"{reached}, against {' and '.join(others)}"
    if count:
        text += f" ({count:,} test images; differences below {100 * margin(start):.1f} points may be chance)"
    if last < start - margin(start):
        kind, title = "bad", f"Worse than the {start_name} network"
    elif last <= start + margin(start):
        kind, title = "open", f"No measurable difference from the {start_name} network"
        text += ". More steps or more test images would tell"
    elif pixels is not None and last <= pixels + margin(pixels):
        kind, title = "open", f"Better than the {start_name} network, but not than pixels"
    else:
        kind, title = "good", "It learned"
    return Finding(kind, title, f"{text}.")  # type: ignore[arg-type]


def judge_drift(records: Records, baselines: KnownBaselines) -> Finding | None:
    """Compare the last evaluation with the weights that the run started from; None if that was not measured."""
    last = next((record for record in reversed(records) if any(tag.startswith("drift/") for tag in record)), None)
    values = {tag: value for tag, value in (last or {}).items() if isinstance(value, float)}
    if last is None or (text := describe_drift(values)) is None:
        return None
    text = text[0].upper() + text[1:]
    # the reference, if there is one, has none of the images that the run trains on
    prefix = "reference/" if "drift/reference/knn_20" in values else ""
    value, change = values.get(f"{prefix or 'eval/'}knn_20"), values.get(f"drift/{prefix}knn_20")
    if value is None or change is None:
        return Finding("open", "Distance from the starting network", f"{text}. Without labels, only you can judge it.")
    if value < _KEPT_SHARE * (value - change):
        return Finding(
            "bad",
            "Much of the starting network is lost",
            f"{text}. Raise objective.anchor.weight, or lower schedules.lr.",
        )
    count = 0 if prefix else baselines.test_images
    is_kept = change >= -(difference_margin(value, value - change, count) if count else _KEPT_MARGIN)
    return Finding("good" if is_kept else "open", "The starting network is kept" if is_kept else
                   "Some of the starting network is lost", f"{text}.")  # fmt: skip


def judge_stability(records: Records, warnings: Sequence[tuple[int, str]] | None) -> Finding:
    """Say whether steps were skipped and whether the run warned; ``warnings``: None if they were not kept."""
    skipped = max((record.get("optim/skipped_steps") or 0 for record in records), default=0)
    measured = [(record["step"], record[_COLLAPSE_TAG]) for record in records if record.get(_COLLAPSE_TAG) is not None]
    collapse = [step for step, count in measured if count > 0]
    if records[-1].get("loss/total", 0.0) is None:
        return Finding("bad", "Diverged", "The loss of the last step is not finite.")
    parts = [f"{skipped:,.0f} steps were skipped as non-finite" if skipped else "No step was skipped as non-finite"]
    if collapse:
        parts.append(f"the features may be collapsing since step {collapse[0]:,}")
        below = " See the warnings below." if warnings else ""
        return Finding("bad", "Signs of collapse", f"{'; '.join(parts)}.{below}")
    if warnings is None:
        parts.append("warnings are only in the run's log, because it has no TensorBoard files")
    elif warnings:
        listed = f"{counted(len(warnings), 'warning')}, listed below"
        # runs of earlier versions did not record it
        parts.append(f"{listed}; none of a collapse" if measured else listed)
    else:
        parts.append("no warning of a collapse or of a sudden loss")
    kind: Literal["good", "open"] = "open" if skipped or warnings else "good"
    return Finding(kind, "Stable" if kind == "good" else "Completed with warnings", f"{'; '.join(parts)}.")
