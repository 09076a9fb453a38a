"""Load pretrained backbone weights of a known family: choose the network, report mismatches, refuse other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shards.format.set_manifest import counted
from streamtrain.config.init import DEFAULT_MINIMUM
from streamtrain.errors import StreamtrainError
from streamtrain.interop.groups import Group, find_groups, find_position_embedding, unmatched_names
from streamtrain.interop.naming import DINOV3, QKV_BIAS, combine
from streamtrain.interop.patch_embedding import PROJECTION, RgbAdaptation
from streamtrain.interop.state_file import StateFile, describe_names, open_state, readable

# larger values are refused as damaged; released weights stay below 1000
MAX_VALUE = 1e4
# most backbones in one file
MAX_NETWORKS = 50
# if one of these tensors is 0 throughout, the file was never completely written
_NEVER_ZERO = ("norm.weight", "norm1.weight", "norm2.weight", "qkv.weight", PROJECTION)


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
    # the chosen network of the file and the others; parts that were left out
    notes: tuple[str, ...] = ()

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
                lines.append(f"{label} {len(names)}: {describe_names(names)}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class BackboneFile:
    """Open weights with at least one backbone."""

    state: StateFile
    groups: tuple[Group, ...]
    # None: weights and backbone must have the same channels
    adaptation: RgbAdaptation | None = None

    def preferred(self) -> Group:
        """Return the backbone of the preferred role.

        Raises:
            StreamtrainError: if several are equally preferred.
        """
        return _choose(self.state, self.groups)

    def refuse_positions(self, group: Group) -> None:
        """Raise StreamtrainError if the backbone has position embeddings, and so another architecture."""
        if (positions := find_position_embedding(self.state.shapes, group)) is not None:
            raise StreamtrainError(f"{self.state.path} {_describe_positions(positions)}")

    def shapes(self, group: Group, expected: Mapping[str, torch.Size] | None = None) -> dict[str, torch.Size]:
        """Return the shapes of a backbone's tensors under streamtrain's names, without those whose parts differ."""
        found = {}
        for name, parts in group.sources.items():
            shape = self._shape(group, name, parts, (expected or {}).get(name))
            if shape is not None:
                found[name] = shape
        return found

    def match(
        self, expected: Mapping[str, torch.Size], minimum: float
    ) -> tuple[Callable[[str], Tensor | None], MatchReport]:
        """Match the tensors to a backbone.

        Args:
            expected: names and shapes of the backbone's parameters.
            minimum: smallest accepted share of matching tensors; 0 also accepts another patch size or depth.

        Returns:
            A function that reads the tensor of one parameter (None if the weights lack it), and the report.

        Raises:
            StreamtrainError: if the weights are of another architecture or size, or several networks fit equally.
        """
        if any(names := [group.own_names(expected, self.state.shapes) for group in self.groups]):
            named = zip(self.groups, names, strict=True)
            groups = tuple(replace(group, sources={**group.sources, **own}) for group, own in named)
            return replace(self, groups=groups).match(expected, minimum)
        reports = {group.prefix: self._report(group, expected) for group in self.groups}
        faults = {each.prefix: self._fault(each, reports[each.prefix], expected, minimum) for each in self.groups}
        fitting = [each for each in self.groups if faults[each.prefix] is None]
        if not fitting:
            closest = max(self.groups, key=lambda each: (reports[each.prefix].share, -each.rank))
            others = "; also there: " + _titles(self.groups, closest) if len(self.groups) > 1 else ""
            raise StreamtrainError(f"{self.state.path} {faults[closest.prefix]}{others}")
        group = _choose(self.state, fitting)
        report = reports[group.prefix]
        rule = self.adaptation.rule if self.adaptation is not None and self.adaptation.is_needed else "refuse"
        if rule != "refuse" and not self._is_adapted(group, PROJECTION, expected[PROJECTION]):
            raise StreamtrainError(
                f"{self.state.path} has the channels of the images already, so init.channels={rule} has no effect; "
                "remove it"
            )

        def read(name: str) -> Tensor | None:
            if name in report.zeroed:
                return torch.zeros(expected[name])
            return self._read(group, name, expected[name]) if name in report.matched else None

        return read, report

    def _report(self, group: Group, expected: Mapping[str, torch.Size]) -> MatchReport:
        shapes, sources = self.shapes(group, expected), group.sources
        biases = [name for name in expected if name.endswith(QKV_BIAS)]
        zeroed = [] if any(name in sources for name in biases) else biases
        present = [name for name in expected if name in sources]
        matched = {name for name in present if shapes.get(name) == expected[name]}
        # transformers has an empty tensor for no registers
        empty = {name for name, shape in shapes.items() if not shape.numel()}
        notes = []
        if PROJECTION in matched and self._is_adapted(group, PROJECTION, expected[PROJECTION]):
            assert self.adaptation is not None
            notes.append(f"patch embedding: RGB to {self.adaptation.channels} channels ({self.adaptation.rule})")
        if group.prefix or len(self.groups) > 1:
            others = _titles(self.groups, group)
            notes.append(f"taken: {group.title}; also there: {others or 'no other backbone'}")
        is_cut = group.naming is DINOV3 and any(
            name in matched and expected[name] != self.state.shapes[group.sources[name][0]] for name in biases
        )
        if is_cut and not group.has_bias_mask(self.state.shapes):
            notes.append("left out: the key part of the biases; set model.key_bias=true if the weights use it")
        return MatchReport(
            matched=tuple(name for name in present if name in matched),
            missing=tuple(name for name in expected if name not in sources and name not in zeroed),
            reshaped=tuple(name for name in present if name not in matched),
            unexpected=(
                *unmatched_names(group, self.groups, self.state.shapes),
                *(name for name in sources if name not in expected and name not in empty),
            ),
            zeroed=tuple(zeroed),
            notes=tuple(notes),
        )

    def _fault(
        self, group: Group, report: MatchReport, expected: Mapping[str, torch.Size], minimum: float
    ) -> str | None:
        """Return why a backbone of the file cannot be this one, or None."""
        names = self.state.shapes
        positions = find_position_embedding(names, group)
        if positions is None and PROJECTION in report.missing:
            # the embedding may be outside the encoder that has the blocks
            positions = find_position_embedding(names)
        if positions is not None:
            return _describe_positions(positions)
        advice = "set the model section to its architecture"
        if minimum > 0:
            depth = len({name.split(".")[1] for name in expected if name.startswith("blocks.")})
            if group.depth != depth:
                blocks = "1 block" if group.depth == 1 else f"{group.depth} blocks"
                return f"has {blocks}, this model {depth}; {advice} (model.depth)"
            if PROJECTION in report.missing:
                return "has no patch embedding, so it is not the whole backbone"
            if PROJECTION in report.reshaped:
                shape = self.state.shapes[group.sources[PROJECTION][0]]
                adaptation = self.adaptation
                if adaptation is not None and adaptation.is_rgb(shape, expected[PROJECTION]):
                    count = counted(adaptation.channels, "channel")
                    rules = "repeat, mean or zero_extra" if adaptation.channels > 3 else "mean"
                    return (
                        f"is for RGB, but this model has {count}; to adapt its patch embedding, set init.channels to "
                        f"{rules}"
                    )
                return (
                    f"has a patch embedding of {list(shape)}, but this model needs "
                    f"{list(expected[PROJECTION])} (width, channels x patch_size²); {advice}"
                )
        masked = [name for name in report.reshaped if name.endswith(QKV_BIAS)]
        if masked and minimum > 0 and group.naming is DINOV3 and group.has_bias_mask(names):
            return "masks the key part of its biases, but this model has model.key_bias=true; set it to false"
        if report.share < minimum:
            text = "; ".join(report.text().splitlines())
            return f"matches only {report.share:.0%} of this model; {advice}. {text}"
        return None

    def _shape(self, group: Group, name: str, parts: list[str], expected: torch.Size | None) -> torch.Size | None:
        """Return the shape of streamtrain's tensor, or None if its parts do not fit together."""
        try:
            tensors = [torch.empty(self.state.shapes[part], device="meta") for part in parts]
            shape = combine(name, tensors, group.naming, self._keeps_key_bias(group, name, expected)).shape
            return expected if expected is not None and self._is_adapted(group, name, expected) else shape
        # sizes beyond 64 bits, too few dimensions, different widths
        except (RuntimeError, IndexError, ValueError, OverflowError, TypeError):
            return None

    def _is_adapted(self, group: Group, name: str, expected: torch.Size) -> bool:
        """Return whether a tensor is a patch embedding that becomes one for other channels when it is read."""
        adaptation = self.adaptation
        if adaptation is None or adaptation.rule == "refuse" or name != PROJECTION:
            return False
        return adaptation.is_rgb(self.state.shapes[group.sources[name][0]], expected)

    def _keeps_key_bias(self, group: Group, name: str, expected: torch.Size | None) -> bool:
        shapes = self.state.shapes
        is_fused = group.naming is DINOV3 and name.endswith(QKV_BIAS)
        return is_fused and shapes[group.sources[name][0]] == expected and not group.has_bias_mask(shapes)

    def _read(self, group: Group, name: str, expected: torch.Size) -> Tensor:
        parts = [self.state.read(part) for part in group.sources[name]]
        with readable(self.state.path):
            value = combine(name, parts, group.naming, self._keeps_key_bias(group, name, expected)).contiguous()
            check_values(value, f"{self.state.path} has {name}")
        if self._is_adapted(group, name, expected):
            assert self.adaptation is not None
            return self.adaptation.adapt(value)
        return value


