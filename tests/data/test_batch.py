"""Normalising crops."""

from __future__ import annotations

import pytest
import torch

from streamtrain.data.batch import normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise_matches_the_formula_in_float64(dtype: torch.dtype) -> None:
    crops = torch.arange(2 * 4 * 5 * 3).to(torch.uint8).view(2, 4, 5, 3)
    expected = ((crops.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    result = normalise(crops, MEAN, STD, dtype)
    assert result.dtype == dtype and result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_normalise_accepts_zero_crops() -> None:
    assert normalise(torch.empty(0, 8, 8, 3, dtype=torch.uint8), MEAN, STD, torch.float32).shape == (0, 3, 8, 8)
