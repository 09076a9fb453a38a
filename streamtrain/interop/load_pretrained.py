"""Starting from somebody's backbone: what of it fits, what does not, and a stop where it is another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamtrain.config.init import DEFAULT_MINIMUM
from streamtrain.errors import StreamtrainError
from streamtrain.interop.naming import QKV_BIAS, combine, convert, detect, find_origins
from streamtrain.interop.state_file import opened_state


@dataclass(frozen=True)
class ImportReport:
    """How a state fits a model: names of tensors, ours but for ``unexpected``."""

    matched: tuple[str, ...]
    # the source has no such tensor
    missing: tuple[str, ...]
    # the source's shape differs
    reshaped: tuple[str, ...]
    # of the source, without a place in the model
    unexpected: tuple[str, ...]
    # biases of a source that has none, which amount to 0
    zeroed: tuple[str, ...]

    @property
    def share(self) -> float:
        """Matched tensors (zeroed biases among them) of those the model has."""
        good = len(self.matched) + len(self.zeroed)
        return good / max(1, good + len(self.missing) + len(self.reshaped))

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"matched {len(self.matched)} tensors ({self.share:.1%} of the backbone's)"]
        for label in ("zeroed", "missing", "reshaped", "unexpected"):
            names = getattr(self, label)
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{label} {len(names)}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def import_backbone(
    state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], source: str, minimum: float = DEFAULT_MINIMUM
) -> tuple[dict[str, Tensor], ImportReport]:
    """The tensors of ``state`` (of any known family) that fit a backbone, under our names, and the report.

    Args:
        state: a backbone's tensors, heads or not.
        wanted: names and shapes of the backbone's parameters.
        source: where ``state`` is from, for the error.
        minimum: share of the wanted tensors that must match.

    Raises:
        StreamtrainError: if fewer do.
    """
    found, unexpected = convert(state, detect(state))
    biases = [name for name in wanted if name.endswith(QKV_BIAS)]
    zeroed = [] if any(name in found for name in biases) else biases
    # a model without registers still has a tensor for them, of no rows
    zeroed += [name for name, shape in wanted.items() if not shape.numel() and name not in found]
    matched = {name: found[name] for name, shape in wanted.items() if name in found and found[name].shape == shape}
    reshaped = [name for name in wanted if name in found and name not in matched]
    report = ImportReport(
        tuple(matched),
        tuple(name for name in wanted if name not in found and name not in zeroed),
        tuple(reshaped),
        tuple(unexpected + [name for name in found if name not in wanted]),
        tuple(zeroed),
    )
    if report.share < minimum:
        raise StreamtrainError(
            f"{source} fits this model to {report.share:.0%} only; choose the model section that belongs to it. "
            + "; ".join(report.text().splitlines())
        )
    return {**matched, **{name: torch.zeros(wanted[name]) for name in zeroed}}, report


@contextmanager
def opened_backbone(
    path: Path, wanted: Mapping[str, torch.Size], minimum: float = DEFAULT_MINIMUM
) -> Iterator[tuple[Callable[[str], Tensor | None], ImportReport]]:
    """As ``import_backbone`` for weights on disk, of which each tensor is read only when it is asked for.

    Yields a function from one of our names to its tensor (None where the weights do not provide it), and the report.

    Raises:
        StreamtrainError: if the weights cannot be read, or fewer than ``minimum`` of the wanted tensors match.
    """
    with opened_state(path) as file:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        found, report = import_backbone(shapes, wanted, str(path), minimum)
        naming = detect(shapes)
        origins, _ = find_origins(shapes, naming)

        def read(name: str) -> Tensor | None:
            if name not in found:
                return None
            if name in report.zeroed:
                return torch.zeros(wanted[name])
            return combine(name, [file.read(origin) for origin in origins[name]], naming).float()

        yield read, report