def check_values(value: Tensor, where: str) -> None:
    """Raise StreamtrainError if a tensor has NaN, Inf or too large values, or only zeros where no network has them.

    ``where`` begins the message and ends with the tensor's name.
    """
    # max() propagates NaN
    largest = float(value.abs().max()) if value.numel() else 1.0
    if not largest <= MAX_VALUE:
        found = f"values up to {largest:.3g}" if largest > MAX_VALUE else "NaN"
        raise StreamtrainError(f"{where} with {found}; the weights are damaged or diverged; use other weights")
    if largest == 0 and where.endswith(_NEVER_ZERO):
        raise StreamtrainError(f"{where} with only zeros; the weights are damaged; use other weights")


@contextmanager
def open_backbone(path: Path) -> Iterator[BackboneFile]:
    """Open weights and find the backbones in them, without reading tensors.

    Raises:
        StreamtrainError: if the weights cannot be read, or have no tensors with the names of a known family.
    """
    with open_state(path) as state:
        groups = find_groups(state.shapes)
        if not groups:
            positions = find_position_embedding(state.shapes)
            if positions is not None:
                raise StreamtrainError(f"{path} {_describe_positions(positions)}")
            raise StreamtrainError(
                f"{path} has no vision transformer under the names of streamtrain, transformers, timm or DINOv3, but "
                f"{len(state.shapes):,} other tensors; it holds {describe_names(state.contents) or 'nothing'}"
            )
        if len(groups) > MAX_NETWORKS:
            raise StreamtrainError(f"{path} has {len(groups)} backbones, such as {groups[0].title}; save one alone")
        yield BackboneFile(state, tuple(groups))


