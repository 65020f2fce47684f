"""Optimizers compared by a method with rules: one ground for all, equal searches, seeds and intervals. No torch."""
