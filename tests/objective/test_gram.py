"""The Gram loss against whole similarity matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamtrain.objective.gram import GramTargets, gram_loss, resize_patches


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(student: Tensor, teacher: Tensor, chosen: Tensor, level: str, negatives: str) -> Tensor:
    """Return the mean squared difference of the cosines over pairs of chosen patches."""
    images = [(s[c], t[c]) for s, t, c in zip(student, teacher, chosen, strict=True)]
    if level == "batch":
        images = [(torch.cat([s for s, _ in images]), torch.cat([t for _, t in images]))]
    squares = []
    for s, t in images:
        s, t = (x / x.norm(dim=1, keepdim=True) for x in (s, t))
        ours, theirs = s @ s.T, t @ t.T
        if negatives != "keep":
            theirs = theirs.relu()
        if negatives == "drop":
            ours = ours.relu()
        squares.append((ours - theirs).square().flatten())
    return torch.cat(squares).mean()


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 4),
    patches=st.integers(2, 7),
    level=st.sampled_from(["image", "batch"]),
    negatives=st.sampled_from(["keep", "drop", "drop_teacher"]),
    tokens=st.sampled_from(["all", "masked", "unmasked"]),
    chunk_bytes=st.sampled_from([1, 100, 10**6]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient(
    images: int, patches: int, level: str, negatives: str, tokens: str, chunk_bytes: int, seed: int
) -> None:
    student, teacher = random(images, patches, 3, seed=seed).requires_grad_(), random(images, patches, 3, seed=seed + 1)
    mask = random(images, patches, seed=seed + 2) > 0
    mask[0, 0], mask[0, 1] = True, False
    chosen = {"all": torch.ones_like(mask), "masked": mask, "unmasked": ~mask}[tokens]
    expected = reference(student, teacher, chosen, level, negatives)
    targets = GramTargets(teacher, level, negatives, tokens, chunk_bytes)  # type: ignore[arg-type]
    got = targets(student, mask)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(2.0 * got, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(2.0 * expected, student)[0], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("level", ["image", "batch"])
def test_edges_in_bf16(level: str) -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for student, chosen in ((torch.zeros(2, 4, 3), None), (random(2, 4, 3), nothing), (1e4 * random(2, 4, 3), None)):
        student = student.bfloat16().requires_grad_()
        loss = gram_loss(student, random(2, 4, 3, seed=1).bfloat16(), chosen, level, "keep", 2**20)  # type: ignore[arg-type]
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert student.grad is not None and student.grad.isfinite().all()


def cubic(distance: float) -> float:
    """Evaluate Keys' cubic kernel with a = −0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_larger_teacher_crops_are_resized_bicubically() -> None:
    grid, target = (6, 4), (3, 2)
    patches = random(1, 24, 2)
    image = patches.float().reshape(6, 4, 2)
    expected = torch.zeros(3, 2, 2)
    for row in range(3):
        for column in range(2):
            y, x = (row + 0.5) * 2 - 0.5, (column + 0.5) * 2 - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = cubic(y - i) * cubic(x - j)
                    expected[row, column] += weight * image[min(max(i, 0), 5), min(max(j, 0), 3)]
    torch.testing.assert_close(resize_patches(patches.float(), grid, target)[0], expected.flatten(0, 1))
    assert resize_patches(patches, grid, grid) is patches
