"""Parallelism, applied to a model from outside."""

from disttrain.parallel.grad_sync import SyncRules, drop_gradients, parameters_will_change, set_gradient_sync
from disttrain.parallel.noise_probe import NoiseProbe, is_blind
from disttrain.parallel.parallelize import parallelize
from disttrain.parallel.precision import device_notes

__all__ = [
    "NoiseProbe",
    "SyncRules",
    "device_notes",
    "drop_gradients",
    "is_blind",
    "parallelize",
    "parameters_will_change",
    "set_gradient_sync",
]
