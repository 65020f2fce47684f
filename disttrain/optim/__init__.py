"""Optimizers, parameter groups and clipping on sharded parameters."""

from disttrain.optim.build import build_optimizer, set_learning_rate
from disttrain.optim.clip import clip_scale, dist_grad_norm, scale_gradients
from disttrain.optim.loss_scale import LossScale

__all__ = ["LossScale", "build_optimizer", "clip_scale", "dist_grad_norm", "scale_gradients", "set_learning_rate"]
