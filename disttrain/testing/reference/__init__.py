"""Naive single-process references: slow, plain formulas that the fast paths are tested against."""

from disttrain.testing.reference.clipping import ReferenceClipper, reference_qk_clip
from disttrain.testing.reference.gpt import reference_logits
from disttrain.testing.reference.optimizers import ReferenceOptimizer
from disttrain.testing.reference.training import ReferenceStep, reference_training

__all__ = [
    "ReferenceClipper",
    "ReferenceOptimizer",
    "ReferenceStep",
    "reference_logits",
    "reference_qk_clip",
    "reference_training",
]
