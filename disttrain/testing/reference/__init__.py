"""Naive single-process references: slow, plain formulas that the fast paths are tested against."""

from disttrain.testing.reference.gpt import reference_logits
from disttrain.testing.reference.optimizers import ReferenceOptimizer, reference_clip
from disttrain.testing.reference.training import ReferenceStep, reference_training

__all__ = ["ReferenceOptimizer", "ReferenceStep", "reference_clip", "reference_logits", "reference_training"]
