from __future__ import annotations

import torch

from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.usage import prototype_mass


def test_mass_is_the_mean_softmax_times_the_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 5, generator=generator), torch.randn(200, 5, generator=generator)
    # chunks of 64 prototypes
    mass = prototype_mass(features, PlainWeight(weight), 0.5, chunk_bytes=4 * 7 * 64)
    expected = (features @ weight.T / 0.5).softmax(1).mean(0) * 200
    torch.testing.assert_close(mass, expected)
