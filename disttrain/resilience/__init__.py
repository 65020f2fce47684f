"""Requests to stop."""

from disttrain.resilience.signals import STOP_SIGNALS, StopRequest

__all__ = ["STOP_SIGNALS", "StopRequest"]
