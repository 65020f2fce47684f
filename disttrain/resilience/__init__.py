"""How a run looks after itself: requests to stop, and ranks that hang."""

from disttrain.resilience.hang import lost_peers
from disttrain.resilience.restarts import RestartBudget
from disttrain.resilience.signals import STOP_SIGNALS, StopRequest
from disttrain.resilience.watchdog import Watchdog

__all__ = ["STOP_SIGNALS", "RestartBudget", "StopRequest", "Watchdog", "lost_peers"]
