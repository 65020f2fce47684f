"""What ranks do in test_update_size.py."""

from __future__ import annotations

import torch
from torch import Tensor

from disttrain.config.parallel import ParallelConfig
from disttrain.monitor import MetricBuffer
from disttrain.optim.update_size import UpdateSizes
from disttrain.testing.optimizer_parity import STRATEGIES, Toys, drawn_gradients
from disttrain.testing.parity import gather_whole

CPU = torch.device("cpu")


def sizes(rank: int, world: int, strategy: str, elements: int) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Means of squares of weights and updates by group as a row has them, and the weights before and after."""
    toys = Toys(world, CPU, ParallelConfig(**STRATEGIES[strategy]))
    named = dict(toys.named_parameters())
    # A mean of squares per parameter, and of all of them in one group.
    groups = [*({"params": [p]} for p in named.values()), {"params": list(named.values())}]
    names = [*named, "all"]
    toys.set_gradients(drawn_gradients(0))
    before, measured = gather_whole(named), UpdateSizes(groups, elements)
    measured.before()
    torch.optim.SGD(named.values(), lr=0.1).step()
    buffer = MetricBuffer({f"{kind}/{n}": "mean" for n in names for kind in ("update", "weights")}, CPU)
    for name, (updates, weights, count) in zip(names, measured.after(), strict=True):
        buffer.add(f"update/{name}", updates, count)
        buffer.add(f"weights/{name}", weights, count)
    return buffer.reduce().values, [before, gather_whole(named)]
