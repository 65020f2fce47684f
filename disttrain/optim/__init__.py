"""Optimizers, parameter groups and clipping on sharded parameters."""

from disttrain.optim.build import build_optimizer, set_learning_rate
from disttrain.optim.clip import GradientNorms, dist_clip_gradients
from disttrain.optim.loss_scale import LossScale
from disttrain.optim.matrix_optimizer import MatrixOptimizer, matrix_optimizer
from disttrain.optim.optimizer_set import OptimizerSet

__all__ = [
    "GradientNorms",
    "LossScale",
    "MatrixOptimizer",
    "OptimizerSet",
    "build_optimizer",
    "dist_clip_gradients",
    "matrix_optimizer",
    "set_learning_rate",
]
