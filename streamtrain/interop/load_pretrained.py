"""Load pretrained backbone weights: report mismatches, fail below a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamtrain.config.init import DEFAULT_MINIMUM
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import open_state
from streamtrain.interop.naming import QKV_BIAS, combine, convert, detect_naming, match_names


@dataclass(frozen=True)
class MatchReport:
    """How pretrained weights match a backbone: streamtrain's tensor names, except in ``unexpected``."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    # of another shape in the weights
    reshaped: tuple[str, ...]
    # names in the weights without a counterpart in the backbone
    unexpected: tuple[str, ...]
    # biases set to 0, because the weights have none of them
    zeroed: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the share of the backbone's tensors that are matched or zeroed."""
        good = len(self.matched) + len(self.zeroed)
        return good / max(1, good + len(self.missing) + len(self.reshaped))

    def text(self) -> str:
        """Return the report as a few lines."""
        lines = [f"matched {len(self.matched)} tensors ({self.share:.1%} of the backbone's)"]
        for label in ("zeroed", "missing", "reshaped", "unexpected"):
            names = getattr(self, label)
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{label} {len(names)}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def match_backbone(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str, minimum: float = DEFAULT_MINIMUM
) -> tuple[dict[str, Tensor], MatchReport]:
    """Return the tensors of ``state`` that match a backbone, under streamtrain's names, and a report.

    Args:
        state: tensors of a backbone of any known family, with or without heads.
        expected: names and shapes of the backbone's parameters.
        source: of ``state``, for errors.
        minimum: smallest accepted share of matching tensors.

    Raises:
        StreamtrainError: if fewer tensors match.
    """
    converted, unexpected = convert(state, detect_naming(state))
    biases = [name for name in expected if name.endswith(QKV_BIAS)]
    zeroed = [] if any(name in converted for name in biases) else biases
    # a model without registers still has an empty tensor for them
    zeroed += [name for name, shape in expected.items() if not shape.numel() and name not in converted]
    present = [name for name in expected if name in converted]
    matched = {name: converted[name] for name in present if converted[name].shape == expected[name]}
    report = MatchReport(
        matched=tuple(matched),
        missing=tuple(name for name in expected if name not in converted and name not in zeroed),
        reshaped=tuple(name for name in present if name not in matched),
        unexpected=tuple(unexpected + [name for name in converted if name not in expected]),
        zeroed=tuple(zeroed),
    )
    if report.share < minimum:
        raise StreamtrainError(
            f"{source} matches only {report.share:.0%} of this model; set the model section to its architecture. "
            + "; ".join(report.text().splitlines())
        )
    return {**matched, **{name: torch.zeros(expected[name]) for name in zeroed}}, report


@contextmanager
def load_pretrained_backbone(
    path: Path, expected: Mapping[str, torch.Size], minimum: float = DEFAULT_MINIMUM
) -> Iterator[tuple[Callable[[str], Tensor | None], MatchReport]]:
    """Open pretrained weights and match them to a backbone like ``match_backbone``, without reading the tensors.

    Yields:
        A function that reads the tensor of one parameter (None if the weights lack it), and the report.

    Raises:
        StreamtrainError: if the weights cannot be read, or a smaller share than ``minimum`` matches.
    """
    with open_state(path) as file:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        matched, report = match_backbone(shapes, expected, str(path), minimum)
        naming = detect_naming(shapes)
        sources, _ = match_names(shapes, naming)

        def read(name: str) -> Tensor | None:
            if name not in matched:
                return None
            if name in report.zeroed:
                return torch.zeros(expected[name])
            return combine(name, [file.read(source) for source in sources[name]], naming).float()

        yield read, report
