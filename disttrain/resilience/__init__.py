"""Requests to stop."""

from disttrain.resilience.signals import StopRequest

__all__ = ["StopRequest"]
