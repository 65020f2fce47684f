"""Learning-rate laws as pure functions of the position in tokens."""

from disttrain.schedule.learning_rate import SHAPES, Shape, lr_factor

__all__ = ["SHAPES", "Shape", "lr_factor"]
