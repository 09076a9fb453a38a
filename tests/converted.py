"""States of a backbone in memory, under the names of any family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from streamtrain.interop.groups import find_groups
from streamtrain.interop.load_pretrained import BackboneFile
from streamtrain.interop.naming import combine
from streamtrain.interop.state_file import StateFile


def in_memory(state: Mapping[str, Tensor], path: str = "a file") -> BackboneFile:
    """Return ``state`` as open weights."""
    shapes = {name: value.shape for name, value in state.items()}
    return BackboneFile(StateFile(Path(path), shapes, list(shapes), state.__getitem__), tuple(find_groups(shapes)))


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the only backbone in ``state`` under streamtrain's names, without the empty tensor of no registers."""
    (group,) = find_groups(state)
    parts = {name: [state[part] for part in sources] for name, sources in group.sources.items()}
    combined = {name: combine(name, tensors, group.naming) for name, tensors in parts.items()}
    return {name: tensor for name, tensor in combined.items() if tensor.numel()}
