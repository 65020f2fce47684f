"""What the rank pool runs for the metrics."""

from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode

from disttrain.monitor import Bins, Last, MetricBuffer

KINDS = {
    "tokens": "sum",
    "slowest": "max",
    "loss": "sum",
    "mean": "mean",
    "times": Bins(1e-2, 1e2, per_decade=1),
    "steps": Last(3),
}


def metrics(rank: int, world: int) -> tuple[list[Any], int]:
    """Reductions after two rounds of calls and after none, and the number of collectives of the first."""
    buffer = MetricBuffer(KINDS, torch.device("cpu"))
    for value in (1, 2, 3):
        buffer.add("tokens", value + 10 * rank)
        buffer.add("slowest", -float(value) - rank)
        buffer.add("loss", torch.tensor(0.1, requires_grad=True))
        # Rank 0 has no tokens at all.
        buffer.add("mean", torch.tensor(5.0 * rank * value), weight=rank * value)
    buffer.add("times", torch.tensor([0.001, 0.5, 0.5, 1e5]))
    buffer.add("times", 2.0 + rank)
    buffer.add("steps", torch.tensor([1.0, 2.0]) + 10 * rank)
    with CommDebugMode() as calls:
        first = buffer.reduce()
    buffer.add("slowest", rank)
    for number in range(5):
        buffer.add("steps", float(number - rank))
    buffer.add("slowest", torch.tensor(rank - 0.5))
    return [first, buffer.reduce(), buffer.reduce()], calls.get_total_counts()
