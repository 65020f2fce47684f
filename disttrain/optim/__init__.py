"""Optimizers, parameter groups and clipping on sharded parameters."""

from disttrain.optim.build import build_optimizer, set_learning_rate
from disttrain.optim.clip import GradientClipper, GradientNorms, dist_clip_gradients
from disttrain.optim.loss_scale import LossScale
from disttrain.optim.matrix_optimizer import MatrixOptimizer, matrix_optimizer
from disttrain.optim.optimizer_set import OptimizerSet
from disttrain.optim.qk_clip import AttentionLogits, QKClip
from disttrain.optim.safeguards import Safeguards, build_safeguards
from disttrain.optim.update_limit import UpdateLimit

__all__ = [
    "AttentionLogits",
    "GradientClipper",
    "GradientNorms",
    "LossScale",
    "MatrixOptimizer",
    "OptimizerSet",
    "QKClip",
    "Safeguards",
    "UpdateLimit",
    "build_optimizer",
    "build_safeguards",
    "dist_clip_gradients",
    "matrix_optimizer",
    "set_learning_rate",
]
