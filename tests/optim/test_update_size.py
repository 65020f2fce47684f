"""Root mean squares of weights and updates: the same on every layout, of all elements or of a sample of rows."""

import math

import pytest
import torch
from torch import Tensor

from disttrain.testing import RankPool
from disttrain.testing.optimizer_parity import STRATEGIES


def rows_of(tensor: Tensor, elements: int) -> Tensor:
    """A plain account of the sample: every n-th row from the first, n so that about `elements` remain."""
    if not tensor.dim():
        return tensor
    distance = min(len(tensor), max(1, math.ceil(tensor.numel() / elements)))
    return torch.stack([row for index, row in enumerate(tensor) if index % distance == 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("elements", [65_536, 12])
@pytest.mark.parametrize("world", [2, 4])
def test_sizes_do_not_depend_on_the_layout(pool: RankPool, world: int, strategy: str, elements: int) -> None:
    for values, (before, after) in pool.run("tests.optim.size_jobs:sizes", world, strategy=strategy, elements=elements):
        samples = {n: (rows_of(before[n], elements), rows_of(after[n], elements)) for n in before}
        pairs = {**samples, "all": tuple(torch.cat([pair[i].flatten() for pair in samples.values()]) for i in (0, 1))}
        for name, (old, new) in pairs.items():
            assert values[f"weights/{name}"] == pytest.approx(old.square().mean().item(), rel=1e-12), name
            assert values[f"update/{name}"] == pytest.approx((new - old).square().mean().item(), rel=1e-12), name
