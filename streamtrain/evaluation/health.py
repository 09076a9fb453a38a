"""A verdict on the health of a run from its metrics, as a table of rules. Torch-free.

The bounds were chosen on short runs with and without faults; docs/monitoring.md has the verdicts on other runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from streamtrain.config.tree import Config
from streamtrain.evaluation.verdict import Finding

Records = Sequence[Mapping[str, Any]]
USED_TAGS = (
    "step", "loss/global", "loss/patch", "optim/gradient_norm", "optim/skipped_steps", "teacher/temperature",
    "teacher/entropy", "teacher/prototype_usage", "features/rank", "features/std", "data/pixel_mean", "data/pixel_std",
    "data/pixel_structure", "data/view_correlation",
)  # fmt: skip
# measurements of the collapse metrics, below which only the inputs are judged, and the last ones that are averaged
MIN_MEASURED, _LAST = 4, 3
# share of log(prototypes) below which assignments are sharp
_SHARP = 0.15
# features/std from which the features of a new network differ enough to judge their assignments
_DISTINCT = 0.3
# features/std from which the features span a number of dimensions, and the possible dimensions that make few a fault
_SPREAD, _MIN_RANGE = 0.25, 16
# values that have risen by more than this factor over the last measurements belong to features that still form
_RISING = 1.2
# the latest steps whose gradient norms are compared
_NORMS = 1000


@dataclass(frozen=True)
class HealthFinding(Finding):
    """A finding with the name of its rule."""

    verdict: str = "healthy"


@dataclass(frozen=True)
class Bound:
    """A fact outside ``low`` to ``high`` is a reason for the verdict; ``text`` has a place for the value."""

    fact: str
    text: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Rule:
    """A verdict, for which any of the bounds suffices."""

    verdict: str
    title: str
    bounds: Sequence[Bound]
    advice: str
    is_fault: bool = True
    # from the first measurement on
    is_early: bool = False


# The first rule with a reason is the verdict.
RULES = (
    Rule(
        "inputs",
        "The images or their normalisation look wrong",
        (
            Bound("pixel_mean", "the normalised pixels have the mean {:.3g} (data/pixel_mean), not about 0", -1.5, 1.5),
            Bound("pixel_std", "the normalised pixels have the standard deviation {:.3g} (data/pixel_std), not about 1",
                  0.4, 2.5),
            Bound("structure", "pixels at a distance are not correlated: {:.3f} (data/pixel_structure)", low=0.12),
            Bound("structure", "the images have no detail: data/pixel_structure is {:.3f}", high=0.995),
            Bound("views", "two views of an image differ as much as two images: data/view_correlation is {:.2f}",
                  low=0.1),
        ),
        "Look at the panel data/crops, and at the images of data.shards; crops.mean and crops.std may be from_set.",
        is_early=True,
    ),
    Rule(
        "entropy collapse",
        "Collapse of the assignments",
        (
            Bound("entropy", "all images have the same assignment: teacher/entropy is at {:.2%} of log(prototypes)",
                  high=0.997),
            Bound("entropy", "the teacher assigns all images to one prototype: teacher/entropy is at {:.2%} of "
                  "log(prototypes)", low=0.01),
            Bound("usage", "the assignments are sharp and use few prototypes: teacher/prototype_usage is {:.1%}",
                  low=0.1),
        ),
        "Near 100 %, lower schedules.teacher_temperature; near 0, raise it, or use objective.centering: sinkhorn.",
    ),
    Rule(
        "rank collapse",
        "Collapse of the features",
        (
            Bound("rank", "the features span few dimensions: features/rank is at {:.1%} of its range", low=0.05),
            Bound("dimensions", "the features of the images differ, but span few dimensions: features/rank is {:.1f}",
                  low=5.0),
            Bound("std", "the features of all images are nearly equal: features/std is {:.2f}", low=0.1),
        ),
        "Lower schedules.lr, raise objective.koleo.weight, or lengthen schedules.freeze_last_layer.",
    ),
    Rule(
        "learning rate",
        "The learning rate looks too high",
        (
            Bound("rank_kept", "the rank of the features fell to {:.0%} of its first value (features/rank)", low=0.75),
            Bound("gradient_peak", "the gradient norm rose to {:.0f} times its median after the warm-up "
                  "(optim/gradient_norm)", high=10.0),
            Bound("skipped", "{:.1%} of the steps were skipped as non-finite (optim/skipped_steps)", high=0.01),
        ),
        "Lower schedules.lr.peak, for example to a third, or lengthen its warmup.",
    ),
    Rule(
        "schedule",
        "The loss rises with the teacher's temperature, as expected",
        (Bound("loss_rise", "the loss rose by {:.1%} since its minimum, while teacher/temperature rose", high=0.01),),
        "This is no fault: warmer targets have a higher entropy. Judge the run by its evaluation.",
        is_fault=False,
    ),
)  # fmt: skip


def judge_health(records: Records, config: Config | None) -> HealthFinding:
    """Return the verdict of the first rule in ``RULES`` with a reason, or that the run is healthy or too short.

    Args:
        records: of ``metrics.jsonl``, at least one.
        config: of the run; None if it cannot be read, which leaves out the facts that need it.
    """
    facts = collect_facts(records, config)
    is_short = facts.get("measured", 0) < MIN_MEASURED
    for rule in RULES:
        if is_short and not rule.is_early:
            continue
        reasons = [
            bound.text.format(facts[bound.fact])
            for bound in rule.bounds
            if bound.fact in facts and not bound.low <= facts[bound.fact] <= bound.high
        ]
        if reasons:
            text = f"{'; '.join(reasons)}. {rule.advice}"
            return HealthFinding(
                "bad" if rule.is_fault else "good", rule.title, text[0].upper() + text[1:], rule.verdict
            )
    if is_short:
        return HealthFinding(
            "open", "Too early to judge the run's health",
            f"The collapse metrics were measured {facts.get('measured', 0):.0f} of the {MIN_MEASURED} times that a "
            "verdict needs; monitor.collapse.every sets how often.", "too early",
        )  # fmt: skip
    known = "; ".join(f"{name} {facts[fact]:{form}}" for fact, name, form in _SHOWN if fact in facts)
    text = f"At the end: {known}." if known else "Few metrics were logged."
    return HealthFinding("good", "No fault is visible in the metrics", text, "healthy")


_SHOWN = (
    ("entropy", "teacher/entropy at", ".0%"), ("rank", "features/rank at", ".0%"), ("std", "features/std", ".2f"),
    ("gradient_peak", "largest gradient norm in units of the median", ".1f"),
)  # fmt: skip


def collect_facts(records: Records, config: Config | None) -> dict[str, float]:
    """Return the numbers that the rules compare, by name; a number without records is missing."""

    def values(tag: str) -> list[float]:
        return [value for record in records if (value := record.get(tag)) is not None]

    last_step = records[-1]["step"]
    ranks, spreads, entropies, usages = (
        values(tag) for tag in ("features/rank", "features/std", "teacher/entropy", "teacher/prototype_usage")
    )
    facts: dict[str, float] = {"measured": len(spreads)}
    for name, tag in (("pixel_mean", "data/pixel_mean"), ("pixel_std", "data/pixel_std"),
                      ("structure", "data/pixel_structure")):  # fmt: skip
        if found := values(tag):
            facts[name] = median(found)
    # a single value has a standard error of about 0.15
    if len(found := values("data/view_correlation")) >= MIN_MEASURED:
        facts["views"] = mean(found)
    if skipped := values("optim/skipped_steps"):
        facts["skipped"] = max(skipped) / max(last_step, 1)
    if config is not None:
        facts |= _facts_with_bounds(ranks, spreads, entropies, usages, config, last_step)
        if ranks and config.init.weights is None:
            # on images of another kind, a trained network may keep fewer dimensions
            facts["rank_kept"] = median(sorted(ranks)[:2]) / max(ranks[0], 1.0)
        warmup = config.schedules.lr.delay + config.schedules.lr.warmup
        late = (record for record in records if record["step"] > 2 * warmup)
        norms = sorted([value for record in late if (value := record.get("optim/gradient_norm"))][-_NORMS:])
        if len(norms) >= 20:
            # of many steps, some have a large gradient in healthy runs too
            facts["gradient_peak"] = norms[-1 - len(norms) // 200] / median(norms)
    if (rise := _loss_rise(records)) is not None:
        facts["loss_rise"] = rise
    return facts


def _facts_with_bounds(
    ranks: list[float], spreads: list[float], entropies: list[float], usages: list[float], config: Config,
    last_step: int,
) -> dict[str, float]:  # fmt: skip
    """Return the shares of the possible values, as far as they may be judged.

    A new network may have equal features for all images, so before ``monitor.collapse.start`` a low value counts only
    after it was within its bounds, and unless it rises.
    """
    collapse, facts = config.monitor.collapse, {}
    is_late = last_step >= collapse.start
    most = min(collapse.images, config.data.global_batch or config.data.micro_batch, config.model.dim)
    spread = median(spreads[-_LAST:]) if spreads else 0.0
    is_forming = spread < collapse.min_std and _is_rising(spreads)
    if spreads and (is_late or (max(spreads) >= collapse.min_std and not is_forming)):
        facts["std"] = spread
    shares = [(rank - 1) / (most - 1) for rank in ranks] if most > 1 else []
    if shares and (is_late or (max(shares) >= collapse.min_rank and not _is_rising(ranks))):
        facts["rank"] = median(shares[-_LAST:])
    # at any step: unlike nearly equal features, these do not belong to a new network
    if ranks and most >= _MIN_RANGE and facts.get("std", 0.0) >= _SPREAD and not _is_rising(ranks):
        facts["dimensions"] = median(ranks[-_LAST:])
    prototypes = config.objective.global_loss.head.prototypes
    # equal features have equal assignments, which says nothing about the temperature
    if entropies and prototypes > 1 and (is_late or facts.get("std", 0.0) >= _DISTINCT):
        facts["entropy"] = median(entropies[-_LAST:]) / math.log(prototypes)
        # broad assignments have few nearest prototypes in healthy runs too
        if usages and facts["entropy"] < _SHARP:
            facts["usage"] = median(usages[-_LAST:])
    return facts


def _is_rising(values: list[float]) -> bool:
    last = values[-_LAST:]
    return bool(last) and last[-1] > _RISING * last[0]


def _loss_rise(records: Records) -> float | None:
    """Return the relative rise of the loss since its smoothed minimum; None if the temperature did not rise too."""
    rises = []
    for tag in ("loss/global", "loss/patch"):
        pairs = [
            (record[tag], record["teacher/temperature"])
            for record in records
            if record.get(tag) is not None and record.get("teacher/temperature") is not None
        ]
        if len(pairs) < 20:
            continue
        width = len(pairs) // 10
        smooth = [
            (median(pair[0] for pair in pairs[at : at + width]), pairs[at][1])
            for at in range(0, len(pairs) - width + 1, width)
        ]
        low = min(smooth)
        if smooth[-1][1] > 1.05 * low[1] and low[0] > 0:
            rises.append(smooth[-1][0] / low[0] - 1)
    return max(rises, default=None)