@contextmanager
def load_pretrained_backbone(
    path: Path,
    expected: Mapping[str, torch.Size],
    minimum: float = DEFAULT_MINIMUM,
    setting: str | None = None,
    adaptation: RgbAdaptation | None = None,
) -> Iterator[tuple[Callable[[str], Tensor | None], MatchReport]]:
    """Open pretrained weights and match them to a backbone, without reading the tensors.

    Args:
        setting: key of the setting that names ``path``, for error messages.
        adaptation: of RGB weights to other channels; None refuses them.

    Yields:
        A function that reads the tensor of one parameter (None if the weights lack it), and the report.

    Raises:
        StreamtrainError: if the weights cannot be read, are of another architecture, or match by less than
            ``minimum``; when reading, if values are not finite.
    """
    with ExitStack() as stack:
        try:
            file = replace(stack.enter_context(open_backbone(path)), adaptation=adaptation)
            matched = file.match(expected, minimum)
        except StreamtrainError as error:
            raise error if setting is None else StreamtrainError(f"{setting}: {error}") from None
        yield matched


def _choose(state: StateFile, fitting: Sequence[Group]) -> Group:
    """Return the group of the preferred role; raises StreamtrainError if it is not the only one."""
    best = min(group.rank for group in fitting)
    chosen = [group for group in fitting if group.rank == best]
    if len(chosen) > 1:
        names = describe_names(each.title for each in chosen)
        raise StreamtrainError(
            f"{state.path} has {len(chosen)} backbones that fit equally: {names}; save one of them alone"
        )
    return chosen[0]


def _titles(groups: tuple[Group, ...], chosen: Group) -> str:
    return describe_names(group.title for group in groups if group is not chosen)


def _describe_positions(name: str) -> str:
    return (
        f"is of another architecture: it has position embeddings ({name}), as DINOv2, MAE and most ViTs have, and this "
        "model has RoPE in their place; use DINOv3 weights"
    )
