"""Learning rates and batch sizes as pure functions of the position in tokens."""

from disttrain.schedule.batch_law import Rule, Scaled, scale_by_batch
from disttrain.schedule.batch_ramp import BatchSchedule, BatchStage, constant_batch, doubling_ramp, linear_ramp
from disttrain.schedule.learning_rate import SHAPES, Cooldown, LrSchedule, Shape

__all__ = [
    "SHAPES",
    "BatchSchedule",
    "BatchStage",
    "Cooldown",
    "LrSchedule",
    "Rule",
    "Scaled",
    "Shape",
    "constant_batch",
    "doubling_ramp",
    "linear_ramp",
    "scale_by_batch",
]
