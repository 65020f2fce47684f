"""What the rank pool runs for the metrics."""

import torch
from torch.distributed.tensor.debug import CommDebugMode

from disttrain.monitor import MetricBuffer


def metrics(rank: int, world: int) -> tuple[dict[str, float], dict[str, float], dict[str, float], int]:
    """Reductions after two rounds of calls and after none, and the number of collectives of the first."""
    buffer = MetricBuffer({"tokens": "sum", "slowest": "max", "loss": "sum"}, torch.device("cpu"))
    for value in (1, 2, 3):
        buffer.add("tokens", value + 10 * rank)
        buffer.add("slowest", -float(value) - rank)
        buffer.add("loss", torch.tensor(0.1, requires_grad=True))
    with CommDebugMode() as calls:
        first = buffer.reduce()
    buffer.add("slowest", rank)
    return first, buffer.reduce(), buffer.reduce(), calls.get_total_counts()
