from __future__ import annotations

import re

from ranks import ROOT

from streamtrain.run.tags import TAGS, describe_tag


def test_every_documented_scalar_has_a_title_and_a_description() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    scalars = page[page.index("## Scalars") : page.index("## TensorBoard")]
    documented = set(re.findall(r"`([a-z]+/[a-z_0-9/]+)`", scalars))
    assert set(TAGS) == documented
    titles = [tag.title for tag in TAGS.values()]
    assert len(set(titles)) == len(titles) and all(tag.description.endswith(".") for tag in TAGS.values())


def test_an_unknown_tag_is_its_own_title() -> None:
    assert describe_tag("own/tag").title == "own/tag" and describe_tag("own/tag").text == ""
