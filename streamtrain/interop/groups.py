"""Find the backbones among the tensors of a file, whatever they are nested in, and tell averages from students."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from streamtrain.interop.naming import BIAS_MASK, DINOV3, HF, NAMINGS, OWN, Naming, match_names

# Words in the names around a backbone, in order of preference. A plain teacher comes after an EMA, because the teacher
# of a distillation is another network than the one that was trained.
_ROLES: tuple[tuple[str, set[str]], ...] = (
    ("EMA", {"ema", "averaged", "average", "avg", "swa", "polyak", "shadow"}),
    ("teacher", {"teacher", "target", "momentum"}),
    ("", set()),
    ("student", {"student", "online"}),
    ("Gram teacher", {"gram"}),
)
# around tensors with a backbone's names and shapes, but other contents
_STATISTICS = re.compile(r"(?:.*[._])?(?:optim\w*|exp_avg\w*|momentum_buffer|grads?)[._].*", re.DOTALL)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# the two networks of MoCo
_MOCO = {"encoder_q": "student", "encoder_k": "teacher"}
# by any name that people give them; rotary ones are functions of the place, without weights
_POSITIONS = (
    r"(?!rope)(?:[a-z]+_)*(?:pos(?:ition(?:al)?)?_?(?:emb|enc|bias|table)\w*|pos(?:ition)?|rel(?:ative)?_pos\w*"
    r"|learned_pos|pe)(?:[._].*)?"
)
# in a backbone, not in another network beside it
_PARENTS = "(?:embeddings|patch_embed|embed|encoder|blocks|layers?|model|rel_pos_bias)"
_INNER_POSITIONS = re.compile(rf"(?:{_PARENTS}\.(?:.*\.)?)?{_POSITIONS}", re.DOTALL)
_ANY_POSITIONS = re.compile(rf"(?:.*\.)?{_POSITIONS}", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """One backbone in a file.

    Attributes:
        prefix: of its names; empty, or ends with a dot.
        sources: streamtrain's name of each tensor, and the full names that make it up.
    """

    prefix: str
    naming: Naming
    sources: Mapping[str, list[str]]

    @cached_property
    def rank(self) -> int:
        """The preference of the network's role; smaller is better."""
        if moco := next((role for name, role in _MOCO.items() if name in self.prefix.split(".")), None):
            return next(rank for rank, (role, _) in enumerate(_ROLES) if role == moco)
        words = {word.lower() for word in _WORD.findall(self.prefix)}
        ranks = [rank for rank, (_, marks) in enumerate(_ROLES) if marks & words]
        # a Gram teacher is called a teacher too, and the average of a student is an average
        return len(_ROLES) - 1 if len(_ROLES) - 1 in ranks else min(ranks, default=2)

    @property
    def title(self) -> str:
        """Where the network is in the file, its role and its size."""
        role = _ROLES[self.rank][0]
        count = f"{len(self.sources)} tensors"
        return f"{self.prefix.rstrip('.') or 'top level'} ({role}, {count})" if role else (
            f"{self.prefix.rstrip('.') or 'top level'} ({count})"
        )  # fmt: skip

    @property
    def depth(self) -> int:
        """The number of its blocks."""
        return len({name.split(".")[1] for name in self.sources if name.startswith("blocks.")})

    def own_names(self, expected: Collection[str], names: Collection[str]) -> dict[str, list[str]]:
        """Return the tensors of an export of streamtrain that only a network of ``model.factory`` has."""
        if self.naming is not OWN:
            return {}
        own = {name: f"{self.prefix}{name}" for name in expected if name not in self.sources}
        return {name: [source] for name, source in own.items() if source in names}

    def has_bias_mask(self, names: Collection[str]) -> bool:
        """Return whether the key part of its fused bias is masked."""
        return self.naming is not DINOV3 or f"{self.prefix}blocks.0.{BIAS_MASK}" in names


def find_groups(names: Collection[str]) -> list[Group]:
    """Return the backbones among tensor names; linear in their number."""
    groups: dict[str, Group] = {}
    for naming in NAMINGS:
        by_prefix: dict[str, dict[str, str]] = defaultdict(dict)
        pattern = _pattern(naming)
        for name in names:
            if match := pattern.fullmatch(name):
                by_prefix[match["prefix"]][match["inner"]] = name
        if naming is HF:
            _merge_live_blocks(by_prefix)
        for prefix, inner in by_prefix.items():
            sources = {name: [inner[part] for part in parts] for name, parts in match_names(inner, naming)}
            has_blocks = any(name.startswith("blocks.") for name in sources)
            if has_blocks and (prefix not in groups or len(sources) > len(groups[prefix].sources)):
                groups[prefix] = Group(prefix, naming, sources)
    return [group for group in groups.values() if not _STATISTICS.fullmatch(group.prefix)]


def unmatched_names(group: Group, groups: Collection[Group], names: Collection[str]) -> list[str]:
    """Return the names that belong to no backbone, except buffers of ``group``."""
    used = {part for each in groups for parts in each.sources.values() for part in parts}
    ignored = re.compile(group.naming.ignored)
    return [
        name
        for name in names
        if name not in used and not (name.startswith(group.prefix) and ignored.match(name[len(group.prefix) :]))
    ]


def find_position_embedding(names: Collection[str], group: Group | None = None) -> str | None:
    """Return the first position embedding of a backbone, or without one of any network in the file; None without any.

    Streamtrain's networks have RoPE instead, which is another function.
    """
    start, pattern = ("", _ANY_POSITIONS) if group is None else (group.prefix, _INNER_POSITIONS)
    return next((name for name in names if name.startswith(start) and pattern.fullmatch(name[len(start) :])), None)


def _pattern(naming: Naming) -> re.Pattern[str]:
    """Return a pattern of the family's names behind any prefix."""
    suffixes = {part for swiglu in (True, False) for parts in naming.suffixes(swiglu).values() for part in parts}
    within = "|".join(re.escape(suffix) for suffix in (*suffixes, *naming.bias))
    fixed = "|".join(re.escape(name) for name in naming.fixed.values())
    inner = rf"(?:{fixed}|{re.escape(naming.block)}\d{{1,6}}\.(?:{within}))"
    return re.compile(rf"(?P<prefix>(?:.*\.)?)(?P<inner>{inner})", re.DOTALL)


def _merge_live_blocks(by_prefix: dict[str, dict[str, str]]) -> None:
    """Move blocks below ``model.`` up: in memory, transformers has them one level deeper than in saved files."""
    for prefix in list(by_prefix):
        outer = prefix.removesuffix("model.")
        is_split = outer != prefix and outer in by_prefix and "embeddings.cls_token" not in by_prefix[prefix]
        if is_split and not any(name.startswith(HF.block) for name in by_prefix[outer]):
            by_prefix[outer] |= by_prefix.pop(prefix)
